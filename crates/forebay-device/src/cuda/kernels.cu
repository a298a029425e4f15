// What is done to a page's bytes on the GPU. `make kernels` compiles this file to kernels.ptx, which is committed.
//
// Every result is defined bit for bit, and the host backend (host/transform.rs) computes the same: sums are in float32 with
// fused multiply-adds in ascending order of rank, and rounded to nearest even, a NaN to the one quiet NaN below.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Elements, as Element in transform.rs numbers them; a tag type for each.
struct F32 { typedef float Raw; };
struct F16 { typedef u16 Raw; };
struct Bf16 { typedef u16 Raw; };
struct F8E4m3 { typedef u8 Raw; };
struct F8E5m2 { typedef u8 Raw; };

__device__ __forceinline__ float half_to_float(u16 raw) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(raw));
  return value;
}

__device__ __forceinline__ float load(F32, float raw) { return raw; }
__device__ __forceinline__ float load(F16, u16 raw) { return half_to_float(raw); }
__device__ __forceinline__ float load(Bf16, u16 raw) { return __uint_as_float((u32)raw << 16); }
__device__ __forceinline__ float load(F8E5m2, u8 raw) { return half_to_float((u16)((u32)raw << 8)); }
__device__ __forceinline__ float load(F8E4m3, u8 raw) {
  u32 sign = (u32)(raw & 0x80) << 24, rest = raw & 0x7f;
  if (rest == 0x7f) return __uint_as_float(sign | 0x7fc00000u);
  // The exponent's bias is 7 in place of 127; exact, subnormal numbers included.
  return __fmul_rn(__uint_as_float(sign | rest << 20), 0x1p120f);
}

__device__ __forceinline__ float store(F32, float value) { return value != value ? __uint_as_float(0x7fc00000u) : value; }
__device__ __forceinline__ u16 store(F16, float value) {
  if (value != value) return 0x7e00;
  u16 raw;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(raw) : "f"(value));
  return raw;
}
__device__ __forceinline__ u16 store(Bf16, float value) {
  if (value != value) return 0x7fc0;
  u32 bits = __float_as_uint(value);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Two halves in a word: the nearest of two values, and sums.
__device__ __forceinline__ u32 halves_of(float low, float high) {
  u32 halves;
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
      : "=r"(halves) : "f"(low), "f"(high));
  return halves;
}
__device__ __forceinline__ u32 add_halves(u32 some, u32 others) {
  u32 sums;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(some), "r"(others));
  return sums;
}
__device__ __forceinline__ u32 multiply_halves(u32 some, u32 others) {
  u32 products;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(products) : "r"(some), "r"(others));
  return products;
}

// The two halves in a word as elements of 16 bits, rounded to nearest even.
__device__ __forceinline__ u32 halves_to(F16, u32 halves) { return halves; }
__device__ __forceinline__ u32 halves_to(Bf16, u32 halves) {
  u32 low = __float_as_uint(half_to_float((u16)halves)), high = __float_as_uint(half_to_float((u16)(halves >> 16)));
  return __byte_perm(low + 0x7fffu + (low >> 16 & 1u), high + 0x7fffu + (high >> 16 & 1u), 0x7632);
}
// The sign bit of each half that is a NaN, beside other bits.
__device__ __forceinline__ u32 nan_bits(u32 halves) { return (halves & 0x7fff7fffu) + 0x03ff03ffu; }

// N elements of a factor, `step` apart from the first, of which so many are there; others are 0. Its element at runtime: 0 float32,
// 1 float16, 2 bfloat16. All are on their way at once.
template <u32 N>
__device__ __forceinline__ void load_factor(
    float (&values)[N], const void* factor, u64 first, u64 step, u32 there, u32 kind) {
  if (kind == 0) {
#pragma unroll
    for (u32 n = 0; n < N; n++) values[n] = n < there ? ((const float*)factor)[first + n * step] : 0.0f;
    return;
  }
  u16 raw[N];
#pragma unroll
  for (u32 n = 0; n < N; n++) raw[n] = n < there ? ((const u16*)factor)[first + n * step] : 0;
#pragma unroll
  for (u32 n = 0; n < N; n++) values[n] = kind == 1 ? load(F16(), raw[n]) : load(Bf16(), raw[n]);
}

// ---- elements of eight bits: see Requantize in transform.rs

// LOWEST and HIGHEST are the halves whose neighbours in the type are as far apart as the type's mantissa says.
template <typename E> struct Eight;
template <> struct Eight<F8E4m3> {
  static constexpr int MANTISSA = 3, LEAST = -6;
  static constexpr u32 LARGEST = 0x7e, LOWEST = 0x2400, HIGHEST = 0x5f00;
};
template <> struct Eight<F8E5m2> {
  static constexpr int MANTISSA = 2, LEAST = -14;
  static constexpr u32 LARGEST = 0x7b, LOWEST = 0x0001, HIGHEST = 0x7b00;
};

// Bytes 0 and 1 of a word, or 2 and 3, as the high bytes of two halves.
__device__ __forceinline__ u32 in_high_bytes(u32 word, int half) { return __byte_perm(word, 0, half ? 0x3424 : 0x1404); }

// Two of the four elements in a word, exactly.
__device__ __forceinline__ u32 eights_to_halves(F8E5m2, u32 word, int half) { return in_high_bytes(word, half); }
__device__ __forceinline__ u32 eights_to_halves(F8E4m3, u32 word, int half) {
  u32 raw = in_high_bytes(word, half);
  // The exponent's bias is 7 in place of 15: times 256.
  u32 halves = multiply_halves((raw & 0x80008000u) | (raw & 0x7f007f00u) >> 1, 0x5c005c00u);
  u32 nans = (word & 0x7f7f7f7fu) + 0x01010101u & 0x80808080u;
  if (nans) halves |= (in_high_bytes(nans, half) >> 15) * 0x7e00u;
  return halves;
}

// Away from zero where the distance from the nearer neighbour says so together with the random byte.
template <typename E>
__device__ __forceinline__ u32 round_at_random(float value, u32 random) {
  constexpr int MANTISSA = Eight<E>::MANTISSA, LEAST = Eight<E>::LEAST;
  u32 bits = __float_as_uint(value) & 0x7fffffffu, sign = __float_as_uint(value) >> 24 & 0x80u;
  int exponent = max((int)(bits >> 23) - 127, LEAST);
  float in_units = __fmul_rn(__uint_as_float(bits), __uint_as_float((u32)(127 + MANTISSA - exponent) << 23));
  u32 units = (u32)__fadd_rn(in_units, __fmul_rn((float)random, 0x1p-8f));
  // The exponent's field follows the mantissa's, so what is carried over comes out right.
  u32 code = sign | min(((u32)(exponent - LEAST) << MANTISSA) + units, Eight<E>::LARGEST);
  if (bits >= 0x47800000u) code = sign | Eight<E>::LARGEST;  // 65536 and more, which none has
  if (bits > 0x7f800000u) code = 0x80u | Eight<E>::LARGEST;
  return bits == 0 ? 0 : code;
}

// The same of the four halves in two words. Between LOWEST and HIGHEST a half's bits with another bias are the code in 256ths, to
// which the random byte is added as it is.
template <typename E>
__device__ __forceinline__ u32 round_at_random(u32 low, u32 high, u32 random) {
  constexpr u32 BOTH = 0x10001u, MANTISSA = Eight<E>::MANTISSA, BIAS = MANTISSA == 3 ? 8 << 11 : 0;
  u32 sums[2], others = 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 magnitudes = (half ? high : low) & 0x7fff7fffu;
    others |= magnitudes + (0x7fffu - Eight<E>::HIGHEST) * BOTH | ~((magnitudes | 0x80008000u) - Eight<E>::LOWEST * BOTH);
    sums[half] = (magnitudes << (MANTISSA - 2)) - BIAS * BOTH + (in_high_bytes(random, half) >> 8);
  }
  u32 codes = __byte_perm(sums[0], sums[1], 0x7531) | (__byte_perm(low, high, 0x7531) & 0x80808080u);
  if (others & 0x80008000u) {
    codes = 0;
#pragma unroll 1
    for (int v = 0; v < 4; v++) {
      float value = half_to_float((u16)((v / 2 ? high : low) >> v % 2 * 16));
      codes |= round_at_random<E>(value, random >> v * 8 & 0xffu) << v * 8;
    }
  }
  return codes;
}

// A tile of ROWS x COLUMNS elements at a time. A thread holds EACH rows of V neighbouring elements. Factors pass through shared
// memory, DEPTH ranks at a time; where there are no more, `down` stays there for all tiles of a block.
constexpr u32 THREADS = 256, EACH = 4, ROWS = THREADS / 32 * EACH, DEPTH = 32;

template <int V>
struct alignas(V * 4) Floats { float of[V]; };

// What else there is for elements of eight bits.
struct Eights {
  const u8* from;
  const u8* random;
  const float* times;
  u32* largest;
};

// V neighbouring elements as they are loaded and stored. Elements of 16 bits stay in 32-bit words, for each alone would
// take a register.
template <typename E, int V>
struct alignas(V * sizeof(typename E::Raw)) Pack {
  typename E::Raw of[V];
  __device__ __forceinline__ float get(int v) const { return load(E(), of[v]); }
  __device__ __forceinline__ void set(int v, float value) { of[v] = store(E(), value); }
};
template <typename E>
struct alignas(16) Pack<E, 8> {
  u32 words[4];
  __device__ __forceinline__ float get(int v) const { return load(E(), (u16)(words[v / 2] >> v % 2 * 16)); }
  __device__ __forceinline__ void set(int v, float value) {
    u32 raw = store(E(), value);
    words[v / 2] = v % 2 ? (words[v / 2] & 0xffffu) | raw << 16 : (words[v / 2] & 0xffff0000u) | raw;
  }
};

// V elements between two terms: floats, or halves, two of them in a word.
template <int V, bool HALFS>
struct Between {
  float of[V];
  __device__ __forceinline__ float get(int v) const { return of[v]; }
  __device__ __forceinline__ void set(const float (&values)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) of[v] = values[v];
  }
  __device__ __forceinline__ void add(const float (&values)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) of[v] = __fadd_rn(of[v], values[v]);
  }
  // The bits of the largest magnitude, as a float.
  __device__ __forceinline__ u32 largest() const {
    u32 found = 0;
#pragma unroll
    for (int v = 0; v < V; v++) found = max(found, __float_as_uint(of[v]) & 0x7fffffffu);
    return found;
  }
  template <typename E>
  __device__ __forceinline__ u32 round_at_random(int first, u32 random) const {
    u32 codes = 0;
#pragma unroll
    for (int v = 0; v < 4; v++) codes |= ::round_at_random<E>(of[first + v], random >> v * 8 & 0xffu) << v * 8;
    return codes;
  }
};
template <int V>
struct Between<V, true> {
  u32 words[(V + 1) / 2];
  static __device__ __forceinline__ u32 word_of(const float (&values)[V], int w) {
    return halves_of(values[w * 2], w * 2 + 1 < V ? values[w * 2 + 1] : 0.0f);
  }
  __device__ __forceinline__ float get(int v) const { return half_to_float((u16)(words[v / 2] >> v % 2 * 16)); }
  __device__ __forceinline__ void set(const float (&values)[V]) {
#pragma unroll
    for (int w = 0; w < (V + 1) / 2; w++) words[w] = word_of(values, w);
  }
  // A sum of two halves is rounded to a half alike from its exact value and from the nearest float.
  __device__ __forceinline__ void add(const float (&values)[V]) {
#pragma unroll
    for (int w = 0; w < (V + 1) / 2; w++) words[w] = add_halves(words[w], word_of(values, w));
  }
  __device__ __forceinline__ u32 largest() const {
    u32 found = 0;
#pragma unroll
    for (int w = 0; w < (V + 1) / 2; w++) found = max(found, max(words[w] & 0x7fffu, words[w] >> 16 & 0x7fffu));
    return __float_as_uint(half_to_float((u16)found)) & 0x7fffffffu;
  }
  template <typename E>
  __device__ __forceinline__ u32 round_at_random(int first, u32 random) const {
    return ::round_at_random<E>(words[first / 2], words[first / 2 + 1], random);
  }
};

// What comes of the elements between.
template <typename E, int V, bool HALFS>
__device__ __forceinline__ void store_all(Pack<E, V>& pack, const Between<V, HALFS>& between) {
#pragma unroll
  for (int v = 0; v < V; v++) pack.set(v, between.get(v));
}
template <typename E>
__device__ __forceinline__ void store_all(Pack<E, 8>& pack, const Between<8, true>& between) {
  u32 nans = 0;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    pack.words[w] = halves_to(E(), between.words[w]);
    nans |= nan_bits(between.words[w]);
  }
  if (nans & 0x80008000u) {
#pragma unroll
    for (int v = 0; v < 8; v++) pack.set(v, between.get(v));
  }
}

template <typename E>
struct alignas(8) EightBits {
  u32 words[2];
  __device__ __forceinline__ float get(int v) const {
    return half_to_float((u16)(eights_to_halves(E(), words[v / 4], v % 4 / 2) >> v % 2 * 16));
  }
  template <bool HALFS>
  __device__ __forceinline__ void round_at_random(const Between<8, HALFS>& values, const EightBits& random) {
#pragma unroll
    for (int w = 0; w < 2; w++) words[w] = values.template round_at_random<E>(w * 4, random.words[w]);
  }
};
template <> struct Pack<F8E4m3, 8> : EightBits<F8E4m3> {};
template <> struct Pack<F8E5m2, 8> : EightBits<F8E5m2> {};

// weight[i, j] = round(weight[i, j] + sum_k (scale[k] * up[i, k]) * down[k, j]) for the elements [first, first + count) of
// the row-major weight; `page` is the address of element `first`. Row 0 of `up` belongs to row `row_base` of the weight.
//
// With IN_TERMS the ranks up to ends[0], ends[1], ... are terms: weight[i, j] is rounded to a half with HALFS, and each term does
// w = half(w + half(scale[term] * sum_k up[i, k] * down[k, j])), and at last w = half(w * by[0]) if there is one.
//
// Elements of eight bits are read from `eights.from`, times a number, and rounded by the bytes of `eights.random`, of which each may
// be where `page` is; or none is written, and the largest magnitude is found.
template <typename E, int V, bool IN_TERMS, bool HALFS>
__device__ __forceinline__ void add_low_rank(
    typename E::Raw* page, u64 first, u64 count, u32 columns, const void* up, const void* down, const float* scale,
    u32 rank, u32 row_base, u32 kind, const u32* ends, u32 terms, const float* by, Eights eights) {
  constexpr bool EIGHT = sizeof(typename E::Raw) == 1;
  // What a thread takes from shared memory at once: 16 bytes, beside those of its neighbours.
  constexpr int W = V < 4 ? V : 4;
  constexpr u32 COLUMNS = 32 * V;
  __shared__ Floats<EACH> ups[DEPTH][ROWS / EACH];
  __shared__ Floats<W> downs[DEPTH][V / W][32];
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 first_row = first / columns, last_row = (first + count - 1) / columns;
  u32 tile_column = blockIdx.y * COLUMNS;
  u32 column = tile_column + lane * V;
  bool stays = rank <= DEPTH;
  float times_first = EIGHT && eights.times ? *eights.times : 1.0f;
  u32 largest = 0;
  // Neighbouring tiles for each block: rows far apart, in memory that was just mapped, slow copies into the next pages down.
  u64 tile_rows = (last_row - first_row) / ROWS + 1;
  u64 begin_row = first_row + tile_rows * blockIdx.x / gridDim.x * ROWS;
  u64 end_row = first_row + tile_rows * (blockIdx.x + 1) / gridDim.x * ROWS;
#pragma unroll 1
  for (u64 tile_row = begin_row; tile_row < end_row; tile_row += ROWS) {
    bool is_first = tile_row == begin_row;
    // Where this thread's elements begin, counted from `page`: before it for a row that began on the page before.
    long long at = (long long)((tile_row + warp * EACH) * columns + column) - (long long)first;
    Pack<E, V> raw[EACH] = {};
    bool mine[EACH];
    const typename E::Raw* from = EIGHT ? (const typename E::Raw*)eights.from : page;
#pragma unroll
    for (u32 r = 0; r < EACH; r++) {
      long long begin = at + (long long)r * columns;
      mine[r] = column < columns && begin >= 0 && begin < (long long)count;
      if (mine[r]) raw[r] = *(const Pack<E, V>*)(from + begin);
    }
    // Of `down` and of `up` the ranks from `loaded` on are in shared memory.
    u32 loaded = 0, begin = 0;
    auto load_factors = [&] {
      u32 depth = min(DEPTH, rank - loaded);
      __syncthreads();
      {
        constexpr u32 STEP = THREADS / ROWS, N = DEPTH / STEP;
        u32 row = threadIdx.x / STEP, k = threadIdx.x % STEP;
        bool is_there = tile_row + row <= last_row && k < depth;
        float values[N];
        load_factor(
            values, up, (tile_row + row - row_base) * rank + loaded + k, STEP,
            is_there ? (depth - k + STEP - 1) / STEP : 0, kind);
#pragma unroll
        for (u32 n = 0; n < N; n++, k += STEP) {
          if (k >= depth) break;
          ups[k][row / EACH].of[row % EACH] = IN_TERMS ? values[n] : __fmul_rn(scale[loaded + k], values[n]);
        }
      }
      if (is_first || !stays) {
        constexpr u32 STEP = THREADS / COLUMNS, N = 8;
        u32 j = threadIdx.x % COLUMNS;
#pragma unroll 1
        for (u32 k = threadIdx.x / COLUMNS; k < depth; k += STEP * N) {
          bool is_there = tile_column + j < columns;
          float values[N];
          load_factor(
              values, down, (u64)(loaded + k) * columns + tile_column + j, (u64)STEP * columns,
              is_there ? (depth - k + STEP - 1) / STEP : 0, kind);
#pragma unroll
          for (u32 n = 0; n < N; n++)
            if (k + n * STEP < depth) downs[k + n * STEP][j % V / W][j / V].of[j % W] = values[n];
        }
      }
      __syncthreads();
    };
    // While the elements are on their way.
    load_factors();
    Between<V, HALFS> between[EACH];
    if constexpr (IN_TERMS) {
#pragma unroll
      for (u32 r = 0; r < EACH; r++) {
        float values[V];
#pragma unroll
        for (int v = 0; v < V; v++) values[v] = EIGHT ? __fmul_rn(raw[r].get(v), times_first) : raw[r].get(v);
        between[r].set(values);
      }
    }
    float sum[EACH][V];
#pragma unroll 1
    for (u32 term = 0; term < (IN_TERMS ? terms : 1); term++) {
      u32 end = IN_TERMS ? ends[term] : rank;
#pragma unroll
      for (u32 r = 0; r < EACH; r++)
#pragma unroll
        for (int v = 0; v < V; v++) sum[r][v] = 0.0f;
#pragma unroll 1
      for (u32 base = begin; base < end;) {
        if (base == loaded + DEPTH) {
          loaded = base;
          load_factors();
        }
        u32 stop = min(end, loaded + DEPTH);
        const Floats<EACH>* up_at = &ups[base - loaded][warp];
        const Floats<W>* down_at = &downs[base - loaded][0][lane];
#pragma unroll 4
        for (u32 k = base; k < stop; k++) {
          Floats<EACH> u = *up_at;
          up_at += ROWS / EACH;
#pragma unroll
          for (int w = 0; w < V / W; w++) {
            Floats<W> d = *down_at;
            down_at += 32;
#pragma unroll
            for (u32 r = 0; r < EACH; r++)
#pragma unroll
              for (int v = 0; v < W; v++) sum[r][w * W + v] = __fmaf_rn(u.of[r], d.of[v], sum[r][w * W + v]);
          }
        }
        base = stop;
      }
      if constexpr (IN_TERMS) {
        float times = scale[term];
#pragma unroll
        for (u32 r = 0; r < EACH; r++) {
#pragma unroll
          for (int v = 0; v < V; v++) sum[r][v] = __fmul_rn(times, sum[r][v]);
          between[r].add(sum[r]);
        }
      }
      begin = end;
    }
    if constexpr (EIGHT) {
      if (eights.largest) {
#pragma unroll
        for (u32 r = 0; r < EACH; r++)
          if (mine[r]) largest = max(largest, between[r].largest());
        continue;
      }
    }
    // Of all rows before any is stored, which no load could pass.
    Pack<E, V> random[EACH] = {};
    if constexpr (EIGHT) {
#pragma unroll
      for (u32 r = 0; r < EACH; r++)
        if (mine[r]) random[r] = *(const Pack<E, V>*)(eights.random + at + (long long)r * columns);
    }
    if (IN_TERMS && by) {
      float last = *by;
#pragma unroll
      for (u32 r = 0; r < EACH; r++) {
        float values[V];
#pragma unroll
        for (int v = 0; v < V; v++) values[v] = __fmul_rn(between[r].get(v), last);
        between[r].set(values);
      }
    }
#pragma unroll
    for (u32 r = 0; r < EACH; r++) {
      if (!mine[r]) continue;
      if constexpr (EIGHT) {
        raw[r].round_at_random(between[r], random[r]);
      } else if constexpr (IN_TERMS) {
        store_all<E>(raw[r], between[r]);
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) raw[r].set(v, __fadd_rn(raw[r].get(v), sum[r][v]));
      }
      *(Pack<E, V>*)(page + at + (long long)r * columns) = raw[r];
    }
  }
  if constexpr (EIGHT) {
    if (!eights.largest) return;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    // A NaN is the one quiet one.
    if (lane == 0) atomicMax(eights.largest, largest > 0x7f800000u ? 0x7fc00000u : largest);
  }
}

#define ADD_TERMS(name, E, V, HALFS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, HALFS ? 3 : 2) add_terms_##name(                                           \
      E::Raw* page, u64 first, u64 count, u32 columns, const void* up, const void* down, const float* scale, u32 rank, \
      u32 row_base, u32 kind, const u32* ends, u32 terms, const float* by) {                                           \
    add_low_rank<E, V, true, HALFS>(                                                                                   \
        page, first, count, columns, up, down, scale, rank, row_base, kind, ends, terms, by, Eights());                \
  }

#define ADD_LOW_RANK(name, E, V)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) add_low_rank_##name(                                        \
      E::Raw* page, u64 first, u64 count, u32 columns, const void* up, const void* down, const float* scale, u32 rank, \
      u32 row_base, u32 kind) {                                                                                        \
    add_low_rank<E, V, false, false>(                                                                                  \
        page, first, count, columns, up, down, scale, rank, row_base, kind, nullptr, 0, nullptr, Eights());            \
  }                                                                                                                    \
  ADD_TERMS(name##_f16, E, V, true)                                                                                    \
  ADD_TERMS(name##_f32, E, V, false)

// One for rows of whole 16-byte packs, one for others.
ADD_LOW_RANK(f32_x4, F32, 4)
ADD_LOW_RANK(f32_x1, F32, 1)
ADD_LOW_RANK(f16_x8, F16, 8)
ADD_LOW_RANK(f16_x1, F16, 1)
ADD_LOW_RANK(bf16_x8, Bf16, 8)
ADD_LOW_RANK(bf16_x1, Bf16, 1)

// Of whole packs.
#define REQUANTIZE(name, E, HALFS)                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, HALFS ? 3 : 2) requantize_##name(                                          \
      u8* to, const u8* from, const u8* random, u64 first, u64 count, const float* times, u32* largest, u32 columns,   \
      const void* up, const void* down, const float* scale, u32 rank, u32 kind, const u32* ends, u32 terms,            \
      const float* by) {                                                                                               \
    Eights eights{from, random, times, largest};                                                                       \
    add_low_rank<E, 8, true, HALFS>(                                                                                   \
        to, first, count, columns, up, down, scale, rank, 0, kind, ends, terms, by, eights);                           \
  }

REQUANTIZE(f8e4m3_f16, F8E4m3, true)
REQUANTIZE(f8e4m3_f32, F8E4m3, false)
REQUANTIZE(f8e5m2_f16, F8E5m2, true)
REQUANTIZE(f8e5m2_f32, F8E5m2, false)

// to[0] and to[1] are those of the table's row that the bits of the nearest half are the number of, without its sign.
extern "C" __global__ void __launch_bounds__(THREADS) look_up(const float* number, const float* table, float* to) {
  if (threadIdx.x < 2) to[threadIdx.x] = table[(store(F16(), *number) & 0x7fffu) * 2 + threadIdx.x];
}

// to[n] = round(from[n] * scale) for n < count. `scaled`: 0 without, 1 with scale[0], 2 with scale[row], where the first
// element is number `first` of a row-major tensor of `columns` columns. `from` may be pinned memory of the host, so a thread
// loads 16 bytes at once; `packed` says that both ends are aligned for that, and that no row ends within such a load.
template <typename From, typename To>
__device__ __forceinline__ void convert(
    typename To::Raw* to, const typename From::Raw* from, u64 first, u64 count, u64 columns, const float* scale,
    u32 scaled, u32 packed) {
  constexpr u32 N = 16 / sizeof(typename From::Raw);
  constexpr u32 ALIGN = N * sizeof(typename To::Raw) < 16 ? N * sizeof(typename To::Raw) : 16;
  struct alignas(16) Read { typename From::Raw of[N]; };
  struct alignas(ALIGN) Written { typename To::Raw of[N]; };
  u64 step = (u64)gridDim.x * blockDim.x, thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  // Without a scale the product is the element itself.
  float by = scaled == 1 ? scale[0] : 1.0f;
  u64 packs = packed ? count / N : 0;
#pragma unroll 1
  for (u64 pack = thread; pack < packs; pack += step) {
    Read read = ((const Read*)from)[pack];
    Written written;
    if (scaled == 2) by = scale[(first + pack * N) / columns];
#pragma unroll
    for (u32 n = 0; n < N; n++) {
      float value = load(From(), read.of[n]);
      written.of[n] = store(To(), __fmul_rn(value, by));
    }
    ((Written*)to)[pack] = written;
  }
#pragma unroll 1
  for (u64 n = packs * N + thread; n < count; n += step) {
    float value = load(From(), from[n]);
    if (scaled == 2) by = scale[(first + n) / columns];
    to[n] = store(To(), __fmul_rn(value, by));
  }
}

#define CONVERT(name, From, To)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) name(                                                         \
      To::Raw* to, const From::Raw* from, u64 first, u64 count, u64 columns, const float* scale, u32 scaled,          \
      u32 packed) {                                                                                                   \
    convert<From, To>(to, from, first, count, columns, scale, scaled, packed);                                        \
  }

#define CONVERT_FROM(name, From)            \
  CONVERT(convert_##name##_f32, From, F32)  \
  CONVERT(convert_##name##_f16, From, F16)  \
  CONVERT(convert_##name##_bf16, From, Bf16)

CONVERT_FROM(f32, F32)
CONVERT_FROM(f16, F16)
CONVERT_FROM(bf16, Bf16)
CONVERT_FROM(f8e4m3, F8E4m3)
CONVERT_FROM(f8e5m2, F8E5m2)

// ---- random bytes

// What Philox4x32-10 mixes in, two words a round.
struct Keys { u32 of[20]; };

__device__ __forceinline__ void random_words(u32 (&words)[4], const Keys& keys) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 wide0 = (u64)0xd2511f53u * words[0], wide1 = (u64)0xcd9e8d57u * words[2];
    u32 next0 = (u32)(wide1 >> 32) ^ words[1] ^ keys.of[round * 2];
    u32 next2 = (u32)(wide0 >> 32) ^ words[3] ^ keys.of[round * 2 + 1];
    words[0] = next0, words[1] = (u32)wide1, words[2] = next2, words[3] = (u32)wide0;
  }
}

// The bytes r(n) of Requantize in transform.rs, from number `first` on. A thread draws for eight neighbouring threads of the
// generator, and has the four times eight bytes of their words.
extern "C" __global__ void __launch_bounds__(THREADS) random_bytes(
    u8* to, u64 first, u64 count, const Keys keys, u64 threads) {
  u64 thread = ((u64)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (thread >= threads) return;
  u32 turn = (u32)(first / (4 * threads)) + blockIdx.y;
  u64 base = (u64)turn * 4 * threads + thread;
  struct alignas(8) { u32 of[2]; } bytes[4];
#pragma unroll
  for (int v = 0; v < 8; v++) {
    u32 words[4] = {turn, 0, (u32)(thread + v), (u32)((thread + v) >> 32)};
    random_words(words, keys);
    // The low byte of each becomes byte v % 4, beside those before.
    constexpr u32 BESIDE[4] = {0x3214, 0x3240, 0x3410, 0x4210};
#pragma unroll
    for (int word = 0; word < 4; word++)
      bytes[word].of[v / 4] = __byte_perm(v % 4 ? bytes[word].of[v / 4] : 0, words[word], BESIDE[v % 4]);
  }
#pragma unroll
  for (int word = 0; word < 4; word++) {
    u64 n = base + word * threads;
    if (n >= first && n < first + count) *(u64*)(to + (n - first)) = (u64)bytes[word].of[1] << 32 | bytes[word].of[0];
  }
}

// How long a copy of another stream's waits while one stream copies to the GPU without a pause, and what lets it in.
//
//     nvcc -O2 -std=c++17 -arch=sm_90 -o /tmp/starve bench/starve.cu -lcuda && /tmp/starve [PART OF A NAME]
//
// A thread keeps so many copies of such a size in its stream, for 0.4 s. Meanwhile another thread copies 1 MiB from pageable and
// from pinned memory, and 16 KiB, one after the other, and rests 5 ms: ten times, if it gets so far. A line is a way: the rate of the
// stream, and the mean and the longest of each of these copies in ms. "busy" 0: the GPU does nothing else; 1: short blocks
// of kernels on all processors; 2: blocks of a millisecond that leave no room for others.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include <cuda.h>
#include <cuda_runtime.h>

#define CHECK(call)                                                    \
  do {                                                                 \
    auto code = (call);                                                \
    if (int(code) != 0) {                                              \
      printf("%s gave %d, line %d\n", #call, int(code), __LINE__);     \
      exit(1);                                                         \
    }                                                                  \
  } while (0)

using Clock = std::chrono::steady_clock;

static double ms(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

__global__ void spin(int cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

enum Kind { PLAIN, LOW_PRIORITY, PING_PONG, MEMSET, KERNEL, DRAIN, BACK };

struct Way {
  const char* name;
  Kind kind;
  size_t chunk;
  int outstanding;
  size_t every;
};

constexpr size_t MIB = 1 << 20, RING = 64 * MIB, SMALL = 4 * MIB, CHUNK = 5 * MIB / 2;
constexpr int EVENTS = 64;

static const Way WAYS[] = {
    {"plain 2.5M x24", PLAIN, CHUNK, 24, 0},
    {"plain low priority", LOW_PRIORITY, CHUNK, 24, 0},
    {"ping-pong /32M", PING_PONG, CHUNK, 24, 32 * MIB},
    {"ping-pong /128M", PING_PONG, CHUNK, 24, 128 * MIB},
    {"memset /32M", MEMSET, CHUNK, 24, 32 * MIB},
    {"memset /128M", MEMSET, CHUNK, 24, 128 * MIB},
    {"kernel /128M", KERNEL, CHUNK, 24, 128 * MIB},
    {"drain /128M", DRAIN, CHUNK, 24, 128 * MIB},
    {"drain /512M", DRAIN, CHUNK, 24, 512 * MIB},
    {"4 B back /4M", BACK, CHUNK, 24, 4 * MIB},
    {"4 B back /8M", BACK, CHUNK, 24, 8 * MIB},
    {"4 B back /16M", BACK, CHUNK, 24, 16 * MIB},
    {"4 B back /32M", BACK, CHUNK, 24, 32 * MIB},
    {"4 B back /128M", BACK, CHUNK, 24, 128 * MIB},
    {"4 B back /384M", BACK, CHUNK, 24, 384 * MIB},
    {"plain 32M x2", PLAIN, 32 * MIB, 2, 0},
    {"ping-pong 32M x2 /32M", PING_PONG, 32 * MIB, 2, 32 * MIB},
    {"memset 32M x2 /32M", MEMSET, 32 * MIB, 2, 32 * MIB},
    {"memset 32M x2 /128M", MEMSET, 32 * MIB, 2, 128 * MIB},
    {"4 B back 32M x2 /32M", BACK, 32 * MIB, 2, 32 * MIB},
    {"plain 2.5M x4", PLAIN, CHUNK, 4, 0},
};

int main(int arguments, char** argument) {
  cudaFree(0);
  CUcontext context;
  CHECK(cuCtxGetCurrent(&context));
  void *ring, *pinned;
  CHECK(cuMemHostAlloc(&ring, RING, 0));
  CHECK(cuMemHostAlloc(&pinned, SMALL, 0));
  CUdeviceptr target, word, small;
  CHECK(cuMemAlloc(&target, RING));
  CHECK(cuMemAlloc(&word, 4096));
  CHECK(cuMemAlloc(&small, SMALL));
  char* pageable = (char*)malloc(SMALL);
  memset(pageable, 1, SMALL);
  int lowest, highest;
  CHECK(cuCtxGetStreamPriorityRange(&lowest, &highest));
  CUstream copies, low, other, application;
  CHECK(cuStreamCreateWithPriority(&copies, CU_STREAM_NON_BLOCKING, highest));
  CHECK(cuStreamCreateWithPriority(&low, CU_STREAM_NON_BLOCKING, lowest));
  CHECK(cuStreamCreateWithPriority(&other, CU_STREAM_NON_BLOCKING, highest));
  CHECK(cuStreamCreateWithPriority(&application, CU_STREAM_NON_BLOCKING, lowest));
  std::vector<CUevent> copied(EVENTS);
  for (auto& event : copied) CHECK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC));
  CUevent ping, pong;
  CHECK(cuEventCreate(&ping, CU_EVENT_DISABLE_TIMING));
  CHECK(cuEventCreate(&pong, CU_EVENT_DISABLE_TIMING));

  for (int busy = 0; busy < 3; busy++) {
    for (const Way& way : WAYS) {
      if (arguments > 1 && !strstr(way.name, argument[1])) continue;
      std::atomic<bool> stop{false}, done{false};
      std::atomic<size_t> bytes{0};
      CUstream stream = way.kind == LOW_PRIORITY ? low : copies;
      std::thread computing([&] {
        cuCtxSetCurrent(context);
        cudaStream_t kernels;
        cudaStreamCreateWithFlags(&kernels, cudaStreamNonBlocking);
        while (busy && !stop) {
          for (int i = 0; i < 20; i++) {
            if (busy == 2)
              spin<<<264, 1024, 0, kernels>>>(2000000);
            else
              spin<<<1000, 256, 0, kernels>>>(20000);
          }
          cudaStreamSynchronize(kernels);
        }
        cudaStreamDestroy(kernels);
      });
      std::thread copying([&] {
        cuCtxSetCurrent(context);
        size_t in_a_row = 0;
        for (long i = 0; !stop; i++) {
          if (i >= way.outstanding) CHECK(cuEventSynchronize(copied[(i - way.outstanding) % EVENTS]));
          size_t at = i * way.chunk % (RING - way.chunk);
          CHECK(cuMemcpyHtoDAsync(target + at, (char*)ring + at, way.chunk, stream));
          CHECK(cuEventRecord(copied[i % EVENTS], stream));
          bytes += way.chunk;
          in_a_row += way.chunk;
          if (!way.every || in_a_row < way.every) continue;
          in_a_row = 0;
          switch (way.kind) {
            case PING_PONG:
              CHECK(cuEventRecord(ping, stream));
              CHECK(cuStreamWaitEvent(other, ping, 0));
              CHECK(cuEventRecord(pong, other));
              CHECK(cuStreamWaitEvent(stream, pong, 0));
              break;
            case MEMSET: CHECK(cuMemsetD32Async(word, 0, 1, stream)); break;
            case KERNEL: spin<<<1, 32, 0, (cudaStream_t)stream>>>(1000); break;
            case DRAIN: CHECK(cuEventSynchronize(copied[i % EVENTS])); break;
            case BACK: CHECK(cuMemcpyDtoHAsync(pinned, target, 4, stream)); break;
            default: break;
          }
        }
        CHECK(cuStreamSynchronize(stream));
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      std::thread ending([&] {
        for (int i = 0; i < 40 && !done; i++) std::this_thread::sleep_for(std::chrono::milliseconds(10));
        stop = true;
      });
      double sum[3] = {0, 0, 0}, longest[3] = {0, 0, 0};
      auto timed = [&](int which, const std::function<void()>& copy) {
        auto from = Clock::now();
        copy();
        double took = ms(from, Clock::now());
        sum[which] += took;
        if (took > longest[which]) longest[which] = took;
      };
      auto from = Clock::now();
      size_t before = bytes;
      int times = 0;
      while (!stop && times < 10) {
        timed(0, [&] {
          cudaMemcpyAsync((void*)small, pageable, MIB, cudaMemcpyHostToDevice, 0);
          cudaStreamSynchronize(0);
        });
        timed(1, [&] {
          cuMemcpyHtoDAsync(small, pinned, MIB, application);
          cuStreamSynchronize(application);
        });
        timed(2, [&] {
          cuMemcpyHtoDAsync(small, pinned, 16 << 10, application);
          cuStreamSynchronize(application);
        });
        times++;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      double took = ms(from, Clock::now());
      size_t moved = bytes - before;
      done = true;
      ending.join();
      copying.join();
      computing.join();
      printf(
          "busy %d %-24s %5.1f GB/s | pageable 1M %7.2f (%7.2f) pinned 1M %7.2f (%7.2f) pinned 16K %7.2f (%7.2f) ms, n %d\n",
          busy, way.name, moved / took / 1e6, sum[0] / times, longest[0], sum[1] / times, longest[1], sum[2] / times,
          longest[2], times);
      fflush(stdout);
    }
  }
}

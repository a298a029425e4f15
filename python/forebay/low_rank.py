"""Products of low rank as torch adds them: one after another, each rounded to the dtype that it computes in.

:meth:`forebay.Attachment.set_loras` rounds once, which is more exact. Here the result is that of a computation in torch, bit
for bit, and the device has it for nothing while a page is filled.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from forebay import streams
from forebay._forebay import Engine
from forebay.converting import USED, dtype_name

Product = tuple[int, int, int, int, int, str, int, tuple[str, int, int, int] | None]
"""A product as the engine takes it."""

Patch = tuple[
    str,
    int,
    list[Product],
    object,
    Callable[[], tuple[int, int, object]] | None,
    tuple[int, int, int, int, int] | None,
]
"""A patch as the engine takes it."""

Placed = tuple[torch.Tensor, Product]
"""A patch on a device: the memory that its factors lie in, and the product."""

Shape = tuple[int, int, int]
"""Rows, columns and rank of a product."""

_ALIGN = 16
_COPIED_AT_ONCE = 8 << 20
_SCRATCH = 32 << 20
"""Bytes that are compared at once."""

_known: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A patch for :meth:`forebay.Attachment.set_patch` that the device adds itself. Called with a weight it computes:

    .. code-block:: python

        value = weight.to(through)
        for up, down, scale in terms:
            product = torch.mm(up.float().flatten(1), down.float().flatten(1))
            value += (scale * product.reshape(value.shape)).to(through)
        return value.to(weight.dtype)

    The device sums a product in ascending order of rank with fused multiply-adds; :func:`sums_as_torch` tells where
    ``torch.mm`` does.

    Attributes:
        terms: Rows x rank, rank x columns and a number, one after another. Dimensions after the first are flattened.
        through: The dtype of all between, float16 or float32.
    """

    terms: Sequence[tuple[torch.Tensor, torch.Tensor, float]]
    through: torch.dtype

    def __post_init__(self) -> None:
        if self.through not in (torch.float16, torch.float32):
            raise ValueError(f"is computed in float16 or float32: {self.through}")
        of = {self._shape(up, down) for up, down, _ in self.terms}
        if len(of) != 1 or None in of:
            shapes = [(tuple(up.shape), tuple(down.shape)) for up, down, _ in self.terms]
            raise ValueError(f"are no products of one shape: {shapes}")
        for *_, scale in self.terms:
            if torch.finfo(torch.float32).max < abs(scale) < float("inf"):
                raise ValueError(f"is multiplied with no float32: {scale}")

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The patched weight, in new memory."""
        value = weight.to(self.through, copy=True)
        for factors in self.terms:
            up, down = (factor.to(weight.device, torch.float32).flatten(1) for factor in factors[:2])
            value += (factors[2] * torch.mm(up, down).reshape(value.shape)).to(self.through)
        return value.to(weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the products."""
        up, down, _ = self.terms[0]
        return up.shape[0], down.shape[1:].numel()

    @property
    def ranks(self) -> list[int]:
        """The rank of each product."""
        return [down.shape[0] for _, down, _ in self.terms]

    @property
    def shapes(self) -> set[Shape]:
        """Of the products."""
        return {(*self.shape, rank) for rank in self.ranks}

    def _packed(self, device: torch.device) -> _Packed:
        """All that a device needs to add the products, where it can be joined without copying between devices."""
        rank, count = sum(self.ranks), len(self.terms)
        dtype = joined_dtype(factor for factors in self.terms for factor in factors[:2])
        ends = itertools.accumulate(self.ranks)
        numbers = struct.pack(f"{count}f{count}i", *(scale for _, _, scale in self.terms), *ends)
        sources = {factor.device.type for factors in self.terms for factor in factors[:2]}
        joined_on = torch.device("cpu") if sources == {"cpu"} else device
        ups = [up.detach().flatten(1).to(joined_on, dtype) for up, _, _ in self.terms]
        downs = [down.detach().flatten(1).to(joined_on, dtype) for _, down, _ in self.terms]
        last = torch.frombuffer(bytearray(numbers), dtype=torch.uint8).to(joined_on)
        parts = [_bytes_of(_joined(ups, 1)), _bytes_of(_joined(downs, 0)), last]
        starts = [0, *itertools.accumulate(-(-part.numel() // _ALIGN) * _ALIGN for part in parts)]
        return _Packed(parts, starts, self.shape[0], rank, dtype_name(dtype), dtype_name(self.through), count)

    @staticmethod
    def _shape(up: torch.Tensor, down: torch.Tensor) -> tuple[int, int] | None:
        """Rows and columns of a product, if there is one."""
        if up.ndim < 2 or down.ndim < 2 or up.shape[1:].numel() != down.shape[0]:
            return None
        return up.shape[0], down.shape[1:].numel()


@dataclass(frozen=True, eq=False)
class _Packed:
    """The factors of products, which are to lie behind one another in memory.

    Attributes:
        parts: The bytes of the factors of rows, of those of columns and of the numbers.
        starts: Where each of these begins, and where all of it ends.
    """

    parts: list[torch.Tensor]
    starts: list[int]
    rows: int
    rank: int
    dtype: str
    through: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.starts[-1]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def product(self, address: int) -> Product:
        """What it is for the engine where its bytes lie at an address."""
        up_at, down_at, scale_at = (address + start for start in self.starts[:-1])
        each = (self.through, self.count, scale_at + 4 * self.count, 0)
        return (0, self.rows, up_at, down_at, scale_at, self.dtype, self.rank, each)


def to_device(patches: Iterable[LowRank], device: torch.device) -> list[Placed]:
    """Takes patches to a device, in the current stream: of each the memory that its factors lie in, and the product for the engine.

    Some hundred weights change at once. Beside weights on their way to the device every copy waits for its turn, so it is some MiB
    that are copied at a time, from pinned memory, which nobody waits for. Patches that were copied together share their memory.
    """
    placed: list[Placed] = []
    together: list[_Packed] = []
    through = _Through(device)
    for patch in patches:
        packed = patch._packed(device)
        nbytes = sum(one.nbytes for one in together) + packed.nbytes
        if together and (packed.device != together[0].device or nbytes > _COPIED_AT_ONCE):
            placed += _copied(together, through)
            together = []
        together.append(packed)
    return placed + _copied(together, through)


def _copied(together: list[_Packed], through: _Through) -> list[Placed]:
    if not together:
        return []
    sizes = [one.nbytes for one in together]
    places = itertools.accumulate(sizes, initial=0)
    parts = [
        (place + start, part)
        for place, one in zip(places, together, strict=False)
        for start, part in zip(one.starts, one.parts, strict=False)
    ]
    pieces = through.copied(parts, sum(sizes)).split_with_sizes(sizes)
    return [(piece, one.product(piece.data_ptr())) for piece, one in zip(pieces, together, strict=True)]


_Parts = Sequence[tuple[int, torch.Tensor]]
"""Bytes, each with where they begin in the memory that they are joined in."""


class _Through:
    """Pinned memory in which bytes are joined on their way to a device: while some are copied, the next ones are joined.

    They are joined by this thread alone. Torch shares that out among threads, for each of which it waits: beside the readers of a
    model's weights a hundred times as long as copying takes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = itertools.cycle([_Slot(device), _Slot(device)])

    def copied(self, parts: _Parts, nbytes: int) -> torch.Tensor:
        """Bytes that are all on the host or all on the device, joined there, in memory of their own."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if parts[0][1].device.type != "cpu":
            for at, part in parts:
                memory[at : at + part.numel()].copy_(part)
            return memory
        for begin in range(0, nbytes, _COPIED_AT_ONCE):
            piece = memory[begin : begin + _COPIED_AT_ONCE]
            if self._device.type == "cpu":
                _join(parts, begin, piece)
            else:
                next(self._slots).copy(parts, begin, piece)
        return memory


class _Slot:
    """A piece of pinned memory, taken when it is used first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.Tensor | None = None
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, parts: _Parts, begin: int, to: torch.Tensor) -> None:
        """Copies what lies in one piece of the memory of these parts, in the current stream."""
        if self._memory is None:
            self._memory = torch.empty(_COPIED_AT_ONCE, dtype=torch.uint8, pin_memory=True)
        else:
            self._copied.synchronize()
        joined = self._memory[: to.numel()]
        _join(parts, begin, joined)
        to.copy_(joined, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._device))


def _join(parts: _Parts, begin: int, memory: torch.Tensor) -> None:
    """Writes what lies in one piece of the memory of these parts to memory of the host."""
    end = begin + memory.numel()
    for at, part in parts:
        first, last = max(at, begin), min(at + part.numel(), end)
        if first < last:
            ctypes.memmove(memory.data_ptr() + first - begin, part.data_ptr() + first - at, last - first)


def _joined(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def multiplied(product: Product, address: int) -> Product:
    """A product of :func:`to_device`, behind which everything is multiplied with the float32 at an address."""
    each = product[-1]
    assert each is not None
    return (*product[:-1], (*each[:-1], address))


def joined_dtype(factors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype in which factors are joined to those of one product: their own, where the device computes with it."""
    dtypes = {factor.dtype for factor in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return dtype if dtype in USED else torch.float32


def sums_as_torch(engine: Engine, device: torch.device, shapes: Iterable[Shape]) -> dict[Shape, bool]:
    """Of which shapes ``torch.mm`` in float32 gives the bits that the engine's device gives.

    Each is tried once, with random factors. The device is waited for once, for all that are new: they are tried while a model's
    weights are on their way to it, whose copies everything that is copied would wait for.
    """
    shapes = set(shapes)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set for a backend alone, to other than float32's own.
        return dict.fromkeys(shapes, False)
    keys = {shape: (str(device), *shape, precision) for shape in shapes}
    new = [shape for shape, key in keys.items() if key not in _known]
    if new:
        with torch.inference_mode(False), torch.no_grad():
            different = torch.stack([_is_different(engine, device, *shape) for shape in new]).tolist()
        _known.update((keys[shape], not one) for shape, one in zip(new, different, strict=True))
    return {shape: _known[key] for shape, key in keys.items()}


def _is_different(engine: Engine, device: torch.device, rows: int, columns: int, rank: int) -> torch.Tensor:
    """Whether any bit of a product is, as a number on the device."""
    generator = torch.Generator(device).manual_seed(rank)
    up = torch.randn(rows, rank, generator=generator, device=device)
    down = torch.randn(rank, columns, generator=generator, device=device)
    # A zero has a sign, which not all sums begin with.
    up[0] = 0.0
    expected = torch.mm(up, down)
    ones = torch.ones(1, device=device)
    ends = torch.full((1,), rank, dtype=torch.int32, device=device)
    stream = streams.current(device)
    different = torch.zeros((), dtype=torch.bool, device=device)
    step = max(1, _SCRATCH // (4 * columns))
    for first in range(0, rows, step):
        part = expected[first : first + step]
        sums = torch.zeros_like(part)
        addresses = (up[first:].data_ptr(), down.data_ptr(), ones.data_ptr())
        each = ("float32", 1, ends.data_ptr(), 0)
        product = (first, first + len(part), *addresses, "float32", rank, each)
        engine.add_product(sums.data_ptr(), "float32", columns, product, stream)
        different |= (sums.view(torch.int32) != part.view(torch.int32)).any()
    return different

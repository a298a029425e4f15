"""VBARs whose pages the application fills itself: fault, fill, use, unpin.

For applications with their own layers::

    vbar = forebay.Vbar(10 << 30, device="cuda")
    place = vbar.alloc(weight.nbytes)
    ...
    now = forebay.fault(place)
    if now is None:
        ...                                     # above the watermark: use something else
    else:
        tensor = place.tensor(weight.dtype, weight.shape)
        if now != before:                       # the contents were lost: fill them again
            tensor.copy_(weight)
            before = now
        use(tensor)
        forebay.unpin(place)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from forebay import streams
from forebay._forebay import Engine, ExplicitVbar
from forebay.engines import engine as engine_of
from forebay.lending import plain_tensor

Signature = tuple[int, ...]
"""The serials of an allocation's pages at fault time. Equal signatures mean equal contents."""


class Vbar:
    """A reserved range of device addresses. It costs no memory; what is faulted in has memory behind it."""

    def __init__(
        self, nbytes: float, device: str | torch.device | Engine | None = None, *, name: str = "vbar"
    ) -> None:
        """Reserves a range.

        Args:
            nbytes: Bytes of the range; may be many times the device's memory.
            device: As for :func:`forebay.engine`.
            name: Its name in reports.

        Raises:
            ValueError: For a size of zero or beyond the address space.
            DeviceError: Where the device is missing.
        """
        self._engine = engine_of(device)
        self._vbar: ExplicitVbar = self._engine.vbar(name, nbytes)

    def alloc(self, nbytes: float) -> Allocation:
        """The next bytes of the range, aligned to 512. There is no free but the range's end.

        Raises:
            ValueError: Past the end of the range.
        """
        address = self._vbar.alloc(nbytes)
        return Allocation(self, address, int(nbytes))

    def prioritize(self) -> None:
        """To the top of the priorities, with the watermark fully open."""
        self._vbar.prioritize()

    def deprioritize(self) -> None:
        """To the bottom of the priorities."""
        self._vbar.deprioritize()

    def set_watermark(self, nbytes: float) -> None:
        """Pages above leave, pinned ones when unpinned; faults there are refused until :meth:`prioritize`."""
        self._vbar.set_watermark(nbytes)

    def set_watermark_limit(self, nbytes: float) -> None:
        """Pages below are not taken by pressure until this is set to 0."""
        self._vbar.set_watermark_limit(nbytes)

    def free(self, nbytes: float) -> int:
        """Gives memory up, highest address first; returns how many bytes."""
        return self._vbar.free(nbytes)

    @property
    def watermark(self) -> int:
        """How many pages (32 MiB each) are below the watermark."""
        return self._vbar.watermark

    @property
    def residency(self) -> list[tuple[bool, bool]]:
        """For each page whether it has memory and whether it is pinned."""
        return self._vbar.residency()

    @property
    def base(self) -> int:
        """The first address."""
        return self._vbar.base

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self._vbar.nbytes

    def stats(self) -> dict[str, Any]:
        """The keys are those of a model in :func:`forebay.stats`."""
        return self._vbar.stats()

    def _stream(self) -> int:
        if self._engine.device == "host":
            return 0
        return streams.current(torch.device(self._engine.device))


@dataclass(frozen=True)
class Allocation:
    """A part of a VBAR."""

    vbar: Vbar = field(repr=False)
    address: int
    nbytes: int

    def fault(self) -> Signature | None:
        """See :func:`fault`."""
        serials = self.vbar._vbar.fault(self.address, self.nbytes, self.vbar._stream())
        return None if serials is None else tuple(serials)

    def unpin(self) -> None:
        """See :func:`unpin`."""
        self.vbar._vbar.unpin(self.address, self.nbytes, self.vbar._stream())

    def tensor(self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor over the allocation, to be touched only between fault and unpin.

        Args:
            dtype: Its dtype.
            shape: Its shape. Default: one dimension over the whole allocation.

        Raises:
            ValueError: Where the tensor would be larger than the allocation.
        """
        size = torch.Size([self.nbytes // dtype.itemsize] if shape is None else shape)
        if size.numel() * dtype.itemsize > self.nbytes:
            raise ValueError(
                f"a tensor of {size.numel() * dtype.itemsize} bytes does not fit in {self.nbytes}"
            )
        stride = torch.empty(size, device="meta").stride()
        whole = self.nbytes // dtype.itemsize * dtype.itemsize
        return plain_tensor(self.vbar._vbar.capsule(self.address, whole), dtype, size, stride)


def fault(allocation: Allocation) -> Signature | None:
    """Backs and pins an allocation's pages.

    Returns:
        The signature: where it differs from the last one the contents were lost. None above the watermark; nothing is
        pinned then.

    Raises:
        DeviceError: Where the device refuses a call.
    """
    return allocation.fault()


def unpin(allocation: Allocation) -> None:
    """Takes the pins of one fault back, behind what is in the current stream by now. Without pins: nothing."""
    allocation.unpin()


def signature(allocation: Allocation) -> Signature | None:
    """The allocation's signature if all of its pages have memory, without pinning them; else None."""
    first = (allocation.address - allocation.vbar.base) // _PAGE
    last = (allocation.address + allocation.nbytes - 1 - allocation.vbar.base) // _PAGE
    if not all(backed for backed, _ in allocation.vbar.residency[first : last + 1]):
        return None
    serials = allocation.fault()
    if serials is not None:
        allocation.unpin()
    return serials


_PAGE = 32 << 20

"""Address ranges of models: fault, fill, use, unpin."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from forebay._forebay import ExplicitVbar
from forebay.comfyui.aimdo import devices
from forebay.comfyui.aimdo.copies import copies

Allocation = tuple[Any, int, int]
"""A range, an address in it and a length: the parts of one :meth:`ModelVBAR.alloc`, or of several that follow each other."""

Signature = Sequence[int]
"""The serials of an allocation's pages when it was faulted in. Equal serials mean equal contents."""

_vbars: weakref.WeakSet[ModelVBAR] = weakref.WeakSet()
_numbers = itertools.count(1)


class ModelVBAR:
    """The address range of one model. Pages at lower addresses are kept longer; one above the watermark is refused."""

    def __init__(self, size: int, device: Any, pageout_callback: Callable[..., Any] | None = None) -> None:
        """Reserves a range.

        Args:
            size: Bytes; may be many times the device's memory.
            device: A device that was initialised.
            pageout_callback: None. Weights are read-only, so pages leave without anything to be saved.

        Raises:
            ValueError: For a size of zero, or beyond the address space.
            RuntimeError: Where the device was not initialised.
            NotImplementedError: For a callback.
        """
        if pageout_callback is not None:
            raise NotImplementedError(
                "nothing is called when pages leave: they are read-only and filled again"
            )
        self._context = devices.context(device)
        self.max_size = devices.count("size", size)
        self.device = device
        self.name = f"ComfyUI model {next(_numbers)}"
        self._vbar: ExplicitVbar | None = self._context.engine.vbar(self.name, self.max_size)
        self._context.tell_streams(self._vbar)
        self.base_addr = self._vbar.base
        _vbars.add(self)

    def alloc(self, nbytes: int) -> Allocation:
        """The next bytes of the range, aligned to 512.

        Raises:
            MemoryError: Past the end of the range.
            ValueError: For a negative number.
        """
        nbytes = devices.count("nbytes", nbytes)
        try:
            return self, self._open().alloc(nbytes), nbytes
        except ValueError as error:
            raise MemoryError(str(error)) from None

    def fault(self, address: int, size: int) -> Signature | None:
        """Backs and pins a part. Its signature, or None above the watermark, where nothing is pinned.

        Raises:
            ValueError: Where the part is not in the range.
            RuntimeError: Where the device refuses a call, or the range is closed.
        """
        if size == 0:
            return ()
        return self._open().fault(address, size, self._context.stream())

    def unpin(self, address: int, size: int) -> None:
        """Takes the pins of one fault back, behind what is in the device's streams by now. Without pins: nothing.

        Raises:
            ValueError: Where the part is not in the range.
        """
        if self._vbar is not None and size:
            self._vbar.know((self._context.stream(),))
            self._vbar.unpin_everywhere(address, size)

    def prioritize(self, malloc_async_clamp: Any = None) -> None:
        """To the top of the priorities, with the watermark fully open.

        Args:
            malloc_async_clamp: How far torch's own allocator may grow. It is left to itself, and memory made free for it.
        """
        self._open().begin_run()

    def deprioritize(self) -> None:
        """To the bottom of the priorities."""
        self._open().deprioritize()

    def set_watermark(self, nbytes: int) -> None:
        """Pages above leave, pinned ones when unpinned; faults there are refused until :meth:`prioritize`."""
        self._open().set_watermark(devices.saturated("nbytes", nbytes))

    def set_watermark_limit(self, nbytes: int) -> None:
        """Pages below are not taken until :func:`vbars_reset_watermark_limits`."""
        self._open().set_watermark_limit(devices.saturated("nbytes", nbytes))

    def free_memory(self, nbytes: float) -> int:
        """Gives memory up, highest address first; it is free on return.

        Returns:
            How many bytes: less where pinned pages or the limit hold the rest.
        """
        freed = self._open().free(devices.saturated("nbytes", nbytes))
        if freed:
            self._context.engine.settle()
        return freed

    def loaded_size(self) -> int:
        """Bytes of the pages that have memory."""
        return 0 if self._vbar is None else self._vbar.held

    def get_nr_pages(self) -> int:
        """How many pages of 32 MiB the range has."""
        return -(-self.max_size // devices.PAGE)

    def get_watermark(self) -> int:
        """How many pages are below the watermark."""
        return self._open().watermark

    def get_residency(self) -> list[int]:
        """For each page: bit 0 set where it has memory, bit 1 where it is pinned."""
        return [backed | pinned << 1 for backed, pinned in self._open().residency()]

    @property
    def offset(self) -> int:
        """Bytes handed out so far, alignment included."""
        return self._open().allocated

    def close(self) -> None:
        """Gives the memory up: at once what is not pinned, the rest with its pins or its last tensor."""
        if self._vbar is not None:
            self._vbar.set_watermark(0)
            self._vbar = None
            _vbars.discard(self)

    def capsule(self, address: int, nbytes: int) -> Any:
        """A DLPack capsule of a part as uint8."""
        return self._open().capsule(address, nbytes)

    def _open(self) -> ExplicitVbar:
        if self._vbar is None:
            raise RuntimeError("the range is closed")
        return self._vbar


def vbar_fault(alloc: Allocation) -> Signature | None:
    """See :meth:`ModelVBAR.fault`."""
    vbar, address, size = alloc
    signature: Signature | None = vbar.fault(address, size)
    return signature


def vbar_unpin(alloc: Allocation | None) -> None:
    """See :meth:`ModelVBAR.unpin`."""
    if alloc is not None:
        vbar, address, size = alloc
        vbar.unpin(address, size)


def vbar_signature_compare(a: Signature | None, b: Signature | None) -> bool:
    """Whether the contents are still what they were. False where there is nothing to compare.

    Raises:
        ValueError: For signatures of different lengths, which are not of one allocation.
    """
    if a is None or b is None:
        return False
    if len(a) != len(b):
        raise ValueError(f"signatures of one allocation have one length: {len(a)} and {len(b)}")
    return a == b


def vbars_analyze(device: Any = None) -> int:
    """Bytes of the pages that have memory, on one device or on all."""
    wanted = None if device is None else devices.context(device)
    return sum(vbar.loaded_size() for vbar in list(_vbars) if wanted in (None, vbar._context))


def allocated() -> dict[str, int]:
    """Bytes that were handed out of each range that is not closed, by its name."""
    return {vbar.name: vbar._vbar.allocated for vbar in list(_vbars) if vbar._vbar is not None}


def vbars_reset_watermark_limits() -> None:
    """Takes all limits back, and the memory that files are read into ahead of their use: ComfyUI calls this after a node."""
    copies.end_node()
    devices.end_read_ahead()
    for vbar in list(_vbars):
        if vbar._vbar is not None:
            vbar.set_watermark_limit(0)

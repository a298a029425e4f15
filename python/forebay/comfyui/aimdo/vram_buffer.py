"""Device memory for weights that are used once."""

from __future__ import annotations

from typing import Any

from forebay.comfyui.aimdo import devices


class VRAMBuffer:
    """A reserved address range of device memory that grows on demand, out of the memory that models have. What it has it
    keeps until it is dropped, with its last tensor."""

    NAME = "ComfyUI cast buffer"
    """What reports call one."""
    lent_bytes = 0
    """Bytes that all buffers of the process handed out so far."""

    def __init__(self, max_size: int, device: Any) -> None:
        """Reserves a range.

        Args:
            max_size: How far it may grow, in bytes.
            device: A device that was initialised.

        Raises:
            ValueError: For a size of zero, or beyond the address space.
            RuntimeError: Where the device was not initialised.
        """
        self._context = devices.context(device)
        self._max_size = devices.count("max_size", max_size)
        self._vbar = self._context.engine.vbar(self.NAME, self._max_size)
        self._context.tell_streams(self._vbar)
        self._backed = 0

    def size(self) -> int:
        """Bytes that have memory."""
        return min(self._backed, self._max_size)

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """A part of the buffer: itself, the address and the length.

        Raises:
            RuntimeError: Past the end, or where the device has no room for it.
            ValueError: For a negative number.
        """
        size, offset = devices.count("size", size), devices.count("offset", offset)
        if offset + size > self._max_size:
            raise RuntimeError(f"a buffer of {self._max_size} bytes has no {size} at {offset}")
        if offset + size > self._backed:
            self._grow(offset + size)
        VRAMBuffer.lent_bytes += size
        return self, self._vbar.base + offset, size

    def capsule(self, address: int, nbytes: int) -> Any:
        """A DLPack capsule of a part as uint8."""
        return self._vbar.capsule(address, nbytes)

    def _grow(self, end: int) -> None:
        end = -(-end // devices.PAGE) * devices.PAGE
        address, missing = self._vbar.base + self._backed, end - self._backed
        # First of all: what it needs comes from models, of which each can do with less.
        self._vbar.prioritize()
        stream = self._context.stream()
        if self._vbar.fault(address, missing, stream) is None:
            self._context.engine.make_room(missing)
            self._vbar.prioritize()
            if self._vbar.fault(address, missing, stream) is None:
                stats = self._context.engine.stats()
                raise RuntimeError(
                    f"out of memory on {self._context.engine.device}: a buffer of {self._backed} bytes cannot grow by "
                    f"{missing}; the budget is {stats['budget']}, of which {stats['held']} are in use"
                )
        self._backed = end

"""Pinned host memory, and files read into it or past it."""

from __future__ import annotations

import contextlib
import operator
import os
import weakref
from typing import Any

from forebay import _forebay
from forebay.comfyui.aimdo import devices
from forebay.comfyui.aimdo.copies import HELD_AHEAD, copies

LIMIT = "FOREBAY_COMFYUI_PINNED_GIB"
"""The environment variable that sets how far all host buffers together may grow, in GiB. Without: as far as copies of weights
are worth it, see :mod:`copies`. What a buffer refuses to hold, ComfyUI reads from the file again at each use."""

_buffers: weakref.WeakSet[HostBuffer] = weakref.WeakSet()


def gib(text: str) -> float:
    """A number of GiB from 0 on.

    Raises:
        ValueError: For anything else, which it names.
    """
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value < 1 << 20:
            return value
    raise ValueError(f"a number of GiB from 0 on is wanted: {text!r}")


def most() -> float | None:
    """How many GiB the environment lets all host buffers together grow to, if it says so.

    Raises:
        ValueError: For a value that is no number, which it names.
    """
    text = os.environ.get(LIMIT)
    try:
        return gib(text) if text else None
    except ValueError as error:
        raise ValueError(f"{LIMIT}: {error}") from None


def total_size() -> int:
    """Bytes of all host buffers."""
    return sum(buffer.size for buffer in list(_buffers))


class HostBuffer:
    """Host memory that grows at one address. Memory is taken ahead of need and given back behind."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        """Reserves address space.

        Args:
            size: Bytes to begin with, registered.
            prewarm: Bytes of memory to be taken ahead of need.
            max_grow_size: How far it may grow. 0: as far as the machine has memory.
            mark_cold: Whether what was read into the buffer may leave the page cache. The kernel takes clean pages when
                it needs memory, so nothing is done about it.

        Raises:
            ValueError: For a negative number.
            RuntimeError: Where the system or a device refuses.
        """
        size = devices.count("size", size)
        limit = devices.count("max_grow_size", max_grow_size)
        ahead = devices.count("prewarm", prewarm)
        self.mark_cold = mark_cold
        self._holds_weights = ahead >= HELD_AHEAD
        self._holds_patches = 0 < ahead < HELD_AHEAD
        self._buffer = _forebay.HostBuffer(
            devices.any_engine(), limit=max(limit, size) if limit else 0, ahead=ahead
        )
        _buffers.add(self)
        if size:
            self.extend(size)

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self._buffer.nbytes

    def get_raw_address(self) -> int:
        """The first address. Without ``max_grow_size`` it is another before the buffer has bytes."""
        return self._buffer.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        """Grows by ``size`` bytes.

        Args:
            size: How many.
            reallocate: Whether the buffer may move to another address where its range is too small.
            register: Whether the new part is registered with the devices. If not, its user may do that.

        Returns:
            The buffer's address.

        Raises:
            RuntimeError: Past its range or the limit of all buffers, for a copy of a weight that is not worth it, where the
                process's memory cgroup has no room, and where the system or a device refuses.
            ValueError: For a negative number, and for an environment that limits all buffers to no number of GiB.
        """
        size = devices.count("size", size)
        limit = most()
        if limit is None and self._is_refused(size):
            raise RuntimeError(
                f"no copy of {size} bytes is kept of what is not used again, or read from the page cache ({LIMIT} says how many "
                "GiB are)"
            )
        if limit is not None and total_size() + size > limit * 2**30:
            raise RuntimeError(
                f"host buffers grow up to {limit:g} GiB together ({LIMIT}); {size} bytes more were asked for"
            )
        try:
            return self._buffer.extend(size, register=register, may_move=reallocate)
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def _is_refused(self, size: int) -> bool:
        """Whether what the buffer is asked to hold is worth no copy."""
        if self._holds_weights:
            return not copies.is_needed(size)
        return self._holds_patches and not copies.is_second_step()

    def register(self, offset: int, size: int) -> None:
        """Registers a part with the devices.

        Raises:
            ValueError: For a part that the buffer does not have, or that is registered.
            RuntimeError: Where a device refuses.
        """
        self._buffer.register(devices.count("offset", offset), devices.count("size", size))

    def unregister(self, offset: int) -> None:
        """Undoes it, once no copy needs the part any more.

        Raises:
            ValueError: Where nothing is registered at this offset.
        """
        self._buffer.unregister(devices.count("offset", offset))

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        """Shrinks, and gives the memory back once no copy needs it any more.

        Args:
            size: How many bytes to keep.
            do_unregister: Whether parts of the rest may be registered, by the buffer or by its user.

        Raises:
            ValueError: Where the buffer is smaller.
        """
        self._buffer.truncate(devices.count("size", size), bool(do_unregister))

    def read_file_slice(
        self,
        file: Any,
        file_offset: int,
        size: int,
        offset: int = 0,
        stream: Any = 0,
        device_ptr: int = 0,
        device: Any = -1,
    ) -> None:
        """Reads a part of a file into the buffer; it is there on return.

        Args:
            file: A descriptor, or an object with ``fileno()``.
            file_offset: Where in the file.
            size: How many bytes.
            offset: Where in the buffer.
            stream: The stream in which the bytes also go to ``device_ptr``.
            device_ptr: An address on ``device``; 0: the buffer alone.
            device: A device that was initialised.

        Raises:
            ValueError: For a part that the buffer does not have, and for negative numbers.
            RuntimeError: Where the file ends before, or cannot be read.
            OSError: For a descriptor that is not open.
        """
        descriptor = _descriptor(file)
        file_offset, size = devices.count("file_offset", file_offset), devices.count("size", size)
        offset, address = devices.count("offset", offset), devices.count("device_ptr", device_ptr)
        if address == 0:
            self._buffer.read(descriptor, file_offset, size, offset)
        else:
            engine = devices.context(device).engine
            self._buffer.read(descriptor, file_offset, size, offset, engine, address, _stream(stream))
        if self._holds_weights:
            copies.note_read((descriptor, file_offset), size, registers=devices.registers())


def read_file_to_device(
    file: Any, file_offset: int, size: int, stream: Any, device_ptr: int, device: Any, mark_cold: bool = True
) -> None:
    """Reads a part of a file to a device. Work that is enqueued in the stream afterwards finds the bytes. What does not stay
    on the device is registered in the background, as far as that is possible: the device reads it from the page cache by itself then.

    Args:
        file: A descriptor, or an object with ``fileno()``.
        file_offset: Where in the file.
        size: How many bytes.
        stream: The stream.
        device_ptr: An address on ``device``.
        device: A device that was initialised.
        mark_cold: As for :class:`HostBuffer`.

    Raises:
        ValueError: For no address and for negative numbers.
        RuntimeError: Where the file ends before, or cannot be read.
        OSError: For a descriptor that is not open.
    """
    arguments = _arguments(file, file_offset, size, device_ptr)
    engine = devices.context(device).engine
    is_registered = _forebay.read_to_device(engine, *arguments, _stream(stream))
    registers = is_registered or engine.registers
    copies.note_read(arguments[:2], size, is_registered=is_registered, registers=registers)


def write_device_to_file(
    file: Any, file_offset: int, size: int, stream: Any, device_ptr: int, device: Any
) -> None:
    """Writes memory of a device, as work that is now in the stream leaves it, to a part of a file.

    Raises:
        ValueError: For no address and for negative numbers.
        RuntimeError: Where the file cannot be written.
        OSError: For a descriptor that is not open.
    """
    arguments = _arguments(file, file_offset, size, device_ptr)
    _forebay.write_from_device(devices.context(device).engine, *arguments, _stream(stream))


def write_host_to_file(file: Any, file_offset: int, size: int, host_ptr: int) -> None:
    """Writes host memory to a part of a file.

    Raises:
        ValueError: For no address and for negative numbers.
        RuntimeError: Where the file cannot be written.
        OSError: For a descriptor that is not open.
    """
    _forebay.write_from_host(*_arguments(file, file_offset, size, host_ptr))


def cleanup_file_reader() -> None:
    """Forgets what was read ahead, and gives the memory for it back; registers nothing of any file any more, until it is read
    again and again."""
    devices.end_read_ahead()
    devices.forget_file()


def _arguments(file: Any, file_offset: int, size: int, address: int) -> tuple[int, int, int, int]:
    descriptor = _descriptor(file)
    file_offset, size = devices.count("file_offset", file_offset), devices.count("size", size)
    address = devices.count("address", address)
    if address == 0:
        raise ValueError("memory has an address other than 0")
    return descriptor, file_offset, size, address


def _descriptor(file: Any) -> int:
    number = file.fileno() if hasattr(file, "fileno") else operator.index(file)
    if isinstance(file, bool) or not 0 <= number < 1 << 31:
        raise ValueError(f"an open file has a descriptor that is not negative: {file}")
    return int(number)


def _stream(stream: Any) -> int:
    return 0 if stream is None else devices.count("stream", getattr(stream, "cuda_stream", stream))

"""The devices that ComfyUI was given, an engine each."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from forebay._forebay import Engine, ExplicitVbar

DeviceId = int | str
"""A GPU's ordinal, or the name of another device of Forebay's: ``"host"``."""

PAGE = 32 << 20
"""Bytes of a page."""

DEFAULT_HEADROOM = 512 << 20
"""Bytes of device memory that the engine leaves to others where nobody says otherwise."""

_PRIORITIES = (0, -1)
"""Of the streams that torch hands out. ComfyUI's own have the first of these."""


@dataclass(eq=False)
class DevCtx:
    """A device: what it is called here and there, and who keeps its memory."""

    id: DeviceId
    engine: Engine
    extra_headroom: int = 0
    _pools: list[int] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        from forebay.engines import torch_device

        return torch_device(self.engine)

    @functools.cached_property
    def stream(self) -> Callable[[], int]:
        """Gives torch's current stream on it."""
        if not isinstance(self.id, int):
            return int
        from forebay import streams

        return streams.source(self.device)

    def tell_streams(self, vbar: ExplicitVbar) -> None:
        """Tells a range of every stream that may use it. ComfyUI unpins before its kernels have ended, and some of its
        copies run in streams that no call names: all of those that torch hands out are waited for before a page leaves."""
        if self.engine.device == "host":
            return
        if self._pools is None:
            from forebay import streams

            self._pools = streams.handed_out(self.device, _PRIORITIES)
        vbar.know(self._pools)


contexts: dict[DeviceId, DevCtx] = {}
"""Those initialised so far."""

lock = threading.Lock()
"""Held while devices are initialised or given up."""


def context(device: Any) -> DevCtx:
    """The context of a device that was initialised.

    Args:
        device: An ordinal, a ``torch.device``, or None where there is but one.

    Raises:
        RuntimeError: Where it was not initialised.
    """
    found = contexts.get(_key(device))
    if found is None:
        there = ", ".join(map(str, contexts)) or "none"
        raise RuntimeError(
            f"no such device was initialised with control.init_devices ({there} so far): {device}"
        )
    return found


def any_engine() -> Engine | None:
    """An engine whose device memory can be registered with; it is registered for all devices then."""
    return next((context.engine for context in contexts.values()), None)


def registers() -> bool:
    """Whether there is a device that page cache is registered with, as far as memory is free."""
    return any(context.engine.registers for context in list(contexts.values()))


def end_read_ahead() -> None:
    """Forgets what was read ahead for any device, and gives the memory for it back."""
    for context in list(contexts.values()):
        context.engine.end_read_ahead()


def forget_file(file: tuple[int, int] | None = None) -> None:
    """Gives back what devices have registered of a file, told by its device and inode; without them of any file."""
    for context in list(contexts.values()):
        context.engine.forget_file(file)


def _key(device: Any) -> Any:
    if device is None:
        return next(iter(contexts)) if len(contexts) == 1 else None
    kind = getattr(device, "type", None)
    if kind is None:
        return device
    return "host" if kind == "cpu" else _key(device.index)


def count(name: str, value: Any) -> int:
    """A number of bytes, or an address.

    Raises:
        TypeError: For what is no integer.
        ValueError: Below 0, or past the address space.
    """
    number = operator.index(value)
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{name} is between 0 and 2**63: {number}")
    return number


def saturated(name: str, value: Any) -> int:
    """A number of bytes, also as a float, where more than there can be means all.

    Raises:
        TypeError: For what is no number.
        ValueError: Below 0, or not a number.
    """
    if not value >= 0:
        raise ValueError(f"{name} is not negative: {value}")
    return int(min(value, (1 << 63) - 1))

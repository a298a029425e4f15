"""The engines of this process, one a device."""

from __future__ import annotations

import atexit
import threading
from typing import Any

import torch

from forebay._forebay import DeviceError, Engine, shut_down_engines
from forebay.allocations import redirect_for

_engines: dict[str, Engine] = {}
_lock = threading.Lock()

# While interpreter and driver are still there: a thread that calls a driver that is gone ends the process.
atexit.register(shut_down_engines)


def engine(
    device: str | torch.device | Engine | None = None,
    *,
    budget: float | None = None,
    headroom: float | None = None,
) -> Engine:
    """The engine of a device, started at the first call.

    Args:
        device: ``"cuda"``, ``"cuda:N"``, ``"host"`` (or ``"cpu"``), a ``torch.device``, or an engine, which is
            returned. Default: the current CUDA device where there is one, else ``"host"``.
        budget: Bytes that all weights on the device may take together. Changes the engine's budget if given.
        headroom: Bytes to keep free for everyone else instead. Changes the engine's budget if given.

    Returns:
        The engine.

    Raises:
        ValueError: For an unknown device name or a budget that is no number of bytes.
        DeviceError: Where the device is missing; the message says what to do.
    """
    if isinstance(device, Engine):
        if budget is not None or headroom is not None:
            device.set_budget(budget=budget, headroom=headroom)
        return device
    name = device_name(device)
    with _lock:
        found = _engines.get(name)
        if found is None:
            found = _engines[name] = Engine(name, budget=budget, headroom=headroom)
            redirect_for(found)
            return found
    if budget is not None or headroom is not None:
        found.set_budget(budget=budget, headroom=headroom)
    return found


def running() -> list[Engine]:
    """The engines that were started so far."""
    with _lock:
        return list(_engines.values())


def device_name(device: str | torch.device | None) -> str:
    """Forebay's name of a device, after a check that torch can use it."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "host"
    name = str(device)
    if name in ("cpu", "cpu:0", "host"):
        return "host"
    if name == "cuda" or name.startswith("cuda:"):
        if not torch.cuda.is_available():
            raise DeviceError(
                f"torch sees no CUDA device; install a driver and a CUDA build of torch, or use device='host': {name}"
            )
        count = torch.cuda.device_count()
        ordinal = name.removeprefix("cuda").removeprefix(":") or str(torch.cuda.current_device())
        if ordinal.isdecimal() and int(ordinal) >= count:
            raise DeviceError(f"there are {count} CUDA devices, numbered from 0: {name}")
        return f"cuda:{ordinal}"
    return name


def torch_device(engine: Engine) -> torch.device:
    """The device that tensors of an engine's weights report."""
    return torch.device("cpu" if engine.device == "host" else engine.device)


def stats(device: str | torch.device | Engine | None = None) -> dict[str, Any]:
    """What is where and what was moved on a device, as plain data.

    Args:
        device: As for :func:`engine`.

    Returns:
        ``device``, ``device_name``, ``budget``, ``held``, ``free_frames``, ``pinned_host``, ``registered``, ``reserved``
        (of the small weights' pages), ``operations`` and ``views`` (how many hold weights), and ``models``, a list of
        dicts, most recently used first: ``name``, ``bytes``, ``page_size``, ``pages``, ``watermark``, ``resident``,
        ``streamed``, ``absent``, ``pinned``, ``filled``, ``direct``, ``past_cache``, ``looked_up`` (bytes),
        ``filled_pages``, ``waits``, ``wait_s``, ``longest_wait_s``, ``mispredicted``, ``lent`` (whether its weights are
        lent as a whole), ``parked`` (whether it is detached and its memory kept). Of ``filled``, ``direct`` was read by
        the copy engine itself from the registered page cache, and ``past_cache`` past it, where it is too small:
        ``cached`` is then the range of ranks that have a share in it, otherwise None.
    """
    return engine(device).stats()


def memory_summary(device: str | torch.device | Engine | None = None) -> str:
    """The same as :func:`stats`, as a table a person reads."""
    return engine(device).summary()


def make_room(nbytes: float, device: str | torch.device | Engine | None = None) -> int:
    """Gives device memory back before something else needs it; the memory is free on return.

    Args:
        nbytes: How many bytes at least.
        device: As for :func:`engine`.

    Returns:
        How many bytes were given back: less where weights in use hold the rest.
    """
    return engine(device).make_room(nbytes)


def set_budget(nbytes: float, device: str | torch.device | Engine | None = None) -> None:
    """Lets all weights on the device take ``nbytes`` bytes together."""
    engine(device).set_budget(budget=nbytes)


def set_headroom(nbytes: float, device: str | torch.device | Engine | None = None) -> None:
    """Lets weights take everything that is free, but for ``nbytes`` bytes."""
    engine(device).set_budget(headroom=nbytes)

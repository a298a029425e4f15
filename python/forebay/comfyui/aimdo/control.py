"""Initialisation, logging, headroom."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from forebay import _forebay
from forebay.comfyui import warming
from forebay.comfyui.aimdo import devices
from forebay.comfyui.aimdo.devices import DEFAULT_HEADROOM, DevCtx, DeviceId
from forebay.comfyui.aimdo.malloc_graph import Recorder
from forebay.comfyui.aimdo.malloc_graph import record as _record

lib: Any = None
"""None before :func:`init`; then the extension module."""

devctxs = devices.contexts
"""The devices initialised so far."""

_MOST_HEADROOM = 1 << 60
_logger = logging.getLogger("forebay")
_headroom: int | None = None


def init(
    implementation: str | None = None,
    simple_vram_headroom: int | None = None,
    nvml_pressure: bool = False,
) -> bool:
    """Gets ready. Does not import torch; may be called again.

    Args:
        implementation: For those who have several; there is one.
        simple_vram_headroom: Bytes of device memory to leave to others. Default: 512 MiB.
        nvml_pressure: How others' memory is found out. Here what the driver says of the device counts either way: it
            includes other processes.

    Returns:
        True.

    Raises:
        ValueError: For a headroom outside of 0 to 2**60.
    """
    global lib, _headroom
    if simple_vram_headroom is not None:
        _headroom = _checked_headroom(simple_vram_headroom)
    lib = _forebay
    warming.expect()
    return True


def init_devices(device_ids: Iterable[DeviceId | tuple[DeviceId, int]]) -> bool:
    """Starts the engines of these devices.

    Args:
        device_ids: Ordinals, each alone or with bytes of headroom beyond the simple one.

    Returns:
        Whether all of them are there. False, with a warning, without a GPU, before :func:`init`, and where devices were
        initialised already.

    Raises:
        ValueError: For a negative headroom.
    """
    wanted = [(entry if isinstance(entry, tuple) else (entry, 0)) for entry in device_ids]
    for _, extra in wanted:
        _checked_headroom(extra)
    with devices.lock:
        if devctxs:
            _logger.warning("the devices are initialised already: %s", ", ".join(map(str, devctxs)))
            return False
        if not wanted:
            _logger.warning("there are no devices to initialise")
            return False
        started = [_start(device, extra) for device, extra in wanted]
        contexts = [context for context in started if context is not None]
        if len(contexts) < len(wanted):
            return False
        devctxs.update({context.id: context for context in contexts})
    warming.begin(contexts[0])
    return True


def init_device(device_id: DeviceId, extra_vram_headroom: int = 0) -> bool:
    """Starts the engine of one device; True where it runs.

    Raises:
        ValueError: For a negative headroom.
    """
    _checked_headroom(extra_vram_headroom)
    with devices.lock:
        if device_id in devctxs:
            return True
        context = _start(device_id, extra_vram_headroom)
        if context is not None:
            devctxs[device_id] = context
    return context is not None


def deinit() -> None:
    """Gives the devices up. What still lives on them stays until it goes by itself."""
    global lib
    with devices.lock:
        devctxs.clear()
        lib = None


def get_devctx(device_id: DeviceId) -> DevCtx:
    """The context of a device.

    Raises:
        RuntimeError: Where it was not initialised.
    """
    return devices.context(device_id)


def set_simple_vram_headroom(nbytes: int) -> None:
    """Sets how many bytes of device memory are left to others, on every device, from now on.

    Raises:
        ValueError: Outside of 0 to 2**60.
        RuntimeError: Before :func:`init`.
    """
    global _headroom
    nbytes = _checked_headroom(nbytes)
    _check_initialised()
    _headroom = nbytes
    for context in list(devctxs.values()):
        _apply_headroom(context)


def get_simple_vram_headroom() -> int:
    """How many bytes of device memory are left to others.

    Raises:
        RuntimeError: Before :func:`init`.
    """
    _check_initialised()
    return DEFAULT_HEADROOM if _headroom is None else _headroom


def get_total_vram_usage() -> int:
    """Bytes of device memory that the engines hold."""
    return sum(context.engine.stats()["held"] for context in list(devctxs.values()))


def analyze() -> None:
    """Logs what is where, on every device."""
    for context in list(devctxs.values()):
        _logger.info("%s", context.engine.summary())


def record(stream: Any, assert_graph_breaks: bool = False) -> Recorder:
    """See :func:`malloc_graph.record`."""
    return _record(stream, assert_graph_breaks)


def set_log_none() -> None:
    """Logs nothing."""
    _logger.setLevel(logging.CRITICAL + 1)


def set_log_critical() -> None:
    """Logs what ends the process."""
    _logger.setLevel(logging.CRITICAL)


def set_log_error() -> None:
    """Logs what failed."""
    _logger.setLevel(logging.ERROR)


def set_log_warning() -> None:
    """Logs what may surprise."""
    _logger.setLevel(logging.WARNING)


def set_log_info() -> None:
    """Logs what changes."""
    _logger.setLevel(logging.INFO)


def set_log_debug() -> None:
    """Logs what helps to find errors."""
    _logger.setLevel(logging.DEBUG)


def set_log_verbose() -> None:
    """Logs all there is."""
    _logger.setLevel(1)


def set_log_vverbose() -> None:
    """Logs all there is."""
    _logger.setLevel(1)


def _start(device_id: DeviceId, extra: int) -> DevCtx | None:
    if lib is None:
        _logger.warning("control.init() comes before its devices")
        return None
    if isinstance(device_id, bool) or not isinstance(device_id, (int, str)):
        _logger.warning("no device is called %r", device_id)
        return None
    from forebay.engines import engine

    try:
        name = f"cuda:{device_id}" if isinstance(device_id, int) else device_id
        context = DevCtx(device_id, engine(name), extra)
        if _headroom is not None or extra:
            _apply_headroom(context)
    except (ValueError, RuntimeError) as error:
        _logger.warning("%s", error)
        return None
    return context


def _apply_headroom(context: DevCtx) -> None:
    context.engine.set_budget(headroom=get_simple_vram_headroom() + context.extra_headroom)


def _checked_headroom(nbytes: int) -> int:
    if not 0 <= nbytes <= _MOST_HEADROOM:
        raise ValueError(f"a headroom is between 0 and 2**60 bytes: {nbytes}")
    return int(nbytes)


def _check_initialised() -> None:
    if lib is None:
        raise RuntimeError("comfy_aimdo is not initialised; call control.init() first")

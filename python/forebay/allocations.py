"""torch's own allocations press weights out, just before torch asks the driver.

torch's allocators call ``cudaMalloc`` and ``cudaMallocAsync`` through a table of addresses in ``libc10_cuda.so``. There, in
data, the two are redirected to functions that give device memory back where too little is free, and then call the original.
``FOREBAY_REDIRECT=0`` in the environment or :func:`redirect_allocations` switches it off. Without it, and with expandable
segments, which torch allocates by other calls, weights follow the free memory by polling, and a forward that ran out of
memory is run once more.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading

from forebay._forebay import Engine, import_of, redirected_allocations, restore_allocations
from forebay._forebay import redirect_allocations as _redirect

_log = logging.getLogger("forebay")
_lock = threading.Lock()

LIBRARY = "libc10_cuda.so"
SWITCH = "FOREBAY_REDIRECT"

_wanted = os.environ.get(SWITCH, "1").lower() not in ("0", "no", "off", "false")
_reason: str | None = None
"""Why it is off although it is wanted."""


def redirect_allocations(enabled: bool = True) -> bool:
    """Switches on or off that torch's own allocations on a GPU press weights out.

    It is on from the first use of a CUDA device by Forebay, unless the environment variable ``FOREBAY_REDIRECT`` is ``0``.

    Args:
        enabled: Off: torch's calls go where they went before, at once.

    Returns:
        Whether it is on now. Off although wanted: :func:`forebay.doctor` says why.
    """
    global _wanted
    with _lock:
        _wanted = enabled
        if not enabled:
            restore_allocations()
            return False
        return _install()


def redirect_for(engine: Engine) -> None:
    """Switches it on for a CUDA engine, unless somebody switched it off."""
    if engine.device == "host":
        return
    with _lock:
        if _wanted and not redirected_allocations()["functions"]:
            _install()


def is_wanted() -> bool:
    """Whether nobody switched it off."""
    return _wanted


def why_off() -> str | None:
    """Why it is off although it is wanted, if that was tried."""
    return _reason


def interpreter_check() -> int:
    """The address of the function that says whether a thread has the interpreter."""
    return ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p).value or 0


def why_not() -> str | None:
    """What stands against it in this build of torch, if anything. Changes nothing."""
    try:
        import_of(LIBRARY, "cudaMalloc")
    except RuntimeError as error:
        return str(error)
    return None


def has_expandable_segments() -> bool:
    """Whether torch was told to allocate in a way that is not redirected."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any(
        "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in names
    )


def _install() -> bool:
    global _reason
    try:
        _redirect(LIBRARY, interpreter_check())
    except RuntimeError as error:
        if _reason is None:
            _log.warning("torch's allocations do not press weights out: %s", error)
        _reason = str(error)
        return False
    _reason = None
    return True


# While the allocator may still be called: what is redirected must not be called when the interpreter is gone.
atexit.register(restore_allocations)

"""Python's garbage collector, which is kept from looking at everything there is while a model that was loaded runs.

A model that is loaded makes objects by the ten thousands, none of them garbage, after which a full collection is due: 0.2 to
0.3 s in a process like ComfyUI's, as much as half of a first step and more than a later one. ComfyUI asks for one by itself when it
has nothing to do, which is soon enough. Collections of what is new go on meanwhile.
"""

from __future__ import annotations

import gc
import threading

_NEVER = 1 << 30
_lock = threading.Lock()
_timer: threading.Timer | None = None
_own: int | None = None
"""The threshold of full collections as it was."""


def postpone(seconds: float = 30.0) -> None:
    """Has full collections wait for some seconds from now on: by default longer than most samplings with steps of less than one."""
    global _own, _timer
    with _lock:
        if _timer is not None:
            _timer.cancel()
        young, middle, full = gc.get_threshold()
        if full != _NEVER:
            _own = full
        gc.set_threshold(young, middle, _NEVER)
        _timer = threading.Timer(seconds, _resume)
        _timer.daemon = True
        _timer.start()


def _resume() -> None:
    global _own, _timer
    with _lock:
        if threading.current_thread() is not _timer:
            return  # somebody postponed it again
        young, middle, full = gc.get_threshold()
        # What the application set meanwhile stays.
        if full == _NEVER and _own is not None:
            gc.set_threshold(young, middle, _own)
        _own = _timer = None

"""What torch's allocator keeps for later tensors goes to weights where they lack it.

After a large activation torch keeps its memory, for ever. Weights that left for it would never come back. So after a
forward of a model that lacks memory the unused part of torch's cache is given back to the driver, and weights take it. A
forward that needs its large activation every time would fetch it back each time; then it is left alone for longer and
longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from forebay._forebay import Engine, Model, set_reclaim
from forebay.capturing import refuse_capture
from forebay.shortage import empty_cache, torch_memory

_LOOK_EVERY_S = 0.05
_LEAST = 64 << 20
"""Unused bytes that are worth it."""
_LONGEST_PAUSE = 64
"""How many forwards a cache is left alone, at most, that came back each time."""


class CacheRelease:
    """Decides when torch's cache is given back."""

    def __init__(self, used: Callable[[], tuple[int, int]], release: Callable[[], int]) -> None:
        """Decides by what is ``used`` (bytes in tensors, bytes in all) and calls ``release``, which tells how much."""
        self._used = used
        self._release = release
        self._pause = 0
        self._left = 0
        self._watched: tuple[int, int] | None = None
        """All of torch's memory and what was given back, as of the last time."""

    def after_forward(self) -> None:
        """To be told of each forward of a model that lacks memory."""
        allocated, reserved = self._used()
        if self._watched is not None:
            then, released = self._watched
            self._watched = None
            came_back = reserved - then > released // 2
            self._pause = min(_LONGEST_PAUSE, max(1, 2 * self._pause)) if came_back else 0
            self._left = self._pause
        if self._left > 0:
            self._left -= 1
            return
        if reserved - allocated >= _LEAST:
            released = self._release()
            if released > 0:
                self._watched = (reserved - released, released)
            else:
                self._left = self._pause = min(_LONGEST_PAUSE, max(1, 2 * self._pause))


class Reclaimer:
    """Told of the forwards of one model on a GPU."""

    def __init__(self, engine: Engine, model: Model, root: nn.Module) -> None:
        self._model = model
        self._root = root
        device = engine.device
        self._cache = CacheRelease(lambda: torch_memory(device), lambda: empty_cache(device))
        self._next = 0.0

    def run(self, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """In place of a ``forward``."""
        refuse_capture(self._root)
        result = original(*args, **kwargs)
        now = time.monotonic()
        if now >= self._next and not torch.cuda.is_current_stream_capturing():
            self._next = now + _LOOK_EVERY_S
            if self._model.lacks_memory():
                self._cache.after_forward()
        return result


# Weights that do not fit beside torch's cache are asked for again without it.
set_reclaim(empty_cache)

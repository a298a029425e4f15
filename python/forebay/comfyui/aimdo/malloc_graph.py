"""Recording what torch allocates. Allocation is left to torch, so there is nothing that could break."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Recorder:
    """Follows the marks of its caller, and how much memory torch has between them. Callers may set attributes."""

    virtual_bytes = 0
    """Bytes of address space of its own: it has none."""
    physical_bytes = 0
    """Bytes of memory of its own: it has none."""
    rogue_count = 0
    """Allocations that were not expected: all are torch's, and welcome."""

    def __init__(self, stream: Any, assert_graph_breaks: bool = False) -> None:
        """Begins at what torch has now."""
        self.stream = stream
        self.assert_graph_breaks = assert_graph_breaks
        self.peak_used = 0
        self._open: list[str | None] = []
        self._paused = False
        self._look()

    def push(self, name: str | None = None) -> None:
        """Begins a part."""
        self._look()
        self._open.append(name)

    def pop(self) -> bool:
        """Ends the innermost part; whether it broke: never.

        Raises:
            RuntimeError: Where no part has begun.
        """
        if not self._open:
            raise RuntimeError("pop() without a push() before")
        self._look()
        self._open.pop()
        return False

    def iterate(self, name: str | None = None) -> bool:
        """Begins another round of the innermost part; whether the last one broke: never."""
        self._look()
        return False

    def pause(self, sync: bool = False) -> None:
        """Looks away until :meth:`resume`."""
        self._look()
        self._paused = True
        self._wait(sync)

    def resume(self, sync: bool = False) -> None:
        """Looks again."""
        self._paused = False
        self._wait(sync)

    @contextlib.contextmanager
    def use_stream(self, stream: Any) -> Iterator[None]:
        """Goes on in another stream for a while."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def abort(self) -> None:
        """Ends all parts."""
        self._open.clear()

    def _look(self) -> None:
        import torch

        if not self._paused and torch.cuda.is_available():
            self.peak_used = max(self.peak_used, torch.cuda.memory_allocated())

    def _wait(self, sync: bool) -> None:
        if sync and hasattr(self.stream, "synchronize"):
            self.stream.synchronize()


def record(stream: Any, assert_graph_breaks: bool = False) -> Recorder:
    """Begins to record what torch allocates in a stream.

    Args:
        stream: torch's stream.
        assert_graph_breaks: Whether a break is an error; there is none.
    """
    return Recorder(stream, assert_graph_breaks)

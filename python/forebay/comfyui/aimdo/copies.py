"""Which weights ComfyUI keeps copies of in host memory, where nobody says how many.

It keeps a copy of every weight that it moves to the device. One that comes from a file is as soon read again: files are
read ahead of its calls. So copies are kept of those alone that it makes by itself, which it would copy from memory that is
not pinned. Which these are it does not say: a copy was refused, and what was to be copied was read from no file.
"""

from __future__ import annotations

HELD_AHEAD = 64 << 20
"""What ComfyUI asks to be held ready in a buffer for a model's weights, at least. Buffers for patches (LoRA), which come from
no file, ask for less."""


class Copies:
    """Remembers how large the copies were that no file has. It is asked in turn about a copy, and told what is read."""

    def __init__(self) -> None:
        self._from_memory: set[int] = set()
        self._refused = 0
        self._read = 0

    def is_needed(self, nbytes: int) -> bool:
        """Whether a copy of so many bytes is to be kept. If not, its weight is about to be read from a file, or copied."""
        # What is laid out for a copy is a little longer than what is read.
        if 2 * self._read < self._refused:
            self._from_memory.add(self._refused)
        self._refused = self._read = 0
        if nbytes in self._from_memory:
            return True
        self._refused = nbytes
        return False

    def note_read(self, nbytes: int) -> None:
        """So many bytes were read from a file to the device."""
        self._read += nbytes

"""Which weights ComfyUI keeps pinned copies of in host memory, where nobody says how many.

It asks for a copy of every weight that it moves to the device, before it moves it, and spends its first step on making them.
Here the first read of a weight makes none: files are read ahead of ComfyUI's calls. What it then reads again within the same
node is what does not fit on the device. Each byte of that, whether it goes to the device alone or into a copy as well, is worth a
byte of copies, which cost once and save time in every step. So one step makes copies of what is streamed, and of that alone, and
the next node's model has none in its first step, whatever its weights have in common with this one's.

Weights that no file has would be copied from memory that is not pinned: of these there is a copy from the second time on. They
show by not being read after the refusal. What ComfyUI reads into the copy of another weight, which it takes away from that where it
is refused one, has a file.
"""

from __future__ import annotations

HELD_AHEAD = 64 << 20
"""What ComfyUI asks to be held ready in a buffer for a model's weights, at least. Buffers for patches (LoRA), which come from
no file, ask for less."""

Part = tuple[int, int, int]
"""A part of a file: its device, its inode, the offset."""


class Copies:
    """Is asked in turn about a copy, and told what is read."""

    def __init__(self) -> None:
        self._read_in_node: set[Part] = set()
        self._worth = 0
        # Which weights these are is not said: how large the copies were that were refused without a read behind.
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
        if nbytes <= self._worth:
            self._worth -= nbytes
            return True
        self._refused = nbytes
        return False

    def note_read(self, part: Part, nbytes: int) -> None:
        """So many bytes were read from a file, to the device or into a copy."""
        self._read += nbytes
        if part in self._read_in_node:
            self._worth += nbytes
        self._read_in_node.add(part)

    def end_node(self) -> None:
        """A node of ComfyUI's has ended: what the next one reads it reads for the first time."""
        self._read_in_node.clear()
        self._worth = 0


copies = Copies()
"""The process's."""

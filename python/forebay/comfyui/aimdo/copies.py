"""Which weights ComfyUI keeps pinned copies of in host memory, where nobody says how many.

It asks for a copy of every weight that it moves to the device, before it moves it, and spends its first step on making them.
Here the first read of a weight makes none: files are read ahead of ComfyUI's calls. What it then reads again within the same
node is what does not fit on the device. That the device reads from the page cache by itself, as far as it can be registered, and
a copy would save nothing but ComfyUI's own time: it has more to do for a weight that it reads than for one that it has a copy of.
So a byte that is read again is worth a byte of copies

* where the device registers nothing, whether it goes to the device alone or into a copy as well. Where there is no memory for
  registering more there is none for a copy;
* where steps take as long as ComfyUI's thread needs, which copies make shorter: the link has nothing to do for more than half
  of a step, and the reads are a good part of it (:data:`READ_S`).

Copies cost once and save time in every step. So they are made of what is streamed, and of that alone, and the next node's model
has none in its first step, whatever its weights have in common with this one's.

Patches (LoRA) and weights that no file has would be copied from memory that is not pinned: of these there is a copy from the
second step on. In the first, beside the readers of the weights, torch's threads take a hundred times as long for a copy as copying
takes. Weights that no file has show by not being read after the refusal. What ComfyUI reads into the copy of another weight,
which it takes away from that where it is refused one, has a file.
"""

from __future__ import annotations

import time

HELD_AHEAD = 64 << 20
"""What ComfyUI asks to be held ready in a buffer for a model's weights, at least. Buffers for patches (LoRA), which come from
no file, ask for less."""

READ_S = 130e-6
"""How much more of ComfyUI's time a read takes than a copy, in seconds: of Flux in scaled float8 its steps were 50 ms longer with
374 reads, and 75 on a slow processor (bench/results/2026-11-30-h200-cache)."""
READS_SHARE = 0.05
"""Reads that together take less of a step than this are not worth a copy."""
LINK_BYTES_S = 50e9
"""What a link brings in a second, about."""
LINK_SHARE = 0.5
"""Where the link is busy for more of a step than this, it is not ComfyUI's thread that takes the time."""

Part = tuple[int, int]
"""A part of an open file: its descriptor, the offset."""


class Copies:
    """Is asked in turn about a copy, and told what is read."""

    def __init__(self) -> None:
        # Which weights these are is not said: how large the copies were that were refused without a read behind.
        self._from_memory: set[int] = set()
        self._refused = 0
        self._read = 0
        self.end_node()

    def is_needed(self, nbytes: int) -> bool:
        """Whether a copy of so many bytes is to be kept of a weight. If not, it is about to be read from a file, or copied."""
        # What is laid out for a copy is a little longer than what is read.
        if 2 * self._read < self._refused:
            self._from_memory.add(self._refused)
        self._refused = self._read = 0
        if nbytes in self._from_memory and self.is_second_step():
            return True
        if nbytes <= self._worth:
            self._worth -= nbytes
            return True
        self._refused = nbytes
        return False

    def is_second_step(self) -> bool:
        """Whether a weight was read for the second time in this node, so that everything else is used again as well. So it is where
        none was read."""
        return self._is_second_step or not self._read_in_node

    def note_read(
        self, part: Part, nbytes: int, *, is_registered: bool = False, registers: bool = False
    ) -> None:
        """So many bytes were read from a file, to the device or into a copy.

        Args:
            part: Which.
            nbytes: How many.
            is_registered: Whether the device reads them by itself.
            registers: Whether it does, as far as there is memory for it.
        """
        self._read += nbytes
        is_again = part in self._read_in_node
        self._read_in_node.add(part)
        self._is_second_step |= is_again
        if is_registered:
            self._steps.note_registered(part, nbytes, time.monotonic())
        if is_again and (self._steps.are_short_of_thread or not registers):
            self._worth += nbytes

    def end_node(self) -> None:
        """A node of ComfyUI's has ended: what the next one reads it reads for the first time."""
        self._read_in_node: set[Part] = set()
        self._is_second_step = False
        self._worth = 0
        self._steps = _Steps()


class _Steps:
    """What the device reads by itself from one read of a part to the next one of the same: a step."""

    def __init__(self) -> None:
        self._first: Part | None = None
        self._began = 0.0
        self._reads = self._nbytes = 0
        # In the first one that is seen parts are registered.
        self._is_first_step = True
        self.are_short_of_thread = False
        """Whether the last step took as long as ComfyUI's thread needed, as far as reads can tell."""

    def note_registered(self, part: Part, nbytes: int, now: float) -> None:
        """The device reads a part by itself."""
        if part == self._first:
            took = now - self._began
            reads = self._reads * READ_S > READS_SHARE * took
            is_link_idle = self._nbytes < LINK_SHARE * LINK_BYTES_S * took
            self.are_short_of_thread = reads and is_link_idle and not self._is_first_step
            self._is_first_step = False
        if self._first is None or part == self._first:
            self._first, self._began = part, now
            self._reads = self._nbytes = 0
        self._reads += 1
        self._nbytes += nbytes


copies = Copies()
"""The process's."""

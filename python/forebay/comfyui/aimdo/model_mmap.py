"""Files of weights as memory."""

from __future__ import annotations

import os
import weakref

from forebay._forebay import FileMapping
from forebay.comfyui.aimdo import devices


class ModelMMAP:
    """A file mapped read-only: its pages are the page cache's own, and the kernel takes them when it needs memory. What devices have
    registered of them for :func:`read_file_to_device` they give back with this object."""

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> None:
        """Maps a file. Nothing is read.

        Raises:
            OSError: Where there is no such file.
            RuntimeError: Where it is no regular file, or cannot be mapped.
        """
        os.stat(path)
        self._mapping = FileMapping(os.fsdecode(path))
        file = os.fstat(self._mapping.fileno())
        ended = weakref.finalize(self, devices.forget_file, (file.st_dev, file.st_ino))
        # Engines end by themselves with the process.
        ended.atexit = False

    def get(self) -> int:
        """The address of the file's first byte, valid as long as this object."""
        return self._mapping.address

    def get_file_handle(self) -> int:
        """A descriptor of the open file, valid as long as this object."""
        return self._mapping.fileno()

    def bounce(self) -> None:
        """Takes the file's pages out of this process's memory. They are found in the page cache when needed again."""
        self._mapping.drop_pages()

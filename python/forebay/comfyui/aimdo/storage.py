"""What is known of disks."""

from __future__ import annotations

import os


def fast_disk(path: str | os.PathLike[str]) -> bool | None:
    """Whether a path is on a disk that is as fast as memory is large. None: the kernel's page cache sees to it."""
    return None

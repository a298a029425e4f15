"""Safetensors files for benchmarks that only their sizes matter to, and where the tensors of any are."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_tensors(path: Path, sizes: dict[str, int]) -> None:
    """Writes tensors of so many bytes, one behind the other, of a random block again and again."""
    header, end = {}, 0
    for name, nbytes in sizes.items():
        header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(1 << 24)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left:
            left -= file.write(block[: min(left, len(block))])


def data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends, in the file."""
    with path.open("rb") as file:
        nbytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(nbytes))
    header.pop("__metadata__", None)
    return {name: tuple(8 + nbytes + at for at in entry["data_offsets"]) for name, entry in header.items()}

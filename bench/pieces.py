"""What it costs that page cache is registered in pieces: copies of a page out of pieces, one by one, in one call or as a batch.

A file is mapped and registered whole, or in pieces, neighbours in one mapping. Then it is copied to the device in copies of
each size, an event behind each page of 32 MiB as the engine records it. A copy larger than a piece spans several. Rates are
the medians of some rounds, each way in turn; what the driver refuses is told by its code.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from stack import link_rate, setting

MIB = 1 << 20
PAGE = 32 * MIB
STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total", type=float, default=2, help="GiB of the file (default: %(default)s)")
    parser.add_argument(
        "--pieces", type=int, nargs="+", default=[4, 8, 32], help="MiB (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


class Driver:
    """The calls of the CUDA driver that torch has no name for."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: object) -> int:
        return getattr(self.cuda, name)(*arguments)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> int:
        return self.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )

    def copy_batch(self, copies: list[tuple[int, int, int]], stream: int) -> int:
        """``cuMemcpyBatchAsync`` of CUDA 13."""
        count = len(copies)
        targets = (ctypes.c_uint64 * count)(*(to for to, _, _ in copies))
        sources = (ctypes.c_uint64 * count)(*(source for _, source, _ in copies))
        sizes = (ctypes.c_size_t * count)(*(nbytes for _, _, nbytes in copies))
        attributes = Attributes(STREAM_ORDER)
        first = (ctypes.c_size_t * 1)(0)
        return self.call(
            "cuMemcpyBatchAsync_v2",
            targets,
            sources,
            sizes,
            ctypes.c_size_t(count),
            ctypes.byref(attributes),
            first,
            ctypes.c_size_t(1),
            ctypes.c_void_p(stream),
        )


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", Location),
        ("target", Location),
        ("flags", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Way:
    """How a page is copied: in copies of so many bytes, each by a call of its own or all in one batch."""

    nbytes: int
    batch: bool = False
    streams: int = 1

    def __str__(self) -> str:
        how = f"{self.nbytes // MIB} MiB a copy"
        return (
            how + (", a batch a page" if self.batch else "") + (", two streams" if self.streams > 1 else "")
        )


WAYS = [
    Way(4 * MIB),
    Way(8 * MIB),
    Way(8 * MIB, batch=True),
    Way(8 * MIB, streams=2),
    Way(16 * MIB),
    Way(PAGE),
]


class Mapped:
    """A file in the page cache, mapped, and registered in pieces."""

    def __init__(self, file: int, nbytes: int, piece: int) -> None:
        self._mapping = mmap.mmap(file, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.nbytes = nbytes
        self._pieces = range(self.address, self.address + nbytes, piece)
        start = time.perf_counter()
        for at in self._pieces:
            code = torch.cuda.cudart().cudaHostRegister(at, min(piece, self.address + nbytes - at), 0)
            if int(code) != 0:
                raise RuntimeError(f"cudaHostRegister of {piece} bytes: {code}")
        self.registering_s = time.perf_counter() - start

    def unregister(self) -> None:
        for at in self._pieces:
            torch.cuda.cudart().cudaHostUnregister(at)


def copied(driver: Driver, mapped: Mapped, target: torch.Tensor, way: Way) -> float | int:
    """Seconds that it takes to copy all of it, or the driver's error code."""
    streams = [torch.cuda.Stream() for _ in range(way.streams)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number, page in enumerate(range(0, mapped.nbytes, PAGE)):
        stream = streams[number % way.streams]
        to = target.data_ptr() + page % target.nbytes
        parts = [(to + at, mapped.address + page + at, way.nbytes) for at in range(0, PAGE, way.nbytes)]
        if way.batch:
            codes = [driver.copy_batch(parts, stream.cuda_stream)]
        else:
            codes = [driver.copy(*part, stream.cuda_stream) for part in parts]
        if any(codes):
            torch.cuda.synchronize()
            return max(codes)
        torch.cuda.Event().record(stream)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    chosen = parse()
    torch.cuda.set_device(0)
    link = link_rate()
    driver = Driver()
    total = int(chosen.total * (1 << 30)) // PAGE * PAGE
    target = torch.empty(8 * PAGE, dtype=torch.uint8, device="cuda")
    rows = []
    print(f"{torch.cuda.get_device_name()}, link {link / 1e9:.1f} GB/s")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), total)
        block = os.urandom(PAGE)
        for at in range(0, total, PAGE):
            os.pwrite(file.fileno(), block, at)
        for piece in [*(mib * MIB for mib in chosen.pieces), total]:
            mapped = Mapped(file.fileno(), total, piece)
            found: dict[Way, list[float | int]] = {way: [] for way in WAYS}
            for _ in range(chosen.rounds):
                for way in WAYS:
                    found[way].append(copied(driver, mapped, target, way))
            right = bool((target[:PAGE].cpu() == torch.frombuffer(bytearray(block), dtype=torch.uint8)).all())
            mapped.unregister()
            name = "whole" if piece == total else f"{piece // MIB} MiB"
            print(f"registered {name}: {total / mapped.registering_s / 1e9:.1f} GB/s, right: {right}")
            for way, results in found.items():
                codes = {result for result in results if isinstance(result, int)}
                rate = None if codes else total / statistics.median(results)
                rows.append({"piece": piece, "way": str(way), "bytes_s": rate, "codes": sorted(codes)})
                told = f"error {min(codes)}" if codes else f"{rate / 1e9:.1f} GB/s, {rate / link:.3f}"
                print(f"    {way!s:32} {told}")
    if chosen.out:
        chosen.out.write_text(json.dumps({**setting(), "link_bytes_s": link, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

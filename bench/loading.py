"""What slows the driver's loading of kernels: the first use of some thirty operations of a diffusion transformer, beside others.

Each condition is a process of its own, in which nothing was used before. The first process of all finds libraries on disk; its row
says so. Other processes copy in memory or read a file of 2 GiB in the page cache; threads of the same process copy from pinned
memory to the device, with turns of so many MiB for others, map and unmap pages of 32 MiB, or record and query events.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import children
from holder import Driver

CONDITIONS = [
    "none (disk)", "none", "memory 2", "memory 6", "memory 12", "reading 6", "reading 12", "copying", "copying 32",
    "copying 8", "copying 4", "copying 384", "mapping", "events", "reading 12, copying 32, mapping", "none",
]  # fmt: skip
"""Parted by commas: what goes on, and how many threads do it or how many MiB are a turn; 0: no turns."""
MIB = 1 << 20
PAGE = 32 * MIB
CHUNK = 5 * MIB // 2
RING = 64 * MIB
AHEAD = 24
"""Copies that are enqueued at once."""
BESIDE = {
    "memory": (
        "import numpy\na = numpy.ones(1 << 26, numpy.uint8); b = numpy.empty_like(a)\nwhile True: numpy.copyto(b, a)"
    ),
    "reading": (
        "import os\nfile = os.open(sys.argv[1], os.O_RDONLY); size = os.fstat(file).st_size\n"
        "buffer, at = bytearray(5 << 19), 0\n"
        "while True: at = (at + os.preadv(file, [buffer], at)) % (size - len(buffer))"
    ),
}
"""What a thread of another process does."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        with children.reporting(chosen.report) as report:
            report(measured(chosen.child, chosen.file))
        os._exit(0)  # its threads never end
    children.end_with_their_parent()
    rows = []
    with tempfile.TemporaryDirectory(prefix="forebay-loading-") as folder:
        file, log = Path(folder) / "file", Path(folder) / "log"
        with file.open("wb") as filled:
            for block in (os.urandom(16 * MIB),) * 128:
                filled.write(block)
        for condition in chosen.conditions:
            arguments = ["--child", condition, "--file", file]
            outcome = children.run_child(Path(__file__), arguments, site=None, log=log, timeout=120)
            if outcome.reason:
                print(f"{condition}: {outcome.reason}", file=sys.stderr)
                continue
            rows += outcome.rows
            longest = sorted(rows[-1]["ms"].items(), key=lambda item: -item[1])[:5]
            told = ", ".join(f"{name} {ms:.0f}" for name, ms in longest)
            print(f"{condition:32} {rows[-1]['total_ms']:7.0f} ms   {told}", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps({"rows": rows}, indent=1))
    return 0 if rows else 1


def measured(condition: str, file: str) -> dict[str, object]:
    """The time that each operation's first use takes while this goes on."""
    import torch

    sys.setswitchinterval(1e-4)
    torch.zeros(1).cuda()
    uses = list(operations())
    torch.cuda.synchronize()
    with contextlib.ExitStack() as going_on:
        for one in condition.split(", "):
            name, _, number = one.partition(" ")
            begin(name, number, file, going_on)
        time.sleep(0.6)
        milliseconds = {}
        begun = time.perf_counter()
        for name, use in uses:
            before = time.perf_counter()
            use()
            torch.cuda.current_stream().synchronize()
            milliseconds[name] = (time.perf_counter() - before) * 1e3
        total = (time.perf_counter() - begun) * 1e3
    return {"condition": condition, "total_ms": total, "ms": milliseconds}


def operations() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is used, on tensors whose making uses no kernel."""
    import torch
    from torch.nn import functional

    width, tokens, heads = 3072, 4352, 24

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    x, one, bias, number = made(1, tokens, width), made(1, width), made(width), torch.rand(1).cuda()
    square, wide, narrow = made(width, width), made(4 * width, width), made(width, 4 * width)
    long, query = made(1, tokens, 4 * width), made(1, heads, tokens, 128)
    float8 = torch.randn(width, width).to(torch.float8_e4m3fn).cuda()
    yield "exp", lambda: torch.exp(number)
    yield "cos", lambda: torch.cos(number * 2.0)
    yield "cat of numbers", lambda: torch.cat([number, number])
    yield "to bf16", lambda: number.to(torch.bfloat16)
    yield "silu", lambda: functional.silu(one)
    yield "linear of one", lambda: functional.linear(one, square, bias)
    yield "layer norm", lambda: functional.layer_norm(x, (width,))
    yield "modulation", lambda: (1 + x) * one + one
    yield "linear", lambda: functional.linear(x, square, bias)
    yield "linear, wide", lambda: functional.linear(x, wide)
    yield "linear, narrow", lambda: functional.linear(long, narrow)
    yield "gelu", lambda: functional.gelu(x, approximate="tanh")
    yield "rms norm", lambda: functional.rms_norm(query, (128,))
    yield "attention", lambda: functional.scaled_dot_product_attention(query, query, query)
    yield "cat", lambda: torch.cat([x, x], 1)
    yield "gate", lambda: x + x * one
    yield "from float8", lambda: float8.to(torch.bfloat16)
    yield "scaled", lambda: x * bias
    yield "random", lambda: torch.randn(4, device="cuda")
    yield "difference", lambda: x - x
    yield "quotient", lambda: x / 3
    yield "sum", lambda: x.float().sum()
    yield "largest", lambda: x.abs().max()


def begin(name: str, number: str, file: str, going_on: contextlib.ExitStack) -> None:
    """Begins what goes on beside."""
    if name in BESIDE:
        body = "\n".join(f"    {line}" for line in BESIDE[name].splitlines())
        code = f"import sys, threading\ndef work():\n{body}\nfor _ in range({number}): threading.Thread(target=work).start()"
        # Without the interpreter while they copy or read.
        going_on.callback(subprocess.Popen([sys.executable, "-c", code, file]).kill)
    elif name != "none":
        works = {"copying": lambda: copying(int(number or 0) * MIB), "mapping": mapping, "events": events}
        threading.Thread(target=works[name], daemon=True).start()


def copying(turn: int) -> None:
    """Copies to the device without a pause; every so many bytes lets others in, unless 0."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        ring = torch.empty(RING, dtype=torch.uint8).pin_memory()
        back = torch.empty(4, dtype=torch.uint8).pin_memory()
        to = torch.empty(RING, dtype=torch.uint8, device="cuda")
        events: list[torch.cuda.Event] = []
        in_a_row = at = 0
        while True:
            to[at : at + CHUNK].copy_(ring[at : at + CHUNK], non_blocking=True)
            at, in_a_row = (at + CHUNK) % (RING - CHUNK), in_a_row + CHUNK
            if turn and in_a_row >= turn:
                in_a_row = 0
                back.copy_(to[:4], non_blocking=True)
            events.append(torch.cuda.Event(blocking=True))
            events[-1].record()
            if len(events) > AHEAD:
                events.pop(0).synchronize()


def events() -> None:
    """Records and queries them as some readers do."""
    import torch

    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    while True:
        for _ in range(20):
            event.record(stream)
            event.query()
        time.sleep(0.0002)


class Properties(ctypes.Structure):
    """Of an allocation: pinned memory of device 0."""

    _fields_ = [(name, ctypes.c_int) for name in ("type", "handles", "location", "id")] + [
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """Of device 0: reading and writing."""

    _fields_ = [(name, ctypes.c_int) for name in ("location", "id", "flags")]


def mapping() -> None:
    """Makes a page, maps it, unmaps it, and gives it back, every half millisecond."""
    driver, places = Driver(0), 64
    size, zero, address = ctypes.c_size_t(PAGE), ctypes.c_uint64(0), ctypes.c_uint64()
    properties, access = Properties(1, 0, 1, 0, None), Access(1, 0, 3)
    whole, unaligned = ctypes.c_size_t(PAGE * places), ctypes.c_size_t(0)
    driver.call("cuMemAddressReserve", ctypes.byref(address), whole, unaligned, zero, zero)
    number = 0
    while True:
        handle, at = ctypes.c_uint64(), ctypes.c_uint64(address.value + PAGE * (number % places))
        driver.call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), zero)
        driver.call("cuMemMap", at, size, ctypes.c_size_t(0), handle, zero)
        driver.call("cuMemSetAccess", at, size, ctypes.byref(access), ctypes.c_size_t(1))
        driver.call("cuMemUnmap", at, size)
        driver.call("cuMemRelease", handle)
        number += 1
        time.sleep(0.0005)


if __name__ == "__main__":
    sys.exit(main())

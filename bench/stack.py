"""A transformer stack larger than the memory left free, timed beside the physical limit.

Writes a bf16 stack of random weights to a safetensors file, runs it once as plain torch with everything resident, then
fills the GPU with a ballast until only ``--free`` is left and runs the same file attached to Forebay. The limit of a step
is max(compute, bytes moved / link): compute is the plain step's time, bytes moved are counted by the engine, the link is
measured in the same run. Every output is compared with the plain one bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import forebay

GIB = 1 << 30


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Stack(nn.Sequential):
    """Blocks of 12 width^2 weights each."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 25 GB)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 2048, 4096, 8192], help="tokens a step"
    )
    parser.add_argument(
        "--free",
        type=float,
        nargs="+",
        default=[8.0],
        help="GiB of device memory left free (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        choices=["registered", "ring"],
        default=["registered", "ring"],
        help="where streamed pages come from: the registered page cache, or through the ring alone",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        help="steps after the first, of which the last half counts (default: %(default)s)",
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=2.0,
        help="seconds after the first step, in which page cache is registered (default: %(default)s)",
    )
    parser.add_argument(
        "--trace", type=Path, help="record what the engine does in first and last steps, into this folder"
    )
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-stack.safetensors"), help="where the weights go"
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args(arguments)


DTYPES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
"""As files name them."""


def write_weights(
    path: Path,
    blocks: int,
    width: int,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> int:
    """A file of random weights, written block by block; bytes of its data."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Block(width, 40).state_dict().items()}
    header: dict[str, object] = {}
    offset = 0
    for block in range(blocks):
        for name, shape in shapes.items():
            nbytes = dtype.itemsize * int(torch.Size(shape).numel())
            header[f"{block}.{name}"] = {
                "dtype": DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
    if path.exists() and path.stat().st_size > offset:
        return offset
    if shutil.disk_usage(path.parent).free < offset + GIB:
        raise SystemExit(f"the weights take {offset / GIB:.1f} GiB on disk, more than is free: {path.parent}")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device=device).manual_seed(seed)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(blocks):
            for name, shape in shapes.items():
                scale = 1.0 if name.startswith("norm") and name.endswith("weight") else shape[-1] ** -0.5
                values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * scale
                file.write(values.to(dtype).cpu().view(torch.uint8).numpy().data)
    return offset


def load(path: Path, blocks: int, width: int) -> Stack:
    """The first blocks of the file; where there are not enough, the file over again."""
    with torch.device("meta"):
        stack = Stack(*(Block(width, 40) for _ in range(blocks))).to(torch.bfloat16)
    stack.load_state_dict(state_of(path, blocks), assign=True)
    return stack.eval().requires_grad_(False)


def state_of(
    path: Path, blocks: int, loader: Callable[[Path], dict[str, torch.Tensor]] = forebay.load
) -> dict[str, torch.Tensor]:
    """The weights of so many blocks; where the file has not enough, the file over again."""
    in_file = 1 + max(int(name.split(".", 1)[0]) for name in loader(path))
    state = {}
    # Mapped once more for every round, so that bytes that are the same in the file are weights of their own.
    for first in range(0, blocks, in_file):
        for name, tensor in loader(path).items():
            block, rest = name.split(".", 1)
            if first + int(block) < blocks:
                state[f"{first + int(block)}.{rest}"] = tensor
    return state


def block_by_block(blocks: nn.Sequential, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What comes out of each block of a stack on the CPU, each alone on ``x``'s device."""
    for block in blocks:
        weights = {name: weight.to(x.device) for name, weight in block.named_parameters()}
        x = torch.func.functional_call(block, weights, (x,))
        yield x


def last_of(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What comes out of the last of them, block by block."""
    for y in block_by_block(blocks, x):
        x = y
    return x


def ballast(free: float, device: str | torch.device = "cuda") -> torch.Tensor:
    """What leaves so many GiB of a GPU free for as long as it lives."""
    available, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, available - int(free * GIB)), dtype=torch.uint8, device=device)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: the GPU, or the host where there is none."""
    default = "cuda:0" if torch.cuda.is_available() else "host"
    parser.add_argument("--device", default=default, help="host or cuda:N (default: %(default)s)")


def torch_device(name: str) -> torch.device:
    """What torch calls the device of ``--device``."""
    return torch.device("cpu" if name == "host" else name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_rate(nbytes: int = GIB, device: str | torch.device = "cuda") -> float:
    """Host to device, pinned, bytes a second: the best of five."""
    device = torch.device(device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda").random_(1, 255)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds[1:])


def timed_step(stack: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    synchronize(x.device)
    start = time.perf_counter()
    y = stack(x)
    synchronize(x.device)
    return y, time.perf_counter() - start


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def inputs(tokens: int, width: int, device: str | torch.device = "cuda") -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(tokens)
    return torch.randn(1, tokens, width, generator=generator, device=device, dtype=torch.bfloat16)


def plain_run(chosen: argparse.Namespace) -> dict[int, tuple[torch.Tensor, float]]:
    """Output and seconds of a step with every weight resident, for each number of tokens."""
    stack = load(chosen.file, chosen.blocks, chosen.width).to(chosen.device)
    results = {}
    for tokens in chosen.tokens:
        x = inputs(tokens, chosen.width)
        timed_step(stack, x)
        runs = [timed_step(stack, x) for _ in range(3)]
        results[tokens] = (runs[-1][0].cpu(), statistics.median(seconds for _, seconds in runs))
    del stack
    torch.cuda.empty_cache()
    return results


def engine_cpu_s() -> float:
    """Processor time of the engine's threads so far."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            name, stat = (task / "comm").read_text(), (task / "stat").read_text()
        except FileNotFoundError:
            continue  # the thread ended meanwhile
        if name.startswith("forebay-"):
            fields = stat.rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def disk_bytes() -> int:
    """Bytes that this process had read from disk so far."""
    return process_io("read_bytes")


def process_io(count: str) -> int:
    """What Linux has counted of this process's input and output."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{count}:")).split()[1])


def streamed_run(
    chosen: argparse.Namespace,
    link: float,
    nbytes: int,
    plain: dict[int, tuple[torch.Tensor, float]],
    free: float,
    source: str,
    ring: dict[str, int] | None = None,
    quiet: bool = False,
) -> list[dict[str, object]]:
    """The rows of one amount of free memory and one way for the bytes."""
    rest = ballast(free)
    # What is kept free is for activations.
    headroom = min(1.5, free / 4) * GIB
    engine = forebay.Engine(
        chosen.device, headroom=headroom, registered=0 if source == "ring" else None, **(ring or {})
    )
    rows: list[dict[str, object]] = []
    for tokens in chosen.tokens:
        stack = load(chosen.file, chosen.blocks, chosen.width)
        x = inputs(tokens, chosen.width)
        before = anonymous_mib()
        start = time.perf_counter()
        with forebay.attach(stack, engine) as attachment:
            attached = time.perf_counter() - start
            expected, compute = plain[tokens]
            if chosen.trace:
                engine.start_recording()
            y, first = timed_step(stack, x)
            traces = {"first": engine.stop_recording()}
            same = torch.equal(y.cpu(), expected)
            if source == "registered":
                time.sleep(chosen.pause)
            filled = [attachment.stats()[0]["filled"]]
            seconds, cpu, waits, disk = [], [], [], []
            for step in range(chosen.steps):
                busy, read = engine_cpu_s(), disk_bytes()
                before_step = attachment.stats()[0]
                if step == chosen.steps - 1:
                    engine.start_recording()
                y, took = timed_step(stack, x)
                seconds.append(took)
                cpu.append(engine_cpu_s() - busy)
                disk.append(disk_bytes() - read)
                stats = attachment.stats()[0]
                waits.append(stats["wait_s"] - before_step["wait_s"])
                filled.append(stats["filled"])
                same = same and torch.equal(y.cpu(), expected)
            traces["later"] = engine.stop_recording()
            longest: dict[str, dict[str, float]] = {}
            for activity, _page, _start, length in traces["later"]:
                of = longest.setdefault(activity, {"count": 0, "sum_s": 0.0, "longest_s": 0.0})
                of["count"] += 1
                of["sum_s"] += length
                of["longest_s"] = max(of["longest_s"], length)
            stats = attachment.stats()[0]
            moved = filled[-1] - filled[-2]
            half = chosen.steps // 2
            later = statistics.median(seconds[half:])
            limit = max(compute, moved / link)
            first_limit = max(compute, nbytes / link)
            rows.append(
                {
                    "free_gib": free, "source": source, "tokens": tokens, "attach_s": attached, "same": same, "compute_s": compute,
                    "moved_bytes": moved, "first_s": first, "first_limit_s": first_limit,
                    "first_ratio": first / first_limit, "steps_s": seconds, "later_s": later, "limit_s": limit,
                    "ratio": later / limit, "engine_cpu_s": statistics.median(cpu[half:]), "waited_s": waits,
                    "longest_wait_s": stats["longest_wait_s"], "last_step": longest, "waits": stats["waits"],
                    "resident_bytes": stats["resident"], "filled_bytes": filled, "direct_bytes": stats["direct"],
                    "registered_bytes": engine.stats()["registered"], "pinned_host_bytes": engine.stats()["pinned_host"],
                    "disk_bytes": disk, "past_cache_bytes": stats["past_cache"], "mispredicted": stats["mispredicted"],
                    "anonymous_mib": anonymous_mib() - before,
                }
            )  # fmt: skip
            if not quiet:
                print(table_row(rows[-1]), flush=True)
            if chosen.trace:
                name = f"trace-{free:g}-{source}-{tokens}.json"
                (chosen.trace / name).write_text(json.dumps(traces))
        torch.cuda.synchronize()
        del stack
    engine.settle()
    del rest, engine
    torch.cuda.empty_cache()
    return rows


HEAD = (
    f"{'free':>6} {'source':>10} {'tokens':>7} {'same':>5} {'compute':>9} {'moved':>9} {'first':>9} {'x limit':>8} "
    f"{'later':>9} {'x limit':>8} {'waited':>8} {'CPU':>8} {'registered':>10} {'disk':>9} {'anon':>9}"
)


def table_row(row: dict[str, Any]) -> str:
    return (
        f"{row['free_gib']:6g} {row['source']:>10} {row['tokens']:7} {row['same']!s:>5} {row['compute_s'] * 1e3:6.0f} ms "
        f"{row['moved_bytes'] / 1e9:6.1f} GB {row['first_s'] * 1e3:6.0f} ms {row['first_ratio']:8.2f} "
        f"{row['later_s'] * 1e3:6.0f} ms {row['ratio']:8.2f} {row['waited_s'][-1] * 1e3:5.0f} ms "
        f"{row['engine_cpu_s'] * 1e3:5.0f} ms {row['registered_bytes'] / 1e9:7.1f} GB {row['disk_bytes'][-1] / 1e9:6.1f} GB {row['anonymous_mib']:5.0f} MiB"
    )


def machine(is_cuda: bool = True) -> dict[str, Any]:
    """Where this runs."""
    return {
        "gpu": torch.cuda.get_device_name() if is_cuda else "none", "torch": torch.__version__,
        "forebay": forebay.__version__, "cores": os.cpu_count(), "kernel": platform.release(),
    }  # fmt: skip


def setting(is_cuda: bool = True) -> dict[str, Any]:
    """What was run when, and where."""
    command = " ".join(["python", *sys.argv])
    return {"command": command, "date": date.today().isoformat(), **machine(is_cuda)}


def main() -> int:
    chosen = parse()
    torch.cuda.set_device(chosen.device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        nbytes = write_weights(chosen.file, chosen.blocks, chosen.width)
        link = link_rate()
        plain = plain_run(chosen)
        print(f"{nbytes / 1e9:.1f} GB of weights, link {link / 1e9:.1f} GB/s, {torch.cuda.get_device_name()}")
        print(HEAD, flush=True)
        for free in chosen.free:
            for source in chosen.source:
                rows += streamed_run(chosen, link, nbytes, plain, free, source)
    result = {**setting(), "weights_bytes": nbytes, "link_gb_s": link / 1e9, "rows": rows}
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

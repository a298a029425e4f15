"""A file many times as large as the memory that the process may have.

Writes linear layers of random weights to a safetensors file, applies one after the other to a vector, first as plain torch
does from the mapped file, then attached, and compares the results bit for bit. Run it in a memory cgroup:

    mkdir /sys/fs/cgroup/small && echo 2G > /sys/fs/cgroup/small/memory.max
    sh -c 'echo $$ > /sys/fs/cgroup/small/cgroup.procs; exec python bench/little_ram.py'

On the host the embedded device's memory (``--budget``) is a part of the cgroup's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stack import add_device, anonymous_mib, disk_bytes, setting, torch_device
from torch import nn

import forebay

GIB, MIB = 1 << 30, 1 << 20
COLUMNS, ROWS = 4096, 8192


class Layers(nn.Module):
    """Applies each layer to the same vector and folds the results together."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights.values():
            layer = nn.Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folded = torch.zeros(1, ROWS, device=x.device)
        for layer in self.layers:
            folded = folded * 0.5 + layer(x).float()
        return folded


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device(parser)
    parser.add_argument(
        "--gib", type=float, default=22.5, help="GiB of weights, bfloat16 (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=float, default=0.5, help="GiB of device memory for them (default: %(default)s)"
    )
    parser.add_argument("--passes", type=int, default=3, help="attached passes (default: %(default)s)")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-layers.safetensors"), help="where the weights go"
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


def write(path: Path, nbytes: int, device: torch.device) -> None:
    """Random weights, one layer at a time: all of them together would not fit. A GPU draws them sooner."""
    size = ROWS * COLUMNS * 2
    count = max(1, nbytes // size)
    header = {
        f"layers.{number:05d}.weight": {
            "dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(count)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if path.exists() and path.stat().st_size == 8 + len(text) + count * size:
        return
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number in range(count):
            generator = torch.Generator(device).manual_seed(number)
            drawn = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.bfloat16, device=device)
            file.write(memoryview((drawn - 0.5).cpu().view(torch.uint8).numpy()))


def limit() -> int | None:
    """The process's own memory cgroup's, of version 2 or 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        of_version = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
        if controllers in of_version:
            folder, name = of_version[controllers]
            file = Path("/sys/fs/cgroup", folder, path.lstrip("/"), name)
            text = file.read_text().strip() if file.exists() else "max"
            if text != "max" and int(text) < 1 << 62:
                return int(text)
    return None


def timed(name: str, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    start, before = time.perf_counter(), disk_bytes()
    result = call().cpu()
    row = {
        "name": name, "seconds": time.perf_counter() - start, "read_bytes": disk_bytes() - before,
        "anonymous_bytes": int(anonymous_mib() * MIB),
    }  # fmt: skip
    print(
        f"{name:<24} {row['seconds']:7.1f} s  read {row['read_bytes'] / 1e9:5.1f} GB  "
        f"anonymous {row['anonymous_bytes'] / MIB:6.0f} MiB",
        flush=True,
    )
    return result, row


def main() -> int:
    chosen = parse()
    device = torch_device(chosen.device)
    is_cuda = device.type == "cuda"
    write(chosen.file, int(chosen.gib * GIB), device)
    weights = forebay.load(chosen.file)
    nbytes = sum(weight.nbytes for weight in weights.values())
    allowed = limit()
    memory = "no limit of memory" if allowed is None else f"{allowed / GIB:.1f} GiB of memory"
    print(f"{nbytes / 1e9:.1f} GB of weights, {memory}")
    model, x = Layers(weights), torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    with torch.no_grad():
        if is_cuda:
            x = x.to(chosen.device)
            expected, plain = timed("plain, layer by layer", lambda: by_layer(weights, x))
        else:
            expected, plain = timed("plain, mapped", lambda: model(x))
        rows = [plain]
        engine = forebay.Engine(chosen.device, budget=int(chosen.budget * GIB))
        same = True
        with forebay.attach(model, engine):
            for number in range(chosen.passes):
                result, row = timed(f"attached, pass {number + 1}", lambda: model(x))
                same &= torch.equal(result, expected)
                rows.append(row)
    print("the same bits" if same else "ANOTHER RESULT")
    if chosen.out:
        told = {
            **setting(is_cuda), "weights_bytes": nbytes, "limit_bytes": allowed, "budget_gib": chosen.budget,
            "same": same, "rows": rows,
        }  # fmt: skip
        chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0 if same else 1


def by_layer(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    folded = torch.zeros(1, ROWS, device=x.device)
    for weight in weights.values():
        folded = folded * 0.5 + nn.functional.linear(x, weight.to(x.device)).float()
    return folded


if __name__ == "__main__":
    raise SystemExit(main())

"""How long the kernels of patches take on a GPU: products of low rank on bfloat16, and float8 rounded at random behind them.

Each weight is of a shape that Flux has, and has one product of a rank. The float8 weight is computed anew as in a first step: the
engine finds its largest magnitude, looks its scale up, and rounds the sum by random bytes. Times are those that the driver tells of
each kernel, in picoseconds an element, over all shapes together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from stack import setting
from torch.profiler import ProfilerActivity, profile

from forebay._forebay import EightBitSum, Engine
from forebay.engines import engine as engine_of
from forebay.low_rank import LowRank, multiplied, to_device

SHAPES = (3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360), (18432, 3072)
KERNELS = "requantize", "random_bytes", "look_up", "add_terms"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


class Case:
    """A weight of a shape, in both formats, and what is added to it."""

    def __init__(self, rows: int, columns: int, rank: int, device: torch.device) -> None:
        factors = torch.randn(rows, rank).half(), torch.randn(rank, columns).half()
        [(self._memory, self._product)] = to_device([LowRank([(*factors, 0.01)], torch.float16)], device)
        self.elements = rows * columns
        self._columns = columns
        self._bf16 = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
        self._stored = (torch.randn(rows, columns, device=device) * 60).to(torch.float8_e4m3fn)
        self._found = torch.empty_like(self._stored)
        self._scale = torch.full((), 0.01, device=device)
        self._numbers = torch.zeros(8, device=device)
        multiplied_by = multiplied(self._product, self._numbers[1:].data_ptr())
        self._sum = EightBitSum(
            self._stored.data_ptr(), "float8_e4m3fn", columns, multiplied_by, self._scale.data_ptr()
        )

    def compute(self, engine: Engine, table: torch.Tensor, threads: int, stream: int) -> None:
        at = self._numbers.data_ptr()
        scaling = at + 16, table.data_ptr(), at
        engine.requantize(self._found.data_ptr(), self._sum, 1, threads, stream, scaling)
        engine.add_product(self._bf16.data_ptr(), "bfloat16", self._columns, self._product, stream)


def measured(cases: list[Case], rounds: int, device: torch.device) -> dict[str, float]:
    """Picoseconds an element, by the kernel's name. A float8 weight is read twice by one of them."""
    engine, stream = engine_of(device), torch.cuda.current_stream(device).cuda_stream
    has = torch.cuda.get_device_properties(device)
    # Of torch's generator.
    threads = has.multi_processor_count * has.max_threads_per_multi_processor
    elements = sum(case.elements for case in cases)
    table = torch.rand(1 << 15, 2, device=device)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for case in cases:
                case.compute(engine, table, threads, stream)
            torch.cuda.synchronize(device)
        took: dict[str, float] = defaultdict(float)
        for event in profiled.events() or []:
            if event.name.startswith(KERNELS):
                took[event.name] += event.device_time
        for name, microseconds in took.items():
            times[name].append(microseconds * 1e6 / elements)
    # The first has the driver translate them.
    return {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}


def main() -> None:
    chosen = parse()
    if not torch.cuda.is_available():
        sys.exit("kernels.py: needs a GPU")
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [Case(rows, columns, chosen.rank, device) for rows, columns in SHAPES]
    result = {**setting(), "rank": chosen.rank, "ps_an_element": measured(cases, chosen.rounds, device)}
    for name, time in result["ps_an_element"].items():
        print(f"{name:32} {time:7.3f} ps an element")
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

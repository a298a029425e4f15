"""What an attached model costs beside plain torch when everything fits.

Times forwards of the same weights as plain torch and attached, in turn, so that whatever else the machine does falls on
both. Two models: many tiny layers, where only the time of a call counts, and a stack of larger ones. Then single calls
of ``F.linear`` with stand-ins, as they run while a model is not lent as a whole. Every output is compared bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stack import add_device, setting
from torch import nn

import forebay

MIB = 1 << 20


class Residual(nn.Module):
    """A layer of its own with two weights, like a block's perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device(parser)
    parser.add_argument("--layers", type=int, default=1000, help="tiny layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="width of a tiny layer (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--block-width", type=int, default=2048, help="width of a block (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, help="rows of the stack's input (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


def compare(
    name: str, model: nn.Module, x: torch.Tensor, engine: forebay.Engine, steps: int, **how: Any
) -> dict[str, Any]:
    """Times a model beside itself, attached."""
    device = torch.device("cpu" if engine.device == "host" else engine.device)
    plain = copy.deepcopy(model).to(device)
    x = x.to(device)
    with forebay.attach(model, engine, name=name, **how) as attachment:
        expected = plain(x)
        for _ in range(20):
            assert torch.equal(model(x), expected), "another result than plain torch's"
        lent = attachment.stats()[0]["lent"]
        times: dict[str, list[float]] = {"plain": [], "attached": []}
        for step in range(steps):
            order = [("plain", plain), ("attached", model)]
            for kind, which in order if step % 2 else reversed(order):
                times[kind].append(seconds(lambda which=which: which(x), device))
        assert torch.equal(model(x), expected), "another result than plain torch's"
    median = {kind: statistics.median(all_) for kind, all_ in times.items()}
    # Of neighbours in time, so that a slow while of the machine cancels.
    ratio = statistics.median(a / p for p, a in zip(times["plain"], times["attached"], strict=True))
    print(
        f"{name:<28} plain {1e3 * median['plain']:8.3f} ms  attached {1e3 * median['attached']:8.3f} ms  "
        f"ratio {ratio:.3f}  {'lent as a whole' if lent else 'on stand-ins'}"
    )
    return {"name": name, "lent": lent, "ratio": ratio, "median_s": median, "times_s": times}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of one call, with what it enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interception(engine: forebay.Engine, rounds: int = 60, calls: int = 2000) -> dict[str, float]:
    """Microseconds that stand-ins add to a call of ``F.linear`` on 64 x 64, best of many rounds in turn."""
    device = torch.device("cpu" if engine.device == "host" else engine.device)
    layer = nn.Linear(64, 64).requires_grad_(False)
    plain = copy.deepcopy(layer).to(device)
    x = torch.randn(1, 64, device=device)
    with forebay.attach(layer, engine, small=0, name="interception"):
        kinds = {"plain": (plain.weight, plain.bias), "attached": (layer.weight, layer.bias)}
        for _ in range(100):
            assert torch.equal(F.linear(x, *kinds["attached"]), F.linear(x, *kinds["plain"]))
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(rounds):
            for kind, (weight, bias) in kinds.items():
                start = time.perf_counter()
                for _ in range(calls):
                    F.linear(x, weight, bias)
                best[kind] = min(best[kind], (time.perf_counter() - start) / calls * 1e6)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    added = best["attached"] - best["plain"]
    print(
        f"{'F.linear 64x64 and bias':<28} plain {best['plain']:8.2f} us  attached {best['attached']:8.2f} us  "
        f"added {added:.2f} us"
    )
    return {"plain_us": best["plain"], "attached_us": best["attached"], "added_us": added}


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    needed = 4 * args.blocks * (8 * args.block_width**2 + 16 * args.block_width)
    engine = forebay.Engine(args.device, budget=2048 * MIB + 2 * needed)
    tiny = nn.Sequential(*(nn.Linear(args.width, args.width) for _ in range(args.layers)))
    stack = nn.Sequential(*(Residual(args.block_width) for _ in range(args.blocks)))
    x = torch.randn(1, args.width)
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for model in (tiny, stack):
            model.requires_grad_(False)
        shape = f"{args.layers} x {args.width}"
        results.append(compare(f"tiny {shape}", copy.deepcopy(tiny), x, engine, args.steps))
        results.append(compare(f"tiny {shape}, none small", tiny, x, engine, args.steps, small=0))
        tokens = torch.randn(args.tokens, args.block_width)
        results.append(
            compare(f"stack {args.blocks} x {args.block_width}", stack, tokens, engine, args.steps)
        )
        added = interception(engine)
    if args.out is not None:
        told = {**setting(args.device != "host"), "models": results, "interception": added}
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

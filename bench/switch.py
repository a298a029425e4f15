"""How long the GPU idles when one model takes over from another.

Two stacks of blocks that do not fit together, nor each alone, are used in turn. Behind the last kernel of the one an event is
recorded, and events around the first layer of the other: what lies between, less the layer's own time, the GPU had nothing
to do. After the first three rounds nothing is used for a while, as between pictures, in which the engine registers what it
streamed. Outputs are compared with plain torch's bit for bit, run block by block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stack import GIB, ballast, inputs, last_of, load, setting, write_weights
from torch import nn

import forebay

TARGET_MS = 5.0
SETTLED = 3
"""Rounds before those that count."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=16, help="blocks of each stack (default: %(default)s)")
    parser.add_argument("--width", type=int, default=5120, help="width of a block (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step (default: %(default)s)")
    parser.add_argument("--free", type=float, default=8.0, help="GiB left free (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each before the other (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="switches each way (default: %(default)s)")
    parser.add_argument(
        "--pause", type=float, default=2.0, help="seconds after the first rounds (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-stack.safetensors"), help="where the weights go"
    )
    parser.add_argument(
        "--trace", type=Path, help="write what the engine did in the last rounds here, as JSON"
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


class Layer:
    """Events around a layer's work."""

    def __init__(self, layer: nn.Module) -> None:
        self.begin = self.end = torch.cuda.Event(enable_timing=True)
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)

    def _before(self, module: object, args: object) -> None:
        self.begin = torch.cuda.Event(enable_timing=True)
        self.begin.record()

    def _after(self, module: object, args: object, output: object) -> None:
        self.end = torch.cuda.Event(enable_timing=True)
        self.end.record()


def own_time(layer: nn.Linear, x: torch.Tensor) -> float:
    """Milliseconds of a layer whose weights are there."""
    weight, bias = layer.weight.to(x.device), layer.bias.to(x.device)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        nn.functional.linear(x, weight, bias)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> int:
    chosen = parse()
    torch.cuda.set_device(chosen.device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        write_weights(chosen.file, chosen.blocks, chosen.width)
        x = inputs(chosen.tokens, chosen.width)
        models = {name: load(chosen.file, chosen.blocks, chosen.width) for name in ("first", "second")}
        expected = last_of(models["first"], x)
        layer_ms = own_time(models["first"][0].qkv, x)
        torch.cuda.empty_cache()
        rest = ballast(chosen.free)
        engine = forebay.Engine(chosen.device, headroom=1.5 * GIB)
        layers = {name: Layer(model[0].qkv) for name, model in models.items()}
        attached = [forebay.attach(model, engine, name=name) for name, model in models.items()]
        outputs: list[torch.Tensor] = []
        before: torch.cuda.Event | None = None
        for number in range(2 * chosen.rounds):
            if number == 2 * SETTLED:
                torch.cuda.synchronize()
                time.sleep(chosen.pause)
            name = ("first", "second")[number % 2]
            if chosen.trace and number == 2 * chosen.rounds - 4:
                engine.start_recording()
            y = models[name](x)
            begin, end = layers[name].begin, layers[name].end
            for _ in range(chosen.steps - 1):
                y = models[name](x)
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            outputs.append(y)
            if before is not None:
                end.synchronize()  # a layer that is behind the GPU by now
                idle = max(0.0, before.elapsed_time(end) - layer_ms)
                rows.append({"to": name, "idle_ms": idle, "until_called_ms": before.elapsed_time(begin)})
            before = ended
        if chosen.trace:
            chosen.trace.write_text(json.dumps(engine.stop_recording()))
        same = all(torch.equal(y, expected) for y in outputs)
        for attachment in attached:
            attachment.detach()
        del rest
    settled = rows[2 * SETTLED :]
    idle = [row["idle_ms"] for row in settled]
    result = {
        **setting(), "free_gib": chosen.free,
        "layer_ms": layer_ms, "median_idle_ms": statistics.median(idle), "longest_idle_ms": max(idle), "same": same, "rows": rows,
    }  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))
    print(
        f"idle at {len(idle)} switches: median {statistics.median(idle):.2f} ms, longest {max(idle):.2f} ms "
        f"(at most {TARGET_MS:g} wanted); same: {same}"
    )
    return 0 if same and statistics.median(idle) < TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())

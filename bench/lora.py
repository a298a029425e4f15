"""What adapters (LoRA) cost: steps of the stack with one on every linear layer beside steps without.

The stack of bench/stack.py runs attached in a budget that streams most of it, then in one that holds all of it, in turn
without adapters and with them, so that whatever else the machine does falls on both. Outputs have to be the same in every
step, and in both budgets, bit for bit. Then adapters change while everything is resident, and what is filled again is
counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stack import GIB, Stack, inputs, load, setting, torch_device, write_weights
from torch import nn

import forebay

KINDS = ("without", "with")
State = dict[str, torch.Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 25 GB)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens a step")
    parser.add_argument("--rank", type=int, default=16, help="the adapters' rank (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=8.0, help="GiB for weights that stream (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="times without and with adapters (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        help="steps each time, after one that is not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a stack of 39 MB, few tokens: whether it works, no measurement"
    )
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-stack.safetensors"), help="where the weights go"
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    chosen = parser.parse_args()
    if chosen.tiny:
        chosen.blocks, chosen.width, chosen.tokens, chosen.budget = 4, 640, [3, 8], 16 / 1024
    return chosen


def adapters(stack: nn.Module, rank: int, seed: int) -> State:
    """Random factors for every linear layer, as peft names them. Merged they change a weight by about a tenth."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in stack.named_modules():
        if isinstance(layer, nn.Linear):
            for key, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
                factor = torch.randn(shape, generator=generator) * (0.1 / rank) ** 0.5 * shape[-1] ** -0.25
                state[f"{name}.{key}.weight"] = factor.to(torch.bfloat16)
    return state


class Run:
    """The stack attached in a budget."""

    def __init__(self, chosen: argparse.Namespace, budget: float, lora: State) -> None:
        self.device = torch.device("cpu" if chosen.device == "host" else chosen.device)
        self.stack: Stack = load(chosen.file, chosen.blocks, chosen.width)
        self.engine = forebay.Engine(chosen.device, budget=budget)
        self.attachment = forebay.attach(self.stack, self.engine)
        self.budget = budget
        self.lora = lora

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and its seconds with all that it enqueued."""
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        return result, time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def filled(self) -> int:
        filled: int = self.attachment.stats()[0]["filled"]
        return filled

    def compare(self, kind: str, x: torch.Tensor, chosen: argparse.Namespace) -> tuple[dict[str, Any], State]:
        """Steps without and with adapters in turn. The row, and the outputs."""
        for _ in range(2):
            self.stack(x)
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        outputs: State = {}
        same, moved = True, 0
        for _ in range(chosen.rounds):
            for name in KINDS:
                self.attachment.set_loras([(self.lora, 1.0)] if name == "with" else [])
                for step in range(1 + chosen.steps):
                    before = self.filled()
                    y, seconds = self.timed(lambda: self.stack(x))
                    same = same and torch.equal(y, outputs.setdefault(name, y))
                    if step > 0:
                        times[name].append(seconds)
                        moved = self.filled() - before
        self.attachment.set_loras([])
        same = same and not torch.equal(outputs["without"], outputs["with"])
        median = {name: statistics.median(times[name]) for name in KINDS}
        row = {
            "kind": kind, "budget": self.budget, "tokens": x.shape[1], "same": same, "moved_bytes": moved,
            "median_s": median, "ratio": median["with"] / median["without"], "times_s": times,
        }  # fmt: skip
        print(
            f"{kind:>9} {row['tokens']:6} tokens: without {median['without'] * 1e3:7.2f} ms, with "
            f"{median['with'] * 1e3:7.2f} ms, ratio {row['ratio']:.3f}, moved {moved / 1e9:.2f} GB, same {same}",
            flush=True,
        )
        return row, outputs

    def changes(self, x: torch.Tensor) -> list[dict[str, Any]]:
        """What changes of the set refill, everything being resident."""
        some = {key: value for key, value in self.lora.items() if key.startswith("1.")}
        every = [(self.lora, 1.0)]
        rows = []
        for what, loras, touched in (
            ("an adapter for every layer", every, self.lora),
            ("one more for one block", [*every, (some, 0.5)], some),
            ("the same set again", [*every, (some, 0.5)], {}),
            ("none", [], self.lora),
        ):
            self.stack(x)
            before = self.filled()
            _, set_s = self.timed(lambda loras=loras: self.attachment.set_loras(loras))
            _, first_s = self.timed(lambda: self.stack(x))
            names = {key.rsplit(".lora_", 1)[0] for key in touched}
            touched_bytes = sum(self.stack.get_submodule(name).weight.nbytes for name in names)
            row = {
                "what": what, "touched_bytes": touched_bytes, "refilled_bytes": self.filled() - before, "set_s": set_s,
                "first_s": first_s,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{what}: {touched_bytes / 1e9:.3f} GB of weights touched, {row['refilled_bytes'] / 1e9:.3f} GB refilled, "
                f"set in {set_s * 1e3:.1f} ms, first step {first_s * 1e3:.1f} ms",
                flush=True,
            )
        return rows

    def close(self) -> None:
        self.attachment.detach()
        self.wait()
        self.engine.settle()


def main() -> int:
    chosen = parse()
    device = torch_device(chosen.device)
    is_cuda = device.type == "cuda"
    rows: list[dict[str, Any]] = []
    outputs: dict[tuple[str, int], State] = {}
    with torch.no_grad():
        nbytes = write_weights(chosen.file, chosen.blocks, chosen.width, device)
        lora = adapters(load(chosen.file, chosen.blocks, chosen.width), chosen.rank, 1)
        for kind, budget in (("streamed", chosen.budget * GIB), ("resident", 1.1 * nbytes + 256 * (1 << 20))):
            run = Run(chosen, budget, lora)
            for tokens in chosen.tokens:
                row, outputs[kind, tokens] = run.compare(kind, inputs(tokens, chosen.width, device), chosen)
                others = outputs["streamed", tokens]
                row["same"] = row["same"] and all(
                    torch.equal(y, others[name]) for name, y in outputs[kind, tokens].items()
                )
                rows.append(row)
            changes = (
                run.changes(inputs(chosen.tokens[0], chosen.width, device)) if kind == "resident" else []
            )
            run.close()
            del run
    result = {
        **setting(is_cuda), "rank": chosen.rank,
        "weights_bytes": nbytes, "factors_bytes": sum(factor.nbytes for factor in lora.values()), "rows": rows,
        "changes": changes,
    }  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

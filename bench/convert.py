"""What converting while filling costs: float8 weights used as bf16 beside bf16 weights used as they are stored.

Blocks of bench/stack.py run attached in a budget that streams most of them: stored as bf16, as float8, and as float8 with a
scale for each row. Nothing is registered, for what is converted goes through the ring. The limit of a step is what it moves
over the link's rate; what it moves is what is stored. Weights are compared with torch's conversion on the CPU, and the
outputs of all steps with each other, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from fits import seconds
from stack import Stack, inputs, link_rate, load, setting, torch_device, write_weights

import forebay


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 7.5 GB as bf16)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step (default: %(default)s)")
    parser.add_argument(
        "--share",
        type=float,
        default=0.25,
        help="of the bf16 weights that the budget holds (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps that count, after three (default: %(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a stack of 39 MB, few tokens: whether it works, no measurement"
    )
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file",
        type=Path,
        default=Path("/tmp/forebay-stack.safetensors"),
        help="the bf16 weights; .fp8 beside it",
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    chosen = parser.parse_args()
    if chosen.tiny:
        chosen.blocks, chosen.width, chosen.tokens, chosen.share, chosen.steps = 4, 640, 3, 0.4, 10
    return chosen


def row_scales(stack: Stack) -> dict[str, torch.Tensor]:
    """A random scale for each row of each matrix."""
    generator = torch.Generator().manual_seed(2)
    return {
        f"{name}_scale": torch.rand(weight.shape[0], generator=generator) + 0.5
        for name, weight in stack.named_parameters()
        if weight.ndim == 2
    }


def is_converted(stack: Stack, scales: dict[str, torch.Tensor]) -> bool:
    """Whether the weights of the first and the last block are what torch makes of them on the CPU."""
    stored = stack.state_dict()
    ends = ("0.", f"{len(stack) - 1}.")
    return all(
        torch.equal(
            weight.clone().cpu(),
            (stored[name].float() * scales.get(f"{name}_scale", torch.ones(1))[:, None]).bfloat16(),
        )
        for name, weight in stack.named_parameters()
        if name.startswith(ends) and weight.ndim == 2
    )


def streamed(chosen: argparse.Namespace, kind: str, path: Path, link: float | None) -> dict[str, Any]:
    """The row of one way that the weights are stored."""
    device = torch.device("cpu" if chosen.device == "host" else chosen.device)
    stack = load(path, chosen.blocks, chosen.width)
    used = 2 * sum(weight.numel() for weight in stack.parameters())
    scales = row_scales(stack) if "row" in kind else {}
    x = inputs(chosen.tokens, chosen.width, device)
    engine = forebay.Engine(chosen.device, budget=used * chosen.share, registered=0)
    outputs: list[torch.Tensor] = []
    times, before, same = [], 0, True
    with forebay.attach(stack, engine, dtype=torch.bfloat16, scales=scales) as attachment:
        for step in range(3 + chosen.steps):
            if step == 3:
                before = attachment.stats()[0]["filled"]
            took = seconds(lambda: outputs.append(stack(x)), device)
            same = same and torch.equal(outputs[-1], outputs[0])
            del outputs[1:]
            if step >= 3:
                times.append(took)
        # On average: what is read ahead at the end of a step is the next one's.
        moved = (attachment.stats()[0]["filled"] - before) // chosen.steps
        same = same and is_converted(stack, scales)
    engine.settle()
    step_s = statistics.median(times)
    limit = moved / link if link else None
    row = {
        "kind": kind, "tokens": chosen.tokens, "same": same, "stored_bytes": sum(p.nbytes for p in stack.parameters()),
        "used_bytes": used, "moved_bytes": moved, "step_s": step_s, "limit_s": limit,
        "ratio": step_s / limit if limit else None, "times_s": times,
    }  # fmt: skip
    print(
        f"{kind:>22}: step {step_s * 1e3:7.1f} ms, moved {moved / 1e9:.2f} GB ({moved / step_s / 1e9:.1f} GB/s), "
        f"over the limit {row['ratio'] or float('nan'):.2f}, same {same}",
        flush=True,
    )
    return row


def main() -> int:
    chosen = parse()
    device = torch_device(chosen.device)
    is_cuda = device.type == "cuda"
    eight = chosen.file.with_suffix(".fp8" + chosen.file.suffix)
    with torch.no_grad():
        write_weights(chosen.file, chosen.blocks, chosen.width, device)
        write_weights(eight, chosen.blocks, chosen.width, device, torch.float8_e4m3fn)
        link = link_rate(device=device) if is_cuda else None
        rows = [
            streamed(chosen, kind, path, link)
            for kind, path in (("bf16", chosen.file), ("float8", eight), ("float8, scaled by row", eight))
        ]
    result = {**setting(is_cuda), "link_gb_s": link / 1e9 if link else None, "rows": rows}
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

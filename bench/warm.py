"""Warm starts: models used in turn, and a model that is attached again.

Three stacks of blocks of one file stand for a pipeline's text encoder, denoiser and decoder. Each round uses them in turn,
the denoiser for several steps, in memory that cannot hold them all. Then the denoiser is detached and attached again.
Outputs are compared with plain torch bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from stack import GIB, inputs, load, parse, timed_step, write_weights

import forebay

PARTS = {"encoder": (4, 1), "denoiser": (16, 6), "decoder": (2, 1)}
"""Blocks, and steps a round."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    own, rest = parser.parse_known_args()
    chosen = parse(["--tokens", "2048", "--free", "8", *rest])
    torch.cuda.set_device(chosen.device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        write_weights(chosen.file, chosen.blocks, chosen.width)
        x = inputs(chosen.tokens[0], chosen.width)
        expected = {}
        for name, (blocks, _) in PARTS.items():
            plain = load(chosen.file, blocks, chosen.width).to(chosen.device)
            expected[name] = timed_step(plain, x)[0]
            del plain
            torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(free - int(chosen.free[0] * GIB), dtype=torch.uint8, device="cuda")
        engine = forebay.Engine(chosen.device, headroom=1.5 * GIB)
        models = {name: load(chosen.file, blocks, chosen.width) for name, (blocks, _) in PARTS.items()}
        attached = {name: forebay.attach(model, engine, name=name) for name, model in models.items()}

        def use(label: str, name: str) -> None:
            before = attached[name].stats()[0]
            times, same = [], True
            for _ in range(PARTS[name][1]):
                y, seconds = timed_step(models[name], x)
                times.append(seconds)
                same = same and torch.equal(y, expected[name])
            after = attached[name].stats()[0]
            moved = after["filled"] - before["filled"]
            rows.append({"when": label, "part": name, "bytes": after["bytes"], "moved_bytes": moved, "steps_s": times, "same": same})  # fmt: skip
            print(
                f"{label:>8} {name:>9} {after['bytes'] / 1e9:5.1f} GB, moved {moved / 1e9:5.1f} GB in {len(times)} steps, "
                f"first {times[0] * 1e3:4.0f} ms, last {times[-1] * 1e3:4.0f} ms, same {same}",
                flush=True,
            )

        for number in (1, 2, 3):
            for name in PARTS:
                use(f"round {number}", name)
        attached["denoiser"].detach()
        attached["denoiser"] = forebay.attach(models["denoiser"], engine, name="denoiser")
        use("again", "denoiser")
    del ballast
    if own.out:
        own.out.write_text(json.dumps({"free_gib": chosen.free[0], "rows": rows}, indent=1))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

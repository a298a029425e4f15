"""The ring's shape: how fast streamed pages come through it by readers, slots and chunk.

The stack of ``stack.py`` with little compute, through the ring alone, once for each shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from stack import HEAD, link_rate, parse, plain_run, streamed_run, table_row, write_weights

SHAPES = [
    (8, 2, 2048),
    (12, 2, 2048),
    (12, 4, 1024),
    (6, 2, 4096),
    (7, 2, 4096),
    (8, 2, 3644),
    (10, 2, 3072),
    (12, 2, 2560),
    (5, 3, 4096),
    (6, 2, 5120),
    (8, 2, 4096),
]
"""Readers, slots of each, KiB a slot."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    own, rest = parser.parse_known_args()
    chosen = parse(["--tokens", "512", "--free", "8", "--steps", "6", *rest])
    torch.cuda.set_device(chosen.device)
    results = []
    with torch.inference_mode():
        nbytes = write_weights(chosen.file, chosen.blocks, chosen.width)
        link = link_rate()
        plain = plain_run(chosen)
        print(f"{'ring':>16} {HEAD}")
        for _ in range(2):
            for readers, slots, kib in SHAPES:
                ring = {"readers": readers, "slots": slots, "chunk": kib << 10}
                for row in streamed_run(
                    chosen, link, nbytes, plain, chosen.free[0], "ring", ring, quiet=True
                ):
                    results.append({"ring": ring, **row})
                    print(f"{readers:4} x {slots} x {kib:4} K {table_row(row)}", flush=True)
    if own.out:
        own.out.write_text(json.dumps({"link_gb_s": link / 1e9, "rows": results}, indent=1))


if __name__ == "__main__":
    main()

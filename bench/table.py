"""Writes bench/results/README.md from the results beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loaders
import peers

RESULTS = Path(__file__).parent / "results"

HEAD = """# Results

Written by `python bench/table.py` from the files beside it; a folder is a day and a machine. Ratios hold within one run:
these machines are shared.

The stack (`bench/stack.py`): bf16 transformer blocks of random weights in one safetensors file in the page cache, run as
plain torch with everything resident, then attached while a ballast leaves only the memory given. The limit of a step is
max(compute, bytes moved / link): compute is the plain step's time, the bytes are counted by the engine, the link is the
pinned host to device rate of the same run. "Same" compares every output with the plain one, bit for bit.

The peers (`bench/peers.py`) run the same blocks from the same file, each in a process of its own, and `bench/loaders.py`
loads the whole file to the GPU, where everything fits.
"""


def stack_table(path: Path) -> str:
    result = json.loads(path.read_text())
    lines = [
        f"## {path.parent.name}: {result['weights_bytes'] / 1e9:.1f} GB in {result['free_gib']:g} GiB",
        "",
        f"{result['gpu']}, {result['cores']} cores, torch {result['torch']}, link {result['link_gb_s']:.1f} GB/s, "
        f"{result['date']}. `{result['command'].split(' --out')[0]}`",
        "",
        "| tokens | same | compute | moved a step | first step | x limit | later steps | x limit | anonymous memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['tokens']} | {'yes' if row['same'] else 'NO'} | {row['compute_s'] * 1e3:.0f} ms | "
            f"{row['moved_bytes'] / 1e9:.1f} GB | {row['first_s'] * 1e3:.0f} ms | {row['first_ratio']:.2f} | "
            f"{row['later_s'] * 1e3:.0f} ms | {row['ratio']:.2f} | +{row['anonymous_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def side_by_side(path: Path, title: str, tables: Callable[[dict[str, Any]], str]) -> str:
    result = json.loads(path.read_text())
    picture = path.with_suffix(".svg")
    parts = [f"## {path.parent.name}: {title}", tables(result)]
    if picture.exists():
        parts.append(f"![{title}]({picture.relative_to(RESULTS)})")
    return "\n\n".join(parts)


def checks(path: Path) -> str:
    return f"## {path.parent.name}: the whole suite on the GPU\n\n`bench/gpu_check.sh`\n\n```text\n{path.read_text().strip()}\n```"


def main() -> None:
    parts = [HEAD.strip()]
    parts += [stack_table(path) for path in sorted(RESULTS.glob("*/stack.json"))]
    parts += [
        side_by_side(path, "Forebay and its peers", peers.markdown)
        for path in sorted(RESULTS.glob("*/peers.json"))
    ]
    parts += [
        side_by_side(path, "loading a file to the GPU", loaders.markdown)
        for path in sorted(RESULTS.glob("*/loaders.json"))
    ]
    parts += [checks(path) for path in sorted(RESULTS.glob("*/tests.txt"))]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

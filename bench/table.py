"""Writes bench/results/README.md from the results beside it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

HEAD = """# Results

Written by `python bench/table.py` from the files beside it; a folder is a day and a machine. Ratios hold within one run:
these machines are shared.

The stack (`bench/stack.py`): bf16 transformer blocks of random weights in one safetensors file in the page cache, run as
plain torch with everything resident, then attached while a ballast leaves only the memory given. The limit of a step is
max(compute, bytes moved / link): compute is the plain step's time, the bytes are counted by the engine, the link is the
pinned host to device rate of the same run. "Same" compares every output with the plain one, bit for bit.
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


def checks(path: Path) -> str:
    return f"## {path.parent.name}: the whole suite on the GPU\n\n`bench/gpu_check.sh`\n\n```text\n{path.read_text().strip()}\n```"


def main() -> None:
    parts = [HEAD.strip()]
    parts += [stack_table(path) for path in sorted(RESULTS.glob("*/stack.json"))]
    parts += [checks(path) for path in sorted(RESULTS.glob("*/tests.txt"))]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

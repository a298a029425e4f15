"""How Forebay's figures grow with the bytes of the weights and with their number.

Bytes: the stack of ``stack.py`` with few blocks to many, in a third of its weights' memory each time; where the file has
too few blocks it is mapped over again. Number: files of the same bytes cut into ever more tensors, used by ``forebay bench``
in a quarter of their memory, where only Forebay itself takes time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from stack import GIB, HEAD, link_rate, parse, plain_run, streamed_run, table_row, write_weights
from tensor_file import write_tensors

KINDS = [10, 1_000, 100_000]
"""Tensors in a file."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 40, 96], help="blocks of 0.63 GB each")
    parser.add_argument("--cli", type=Path, help="the command line tool, for the number of tensors")
    parser.add_argument(
        "--tensor-gb", type=float, default=6.6, help="GB of such a file (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where these files go")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    own, rest = parser.parse_known_args()
    chosen = parse(["--tokens", "512", "--steps", "6", *rest])
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "bytes": [], "tensors": []}
    if own.sizes:
        by_bytes(chosen, own.sizes, result)
    if own.cli:
        by_number(own, result)
    if own.out:
        own.out.write_text(json.dumps(result, indent=1))
    return 0 if all(row["same"] for row in result["bytes"]) else 1


def by_bytes(chosen: argparse.Namespace, sizes: list[int], result: dict[str, Any]) -> None:
    torch.cuda.set_device(chosen.device)
    print(f"{'weights':>9} {HEAD}")
    with torch.inference_mode():
        write_weights(chosen.file, min(chosen.blocks, max(sizes)), chosen.width)
        link = result["link_gb_s"] = link_rate() / 1e9
        for blocks in sizes:
            chosen.blocks = blocks
            nbytes = blocks * 2 * (12 * chosen.width**2 + 13 * chosen.width)
            free = max(1.0, nbytes / 3 / GIB)
            plain = plain_run(chosen)
            for row in streamed_run(chosen, link * 1e9, nbytes, plain, free, "registered", quiet=True):
                result["bytes"].append({"weights_bytes": nbytes, **row})
                print(f"{nbytes / 1e9:6.1f} GB {table_row(row)}", flush=True)


def by_number(own: argparse.Namespace, result: dict[str, Any]) -> None:
    print(f"{'tensors':>9} {'first':>9} {'x limit':>8} {'later':>9} {'x limit':>8} {'waits':>8}")
    for count in KINDS:
        path = own.folder / "forebay-tensors.safetensors"
        nbytes = int(own.tensor_gb * 1e9) // count // 512 * 512
        write_tensors(path, {f"layers.{i}.weight": nbytes for i in range(count)})
        command = [own.cli, "bench", path, "--free", str(path.stat().st_size // 4), "--steps", "4", "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        report = json.loads(done.stdout)
        path.unlink()
        passes = report["models"][0]["passes"]
        result["tensors"].append(
            {"tensors": count, "link_bytes_per_s": report["link"]["bytes_per_s"], "passes": passes}
        )
        first, last = passes[0], passes[-1]
        print(
            f"{count:9} {first['seconds'] * 1e3:6.0f} ms {first['times_limit']:8.2f} {last['seconds'] * 1e3:6.0f} ms "
            f"{last['times_limit']:8.2f} {last['waits']:8}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())

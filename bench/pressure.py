"""The OOM matrix: weights, activations and other processes in a card that cannot hold them all.

A ballast makes a card of ``--card`` GiB of the GPU. A stack of bf16 blocks of 0.5, 1, 2 and 4 times its size runs in it while
something else wants memory: an activation of 10, 50, 90 and 97% of the card in the middle of a step, once or in every step;
another process that takes half of the card during a step and gives it back; 200 activations one after the other; a video
model's shape (Wan 2.2 at 1280x1280x81: activations as large as its 134,400 tokens', 28 GB, on 16 GB). For each of torch's
allocators, and beside it diffusers' group offloading and comfy-aimdo. Every output is compared bit for bit with plain torch's, run block by block with nothing else in
its way. Every cell is a row: finished or the error, the same or not, seconds a step. Beside the video model's shape stands plain
torch with a layer's weights at a time: whether there is room for the activations themselves.

Each system, allocator and size is a process of its own with a time limit. One that dies or hangs is a row as well, and
a new process goes on with the next cell. On ``--device host`` the card is a small host device and activations are taken from it
by hand; ``--tiny`` has sizes for that.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import children
from children import Outcome, Row

OURS, PLAIN = "forebay", "to"
PEERS: dict[str, tuple[str, str | None]] = {
    "diffusers": ("diffusers group offloading, streams", "diffusers"),
    "aimdo": ("comfy-aimdo, from the file", "comfy-aimdo"),
    PLAIN: ("plain torch, a layer at a time", None),
}
"""Titles, and the package that a system is."""
ALLOCATORS = {
    "native": "",
    "async": "backend:cudaMallocAsync",
    "expandable": "expandable_segments:True",
}
MECHANISMS = {
    "native": "cudaMalloc redirected",
    "async": "cudaMallocAsync redirected",
    "expandable": "polling, and the forward run again",
}


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix. ``kind`` is ``once``, ``every``, ``process``, ``spikes`` or ``video``."""

    kind: str
    share: float
    """Of the card, that something else takes."""

    def title(self) -> str:
        names = {
            "once": f"{self.share:.0%} once",
            "every": f"{self.share:.0%} in every step",
            "process": f"another process takes {self.share:.0%}",
            "spikes": f"{self.share:.0%}, many times",
            "video": "a video model's shape",
        }
        return names[self.kind]


SHARES = (0.1, 0.5, 0.9, 0.97)
ACTIVATIONS = [Cell(kind, share) for share in SHARES for kind in ("once", "every")]
PROCESS, SPIKES, VIDEO = Cell("process", 0.5), Cell("spikes", 0.5), Cell("video", 0.0)


SETUP = 2
"""How many times longer than a cell its preparation may take."""


@dataclass(frozen=True)
class Group:
    """Cells that one process runs, one after the other."""

    system: str
    allocator: str
    times: float
    """Weights, in cards."""
    cells: tuple[Cell, ...]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--card", type=float, default=12, help="GiB of the emulated card (default: %(default)s)"
    )
    parser.add_argument(
        "--video-card", type=float, default=16e9 / 2**30, help="GiB of the card for the video model's shape"
    )
    parser.add_argument(
        "--times",
        type=float,
        nargs="+",
        default=[0.5, 1, 2, 4],
        help="weights, in cards (default: %(default)s)",
    )
    parser.add_argument(
        "--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS), help="torch's (default: all)"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument(
        "--only", nargs="+", choices=["activations", "process", "spikes", "video"], help="kinds of cells"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="all cells of torch's own allocator, of the others and the peers only those of twice the card",
    )
    parser.add_argument("--width", type=int, default=5120, help="width of a block (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step (default: %(default)s)")
    parser.add_argument("--spikes", type=int, default=200, help="spikes of that row (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes for the host device")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds a cell may take (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels; default: what is installed")
    parser.add_argument("--device", default="cuda:0", help="host or cuda:N (default: %(default)s)")
    parser.add_argument("--file", type=Path, help="where the weights go; default: in the temporary folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("target/pressure"),
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.tiny:
        chosen.card, chosen.video_card, chosen.width, chosen.tokens = 1 / 32, 1 / 32, 320, 8
        chosen.spikes = min(chosen.spikes, 20)
    if chosen.device == "host":
        chosen.allocators, chosen.peers = ["native"], []
    if chosen.file is None:
        chosen.file = Path(f"/tmp/forebay-pressure-{chosen.width}.safetensors")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.child:
        return child(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    children.end_with_their_parent()
    wants = {"sizes": sizes(chosen), "video": wanted(chosen, "video")}
    reference = run(chosen, "reference", {}, wants, timeout=240)
    if reference.reason:
        raise SystemExit(f"nothing to compare with: {reference.reason}")
    machine = next(row["machine"] for row in reference.rows if "machine" in row)
    wheels = children.Wheels(chosen.wheels)
    rows: list[Row] = []
    result: dict[str, Any] = {}
    for group in groups(chosen):
        rows += run_group(chosen, group, wheels)
        # After each, so that a run that is stopped leaves what it has.
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            **machine,
            "card_gib": chosen.card,
            "tokens": chosen.tokens,
            "rows": rows,
        }
        (chosen.out / "pressure.json").write_text(json.dumps(result, indent=1))
        (chosen.out / "pressure.md").write_text(markdown(result) + "\n")
    print(markdown(result))
    return 0 if all(is_right(row) for row in rows if row["system"] == OURS) else 1


def sizes(chosen: argparse.Namespace) -> list[float]:
    return sorted({*chosen.times, *([1.0] if wanted(chosen, "spikes") else [])})


def wanted(chosen: argparse.Namespace, kind: str) -> bool:
    return chosen.only is None or kind in chosen.only


def groups(chosen: argparse.Namespace) -> list[Group]:
    """What is to be run, in its order: ours first, everything at twice the card before the rest of it."""
    # A small card has not even room for the norms beside the largest.
    shares = SHARES[:-1] if chosen.tiny else SHARES
    activations = (
        tuple(cell for cell in ACTIVATIONS if cell.share in shares) if wanted(chosen, "activations") else ()
    )
    process = (PROCESS,) if wanted(chosen, "process") else ()
    found = [Group(OURS, "native", times, activations + process) for times in chosen.times]
    if wanted(chosen, "spikes"):
        found.append(Group(OURS, "native", 1.0, (SPIKES,)))
    if "native" not in chosen.allocators:
        found.clear()
    some = [times for times in chosen.times if times == 2] if chosen.quick else chosen.times
    for allocator in chosen.allocators:
        if allocator != "native":
            found += [Group(OURS, allocator, times, activations + process) for times in some]
    peers = [peer for peer in chosen.peers if peer != PLAIN]
    if wanted(chosen, "video"):
        # Of plain torch nothing else is asked, and the allocator is what counts.
        systems = [OURS, *(peer for peer in chosen.peers if peer == PLAIN)]
        found += [
            Group(system, allocator, 0.0, (VIDEO,)) for allocator in chosen.allocators for system in systems
        ]
        found += [Group(peer, "native", 0.0, (VIDEO,)) for peer in peers]
    # A peer that ran out of memory begins again for the next cell, which takes time.
    of_peers = tuple(cell for cell in activations if not chosen.quick or cell.kind == "once")
    for peer in peers:
        found += [Group(peer, "native", times, of_peers) for times in some]
    return [group for group in found if group.cells]


def run_group(chosen: argparse.Namespace, group: Group, wheels: children.Wheels) -> list[Row]:
    """A row for each cell. After one that ended its process another process goes on."""
    rows: list[Row] = []
    cells = list(group.cells)
    try:
        package = package_of(group.system)
        site = wheels.site([*([package] if package else []), *NEEDS.get(group.system, ())])
    except RuntimeError as error:
        return [row_of(group, cell, {"same": False, "reason": str(error)}) for cell in cells]
    while cells:
        setting = {**asdict(group), "cells": [asdict(cell) for cell in cells]}
        settings = ALLOCATORS[group.allocator]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": settings} if settings else {}
        limit = 30 + chosen.timeout * (SETUP + sum(patience(cell.kind) for cell in cells))
        outcome = run(chosen, group.system, environment, setting, limit, site)
        done = [row for row in outcome.rows if "cell" in row]
        for row in done:
            rows.append(row_of(group, cells.pop(0), {**row, "versions": outcome.versions}))
            print(line(rows[-1]), flush=True)
        if cells and (outcome.reason or not done):
            reason = outcome.reason or "its process ended before it"
            rows.append(row_of(group, cells.pop(0), {"same": False, "reason": reason}))
            print(line(rows[-1]), flush=True)
    return rows


NEEDS = {
    "diffusers": (
        "accelerate", "psutil", "huggingface-hub", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "click", "filelock",
        "fsspec", "requests", "urllib3", "charset-normalizer", "importlib-metadata", "zipp", "pillow", "safetensors",
    )
}  # fmt: skip


def run(
    chosen: argparse.Namespace,
    name: str,
    environment: dict[str, str],
    setting: dict[str, Any],
    timeout: float,
    site: Path | None = None,
) -> Outcome:
    settings = ["card", "video_card", "width", "tokens", "spikes", "timeout", "device", "file"]
    arguments: list[object] = ["--child", json.dumps({"system": name, **setting})]
    for key in settings:
        arguments += [f"--{key.replace('_', '-')}", getattr(chosen, key)]
    log = chosen.out / f"pressure-{name}.log"
    return children.run_child(
        Path(__file__), arguments, site=site, log=log, timeout=timeout, environment=environment
    )


def child(chosen: argparse.Namespace) -> int:
    setting = json.loads(chosen.child)
    package = package_of(setting["system"])
    with children.reporting(chosen.report, [name for name in (package,) if name]) as report:
        if package == "comfy-aimdo":
            from comfy_aimdo import control  # it wants to be there before torch

            if not control.init():
                raise RuntimeError("comfy_aimdo.control.init() returned False")
        import pressure_cells

        if setting["system"] == "reference":
            pressure_cells.reference(chosen, setting["sizes"], setting["video"], report)
        else:
            pressure_cells.measure(chosen, setting, report)
    return 0


def patience(kind: str) -> int:
    """How many times longer than others a cell may take."""
    return 4 if kind == "spikes" else 1


def row_of(group: Group, cell: Cell, row: Row) -> Row:
    return {
        "system": group.system,
        "allocator": group.allocator,
        "times": group.times,
        **row,
        "cell": cell.title(),
        "kind": cell.kind,
        "share": cell.share,
    }


def package_of(system: str) -> str | None:
    """What a system is installed from, where it is a peer's."""
    return PEERS[system][1] if system in PEERS else None


def title_of(system: str, allocator: str) -> str:
    """A system, and of ours what carries it under this allocator."""
    return f"Forebay, {MECHANISMS[allocator]}" if system == OURS else PEERS[system][0]


def is_right(row: Row) -> bool:
    """Finished with the same bits, and after a spike as before it."""
    spikes = row.get("spikes")
    return bool(row["same"]) and (spikes is None or spikes["back"])


def line(row: Row) -> str:
    what = f"{row['system']:>10} {row['allocator']:>10} {row['times']:4g} x {row['cell']:<32}"
    return f"{what} {outcome_of(row)}"


def outcome_of(row: Row) -> str:
    """A cell in a few words."""
    if not row.get("steps_s"):
        return row.get("reason", "no result").replace("|", "/")
    text = f"{max(row['steps_s']):.2f} s" + ("" if row["same"] else ", NOT THE SAME")
    if row.get("reason"):
        text += f" ({row['reason']})".replace("|", "/")
    if row.get("took_s") is not None:
        text += f"; taken within {row['took_s']:.2f} s"
    if row.get("again"):
        text += f"; run again {row['again']} times"
    return text


def markdown(result: dict[str, Any]) -> str:
    """The tables: for each system and allocator the cells against the weights."""
    rows = result["rows"]
    parts = [
        f"{result['gpu']}, torch {result['torch']}, a card of {result['card_gib']:g} GiB, {result['tokens']} tokens, "
        f"{result['date']}. `{result['command'].split(' --out')[0]}`",
        "The longest step of each cell, in seconds; every output the same as plain torch's unless it says so.",
    ]
    matrix = [row for row in rows if row["kind"] in ("once", "every", "process")]
    for system, allocator in dict.fromkeys((row["system"], row["allocator"]) for row in matrix):
        own = [row for row in matrix if (row["system"], row["allocator"]) == (system, allocator)]
        times = list(dict.fromkeys(row["times"] for row in own))
        title = title_of(system, allocator)
        found = {(row["cell"], row["times"]): row for row in own}
        lines = [
            f"| {title} | " + " | ".join(f"weights {n:g} x the card" for n in times) + " |",
            "|---" * (len(times) + 1) + "|",
        ]
        for cell in dict.fromkeys(row["cell"] for row in own):
            texts = [outcome_of(found[cell, n]) if (cell, n) in found else "" for n in times]
            lines.append("| " + " | ".join([cell, *texts]) + " |")
        parts.append("\n".join(lines))
    for row in rows:
        if row["kind"] == "spikes" and "spikes" in row:
            told = row["spikes"]
            parts.append(
                f"{told['count']} spikes of {row['share']:.0%}, weights {row['times']:g} x the card: resident "
                f"{told['resident'][0] / 1e9:.2f} GB before and {told['resident'][1] / 1e9:.2f} after (a page is "
                f"{told['page'] / 1e6:.0f} MB), a step {told['step_s'][0] * 1e3:.0f} ms and {told['step_s'][1] * 1e3:.0f} ms, "
                f"moved a step {told['moved'][0] / 1e9:.2f} GB and {told['moved'][1] / 1e9:.2f}, refilled a spike "
                f"{told['refilled'] / 1e9:.2f} GB; same: {'yes' if row['same'] else 'NO'}"
            )
        elif row["kind"] in ("spikes", "video"):
            name = title_of(row["system"], row["allocator"])
            name += "" if row["system"] == OURS else f", {row['allocator']}"
            parts.append(f"{row['cell']}, {name}: {outcome_of(row)}; {row.get('told', '')}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

"""Forebay and its peers side by side: the same weights, the same inputs, the same free memory.

Runs each system in a process of its own over one safetensors file of bf16 transformer blocks in the page cache, with a
ballast that leaves only so much of the GPU free. A first step counts from "the model is loaded on the CPU" (mapped) to the
first output: pinning and other preparation are part of it, and are also given apart as set-up; what a system prepares once a
process is charged to each of its first steps. Later steps are the median of the rest. Every output is compared bit for
bit with plain torch's, with everything resident. The limit of a step is max(plain torch's time, bytes Forebay moved /
pinned link rate). A system that cannot run is a row that says why.

Peers come from a folder of wheels (``bench/peer_wheels.sh``), or from what is installed where ``--wheels`` is not given.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import children
import plot
from children import Outcome, Row


@dataclass(frozen=True)
class Peer:
    """What the parent has to know of a system; ``runners.py`` has the rest."""

    title: str
    package: str | None = None
    needs: tuple[str, ...] = ()
    one_size: bool = False
    """Configured with the free memory once for all: a process for each."""


_HUB = (
    "huggingface-hub", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "click", "filelock",
    "fsspec", "requests", "urllib3", "charset-normalizer", "importlib-metadata", "zipp", "pillow", "safetensors",
)  # fmt: skip

PLAIN = "plain"
OURS = "forebay"
PEERS = {
    PLAIN: Peer("plain torch, all resident"),
    OURS: Peer("Forebay", "forebay"),
    "to": Peer("`.to()` per layer"),
    "accelerate": Peer("accelerate `cpu_offload`", "accelerate", ("safetensors", "psutil")),
    "diffusers": Peer("diffusers group offloading, streams", "diffusers", ("accelerate", "psutil", *_HUB)),
    "mmgp": Peer(
        "mmgp, pinned, async", "mmgp", ("optimum-quanto", "accelerate", "psutil", "safetensors"), True
    ),
    "aimdo": Peer("comfy-aimdo, from the file", "comfy-aimdo"),
    "aimdo-pinned": Peer("comfy-aimdo, from pinned memory", "comfy-aimdo"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 25 GB)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="tokens a step")
    parser.add_argument(
        "--free", type=float, nargs="+", default=[16, 8, 4], help="GiB of device memory left free"
    )
    parser.add_argument(
        "--room",
        type=float,
        default=1.5,
        help="GiB of it for activations, where a system is told (default: %(default)s)",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--steps", type=int, default=8, help="later steps at most (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="begin no other later step after so long (default: %(default)s)",
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=1.5,
        help="seconds after a first step, in which a system may prepare (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds a process may take (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels")
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-stack.safetensors"), help="where the weights go"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("target/peers"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = parse()
    if chosen.child:
        return child(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    children.end_with_their_parent()
    wheels = children.Wheels(chosen.wheels)
    names = [PLAIN, OURS, *(name for name in chosen.peers if name not in (PLAIN, OURS))]
    outcomes: dict[str, list[Outcome]] = {}
    for name in names:
        sizes = [[free] for free in chosen.free] if PEERS[name].one_size else [chosen.free]
        outcomes[name] = [run(chosen, name, free, wheels) for free in sizes]
        if name == PLAIN and outcomes[name][0].reason:
            raise SystemExit(f"nothing to compare with, plain torch did not run: {outcomes[name][0].reason}")
        if OURS in outcomes:  # after each, so that a run that is stopped leaves what it has
            result = gather(chosen, outcomes)
            (chosen.out / "peers.json").write_text(json.dumps(result, indent=1))
            (chosen.out / "peers.md").write_text(markdown(result) + "\n")
            (chosen.out / "peers.svg").write_text(picture(result))
    print(markdown(result))
    return 0 if all(row["same"] for row in result["rows"] if row["peer"] == OURS) else 1


def child(chosen: argparse.Namespace) -> int:
    packages = [name for name in (PEERS[chosen.child].package,) if name]
    with children.reporting(chosen.report, packages) as report:
        if PEERS[chosen.child].package == "comfy-aimdo":
            from comfy_aimdo import control  # it wants to be there before torch

            if not control.init():
                raise RuntimeError("comfy_aimdo.control.init() returned False")
        import runners

        runners.measure(chosen, report)
    return 0


def run(chosen: argparse.Namespace, name: str, free: list[float], wheels: children.Wheels) -> Outcome:
    peer = PEERS[name]
    try:
        site = wheels.site([peer.package, *peer.needs]) if peer.package and name != OURS else None
    except RuntimeError as error:
        outcome = Outcome(reason=str(error))
    else:
        settings = ["blocks", "width", "tokens", "steps", "seconds", "pause", "room", "device", "file"]
        arguments: list[object] = ["--child", name, "--free", *free]
        for setting in settings:
            value = getattr(chosen, setting)
            arguments += [f"--{setting}", *(value if isinstance(value, list) else [value])]
        # Plain torch writes the weights first.
        limit = chosen.timeout + (240 if name == PLAIN else 0)
        log = chosen.out / f"peers-{name}.log"
        outcome = children.run_child(Path(__file__), arguments, site=site, log=log, timeout=limit)
    sizes = "/".join(f"{size:g}" for size in free)
    print(f"{name:14} {sizes:>8} GiB: {outcome.reason or 'ok'}", flush=True)
    return outcome


def gather(chosen: argparse.Namespace, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """All rows with their limits, one for each (system, free memory, tokens), measured or not."""
    found = {
        (name, row["free_gib"], row["tokens"]): row
        for name, runs in outcomes.items()
        for outcome in runs
        for row in outcome.rows
        if "tokens" in row
    }
    machine = next(row["machine"] for row in outcomes[PLAIN][0].rows if "machine" in row)
    rows: list[Row] = []
    for name, runs in outcomes.items():
        reasons = [outcome.reason for outcome in runs if outcome.reason]
        for free in [None] if name == PLAIN else chosen.free:
            for tokens in chosen.tokens:
                row = found.get(
                    (name, free, tokens),
                    {"same": False, "reason": "; ".join(dict.fromkeys(reasons)) or "no result"},
                )
                rows.append({"peer": name, "free_gib": free, "tokens": tokens, **row})
    compute = {row["tokens"]: row["later_s"] for row in rows if row["peer"] == PLAIN}
    ours = {(row["free_gib"], row["tokens"]): row for row in rows if row["peer"] == OURS}
    for row in rows:
        base = ours.get((row["free_gib"], row["tokens"]))
        if base is None or "later_s" not in base or "later_s" not in row:
            continue
        seconds = compute[row["tokens"]]
        row["limit_s"] = max(seconds, base["moved_bytes"] / machine["link_bytes_s"])
        row["first_limit_s"] = max(seconds, machine["weights_bytes"] / machine["link_bytes_s"])
        row["later_of_ours"] = row["later_s"] / base["later_s"]
        row["first_of_ours"] = row["first_s"] / base["first_s"]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        **machine,
        "free_gib": chosen.free,
        "tokens": chosen.tokens,
        "peers": {
            name: {
                "title": PEERS[name].title,
                "versions": {package: v for run in runs for package, v in run.versions.items()},
                "anonymous_bytes": max(run.anonymous_bytes for run in runs),
                "taken_bytes": max(run.taken_bytes for run in runs),
            }
            for name, runs in outcomes.items()
        },
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables: for each amount of free memory the systems against the numbers of tokens."""
    rows = {(row["peer"], row["free_gib"], row["tokens"]): row for row in result["rows"]}
    tokens = result["tokens"]
    parts = [
        f"{result['gpu']}, {result['cores']} cores, torch {result['torch']}, {result['weights_bytes'] / 1e9:.1f} GB of "
        f"weights, link {result['link_bytes_s'] / 1e9:.1f} GB/s, {result['date']}. "
        f"`{result['command'].split(' --out')[0]}`",
        "Seconds a step, and in brackets how many times Forebay's. Memory is the peak of what the process took of the "
        "machine's available memory, page cache not counted, and of it pinned.",
    ]
    for free in result["free_gib"]:
        head = [f"{free:g} GiB free", *(f"{kind}, {n} tokens" for n in tokens for kind in ("first", "later"))]
        lines = [
            "| " + " | ".join([*head, "set-up", "same", "memory"]) + " |",
            "|---" * (len(head) + 3) + "|",
        ]
        for name, peer in result["peers"].items():
            of_peer = [rows[name, None if name == PLAIN else free, n] for n in tokens]
            title = " ".join([peer["title"], *peer["versions"].values()])
            measured = [row for row in of_peer if "later_s" in row]
            cells = [cell(row, kind) for row in of_peer for kind in ("first", "later")]
            if measured:
                setup = f"{max(row['setup_s'] for row in measured):.2f} s"
                off = max(row.get("difference", 0) for row in measured)
                same = (
                    "yes" if all(row["same"] for row in measured) else f"NO (by {off:.1g})" if off else "NO"
                )
                pinned = max(row["pinned_bytes"] for row in measured)
                memory = f"{peer['taken_bytes'] / 2**30:.1f} GiB ({pinned / 2**30:.1f})"
            else:
                cells = [of_peer[0]["reason"].replace("|", "/"), *[""] * (len(cells) - 1)]
                setup = same = memory = ""
            lines.append("| " + " | ".join([title, *cells, setup, same, memory]) + " |")
        limits = [rows[OURS, free, n] for n in tokens]
        cells = [
            f"{row[key]:.3f}" if key in row else "" for row in limits for key in ("first_limit_s", "limit_s")
        ]
        lines.append("| " + " | ".join(["*limit*", *cells, "", "", ""]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cell(row: Row, kind: str) -> str:
    if "later_s" not in row:
        return row["reason"].replace("|", "/")
    times = row.get(f"{kind}_of_ours")
    return f"{row[f'{kind}_s']:.3f}" + (f" ({times:.1f})" if times and row["peer"] != OURS else "")


def picture(result: dict[str, Any]) -> str:
    rows = {(row["peer"], row["free_gib"], row["tokens"]): row for row in result["rows"]}
    panels = []
    for kind, limit in (("later", "limit_s"), ("first", "first_limit_s")):
        for free in result["free_gib"]:
            lines = {
                peer["title"].replace("`", ""): [
                    rows[name, None if name == PLAIN else free, n].get(f"{kind}_s") for n in result["tokens"]
                ]
                for name, peer in result["peers"].items()
                if name != PLAIN
            }
            limits = [rows[OURS, free, n].get(limit) for n in result["tokens"]]
            title = f"{kind} step{'s' if kind == 'later' else ''}, {free:g} GiB free"
            panels.append(plot.Panel(title, [f"{n}" for n in result["tokens"]], lines, limits))
    subtitle = (
        f"{result['gpu']}, {result['weights_bytes'] / 1e9:.1f} GB of bf16 blocks, link "
        f"{result['link_bytes_s'] / 1e9:.0f} GB/s; seconds over tokens a step, logarithmic; dashed: the physical limit"
    )
    columns = max(2, len(result["free_gib"]))  # of one size first and later steps side by side
    return plot.lines("Seconds a step when the weights do not fit", subtitle, panels, columns)


if __name__ == "__main__":
    sys.exit(main())

"""ComfyUI with random weights of the real shapes: its own offloading, comfy-aimdo, Forebay in place of it, and native.

A cell is a model, a format, with or without a LoRA, text encoders and decoder, on a card of so many GiB: another process
holds the rest of the device's memory. Every system runs every cell in a process of its own, one after the other, with the
same seed; results are compared by hash with those of ComfyUI's own offloading (``--disable-dynamic-vram``), with a LoRA with
those of comfy-aimdo. A first step counts from the call that samples; later steps are the median of all others. The limit of
a later step is the larger of the fastest later step on a card that holds everything, measured here, and the bytes that were
not resident over the link's rate.

What runs is a tool that starts ComfyUI without a server (``--tool``), over a checkout (``--comfyui``, a folder or a tar.gz
of one). ``bench/comfyui_wheels.sh`` gathers both and what ComfyUI imports, for a machine without a network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import runpy
import statistics
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import children
from children import Outcome, Row

GIB = 1 << 30
PACKAGE = "forebay.comfyui.aimdo"
NEEDS = ("torchsde", "trampoline", "comfy-kitchen")
"""What ComfyUI imports and the machine may lack."""


@dataclass(frozen=True)
class System:
    """A way in which ComfyUI keeps its weights."""

    title: str
    comfy: tuple[str, ...] = ()
    distribution: str | None = "forebay"
    native: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def wheel(self) -> str | None:
        """What is to be installed for it alone."""
        return None if self.distribution == "forebay" else self.distribution


LEGACY = "legacy"
SYSTEMS = {
    LEGACY: System("ComfyUI's own offloading", ("--disable-dynamic-vram",), None),
    "aimdo": System("", distribution="comfy-aimdo"),
    "dropin": System("Forebay in its place"),
    "unpinned": System(
        "Forebay in its place, nothing pinned", environment=(("FOREBAY_COMFYUI_PINNED_GIB", "0"),)
    ),
    "native": System("Forebay, native", native=True),
}


@dataclass(frozen=True)
class Cell:
    """What is run."""

    arch: str
    quant: str = "bf16"
    card: float = 12
    """GiB of device memory that are free at the start; 0: all."""
    size: str = "full"
    instances: int = 1
    rounds: int = 1
    lora: float = 0
    te: bool = False
    vae: bool = False

    @property
    def name(self) -> str:
        """As the command line takes it."""
        parts = [self.arch, self.quant, f"{self.card:g}"]
        parts += [f"lora{self.lora:g}"] if self.lora else []
        parts += [f"x{self.instances}"] if self.instances > 1 else []
        parts += [f"r{self.rounds}"] if self.rounds > 1 else []
        parts += [word for word in ("te", "vae") if getattr(self, word)]
        return "-".join([*parts, *([] if self.size == "full" else [self.size])])

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell of a name."""
        arch, quant, card, *rest = text.split("-")
        cell = cls(arch, quant, float(card))
        for word in rest:
            if word in ("te", "vae"):
                cell = replace(cell, **{word: True})
            elif word.startswith("lora"):
                cell = replace(cell, lora=float(word[4:]))
            elif re.fullmatch(r"x\d+", word):
                cell = replace(cell, instances=int(word[1:]))
            elif re.fullmatch(r"r\d+", word):
                cell = replace(cell, rounds=int(word[1:]))
            elif word in ("tiny", "small", "medium", "full"):
                cell = replace(cell, size=word)
            else:
                raise argparse.ArgumentTypeError(f"no part of a cell's name: {word}")
        return cell


GROUPS = {
    "flux": ["flux-bf16-80", "flux-bf16-12", "flux-bf16-24", "flux-bf16-12-lora0.8", "flux-fp8scaled-8"],
    "wan": ["wan-fp16-80", "wan-fp16-8-x2-r2"],
    "small": [
        "zimage-bf16-80", "zimage-bf16-8", "zimage-fp8scaled-8-lora0.8", "sd15-bf16-80", "sd15-bf16-8-lora0.8",
    ],
    "whole": ["flux-bf16-24-te-vae", "zimage-bf16-12-vae"],
    "tiny": ["flux-bf16-0-tiny", "flux-fp8scaled-0-lora0.8-tiny"],
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout, or a tar.gz of one")
    parser.add_argument("--tool", type=Path, required=True, help="what starts ComfyUI without a server")
    parser.add_argument("--wheels", type=Path, help="folder of wheels; default: what is installed")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["flux"],
        help=f"ARCH-QUANT-CARD[-loraN][-xINSTANCES][-rROUNDS][-te][-vae][-SIZE], or a group: {', '.join(GROUPS)}",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["legacy", "aimdo", "dropin"])
    parser.add_argument("--steps", type=int, default=4, help="steps a sampling (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a process (default: %(default)s)")
    parser.add_argument(
        "--until", type=float, default=540, help="begin no other after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/forebay-comfyui"), help="where weights go")
    parser.add_argument("--out", type=Path, default=Path("target/comfyui"), help="folder for the results")
    parser.add_argument("--child", choices=[*SYSTEMS, "machine"], help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = parse()
    if chosen.child:
        return child(chosen)
    started = time.monotonic()
    names = [name for cell in chosen.cells for name in GROUPS.get(cell, [cell])]
    cells = [Cell.parse(name) for name in dict.fromkeys(names)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    children.end_with_their_parent()
    wheels = children.Wheels(chosen.wheels)
    systems = [name for name in SYSTEMS if name in chosen.systems]
    with tempfile.TemporaryDirectory(prefix="forebay-comfyui-") as folder:
        root = unpacked(chosen.comfyui, Path(folder))
        found = run(chosen, root, "machine", None, wheels).rows
        machine = found[0] if found else {"gpu": "none", "memory_bytes": 0, "link_gb_s": 0}
        rows: list[Row] = []
        for cell in cells:
            for name in systems:
                if time.monotonic() - started > chosen.until:
                    outcome = Outcome(reason=f"not begun: {chosen.until:.0f} s are over")
                else:
                    outcome = run(chosen, root, name, cell, wheels, machine["memory_bytes"])
                rows.append(row_of(cell, name, outcome, chosen.steps))
                print(f"{cell.name:28} {name:8} {told(rows[-1])}", flush=True)
                result = gathered(machine, rows)
                (chosen.out / "comfyui.json").write_text(json.dumps(result, indent=1))
                (chosen.out / "comfyui.md").write_text(markdown(result) + "\n")
    print(markdown(result))
    return 0 if all(row.get("same", True) for row in result["rows"]) else 1


def unpacked(checkout: Path, folder: Path) -> Path:
    """The folder of a checkout."""
    if checkout.is_dir():
        return checkout.resolve()
    with tarfile.open(checkout) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(
    chosen: argparse.Namespace,
    root: Path,
    name: str,
    cell: Cell | None,
    wheels: children.Wheels,
    memory_bytes: int = 0,
) -> Outcome:
    """Runs one cell on one system."""
    wheel = SYSTEMS[name].wheel if name in SYSTEMS else None
    try:
        # The first name is the folder's: a system with a wheel of its own has one of its own.
        site = wheels.site([*filter(None, [wheel]), *NEEDS])
    except RuntimeError as error:
        return Outcome(reason=str(error))
    arguments: list[object] = ["--child", name, "--comfyui", root, "--tool", chosen.tool.resolve()]
    arguments += ["--device", chosen.device, "--steps", chosen.steps, "--work", chosen.work]
    log = chosen.out / f"{name}.log"
    if cell is not None:
        card = cell.card * GIB if cell.card and cell.card * GIB < memory_bytes else 0
        hog = (memory_bytes - card) / GIB if card else 0
        arguments += ["--cells", cell.name, f"{hog:.3f}"]
        log = chosen.out / f"{cell.name}-{name}.log"
    environment = dict(SYSTEMS[name].environment) if name in SYSTEMS else {}
    return children.run_child(
        Path(__file__), arguments, site=site, log=log, timeout=chosen.timeout, environment=environment
    )


def child(chosen: argparse.Namespace) -> int:
    if chosen.child == "machine":
        with children.reporting(chosen.report) as report:
            report(measured())
        return 0
    system = SYSTEMS[chosen.child]
    name, hog = chosen.cells
    cell = Cell.parse(name)
    with (
        children.reporting(chosen.report, [system.distribution] if system.distribution else []) as report,
        tempfile.NamedTemporaryFile(suffix=".json") as out,
    ):
        arguments: list[object] = ["--comfy-root", chosen.comfyui, "--work", chosen.work, "--out", out.name]
        arguments += ["--device", chosen.device, "--steps", chosen.steps, "--hog-gib", hog]
        for setting in ("arch", "size", "quant", "instances", "rounds", "lora"):
            arguments += [f"--{setting}", getattr(cell, setting)]
        arguments += [f"--{word}" for word in ("te", "vae") if getattr(cell, word)]
        if system.wheel is None:
            arguments += ["--aimdo-package", PACKAGE]
        if system.native:
            importlib.import_module("forebay.comfyui.native").install()
        sys.argv = [str(chosen.tool), *map(str, arguments), "--", *system.comfy]
        try:
            runpy.run_path(str(chosen.tool), run_name="__main__")
        finally:
            text = Path(out.name).read_text()
            if text:
                report(json.loads(text))
    return 0


def measured() -> Row:
    """The GPU, its memory, and the link's rate."""
    import torch

    row = {"torch": torch.__version__, "cores": os.cpu_count(), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {**row, "gpu": "none", "memory_bytes": 0, "link_gb_s": 0}
    from stack import link_rate

    rate = link_rate()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    gpu = torch.cuda.get_device_name()
    return {**row, "gpu": gpu, "memory_bytes": free, "link_gb_s": rate / 1e9}


def row_of(cell: Cell, system: str, outcome: Outcome, steps: int) -> Row:
    """One system's numbers in one cell."""
    row: Row = {"cell": cell.name, "system": system, "card_gib": cell.card, "versions": outcome.versions}
    row |= {"anonymous_bytes": outcome.anonymous_bytes, "taken_bytes": outcome.taken_bytes, "steps": steps}
    report = next((report for report in outcome.rows if "phases" in report), None)
    if outcome.reason or report is None:
        return {**row, "reason": outcome.reason or "no report"}
    phases = report["phases"]
    sampled = [phase for phase in phases if phase["phase"].startswith("sample")]
    first_round = sampled[: cell.instances]
    later = [seconds for phase in sampled for seconds in phase["step_s"][1:]]
    weights = sum(gib for phase in phases for gib in phase.get("file_gib", [])) * GIB / cell.instances
    loaded = [model["loaded_gib"] for phase in sampled[-1:] for model in phase.get("models", [])]
    return {
        **row,
        "first_s": [phase["step_s"][0] for phase in first_round],
        "again_s": [phase["step_s"][0] for phase in sampled[cell.instances :]],
        "later_s": statistics.median(later) if later else None,
        "weights_bytes": weights,
        "resident_bytes": max(loaded, default=0) * GIB,
        "pinned_bytes": max(phase.get("pinned_gib", 0) for phase in phases) * GIB,
        "device_bytes": max(phase.get("vram_used_gib", 0) for phase in phases) * GIB,
        "torch_peak_bytes": max(phase.get("torch_peak_gib", 0) for phase in phases) * GIB,
        "phases": {phase["phase"]: phase["s"] for phase in phases},
        "hashes": [phase["result"]["sha256"] for phase in phases if "result" in phase],
    }


def gathered(machine: Row, rows: list[Row]) -> Row:
    """All rows, compared."""
    # With a LoRA ComfyUI's dynamic path rounds elsewhere than its own offloading does, whatever package it runs on.
    found = {(row["cell"], row["system"]): row.get("hashes") for row in rows}
    reference = {
        name: found.get((name, "aimdo")) if Cell.parse(name).lora else found.get((name, LEGACY))
        for name, _ in found
    }
    computing: dict[tuple[str, ...], float] = {}
    for row in rows:
        cell = Cell.parse(row["cell"])
        if row.get("later_s") and (cell.card == 0 or cell.card >= 80):
            key = (cell.arch, cell.quant, cell.size)
            computing[key] = min(computing.get(key, row["later_s"]), row["later_s"])
    link = machine["link_gb_s"] * 1e9
    compared = []
    for row in rows:
        cell, more = Cell.parse(row["cell"]), {}
        rounds_elsewhere = cell.lora and row["system"] == LEGACY
        if row.get("hashes") and reference.get(row["cell"]) and not rounds_elsewhere:
            more["same"] = row["hashes"] == reference[row["cell"]]
        compute = computing.get((cell.arch, cell.quant, cell.size))
        if row.get("later_s") and compute and link:
            moved = max(0, row["weights_bytes"] - row["resident_bytes"])
            more["limit_s"] = max(compute, moved / link)
            more["first_limit_s"] = max(compute, row["weights_bytes"] / link)
        compared.append({**row, **more})
    command = " ".join(["python", *sys.argv])
    return {"command": command, "date": date.today().isoformat(), **machine, "rows": compared}


def told(row: Row) -> str:
    """One row in a line."""
    if "reason" in row:
        return row["reason"]
    later = f"{row['later_s']:.3f}" if row["later_s"] is not None else "-"
    firsts = "/".join(f"{seconds:.2f}" for seconds in row["first_s"])
    return f"first {firsts} s, later {later} s, anonymous {row['anonymous_bytes'] / GIB:.1f} GiB, {row['hashes'][-1]}"


def markdown(result: Row) -> str:
    """A table for each cell."""
    parts = [
        "Seconds; a first step for each model. GiB of anonymous memory (the process's peak), of memory that ComfyUI has "
        "pinned, and of the device's memory in use, others' included. The same: every result's hash is that of ComfyUI's "
        "own offloading; with a LoRA that of comfy-aimdo, as ComfyUI rounds patched weights elsewhere where memory is dynamic."
    ]
    cells = list(dict.fromkeys(row["cell"] for row in result["rows"]))
    for cell in cells:
        head = ["", "first step", "again", "later steps", "x limit", "anonymous", "pinned", "device", "same"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in result["rows"] if row["cell"] == cell):
            versions = [f"{name} {version}" for name, version in row.get("versions", {}).items()]
            title = ", ".join(filter(None, [SYSTEMS[row["system"]].title, *versions]))
            lines.append(f"| {' | '.join([title, *cells_of(row)])} |")
        parts.append(f"`{cell}`:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def cells_of(row: Row) -> list[str]:
    if "reason" in row:
        return [row["reason"].replace("|", "/"), *[""] * 7]

    def seconds(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    sizes = [f"{row[key] / GIB:.1f}" for key in ("anonymous_bytes", "pinned_bytes", "device_bytes")]
    later = f"{row['later_s']:.3f}" if row["later_s"] is not None else ""
    ratio = f"{row['later_s'] / row['limit_s']:.2f}" if row.get("limit_s") and row["later_s"] else ""
    same = {True: "yes", False: "NO", None: ""}[row.get("same")]
    return [seconds(row["first_s"]), seconds(row["again_s"]), later, ratio, *sizes, same]


if __name__ == "__main__":
    sys.exit(main())

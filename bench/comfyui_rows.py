"""What runs of ComfyUI come to: a row each, its limits, whether its result is the one it is compared with, and tables of them."""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import replace
from datetime import date

from children import Outcome, Row
from comfyui_cells import AIMDO, GIB, LEGACY, LOADED, SYSTEMS, Cell
from in_turn import of_turns, over_limit


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
    ran = [seconds for phase in sampled for seconds in phase.get("ran_s", [])[1:]]
    slept = [max(0.0, step - awake) for step, awake in zip(later, ran, strict=False)]
    weights = sum(gib for phase in phases for gib in phase.get("file_gib", [])) * GIB / cell.instances
    loaded = [model["loaded_gib"] for phase in sampled[-1:] for model in phase.get("models", [])]
    resident = max(loaded, default=0) * GIB
    turns_s: list[float] = []
    for phase in sampled:
        if turns := phase.get("turns"):
            turns_s, resident = of_turns(phase["step_s"]), turns["resident_bytes"]
            # Of both cards: who slept when is not told apart.
            later, slept = turns_s[2::2], []
    return {
        **row,
        "first_s": [phase["step_s"][0] for phase in first_round],
        "again_s": [phase["step_s"][0] for phase in sampled[cell.instances :]],
        "later_s": statistics.median(later) if later else None,
        "slept_s": statistics.median(slept) if slept else None,
        "steps_s": [phase["step_s"] for phase in sampled],
        "ran_s": [phase["ran_s"] for phase in sampled if "ran_s" in phase],
        "weights_bytes": weights,
        "resident_bytes": resident,
        "turns_s": turns_s,
        "pinned_bytes": max(phase.get("pinned_gib", 0) for phase in phases) * GIB,
        "device_bytes": max(phase.get("vram_used_gib", 0) for phase in phases) * GIB,
        "torch_peak_bytes": max(phase.get("torch_peak_gib", 0) for phase in phases) * GIB,
        "phases": {phase["phase"]: phase["s"] for phase in phases},
        "hashes": [phase["result"]["sha256"] for phase in phases if "result" in phase],
    }


def gathered(machine: Row, rows: list[Row]) -> Row:
    """All rows, compared."""
    references = References(rows)
    computing: dict[tuple[str, ...], float] = {}
    starting: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        cell = Cell.parse(row["cell"])
        if row.get("later_s") and cell.holds_everything:
            computing[cell.model] = min(computing.get(cell.model, row["later_s"]), row["later_s"])
            if row["system"] == LOADED:
                # Of several the fastest: the first process of all finds libraries and kernels on disk.
                kernels = [max(0.0, first - row["later_s"]) for first in row["first_s"]]
                known = starting.get(cell.model, kernels)
                starting[cell.model] = min(known, kernels, key=statistics.mean)
    link = machine["link_gb_s"] * 1e9
    compared = []
    for row in rows:
        cell, more = Cell.parse(row["cell"]), {}
        reference = references.of(cell, row["system"])
        if row.get("hashes") and reference:
            more["same"] = row["hashes"] == reference
        if row.get("later_s") and link:
            compute, reading = computing.get(cell.model), row["weights_bytes"] / link
            streaming = max(0, row["weights_bytes"] - row["resident_bytes"]) / link
            if compute:
                more["limit_s"] = max(compute, streaming)
                more["again_limit_s"] = max(compute, reading)
                kernels = [] if SYSTEMS[row["system"]].waits_before else starting.get(cell.model, [])
                starts = itertools.zip_longest(row["first_s"], kernels, fillvalue=0.0)
                limits = [max(start + more["limit_s"], reading) for _, start in starts]
                more["first_limit_s"] = statistics.mean(limits[: len(row["first_s"])])
            if over := over_limit(row.get("turns_s", []), streaming):
                # Its own steps say what there is to compute, at the processor's speed then.
                more["limit_s"] = row["later_s"] / over
        compared.append({**row, **more})
    command = " ".join(["python", *sys.argv])
    return {"command": command, "date": date.today().isoformat(), **machine, "rows": compared}


class References:
    """The hashes that a system's are compared with; None where they are not known."""

    def __init__(self, rows: list[Row]) -> None:
        hashes = [(Cell.parse(row["cell"]), row["system"], row.get("hashes")) for row in rows]
        self._found = {(cell, system): value for cell, system, value in hashes if value}
        self._loaded = {
            replace(cell, card=0): value
            for (cell, system), value in self._found.items()
            if system in (LEGACY, LOADED) and cell.holds_everything
        }
        self._patched_on_use = {
            replace(cell, card=0): value for (cell, system), value in self._found.items() if system == AIMDO
        }

    def of(self, cell: Cell, system: str) -> list[str] | None:
        """Of a system in a cell."""
        anywhere = replace(cell, card=0)
        loaded = self._loaded.get(anywhere)
        if not cell.lora:
            return self._found.get((cell, LEGACY), loaded)
        # Where weights are loaded ComfyUI rounds patched ones in another way than where they are patched as they are used.
        if SYSTEMS[system].native or SYSTEMS[system].loads_before:
            return loaded
        return (
            None if system == LEGACY else self._found.get((cell, AIMDO), self._patched_on_use.get(anywhere))
        )


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
        "Seconds; a first step for each model, and again in each further round, with nothing resident. Limits: see "
        "`comfyui.py --help`. GiB of anonymous memory (the process's peak), of memory that ComfyUI has pinned, and of the "
        "device's memory in use, others' included. The same: every result's hash is that of ComfyUI's own offloading. With a "
        "LoRA ComfyUI rounds patched weights in one way where they are loaded and in another where it patches them as they "
        "are used: native always gives the former, and is compared with ComfyUI's own offloading on a card that holds "
        "everything; comfy-aimdo and Forebay in its place are compared with comfy-aimdo."
    ]
    tells_sleep = any(row.get("slept_s") is not None for row in result["rows"])
    if tells_sleep:
        parts.append(
            "Asleep: seconds of a later step in which the thread that samples did not run, because others had the driver."
        )
    cells = list(dict.fromkeys(row["cell"] for row in result["rows"]))
    for cell in cells:
        head = ["", "first step", "x limit", "again", "x limit", "later steps", "x limit"]
        head += [*(["asleep"] if tells_sleep else []), "anonymous", "pinned", "device", "same"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in result["rows"] if row["cell"] == cell):
            versions = [f"{name} {version}" for name, version in row.get("versions", {}).items()]
            title = ", ".join(filter(None, [SYSTEMS[row["system"]].title, *versions]))
            lines.append(f"| {' | '.join([title, *cells_of(row, tells_sleep)])} |")
        parts.append(f"`{cell}`:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def verdict(result: Row) -> str:
    """How many results are the same as those they are compared with, and which are not, or did not come."""
    rows: list[Row] = result["rows"]
    compared = [row["same"] for row in rows if "same" in row]
    others = [
        f"{row['cell']} {row['system']}: {row.get('reason', 'ANOTHER RESULT')}"
        for row in rows
        if "reason" in row or not row.get("same", True)
    ]
    return "\n".join(
        [f"The same result: {sum(compared)} of {len(compared)} compared, {len(rows)} run.", *others]
    )


def matrix(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Which systems gave the result they are compared with, on cards of which size; rows with as many steps may come of several files.

    Returns:
        The head of a table, and its lines.
    """
    same: dict[tuple[str, int], dict[float, list[str]]] = {}
    for steps in sorted({row["steps"] for row in rows}):
        for row in gathered({"link_gb_s": 0}, [row for row in rows if row["steps"] == steps])["rows"]:
            if "same" not in row:
                continue
            cell = Cell.parse(row["cell"])
            name = replace(cell, card=0).name.replace("-0", "", 1)
            told = row["system"] if row["same"] else f"**not {row['system']}**"
            same.setdefault((name, steps), {}).setdefault(cell.card, []).append(told)
    cards = sorted({card for of_cards in same.values() for card in of_cards})
    head = ["", "steps", *(f"{card:g} GiB" for card in cards)]
    return head, [
        [name, str(steps), *(", ".join(sorted(set(of_cards.get(card, [])))) for card in cards)]
        for (name, steps), of_cards in same.items()
    ]


def cells_of(row: Row, tells_sleep: bool) -> list[str]:
    if "reason" in row:
        return [row["reason"].replace("|", "/"), *[""] * (10 if tells_sleep else 9)]

    def seconds(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    def ratio(values: list[float], limit: str) -> str:
        return f"{statistics.mean(values) / row[limit]:.2f}" if values and row.get(limit) else ""

    sizes = [f"{row[key] / GIB:.1f}" for key in ("anonymous_bytes", "pinned_bytes", "device_bytes")]
    steps = [seconds(row["first_s"]), ratio(row["first_s"], "first_limit_s")]
    steps += [seconds(row["again_s"]), ratio(row["again_s"], "again_limit_s")]
    later = row["later_s"]
    steps += [f"{later:.3f}", ratio([later], "limit_s")] if later is not None else ["", ""]
    if tells_sleep:
        steps += [f"{row['slept_s']:.3f}" if row.get("slept_s") is not None else ""]
    same = {True: "yes", False: "NO", None: ""}[row.get("same")]
    return [*steps, *sizes, same]

"""The benchmark of ComfyUI: who is compared with whom, and that nobody imports while another is measured."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = {"gpu": "none", "memory_bytes": 0, "link_gb_s": 10}
TOOL = """
import argparse, json, sys
parser = argparse.ArgumentParser()
for name in ("comfy-root", "work", "out", "arch"):
    parser.add_argument("--" + name)
chosen, _ = parser.parse_known_args()
def log(what):
    with open(chosen.work + "/log", "a") as file:
        file.write(f"{what} {chosen.arch}\\n")
if chosen.arch == "wan":
    raise RuntimeError("no such model")
sys.path.insert(0, chosen.comfy_root)
log("came")
import comfy.model_management
log("began")
phase = {"phase": "sample round 0 model 0", "s": 1, "step_s": [1.0, 0.5], "result": {"sha256": "ab"}}
with open(chosen.out, "w") as file:
    json.dump({"phases": [phase]}, file)
log("ended")
"""


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("comfyui")


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("comfyui_rows")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "checkout" / "comfy"
    package.mkdir(parents=True)
    for name in ("__init__", "model_management"):
        (package / f"{name}.py").touch()
    (tmp_path / "tool.py").write_text(TOOL)
    return package.parent


def run(checkout: Path, *arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what the tool did in its order."""
    folder = checkout.parent
    command = [sys.executable, BENCH / "comfyui.py", "--comfyui", checkout, "--tool", folder / "tool.py"]
    command += ["--device", "cpu", "--systems", "legacy", "--work", folder, "--out", folder / "out"]
    (folder / "log").touch()
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "out" / "comfyui.json").read_text())["rows"]
    return rows, (folder / "log").read_text().splitlines()


def test_all_come_before_the_first_begins(checkout: Path) -> None:
    rows, log = run(checkout, "--cells", "flux-bf16-0-tiny", "wan-fp16-0-tiny", "sd15-bf16-0-tiny")
    assert sorted(log[:2]) == ["came flux", "came sd15"]
    assert log[2:] == ["began flux", "ended flux", "began sd15", "ended sd15"]
    assert [row.get("reason") for row in rows] == [None, "RuntimeError: no such model", None]
    assert [row["first_s"] for row in rows if "first_s" in row] == [[1.0], [1.0]]


def test_a_cell_runs_as_often_as_it_is_given(checkout: Path) -> None:
    rows, log = run(checkout, "--cells", "flux-bf16-0-tiny", "sd15-bf16-0-tiny", "flux-bf16-0-tiny")
    assert log[3:] == [f"{does} {arch}" for arch in ("flux", "sd15", "flux") for does in ("began", "ended")]
    assert [row["cell"].partition("-")[0] for row in rows] == ["flux", "sd15", "flux"]
    logs = {path.name for path in (checkout.parent / "out").glob("flux*.log")}
    assert logs == {"flux-bf16-0-tiny-legacy.log", "flux-bf16-0-tiny-legacy-2.log"}


def test_who_comes_too_late_is_not_begun(checkout: Path) -> None:
    rows, log = run(checkout, "--cells", "flux-bf16-0-tiny", "sd15-bf16-0-tiny", "--until", "0")
    assert [row["reason"] for row in rows] == ["not begun: 0 s are over"] * 2
    assert log == []


def row(cell: str, system: str, result: str, **more: Any) -> dict[str, Any]:
    """As a child's report makes it."""
    sizes = dict.fromkeys(("anonymous_bytes", "pinned_bytes", "device_bytes", "resident_bytes"), 0)
    times = {"first_s": [3.0, 5.0], "again_s": [], "later_s": 1.0, "weights_bytes": 20e9}
    return {"cell": cell, "system": system, "hashes": [result], **sizes, **times, **more}


def test_with_a_lora_native_is_compared_with_what_is_loaded(rows_of: ModuleType) -> None:
    on_use = [("aimdo", "u"), ("dropin", "u"), ("unpinned", "l"), ("native", "l"), ("legacy", "m")]
    rows = [row("flux-bf16-12-lora0.8", system, result) for system, result in on_use]
    rows += [row("flux-bf16-8-lora0.5", system, result) for system, result in on_use]
    rows += [row("flux-bf16-80-lora0.8", "legacy", "l"), row("flux-bf16-80-lora0.8", "native", "u")]
    same = [found.get("same") for found in rows_of.gathered(MACHINE, rows)["rows"]]
    assert same == [True, True, False, True, None, True, True, False, None, None, None, False]


def test_without_a_lora_all_are_compared_with_comfyuis_own(rows_of: ModuleType) -> None:
    rows = [
        row("flux-bf16-12", system, result)
        for system, result in [("legacy", "a"), ("aimdo", "a"), ("native", "b")]
    ]
    rows.append(row("flux-bf16-24", "native", "a"))
    same = [found.get("same") for found in rows_of.gathered(MACHINE, rows)["rows"]]
    assert same == [True, True, False, None]
    rows.append(row("flux-bf16-80", "loaded", "b"))
    same = [found.get("same") for found in rows_of.gathered(MACHINE, rows)["rows"]]
    assert same == [True, True, False, False, True]


@pytest.mark.parametrize(
    "text",
    ["", "flux", "matrix-none", "flux-bf16-large", "flux-bf16-12-lora", "flux-bf16-12-x", "flux-bf16--1"],
)
def test_what_names_no_cell_is_told_by_its_name(comfyui: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"(: |, in ){text}$"):
        comfyui.jobs_of(text, ["legacy"])


def test_every_result_of_a_matrix_is_compared_but_those_that_others_are_compared_with(
    comfyui: ModuleType,
    rows_of: ModuleType,
) -> None:
    cells = importlib.import_module("comfyui_cells")
    names = [name for group, names in cells.GROUPS.items() if group.startswith("matrix-") for name in names]
    jobs = [job for name in names for job in comfyui.jobs_of(name, ["legacy"])]
    assert len({(job.cell, job.system) for job in jobs}) == len(jobs)
    assert {job.cell.card for job in jobs} == {8, 12, 24, 80}
    rows = [row(job.cell.name, job.system, "a") for job in jobs]
    compared = rows_of.gathered(MACHINE, rows)
    alone = {("lora" in found["cell"], found["system"]) for found in compared["rows"] if "same" not in found}
    assert alone == {(True, "legacy")}
    loras = sum(job.system == "legacy" and job.cell.lora > 0 for job in jobs)
    same = len(jobs) - loras
    assert rows_of.verdict(compared) == f"The same result: {same} of {same} compared, {len(jobs)} run."


def test_the_verdict_names_what_is_another_and_what_did_not_come(rows_of: ModuleType) -> None:
    rows = [row("sd15-bf16-80", system, result) for system, result in [("legacy", "a"), ("native", "b")]]
    rows.append({"cell": "wan-fp16-8", "system": "dropin", "reason": "no memory"})
    assert rows_of.verdict(rows_of.gathered(MACHINE, rows)).splitlines() == [
        "The same result: 1 of 2 compared, 3 run.",
        "sd15-bf16-80 native: ANOTHER RESULT",
        "wan-fp16-8 dropin: no memory",
    ]


def test_first_steps_have_a_limit(rows_of: ModuleType) -> None:
    rows = [row("flux-bf16-80", "legacy", "a"), row("flux-bf16-12-x2-r2", "native", "a", again_s=[1.0, 2.0])]
    result = rows_of.gathered(MACHINE, rows)
    lines = [line.split(" | ") for line in rows_of.markdown(result).splitlines() if "3.00, 5.00" in line]
    # 20 GB at 10 GB/s.
    assert [line[1:7] for line in lines] == [
        ["3.00, 5.00", "2.00", "", "", "1.000", "0.50"],
        ["3.00, 5.00", "2.00", "1.00, 2.00", "0.75", "1.000", "0.50"],
    ]
    for found in result["rows"]:
        del found["first_limit_s"], found["again_limit_s"], found["limit_s"]  # a result of an earlier day
    assert "| 3.00, 5.00 |  | 1.00, 2.00 |  | 1.000 |  |" in rows_of.markdown(result)


def test_what_was_loaded_before_tells_how_long_kernels_take(rows_of: ModuleType) -> None:
    rows = [
        row("flux-bf16-80", "loaded", "a", first_s=[9.0]),
        row("flux-bf16-80-lora0.8", "loaded", "a", first_s=[4.0]),
        *(row("flux-bf16-12-x2-r2", system, "a", again_s=[1.0, 2.0]) for system in ("native", "started")),
    ]
    native, started = rows_of.gathered(MACHINE, rows)["rows"][2:]
    # The first process finds libraries on disk, the second model its kernels: 3 s of them, and 20 GB at 10 GB/s.
    assert (native["first_limit_s"], native["again_limit_s"], native["limit_s"]) == (3.5, 2.0, 2.0)
    # There are none to be loaded by then.
    assert (started["first_limit_s"], started["again_limit_s"], started["limit_s"]) == (2.0, 2.0, 2.0)


def test_loading_before_a_first_step_is_no_part_of_it(comfyui: ModuleType) -> None:
    phases = [{"phase": "load"}, *({"phase": f"sample {n}", "step_s": [3.0, 1.0]} for n in range(2))]
    samplings = [comfyui.Sampled(2.0, [2.5, 0.75]), comfyui.Sampled(0.5, [1.5, 0.5])]
    report = comfyui.completed({"phases": phases}, samplings)
    assert [phase.get("step_s") for phase in report["phases"]] == [None, [1.0, 1.0], [2.5, 1.0]]
    assert [phase.get("ran_s") for phase in report["phases"]] == [None, [2.5, 0.75], [1.5, 0.5]]


def test_later_steps_tell_how_long_their_thread_slept(comfyui: ModuleType, rows_of: ModuleType) -> None:
    def found(*ran: list[float]) -> Any:
        each = [
            {"phase": "sample", "s": 1, "step_s": [3.0, 1.0, 1.0, 1.25], **({"ran_s": r} if r else {})}
            for r in ran
        ]
        outcome = comfyui.Outcome(rows=[{"phases": [{"phase": "load", "s": 1}, *each]}])
        return rows_of.row_of(comfyui.Cell.parse("flux-bf16-12-r2"), "native", outcome, 4)["slept_s"]

    assert found([1.0, 0.75, 1.5, 1.0], [3.0, 0.5, 0.5, 1.0]) == 0.25
    assert found([]) is None
    rows = [
        row("flux-bf16-80", "loaded", "a", slept_s=0.0),
        row("flux-bf16-12", "native", "a", slept_s=0.0071),
    ]
    rows.append(row("flux-bf16-12", "aimdo", "a"))
    told = [
        line.split(" | ")[7]
        for line in rows_of.markdown(rows_of.gathered(MACHINE, rows)).splitlines()
        if "5.00 |" in line
    ]
    assert told == ["0.000", "0.007", ""]


def test_each_turn_is_held_against_its_neighbours(comfyui: ModuleType, rows_of: ModuleType) -> None:
    in_turn = importlib.import_module("in_turn")
    # The processor's speed halves behind the third turn. What settles, and the last turn, which is cut off, do not count.
    turns = [5.0, 1.0, 1.1, 2.0, 2.2, 2.0, 9.0]
    steps = [value for turn in turns for value in [7.0] * in_turn.SETTLING + [turn] * in_turn.SETTLED]
    phase = {"phase": "sample", "s": 1, "step_s": steps[:-1]}
    phase["turns"] = {"resident_bytes": 5}
    found = rows_of.row_of(
        comfyui.Cell.parse("flux-bf16-12"), "turns", comfyui.Outcome(rows=[{"phases": [phase]}]), 49
    )
    assert found["turns_s"] == turns[:-1]
    assert (found["later_s"], found["slept_s"], found["resident_bytes"]) == (pytest.approx(1.65), None, 5)
    over = in_turn.over_limit(found["turns_s"], 0.5)
    assert over == pytest.approx((1.1 / 1.5 + 2.2 / 2) / 2)
    # Where the link takes longer than to compute, that is the limit.
    assert in_turn.over_limit(found["turns_s"], 4.0) == pytest.approx((1.1 + 2.2) / 2 / 4)
    assert in_turn.over_limit(turns[:3], 0.5) is None
    rows = [row("flux-bf16-12", "turns", "a", turns_s=turns[:-1], later_s=1.65, resident_bytes=5e9)]
    [of_turns] = rows_of.gathered(MACHINE, rows)["rows"]
    # 15 GB at 10 GB/s.
    assert of_turns["limit_s"] == pytest.approx(1.65 / ((1.1 / 1.5 + 2.2 / 2) / 2))


class FakeEngine:
    """Of a device of 100 bytes."""

    headroom = 10

    def __init__(self) -> None:
        self.set: list[float] = []

    def memory(self) -> tuple[int, int]:
        return 90, 100

    def set_budget(self, *, headroom: float) -> None:
        self.set.append(headroom)

    def stats(self) -> dict[str, int]:
        return {"held": 100 - int(self.set[-1])}


def test_cards_change_behind_each_turn(comfyui: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn, engine = importlib.import_module("in_turn"), FakeEngine()
    monkeypatch.setattr("forebay.engines.engine", lambda _device: engine)
    cards = in_turn.Cards(40)
    assert engine.set == [70]
    for _ in range(in_turn.STEPS - 1):
        cards.after_step()
    assert engine.set == [70]
    for _ in range(2 * in_turn.STEPS):
        cards.after_step()
    assert engine.set == [70, 10, 70]
    cards.close()
    assert engine.set == [70, 10, 70, 10]
    assert cards.resident_bytes == 30
    on_small = [in_turn.is_on_small(step) for step in range(3 * in_turn.STEPS - 1)]
    assert on_small == [True] * in_turn.STEPS + [False] * in_turn.STEPS + [True] * (in_turn.STEPS - 1)

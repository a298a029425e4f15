"""The benchmarks of adapters and conversion run, find results the same, and write what the tables are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import DEVICE

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("name", "section", "arguments"),
    [("lora", "lora", ["--rounds", "1", "--steps", "1"]), ("convert", "converted", [])],
)
def test_it_runs_and_has_a_table(name: str, section: str, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / f"{name}.json"
    command = [sys.executable, BENCH / f"{name}.py", "--tiny", "--device", DEVICE, *arguments]
    run = subprocess.run(
        [*command, "--file", tmp_path / "stack.safetensors", "--out", out], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert all(row["same"] for row in result["rows"])
    streamed = [row["moved_bytes"] for row in result["rows"] if row["kind"] != "resident"]
    assert all(moved > 0 for moved in streamed)
    script = f"import sys, pathlib, table; print(table.{section}(pathlib.Path(sys.argv[1])))"
    written = subprocess.run([sys.executable, "-c", script, out], cwd=BENCH, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    lines = written.stdout.splitlines()
    assert lines[0].startswith("### ") and sum(line.startswith("| ") for line in lines) >= 4
    if name == "lora":
        again = next(row for row in result["changes"] if row["what"] == "the same set again")
        assert again["refilled_bytes"] == 0
        one = next(row for row in result["changes"] if row["what"] == "one more for one block")
        assert one["touched_bytes"] <= one["refilled_bytes"] < 2 * one["touched_bytes"]
    else:
        assert streamed[1] < 0.6 * streamed[0], "what is moved is what is stored"

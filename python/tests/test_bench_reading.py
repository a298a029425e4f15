"""What ComfyUI asks for in its first pass is read once, whatever the order of its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_a_first_pass_reads_little_more_than_it_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "reading.json"
    command = [sys.executable, BENCH / "reading.py", "--width", "256", "--out", out]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for name, passes in rows.items():
        # The beginning of the next pass is read ahead at its end.
        assert all(0.97 < row["read"] < 1.1 for row in passes), f"{name}: {passes}"

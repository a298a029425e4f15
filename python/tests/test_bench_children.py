"""The benchmarks' children start together and run one after the other, on a card that another process makes small."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
HEAD = f"""
import argparse, os, pathlib, sys, time
sys.path.insert(0, {str(BENCH)!r})
import children
parser = argparse.ArgumentParser()
parser.add_argument("--name", default="")
parser.add_argument("--report", type=pathlib.Path)
chosen = parser.parse_args()
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the benchmarks' modules."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def children(bench: Any) -> ModuleType:
    return bench("children")


def script(folder: Path, body: str, name: str = "a") -> Path:
    # One for each child: another's may be reading its own.
    path = folder / f"{name}.py"
    path.write_text(HEAD + body)
    return path


def started(
    children: ModuleType, opened: contextlib.ExitStack, folder: Path, body: str, name: str = "a"
) -> Any:
    """A child that waits."""
    child = children.Child(
        script(folder, body, name), ["--name", name], site=None, log=folder / f"{name}.log", waits=True
    )
    return opened.enter_context(child)


WAITS = """
with children.reporting(chosen.report) as report:
    children.wait_for_release()
    with open({order!r}, "a") as file:
        file.write(chosen.name + "\\n")
    report({{"name": chosen.name}})
"""


def test_children_go_on_in_the_order_of_their_release(children: ModuleType, tmp_path: Path) -> None:
    order = tmp_path / "order"
    order.touch()
    with contextlib.ExitStack() as opened:
        body = WAITS.format(order=str(order))
        waiting = {name: started(children, opened, tmp_path, body, name) for name in "abc"}
        children.wait_until_ready(list(waiting.values()), 60)
        assert order.read_text() == "" and not any(child.has_ended for child in waiting.values())
        for name in "cab":
            waiting[name].release()
            outcome = waiting[name].watch(60)
            assert (outcome.reason, outcome.rows) == (None, [{"name": name}])
    assert order.read_text() == "c\na\nb\n"


def test_one_that_fails_before_its_gate_says_why(children: ModuleType, tmp_path: Path) -> None:
    body = "with children.reporting(chosen.report):\n    raise ValueError('no weights')"
    with contextlib.ExitStack() as opened:
        child = started(children, opened, tmp_path, body)
        children.wait_until_ready([child], 60)
        assert child.has_ended
        child.release()
        assert child.watch(60).reason == "ValueError: no weights"


def test_one_that_never_comes_to_its_gate_is_ended(children: ModuleType, tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        child = started(children, opened, tmp_path, "time.sleep(600)")
        children.wait_until_ready([child], 0.5)
        assert child.has_ended
        assert child.watch(60).reason == "not ready after 0 s"


def test_time_counts_from_the_release(children: ModuleType, tmp_path: Path) -> None:
    body = "children.wait_for_release()\nprint('released', flush=True)\ntime.sleep(600)"
    with contextlib.ExitStack() as opened:
        child = started(children, opened, tmp_path, body)
        children.wait_until_ready([child], 60)
        assert not child.has_ended
        child.release()
        assert child.watch(2).reason == "stopped after 2 s"
    assert (tmp_path / "a.log").read_text() == "released\n"


def test_one_without_a_gate_runs_at_once(children: ModuleType, tmp_path: Path) -> None:
    body = """chosen.report.write_text('{"row": 1}\\n')\nsys.exit('no more')"""
    outcome = children.run_child(
        script(tmp_path, body), [], site=None, log=tmp_path / "log", timeout=60, environment={}
    )
    assert (outcome.rows, outcome.reason) == ([{"row": 1}], "ended with 1: no more")


def test_one_that_waits_ends_with_its_parent(tmp_path: Path) -> None:
    waits = tmp_path / "waits.py"
    waits.write_text(HEAD + "children.wait_for_release()")
    parent = f"""
child = children.Child(pathlib.Path({str(waits)!r}), [], site=None, log=pathlib.Path("log"), waits=True)
children.wait_until_ready([child], 60)
print(child._process.pid, child.has_ended, flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, script(tmp_path, parent)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what it leaves behind
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    pid, has_ended = run.stdout.split()
    assert has_ended == "False"
    with contextlib.suppress(ProcessLookupError):  # it is gone
        descriptor = os.pidfd_open(int(pid))
        try:
            assert select.select([descriptor], [], [], 60)[0]
        finally:
            os.close(descriptor)


class Holder:
    """In place of another process on a device of 100 bytes, of which it needs 5 itself."""

    log: list[str]
    most = 100

    def __init__(self, ordinal: int) -> None:
        self.log.append("start")

    def free_bytes(self) -> int:
        return 95

    def take(self, nbytes: int) -> None:
        self.log.append(f"take {nbytes}")
        self.held = min(nbytes, self.most)

    def wait_until_taken(self) -> tuple[int, float]:
        return self.held, 30.0

    def give(self) -> None:
        self.log.append("give")

    def __exit__(self, *_: object) -> None:
        self.log.append("end")


def test_a_card_is_what_another_process_leaves(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = bench("card")
    monkeypatch.setattr(card, "OtherProcess", Holder)
    Holder.log = log = []
    with card.Card() as made:
        for nbytes in (0, 60, 60, 20, 0, 30):
            made.leave(nbytes)
        assert log == ["start", "take 35", "give", "take 75", "end", "start", "take 65"]
        monkeypatch.setattr(Holder, "most", 50)
        with pytest.raises(RuntimeError, match="75 bytes, of which 50"):
            made.leave(20)
        made.leave(50)
    assert log[-5:] == ["take 75", "end", "start", "take 45", "end"]


class Driver:
    """In place of a device of 1000 bytes."""

    def __init__(self, ordinal: int) -> None:
        self.allocated: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int | None:
        if nbytes > self.free_bytes():
            return None
        self.allocated[len(self.allocated)] = nbytes
        return len(self.allocated) - 1

    def free(self, address: int) -> None:
        del self.allocated[address]

    def free_bytes(self) -> int:
        return 1000 - sum(self.allocated.values())


def test_the_holder_takes_to_the_byte(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = bench("holder")
    written = io.StringIO()
    for target, name, value in [
        (holder, "Driver", Driver), (holder, "PIECE", 256), (holder, "PATIENCE_S", 0.05),
        (holder.signal, "signal", lambda *_: None), (sys, "argv", ["holder.py", "0"]), (sys, "stdout", written),
        (sys, "stdin", io.StringIO("free\ntake 700\nfree\ngive\ntake 2000\n")),
    ]:  # fmt: skip
        monkeypatch.setattr(target, name, value)
    holder.main()
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    values = [answer.get("free", answer.get("held")) for answer in told[1:]]
    assert values == [1000, 700, 300, 0, 768]


def test_memory_is_touched_and_freed(bench: Any) -> None:
    touch = bench("touch")
    touch.touch(0)
    touch.touch(64 << 20)
    with pytest.raises(RuntimeError, match="not to be had"):
        touch.touch(1 << 60)

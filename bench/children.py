"""Runs one system after the other, each in a process of its own, and says why one did not run.

A child reports lines of JSON into a file, so what it measured before it failed, hung or was killed is kept. Its memory is
watched from here: the child does not spend time on it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_WATCH_EVERY_S = 0.05


@dataclass
class Outcome:
    """What became of a child."""

    rows: list[Row] = field(default_factory=list)
    reason: str | None = None
    """Why it did not finish; None where it did."""
    anonymous_bytes: int = 0
    """Peak of its anonymous and shared memory."""
    taken_bytes: int = 0
    """Peak drop of the machine's available memory: anonymous and pinned memory of any kind, not the page cache."""
    versions: dict[str, str] = field(default_factory=dict)


class Wheels:
    """A folder of wheels, installed for each child apart: one system's requirements are not another's."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._sites = tempfile.TemporaryDirectory(prefix="forebay-bench-")

    def site(self, names: Sequence[str]) -> Path | None:
        """Where these distributions are installed, from the folder alone; None where nothing is to be installed.

        Raises:
            RuntimeError: Where the folder lacks one or it does not install.
        """
        if self._folder is None or not names:
            return None
        site = Path(self._sites.name) / "-".join(names[:1])
        if site.exists():
            return site
        files = [self._wheel(name) for name in names]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", site, *files], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"not installed: {_last_line(done.stderr)}")
        return site

    def _wheel(self, name: str) -> Path:
        found = sorted(self._folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl")) if self._folder else []
        if not found:
            raise RuntimeError(f"no wheel of {name} in {self._folder}")
        return found[-1]


def end_with_their_parent() -> None:
    """A parent that is told to stop ends the child it waits for: it has a session of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def run_child(
    script: Path,
    arguments: Sequence[object],
    *,
    site: Path | None,
    log: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs ``script`` with ``arguments`` and ``--report FILE``, and watches it."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder, log.open("w") as output:
        report = Path(folder) / "report.jsonl"
        report.touch()
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
        available = _available_bytes()
        child = subprocess.Popen(
            [sys.executable, script, *map(str, arguments), "--report", report],
            env={**os.environ, **(environment or {}), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + timeout
        try:
            while child.poll() is None and time.monotonic() < end:
                outcome.anonymous_bytes = max(outcome.anonymous_bytes, _anonymous_bytes(child.pid))
                outcome.taken_bytes = max(outcome.taken_bytes, available - _available_bytes())
                time.sleep(_WATCH_EVERY_S)
            if child.poll() is None:
                outcome.reason = f"stopped after {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for line in report.read_text().splitlines():
            row = json.loads(line)
            outcome.versions |= row.pop("versions", {})
            if set(row) == {"reason"}:
                outcome.reason = row["reason"]
            elif row:
                outcome.rows.append(row)
    if outcome.reason is None and child.returncode != 0:
        outcome.reason = f"ended with {child.returncode}: {_last_line(log.read_text(errors='replace'))}"
    return outcome


@contextlib.contextmanager
def reporting(path: Path, distributions: Sequence[str] = ()) -> Iterator[Callable[[Row], None]]:
    """In a child: a function that reports a row. An exception becomes the reason, and is raised on."""
    with path.open("a", buffering=1) as file:

        def report(row: Row) -> None:
            file.write(json.dumps(row) + "\n")

        try:
            report({"versions": {name: importlib.metadata.version(name) for name in distributions}})
            yield report
        except BaseException as error:
            report({"reason": reason_of(error)})
            raise


def reason_of(error: BaseException) -> str:
    """An exception in one short line."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    return text if len(text) <= 200 else text[:197] + "..."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))


def _available_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0

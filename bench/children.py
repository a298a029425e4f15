"""Runs one system after the other, each in a process of its own, and says why one did not run.

A child reports lines of JSON into a file, so what it measured before it failed, hung or was killed is kept. Its memory is
watched from here: the child does not spend time on it.

Children whose imports take long are started together and wait, each at the gate that it comes to with
:func:`wait_for_release`, so that none of them imports while another one is measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import select
import signal
import socket
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
    with Child(script, arguments, site=site, log=log, environment=environment) as child:
        return child.watch(timeout)


class Child:
    """A process with a session of its own, from its start to its outcome. Leaving it as a context ends it.

    Args:
        script: What it runs, with ``arguments`` and ``--report FILE``.
        site: Where distributions are installed for it alone.
        log: What it prints goes there.
        environment: Added to this process's.
        waits: It comes to a gate (:func:`wait_for_release`), and goes on when it is released.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[object],
        *,
        site: Path | None,
        log: Path,
        environment: Mapping[str, str] | None = None,
        waits: bool = False,
    ) -> None:
        self._outcome = Outcome()
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="forebay-bench-")
        self._report = Path(self._folder.name) / "report.jsonl"
        self._report.touch()
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
        # The gate is the child's input: whatever becomes of this process, the child sees its end there.
        self._gate, theirs = socket.socketpair() if waits else (None, None)
        self._has_arrived = self._is_over = False
        self._available = _available_bytes()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, script, *map(str, arguments), "--report", self._report],
                env={**os.environ, **(environment or {}), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=theirs,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if theirs is not None:
            theirs.close()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_at_most(self, end: float) -> bool:
        """Whether it comes to its gate or ends before a time of the monotonic clock."""
        assert self._gate is not None, "a child without a gate"
        while not self._has_arrived and not self.has_ended and time.monotonic() < end:
            if select.select([self._gate], [], [], _WATCH_EVERY_S)[0]:
                self._has_arrived = bool(self._gate.recv(1))
                if not self._has_arrived:  # it is ending
                    time.sleep(_WATCH_EVERY_S)
        return self._has_arrived or self.has_ended

    def give_up(self, reason: str) -> None:
        """Ends it for a reason that becomes its outcome's."""
        self._outcome.reason = reason
        self._kill()

    def release(self) -> None:
        """Lets it go on. What it takes of the machine's memory counts from here."""
        assert self._gate is not None, "a child without a gate"
        self._available = _available_bytes()
        with contextlib.suppress(OSError):  # it has ended, which is its outcome
            self._gate.send(b"\n")

    def watch(self, timeout: float) -> Outcome:
        """Waits for its end, for so many seconds at most."""
        outcome = self._outcome
        end = time.monotonic() + timeout
        while not self.has_ended and time.monotonic() < end:
            outcome.anonymous_bytes = max(outcome.anonymous_bytes, _anonymous_bytes(self._process.pid))
            outcome.taken_bytes = max(outcome.taken_bytes, self._available - _available_bytes())
            time.sleep(_WATCH_EVERY_S)
        if not self.has_ended:
            outcome.reason = f"stopped after {timeout:.0f} s"
        self._kill()
        for line in self._report.read_text().splitlines():
            row = json.loads(line)
            outcome.versions |= row.pop("versions", {})
            if set(row) == {"reason"}:
                outcome.reason = row["reason"]
            elif row:
                outcome.rows.append(row)
        if outcome.reason is None and self._process.returncode != 0:
            text = self._log.read_text(errors="replace")
            outcome.reason = f"ended with {self._process.returncode}: {_last_line(text)}"
        return outcome

    def _kill(self) -> None:
        """Ends it and what it started, once: its number may be another's later."""
        if not self._is_over:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._is_over = True

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        if self._gate is not None:
            self._gate.close()
        self._folder.cleanup()


def wait_until_ready(waiting: Sequence[Child], timeout: float) -> None:
    """Waits until each is at its gate or has ended; who is neither within so many seconds is ended."""
    end = time.monotonic() + timeout
    for child in waiting:
        if not child.wait_at_most(end):
            child.give_up(f"not ready after {timeout:.0f} s")


def wait_for_release() -> None:
    """In a child that was started to wait: tells its parent that it is ready, and waits for its word.

    Raises:
        SystemExit: Where the parent ended instead.
    """
    os.write(0, b"\n")
    if not os.read(0, 1):
        raise SystemExit("ended before its release")


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

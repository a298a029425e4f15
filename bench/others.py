"""Others who use a device's memory: what they are asked for, and another process that does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Others:
    """Somebody else who takes memory and gives it back, while a step runs."""

    def take(self, nbytes: int) -> None:
        """Begins to take as much."""
        raise NotImplementedError

    def wait_until_taken(self) -> tuple[int, float]:
        """How much it got, and within how many seconds."""
        raise NotImplementedError

    def give_later(self) -> None:
        """Gives everything back without waiting for it."""
        raise NotImplementedError

    def give(self) -> None:
        """Gives everything back."""
        raise NotImplementedError


class OtherProcess(Others):
    """``holder.py``. It is there before the card is measured: its context takes memory as well."""

    def __init__(self, ordinal: int) -> None:
        command = [sys.executable, Path(__file__).with_name("holder.py"), str(ordinal)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._asked = 0
        self._answer()

    def take(self, nbytes: int) -> None:
        self._ask(f"take {nbytes}")

    def wait_until_taken(self) -> tuple[int, float]:
        told = self._answer()
        self._asked -= 1
        return told["held"], told["seconds"]

    def give_later(self) -> None:
        self._ask("give")

    def free_bytes(self) -> int:
        """What is free of the device, while it has not been told to take or give."""
        self._ask("free")
        told = self._answer()
        self._asked -= 1
        return told["free"]

    def give(self) -> None:
        while self._asked:
            self._answer()
            self._asked -= 1
        self._ask("give")
        self._answer()
        self._asked -= 1

    def _ask(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        self._asked += 1

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process ended")
        return json.loads(line)

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

"""Somebody else takes half of the device while a model runs, and gives it back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from support import DEVICE, MIB, linears, move, randomize, reference, same

import forebay

CARD = 128 * MIB if DEVICE == "host" else 2048 * MIB
PIECE = CARD // 32
PATIENCE_S = 30.0

CHILD = """
import sys, time, torch
device, piece, wanted, patience = sys.argv[1], *map(int, sys.argv[2:])
torch.zeros(1, device=device)
print("ready", flush=True)
sys.stdin.readline()
held, end = [], time.monotonic() + patience
while len(held) * piece < wanted and time.monotonic() < end:
    try:
        held.append(torch.empty(piece, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        time.sleep(0.001)
print(len(held) * piece, flush=True)
sys.stdin.readline()
"""


class OtherProcess:
    """Takes memory in pieces, as it finds them free."""

    def __init__(self, wanted: int) -> None:
        arguments = [DEVICE, str(PIECE), str(wanted), str(round(PATIENCE_S))]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self.taken: int | None = None

    def take(self) -> None:
        self._tell()
        threading.Thread(target=self._read, daemon=True).start()

    def give(self) -> None:
        self._tell()
        self._process.wait(PATIENCE_S)

    def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.taken = int(self._process.stdout.readline() or 0)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class OtherThread:
    """The same on a host device, which other processes cannot reach."""

    def __init__(self, engine: forebay.Engine, wanted: int) -> None:
        self._engine = engine
        self._wanted = wanted
        self._held: list[forebay._forebay.Ballast] = []
        self.taken: int | None = None

    def take(self) -> None:
        threading.Thread(target=self._take, daemon=True).start()

    def give(self) -> None:
        while self._held:
            self._held.pop().close()

    def _take(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while len(self._held) * PIECE < self._wanted and time.monotonic() < end:
            try:
                self._held.append(self._engine.ballast(PIECE))
            except forebay.OutOfMemoryError:
                time.sleep(0.001)
        self.taken = len(self._held) * PIECE

    def end(self) -> None:
        self.give()


@pytest.fixture
def others() -> Iterator[Callable[[forebay.Engine], OtherProcess | OtherThread]]:
    """Starts somebody else who wants half of the card. The context of a process takes memory before the card is made."""
    started: list[OtherProcess | OtherThread] = []

    def start(engine: forebay.Engine) -> OtherProcess | OtherThread:
        started.append(OtherThread(engine, CARD // 2) if DEVICE == "host" else OtherProcess(CARD // 2))
        return started[0]

    yield start
    for one in started:
        one.end()


@pytest.mark.parametrize("times", [0.7, 1.5], ids=["a model that fits", "a model that does not"])
def test_another_process_gets_half_of_the_card_and_weights_come_back(others, times) -> None:
    settings = {"capacity": CARD, "poison": True} if DEVICE == "host" else {}
    card = forebay.Engine(DEVICE, headroom=CARD // 8, readers=2, **settings)
    other = others(card)
    model = randomize(linears(round(times * CARD / (4 * MIB))))
    x = move(torch.randn(2, 1024))
    expected = reference(model)(x).cpu()
    with contextlib.ExitStack() as rest:
        if DEVICE != "host":
            torch.cuda.empty_cache()
            rest.enter_context(card.ballast(card.memory()[0] - CARD))
        attachment = rest.enter_context(forebay.attach(model, card, page_size=2 * MIB))

        def resident() -> int:
            return int(attachment.stats()[0]["resident"])

        def run_until(is_so: Callable[[], bool], what: str) -> None:
            end = time.monotonic() + PATIENCE_S
            while not is_so():
                assert same(model(x).cpu(), expected)
                assert time.monotonic() < end, f"{what}\n{card.summary()}"

        run_until(lambda: resident() >= 0.6 * min(CARD - CARD // 8, times * CARD), "it lacks what is free")
        before = resident()
        other.take()
        run_until(lambda: other.taken is not None, "the other waits")
        assert other.taken == CARD // 2
        run_until(lambda: card.memory()[0] >= CARD // 8 - 4 * MIB, "headroom is not kept free")
        assert resident() <= CARD // 2
        other.give()
        run_until(lambda: resident() >= before - 2 * MIB, "what was given back is not used again")

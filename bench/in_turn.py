"""Steps on a card that is too small, in turn with steps of the same process on one that holds everything.

Where the thread that launches kernels is the limit, a step takes as long as the processor's speed makes it. On shared machines that
doubles and halves for seconds, so that two processes cannot be held against each other. Here the engine's headroom makes the
same process's card small and large again: each turn on the small one is held against its neighbours.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STEPS = 7
"""Of a turn."""
SETTLING = 3
"""Steps at the beginning of a turn in which memory is given back, or taken and filled."""
SETTLED = STEPS - SETTLING


def is_on_small(step: int) -> bool:
    """Whether a step, counted from 0, runs on the small card: those of the first turn do."""
    return step // STEPS % 2 == 0


class Cards:
    """The device's engine, on a card of so many bytes from now on, and on all of the device in turn.

    Attributes:
        resident_bytes: What was resident at the end of the latest turn on the small card.

    Raises:
        RuntimeError: Where it has a fixed budget.
    """

    def __init__(self, card_bytes: int) -> None:
        from forebay.engines import engine

        self._engine = engine("cuda")
        self._large = self._engine.headroom
        if self._large is None:
            raise RuntimeError("the engine has a fixed budget")
        _, total = self._engine.memory()
        self._small = self._large + max(0, total - card_bytes)
        self._engine.set_budget(headroom=self._small)
        self._steps = 0
        self.resident_bytes = 0

    def after_step(self) -> None:
        """After each step."""
        self._steps += 1
        if self._steps % STEPS:
            return
        if is_on_small(self._steps - 1):
            self.resident_bytes = int(self._engine.stats()["held"])
        self._engine.set_budget(headroom=self._small if is_on_small(self._steps) else self._large)

    def close(self) -> None:
        """Leaves it on all of the device."""
        self._engine.set_budget(headroom=self._large)


def of_turns(steps_s: Sequence[float]) -> list[float]:
    """The median step of each turn that ran to its end, as it settled: small, large, small and so on."""
    ends = range(STEPS, len(steps_s) + 1, STEPS)
    return [statistics.median(steps_s[end - SETTLED : end]) for end in ends]


def over_limit(turns_s: Sequence[float], link_s: float) -> float | None:
    """How many times the limit a step on the small card takes: the median of its turns but for the first, in which page cache is
    registered, each over the larger of its neighbours' mean and what the link takes. None without a turn with two neighbours."""
    ratios = [
        small / max((before + after) / 2, link_s)
        for before, small, after in list(zip(turns_s, turns_s[1:], turns_s[2:], strict=False))[1::2]
    ]
    return statistics.median(ratios) if ratios else None

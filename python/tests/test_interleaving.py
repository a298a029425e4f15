"""Any interleaving of use and pressure on two attached models is bit-identical to plain torch."""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import DEVICE, MIB, linears, move, press, randomize, reference, same
from torch import nn

import forebay

LEAST, MOST = 16, 40


@functools.cache
def models() -> tuple[list[nn.Module], list[nn.Module]]:
    """Two models, and the same as plain modules on the device."""
    first = nn.Sequential(nn.Embedding(1500, 512), *linears(4, 512), nn.LSTM(512, 256), nn.LayerNorm(256))
    second = nn.TransformerEncoderLayer(384, 4, 768, batch_first=True)
    made = [randomize(_Recurrent(first)), randomize(second)]
    return made, [reference(model) for model in made]


class _Recurrent(nn.Module):
    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens
        for part in self.parts:
            x = part(x)[0] if isinstance(part, nn.LSTM) else part(x)
        return x


class Interleaving(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        torch.manual_seed(seed)
        poison = {"poison": True} if DEVICE == "host" else {}
        self.engine = forebay.Engine(DEVICE, budget=MOST * MIB, readers=2, **poison)
        self.models, self.plain = models()
        self.attached = [forebay.attach(model, self.engine, page_size=2 * MIB) for model in self.models]
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    @rule(which=st.integers(0, 1), length=st.integers(1, 4))
    def use(self, which: int, length: int) -> None:
        x = move(torch.randint(0, 1500, (2, length)) if which == 0 else torch.randn(2, length, 384))
        # A detached model is on the CPU, wherever the plain one is.
        here = (lambda x: x) if self.attached[which].models else (lambda x: x.cpu())
        expected = self.plain[which] if self.attached[which].models else self.models[which]
        with torch.no_grad():
            assert same(self.models[which](here(x)), expected(here(x)))

    @rule(amount=st.integers(1, 64))
    def make_room(self, amount: int) -> None:
        self.engine.make_room(amount * MIB)

    @rule(budget=st.integers(LEAST, MOST))
    def set_budget(self, budget: int) -> None:
        self.engine.set_budget(budget=budget * MIB)

    @rule(which=st.integers(0, 1), weight=st.integers(0, 30), part=st.sampled_from(["t", "flatten", "chunk"]))
    def keep_view(self, which: int, weight: int, part: str) -> None:
        if len(self.views) < 2 and self.attached[which].models:
            take = {
                "t": lambda w: w.swapaxes(0, -1),
                "flatten": lambda w: w.detach().flatten(),
                "chunk": lambda w: w.chunk(2)[1],
            }[part]
            both = (list(models[which].parameters()) for models in (self.models, self.plain))
            kept, expected = (take(weights[weight % len(weights)]) for weights in both)
            self.views.append((kept, expected))

    @rule()
    def drop_views(self) -> None:
        self.views.clear()

    @rule(which=st.integers(0, 1))
    def attach_or_detach(self, which: int) -> None:
        if self.attached[which].models:
            self.attached[which].detach()
        else:
            self.attached[which] = forebay.attach(self.models[which], self.engine, page_size=2 * MIB)

    @rule(which=st.integers(0, 1), up=st.booleans())
    def reorder(self, which: int, up: bool) -> None:
        getattr(self.attached[which], "prioritize" if up else "deprioritize")()

    @invariant()
    def views_hold(self) -> None:
        assert all(same(kept, expected) for kept, expected in getattr(self, "views", ()))

    def teardown(self) -> None:
        if hasattr(self, "attached"):
            for attached in self.attached:
                attached.detach()
            self.views_hold()
            self.views.clear()
            self.engine.settle()
            press(self.engine)
            assert self.engine.stats()["models"] == [] and self.engine.stats()["held"] == 0


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(
    max_examples=80,
    stateful_step_count=16,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

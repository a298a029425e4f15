"""Fixtures: an engine of its own for each test, a seed that is printed, no gradients unless asked for."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator

import pytest
import support
import torch

import forebay
from forebay.comfyui.aimdo import host_buffer, model_vbar
from forebay.comfyui.aimdo.copies import Copies


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch and Python; FOREBAY_TEST_SEED repeats a run."""
    chosen = int(os.environ.get("FOREBAY_TEST_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"FOREBAY_TEST_SEED={chosen}")
    torch.manual_seed(chosen)
    random.seed(chosen)
    return chosen


@pytest.fixture
def engine() -> Callable[..., forebay.Engine]:
    """Makes engines with a budget in MiB. Frames are poisoned on host: bytes that were not filled are seen."""
    poison = {"poison": True} if support.DEVICE == "host" else {}

    def make(budget_mib: float = 256) -> forebay.Engine:
        return forebay.Engine(support.DEVICE, budget=budget_mib * support.MIB, readers=2, **poison)

    return make


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Which weights ComfyUI keeps copies of, as before it asked for the first, without a limit by the user."""
    made = Copies()
    for module in (host_buffer, model_vbar):
        monkeypatch.setattr(module, "copies", made)
    monkeypatch.delenv(host_buffer.LIMIT, raising=False)
    return made


@pytest.fixture
def current_device() -> Iterator[None]:
    """Makes the device that is tested torch's current one, for what torch does on no other."""
    with torch.cuda.device(support.TORCH_DEVICE) if support.DEVICE != "host" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Most tests are about inference; those that are not enable gradients themselves."""
    with torch.no_grad():
        yield

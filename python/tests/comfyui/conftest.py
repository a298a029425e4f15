"""The package that ComfyUI imports as comfy_aimdo, on the device of the tests with an engine of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import support

import forebay
from forebay import engines
from forebay.comfyui.aimdo import control


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As before the first call."""
    monkeypatch.setattr(control, "_headroom", None)
    control.deinit()
    yield
    gc.collect()
    control.deinit()


@pytest.fixture
def comfy(fresh: None, engine: Callable[..., forebay.Engine], monkeypatch: pytest.MonkeyPatch):
    """Initialises the device with a budget in MiB; gives its id, torch device and engine."""

    def make(budget_mib: float = 256) -> SimpleNamespace:
        made = engine(budget_mib)
        monkeypatch.setitem(engines._engines, made.device, made)
        assert control.init()
        assert control.init_devices(iter([support.COMFY_DEVICE]))
        return SimpleNamespace(id=support.COMFY_DEVICE, device=support.TORCH_DEVICE, engine=made)

    return make

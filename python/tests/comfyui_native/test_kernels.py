"""What is used before a model runs, so that the driver has its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import comfy.ldm.flux.model
import comfy.model_management
import torch

from forebay.comfyui import warming
from forebay.comfyui.native import kernels
from forebay.low_rank import _known

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that a CPU computes in no time."""
    for module, name, value in (
        (warming, "_WIDTH", 400),
        (warming, "_HEADS", 3),
        (warming, "_TOKENS", (64, 16, 1)),
        (kernels, "_WIDTH", 64),
    ):
        monkeypatch.setattr(module, name, value)


def _used(uses: Any) -> int:
    with torch.inference_mode():
        return len([use() for use in uses])


def test_what_is_used_before_a_model_runs_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    # A use that fails goes by without a word where a model may not need it: here none does.
    assert _used(warming._usual(CPU, torch.bfloat16)) > 30
    assert _used(warming._of_float8(CPU, torch.bfloat16)) == 0
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device: True)
    assert _used(warming._of_float8(CPU, torch.bfloat16)) > 10


def test_random_numbers_are_the_applications() -> None:
    before = torch.get_rng_state()
    _used(warming._usual(CPU, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_of_patches_are_known_then(native: Callable[..., Any]) -> None:
    _known.clear()
    with native(1 << 30):
        assert warming.of_patches is kernels.of_patches
        assert _used(kernels.of_patches(CPU, torch.bfloat16)) > 5
    assert {(rows, columns) for _, rows, columns, *_ in _known} >= {(192, 64), (64, 256)}
    assert warming.of_patches is None

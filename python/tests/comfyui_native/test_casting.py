"""How long the tensors stay that layers get from ``cast_bias_weight``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.model_management as management
import comfy.ops
import support
import torch
from comfy.quant_ops import QuantizedTensor
from running import load

import forebay

Layers = tuple[forebay.Engine, list[Any], list[torch.Tensor]]


@pytest.fixture(params=["bf16", "fp8scaled"])
def layers(request: pytest.FixtureRequest, folder: Path, native: Callable[..., Any]) -> Iterator[Layers]:
    """The engine, linear layers of a Flux of which half fits, and what their weights stand for."""
    path = checkpoints.write(folder, "flux", request.param)
    plain = [
        comfy.ops.cast_bias_weight(one, dtype=torch.bfloat16, device="cpu")[0] for one in _linear(load(path))
    ]
    with native(path.stat().st_size / 2) as engine:
        model = load(path)
        management.load_models_gpu([model])
        yield engine, _linear(model), [weight.to(support.TORCH_DEVICE) for weight in plain]


def _linear(model: Any) -> list[Any]:
    blocks = [*model.model.diffusion_model.double_blocks, *model.model.diffusion_model.single_blocks]
    return [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]


def _cast(layer: Any, offloadable: bool) -> Any:
    return comfy.ops.cast_bias_weight(
        layer, dtype=torch.bfloat16, device=torch.device(support.TORCH_DEVICE), offloadable=offloadable
    )


def _pinned(engine: forebay.Engine) -> tuple[int, int]:
    stats = engine.stats()
    return stats["operations"], stats["views"]


def _dense(weight: Any) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def test_until_the_layer_says_that_it_has_computed(layers: Layers) -> None:
    engine, linear, plain = layers
    none = _pinned(engine)
    for layer, expected in zip(linear, plain, strict=True):
        weight, bias, receipt = _cast(layer, offloadable=True)
        engine.make_room(1 << 60)
        assert _pinned(engine) == (none[0] + 1, none[1])
        assert support.same(_dense(weight), expected)
        comfy.ops.uncast_bias_weight(layer, weight, bias, receipt)
        del receipt
        assert _pinned(engine) == none


def test_not_longer_where_computing_fails(layers: Layers) -> None:
    engine, linear, _ = layers
    none = _pinned(engine)

    def fails(layer: Any) -> None:
        weight, _, receipt = _cast(layer, offloadable=True)
        assert receipt is not None
        weight @ torch.ones(1, 1, 1, dtype=torch.int8)

    for layer in linear:
        with pytest.raises(RuntimeError):
            fails(layer)
        assert _pinned(engine) == none


def test_as_long_as_they_are_used_where_the_layer_does_not_say_it(layers: Layers) -> None:
    engine, linear, plain = layers
    none = _pinned(engine)
    for layer, expected in zip(linear, plain, strict=True):
        found = _cast(layer, offloadable=False)
        assert len(found) == 2
        engine.make_room(1 << 60)
        assert support.same(_dense(found[0]), expected)
        del found
        assert _pinned(engine) == none

"""Layers of scaled float8 whose kernels are launched directly: what they give is what ComfyUI's own forward gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import comfy.model_management as management
import comfy.ops
import support
import torch
from torch import nn

import forebay
from forebay.comfyui.native import float8_linear
from forebay.comfyui.native.loaded import Loaded
from forebay.instance_methods import InstanceMethod

_IN, _OUT = 512, 640
_DEVICE = torch.device(support.TORCH_DEVICE)
_SHAPES = (3, _IN), (2, 5, _IN), (2, 1, 7, _IN)


def _layer(
    bias: bool = True, input_scale: float | None = None, stored: torch.dtype = torch.float8_e4m3fn
) -> Any:
    """A linear layer of ComfyUI's with random weights, as it comes from a file."""
    generator = torch.Generator().manual_seed(3)
    layer = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(_IN, _OUT, bias=bias, device="cpu")
    quant = json.dumps({"format": str(stored).removeprefix("torch.")}).encode()
    state = {
        "weight": (torch.randn(_OUT, _IN, generator=generator) * 50).to(stored),
        "weight_scale": torch.tensor(0.003),
        "comfy_quant": torch.tensor(list(quant), dtype=torch.uint8),
    }
    if bias:
        state["bias"] = torch.randn(_OUT, generator=generator).bfloat16()
    if input_scale is not None:
        state["input_scale"] = torch.tensor(input_scale)
    layer.load_state_dict(state)
    return layer.requires_grad_(False)


def _value(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * scale).bfloat16().to(_DEVICE)


def _own(layer: Any, value: torch.Tensor) -> torch.Tensor:
    """What ComfyUI's own layer gives, all of it on the device."""
    found: torch.Tensor = layer.to(_DEVICE)(value)
    return found


@pytest.fixture
def attached(
    native: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], nn.Module]]:
    """Attaches a layer. No kind of layer is known yet."""
    monkeypatch.setattr(float8_linear, "_gives_the_same", {})
    loaded: list[Loaded] = []

    def attach(layer: Any) -> nn.Module:
        loaded.append(Loaded(layer, _DEVICE))
        return layer  # type: ignore[no-any-return]

    with native():
        yield attach
        for one in loaded:
            one.unload()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was multiplied directly."""
    shapes: list[torch.Size] = []
    multiplied = float8_linear._multiplied

    def noted(value: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(value.shape)
        return multiplied(value, *args)

    monkeypatch.setattr(float8_linear, "_multiplied", noted)
    return shapes


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers whose own forward asked for their weights."""
    layers: list[Any] = []
    cast = comfy.ops.cast_bias_weight

    def noted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        layers.append(layer)
        return cast(layer, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", noted)
    return layers


@pytest.mark.parametrize("input_scale", [None, 0.37])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits_of_inputs_of_all_shapes(
    attached: Callable[[Any], nn.Module], products: list[torch.Size], bias: bool, input_scale: float | None
) -> None:
    expected = {
        shape: _own(_layer(bias, input_scale), _value(shape, scale))
        for shape, scale in zip(_SHAPES, (1.0, 90.0, 400.0), strict=True)
    }
    layer = attached(_layer(bias, input_scale))
    for shape, scale in zip(_SHAPES, (1.0, 90.0, 400.0), strict=True):
        for _ in range(2):
            assert support.same(layer(_value(shape, scale)), expected[shape])
    # Once to compare, and from then on in place of ComfyUI's.
    assert products == [(3, _IN), (3, _IN), (10, _IN), (10, _IN), (14, _IN), (14, _IN)]


def test_what_is_no_row_after_another_in_memory(
    attached: Callable[[Any], nn.Module], products: list[torch.Size]
) -> None:
    wide = _value((2, 6, 2 * _IN))
    for value in (wide[:, :, :_IN], wide.transpose(0, 1)[..., _IN:], wide[:, ::2, _IN:]):
        expected = _own(_layer(), value)
        products.clear()
        layer = attached(_layer())
        assert support.same(layer(value), expected)
        assert support.same(layer(value), expected)
        assert products


def test_comfyuis_forward_runs_once_for_each_kind_of_layer(
    attached: Callable[[Any], nn.Module], products: list[torch.Size], forwards: list[Any]
) -> None:
    of_one_class = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    assert of_one_class.Linear.forward is not comfy.ops.mixed_precision_ops({}, torch.float16).Linear.forward
    layers = [attached(_layer()) for _ in range(3)]
    for layer in layers:
        layer(_value((2, 5, _IN)))
    assert (len(forwards), len(products)) == (1, 3)
    attached(_layer(bias=False))(_value((2, 5, _IN)))
    assert (len(forwards), len(products)) == (2, 4)


def _scaled_before(layer: Any) -> None:
    layer.register_parameter("pre_quant_scale", nn.Parameter(torch.full((_IN,), 0.5), requires_grad=False))


def _with_function(layer: Any) -> None:
    layer.weight_function = [lambda weight: weight * 2]


def _with_bias_function(layer: Any) -> None:
    layer.bias_function = [lambda bias: bias * 2]


def _in_full_precision(layer: Any) -> None:
    layer._full_precision_mm = True


def _cast_always(layer: Any) -> None:
    layer.comfy_force_cast_weights = True


@pytest.mark.parametrize(
    "change", [_scaled_before, _with_function, _with_bias_function, _in_full_precision, _cast_always]
)
def test_layers_with_something_to_them_run_as_comfyui_runs_them(
    attached: Callable[[Any], nn.Module], products: list[torch.Size], change: Callable[[Any], None]
) -> None:
    value = _value((2, 5, _IN))
    plain = _layer().to(_DEVICE)
    without = plain(value)
    change(plain)
    plain.to(_DEVICE)
    expected = plain(value)
    assert not support.same(expected, without)
    layer = _layer()
    if change is _scaled_before:
        change(layer)
        attached(layer)
    else:
        attached(layer)
        assert support.same(layer(value), without)
        change(layer)
    products.clear()
    assert support.same(layer(value), expected)
    assert support.same(layer(value), expected)
    assert not products


def test_other_inputs_are_comfyuis(attached: Callable[[Any], nn.Module], products: list[torch.Size]) -> None:
    flat = _value((_IN,))
    expected = _own(_layer(), flat)
    layer = attached(_layer())
    assert support.same(layer(flat), expected)
    quantized = comfy.ops.QuantizedTensor.from_float(_value((4, _IN)), "TensorCoreFP8E4M3Layout")
    assert support.same(layer(quantized), _own(_layer(), quantized))
    with torch.inference_mode(False):
        trained = _value((4, _IN)).requires_grad_()
    assert support.same(layer(trained), _own(_layer(), trained))
    assert not products


def test_what_comfyui_computes_is_kept_where_it_is_something_else(
    attached: Callable[[Any], nn.Module],
    products: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = _value((2, 5, _IN))
    expected = _own(_layer(), value)

    def other(*_: Any) -> float8_linear.Rounding:
        return lambda value, scale: (value * 2).to(torch.float8_e4m3fn)

    monkeypatch.setattr(float8_linear, "_rounding", other)
    layer = attached(_layer())
    for _ in range(3):
        assert support.same(layer(value), expected)
    assert len(products) == 1


def test_comfyui_multiplies_what_there_is_no_product_for(
    attached: Callable[[Any], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = _value((2, 5, _IN))
    expected = _own(_layer(), value)
    layer = attached(_layer())
    layer(value)
    calls = []

    def fails(*_: Any) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("no such product")

    monkeypatch.setattr(float8_linear, "_multiplied", fails)
    assert support.same(layer(value), expected)
    assert calls == [1], "a kind that was found to do"
    float8_linear._gives_the_same.clear()
    for _ in range(2):
        assert support.same(layer(value), expected)
    assert calls == [1, 1], "and is not tried again where it was not"


def test_a_user_interrupts_it(attached: Callable[[Any], nn.Module]) -> None:
    layer, value = attached(_layer()), _value((2, 5, _IN))
    layer(value)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        layer(value)
    layer(value)


def test_nothing_stays_pinned_and_the_layer_is_its_own_afterwards(native: Callable[..., Any]) -> None:
    layer, value = _layer(), _value((2, 5, _IN))
    expected = _own(_layer(), value)

    def pinned(engine: forebay.Engine) -> tuple[int, int]:
        stats = engine.stats()
        return stats["operations"], stats["views"]

    with native() as engine:
        loaded = Loaded(layer, _DEVICE)
        layer(value)
        before = pinned(engine)  # a small weight is a view for as long as its model is attached
        for _ in range(2):
            assert support.same(layer(value), expected)
        assert isinstance(layer.__dict__["forward"], InstanceMethod)
        assert pinned(engine) == before
        loaded.unload()
    assert "forward" not in layer.__dict__
    assert support.same(_own(layer, value), expected)


def test_a_weight_that_left_is_filled_again(attached: Callable[[Any], nn.Module]) -> None:
    value = _value((2, 5, _IN))
    expected = _own(_layer(), value)
    layer = attached(_layer())
    engine: forebay.Engine = forebay.engine(support.DEVICE)
    for _ in range(3):
        assert support.same(layer(value), expected)
        engine.make_room(1 << 60)

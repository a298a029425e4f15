"""What layers get when they ask ComfyUI for their weights.

ComfyUI's layers that cast, or that are quantized, or that have functions on their weights, ask ``cast_bias_weight`` for
tensors to compute with. It works as before, on plain tensors that are lent for as long as they are used: it looks at a
weight a dozen times, which stand-ins would answer one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from forebay.comfyui.native.quantized import quantized_of
from forebay.parameter import ForebayTensor


def lending(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of ``comfy.ops.cast_bias_weight``."""

    @functools.wraps(original)
    def cast_bias_weight(s: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_with_plain_weights(s), *args, **kwargs)

    return cast_bias_weight


def _with_plain_weights(layer: Any) -> Any:
    """The layer itself where nothing of it is managed, otherwise its weights as plain tensors."""
    weight, bias = layer.weight, layer.bias
    plain_weight, plain_bias = _plain(layer, "weight", weight), _plain(layer, "bias", bias)
    if plain_weight is weight and plain_bias is bias:
        return layer
    return SimpleNamespace(
        weight=plain_weight,
        bias=plain_bias,
        weight_function=layer.weight_function,
        bias_function=layer.bias_function,
    )


def _plain(layer: Any, name: str, weight: Any) -> Any:
    if isinstance(weight, ForebayTensor):
        # Rows of a table that is not resident are looked up at their source, by the operation itself.
        return weight if isinstance(layer, nn.Embedding) else weight._weight.view()
    if type(weight) is nn.Parameter or type(weight) is torch.Tensor or weight is None:
        return weight
    quantized = quantized_of(layer, name)
    # Something else may stand there, a patched one.
    return quantized.plain() if quantized is not None and quantized.tensor is weight else weight

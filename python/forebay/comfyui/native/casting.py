"""What layers get when they ask ComfyUI for their weights.

ComfyUI's layers that cast, or that are quantized, or that have functions on their weights, ask ``cast_bias_weight`` for
tensors to compute with. It works as before, on plain tensors: it looks at a weight a dozen times, which stand-ins would
answer one by one. A layer says when it has computed, by ``uncast_bias_weight``, and what it hands over there holds its
weights. Who does not say it (``offloadable=False``) gets tensors that stay as long as they are used.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from forebay._forebay import Weight, hold
from forebay.comfyui.native.quantized import quantized_of, unpinned
from forebay.parameter import ForebayTensor

_SAYS_WHEN = "offloadable"


class _Receipt(tuple[Any, ...]):
    """What a layer hands to ``uncast_bias_weight``. It holds the layer's weights."""

    holding: Any


def lending(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of ``comfy.ops.cast_bias_weight``."""
    parameters = list(inspect.signature(original).parameters)
    place = parameters.index(_SAYS_WHEN) - 1 if _SAYS_WHEN in parameters else None

    @functools.wraps(original)
    def cast_bias_weight(s: Any, *args: Any, **kwargs: Any) -> Any:
        says_when = kwargs.get(_SAYS_WHEN, False) or (place is not None and len(args) > place and args[place])
        if not says_when:
            return original(_with_plain_weights(s), *args, **kwargs)
        held: list[Weight] = []
        layer = _with_plain_weights(s, held)
        if not held:
            return original(layer, *args, **kwargs)
        holding = hold(held)
        weight, bias, handed_over = original(layer, *args, **kwargs)
        if type(handed_over) is not tuple:  # not the ComfyUI that is known
            return original(_with_plain_weights(s), *args, **kwargs)
        receipt = _Receipt(handed_over)
        receipt.holding = holding
        return weight, bias, receipt

    return cast_bias_weight


def _with_plain_weights(layer: Any, held: list[Weight] | None = None) -> Any:
    """The layer itself where nothing of it is managed, otherwise its weights as plain tensors.

    Args:
        layer: Has a weight and a bias.
        held: Gets the weights that are to be held while these tensors are used. Without it they stay as long as they are used.
    """
    weight, bias = layer.weight, layer.bias
    plain_weight, plain_bias = _plain(layer, "weight", weight, held), _plain(layer, "bias", bias, held)
    if plain_weight is weight and plain_bias is bias:
        return layer
    return SimpleNamespace(
        weight=plain_weight,
        bias=plain_bias,
        weight_function=layer.weight_function,
        bias_function=layer.bias_function,
    )


def _plain(layer: Any, name: str, weight: Any, held: list[Weight] | None) -> Any:
    if weight is None or type(weight) is nn.Parameter or type(weight) is torch.Tensor:
        return weight
    if isinstance(weight, ForebayTensor):
        if isinstance(layer, nn.Embedding):
            # Rows of a table that is not resident are looked up at their source, by the operation itself.
            return weight
        return weight._weight.view() if held is None else unpinned(weight, held)
    quantized = quantized_of(layer, name)
    # Something else may stand there, a patched one.
    if quantized is None or quantized.tensor is not weight:
        return weight
    return quantized.plain() if held is None else quantized.unpinned(held)

"""Small weights: ordinary parameters on the device, always resident.

They are of the plain type, because tools that record or transform operations know no other. What differs is set on the
one object: copies and pickles of it see the source.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from forebay._forebay import ForebayError, Weight
from forebay.converting import Conversion

_ATTRIBUTE = "_forebay_small"


class SmallWeight:
    """What is known of a small weight. Its methods stand in for the parameter's own."""

    def __init__(self, weight: Weight, source: torch.Tensor, conversion: Conversion | None) -> None:
        self._weight = weight
        self._source = source
        self._conversion = conversion

    @property
    def _value(self) -> torch.Tensor:
        return self._source if self._conversion is None else self._conversion.value(self._source)

    def copied(self, memo: dict[int, Any]) -> nn.Parameter:
        """In place of ``__deepcopy__``."""
        return nn.Parameter(copy.deepcopy(self._value.detach(), memo), requires_grad=False)

    def reduced(self, protocol: Any) -> Any:
        """In place of ``__reduce_ex__``."""
        plain: Any = nn.Parameter(self._value, requires_grad=False)
        return plain.__reduce_ex__(protocol)

    def trained(self, requires_grad: bool = True) -> None:
        """In place of ``requires_grad_``."""
        if requires_grad:
            raise ForebayError(
                "a managed weight cannot be trained; detach() its model before requires_grad is set: "
                f"{self._weight.name}"
            )


def small_parameter(weight: Weight, source: torch.Tensor, conversion: Conversion | None) -> nn.Parameter:
    """The parameter of a small weight, which stays pinned as long as it lives."""
    parameter = nn.Parameter(weight.view(), requires_grad=False)
    small = SmallWeight(weight, source, conversion)
    # Not the parameter itself in here: it would not go before the next garbage collection.
    parameter.__dict__.update(
        {
            _ATTRIBUTE: small,
            "__deepcopy__": small.copied,
            "__reduce_ex__": small.reduced,
            "requires_grad_": small.trained,
        }
    )
    return parameter


def small_of(parameter: torch.Tensor | None) -> SmallWeight | None:
    """What is known of a parameter, where it is a small weight's."""
    return parameter.__dict__.get(_ATTRIBUTE) if type(parameter) is nn.Parameter else None

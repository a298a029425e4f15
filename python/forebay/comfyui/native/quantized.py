"""Quantized weights: tensors made of several, of which each is a weight of its own to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay.instance_methods import InstanceMethod
from forebay.parameter import ForebayTensor

_DATA = "data"


class ManagedQuantized:
    """A quantized weight whose inner tensors are managed.

    While its model is attached they are parameters of a module of their own, and the quantized tensor that stands in the
    layer is made of their stand-ins. A forward of the layer sees one that is made of plain tensors.
    """

    def __init__(self, module: nn.Module, name: str, weight: Any) -> None:
        """Takes the weight out of its layer and lays its parts where :func:`forebay.attach` finds them."""
        self._module = module
        self._name = name
        self._weight = weight
        self._params = weight._params
        self._forward: InstanceMethod | None = None
        self._holder = nn.Module()
        self._holder_name = f"{name}_parts"
        self._fields: list[str] = []
        self._holder.register_parameter(_DATA, nn.Parameter(weight._qdata, requires_grad=False))
        for field in dataclasses.fields(self._params):
            value = getattr(self._params, field.name)
            if isinstance(value, torch.Tensor):
                self._fields.append(field.name)
                self._holder.register_parameter(field.name, nn.Parameter(value, requires_grad=False))
        module._parameters[name] = None
        module._modules[self._holder_name] = self._holder

    def stand_in(self) -> None:
        """Puts a quantized tensor of stand-ins into the layer."""
        del self._module._modules[self._holder_name]
        with torch.inference_mode(False):
            tensor = self._made_of(self._holder._parameters)
        tensor._is_param = True
        self._module._parameters[self._name] = tensor
        self._forward = InstanceMethod(self._module, "forward", self._run)

    def withdraw(self) -> None:
        """Takes it out of the layer again, before the model is detached."""
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    def restore(self) -> None:
        """Puts the layer's own weight back."""
        self._module._modules.pop(self._holder_name, None)
        self._module._parameters[self._name] = self._weight

    def plain(self) -> Any:
        """The weight, made of plain tensors on the device. They stay as long as it does."""
        parts = {name: _plain(getattr(self._holder, name)) for name in (_DATA, *self._fields)}
        return self._made_of(parts)

    def _made_of(self, parts: Any) -> Any:
        fields = {name: parts[name] for name in self._fields}
        return QuantizedTensor(
            parts[_DATA], self._weight._layout_cls, dataclasses.replace(self._params, **fields)
        )

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen = self._module.__dict__
        # Python looks here before `_parameters`.
        seen[self._name] = self.plain()
        try:
            return original(*args, **kwargs)
        finally:
            seen.pop(self._name, None)


def _plain(part: torch.Tensor) -> torch.Tensor:
    return part._weight.view() if isinstance(part, ForebayTensor) else part.data

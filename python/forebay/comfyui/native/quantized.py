"""Quantized weights: tensors made of several, of which each is a weight of its own to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay._forebay import Weight
from forebay.parameter import ForebayTensor
from forebay.streams import Uses

_DATA = "data"
_SCALE = "scale"
_ATTRIBUTE = "forebay_quantized"


def quantized_of(module: nn.Module, name: str) -> ManagedQuantized | None:
    """What is known of a layer's weight, where it is a quantized one that is managed."""
    known = module.__dict__.get(_ATTRIBUTE)
    found: ManagedQuantized | None = None if known is None else known.get(name)
    return found


def stand_ins_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """What stands in for a module's own weights, and for the parts of its quantized ones."""
    known: dict[str, ManagedQuantized] = module.__dict__.get(_ATTRIBUTE, {})
    for name, parameter in module._parameters.items():
        if name in known:
            yield from known[name].stand_ins
        elif parameter is not None:
            yield parameter


class ManagedQuantized:
    """A quantized weight whose inner tensors are managed.

    While its model is attached they are parameters of a module of their own, and the quantized tensor that stands in the
    layer is made of their stand-ins. What computes gets one that is made of plain tensors.

    Attributes:
        module: The layer.
        name: The weight's name there.
        original: The weight as it was.
        tensor: What stands in the layer, made of stand-ins.
        data_name: The name of its data in the model that is attached.
    """

    def __init__(self, path: str, module: nn.Module, name: str, weight: Any) -> None:
        """Takes the weight out of its layer and lays its parts where :func:`forebay.attach` finds them."""
        self.module = module
        self.name = name
        self.original = weight
        self.tensor: Any = None
        self._unpinned: Any = None
        self._stand_ins: dict[str, torch.Tensor] = {}
        self._weights: list[Weight] = []
        self._params = weight._params
        self._scale: torch.Tensor | None = None
        self._uses: Uses | None = None
        """Of another scale than its own."""
        self._holder = nn.Module()
        self._holder_name = f"{name}_parts"
        self.data_name = f"{path}.{self._holder_name}.{_DATA}" if path else f"{self._holder_name}.{_DATA}"
        self._fields = [
            field.name
            for field in dataclasses.fields(self._params)
            if isinstance(getattr(self._params, field.name), torch.Tensor)
        ]
        parts = {_DATA: weight._qdata, **{field: getattr(self._params, field) for field in self._fields}}
        for part, tensor in parts.items():
            self._holder.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        module._parameters[name] = None
        module._modules[self._holder_name] = self._holder

    @property
    def stand_ins(self) -> Iterable[torch.Tensor]:
        """What stands in for its parts."""
        return self._stand_ins.values()

    @property
    def has_one_scale(self) -> bool:
        """Whether there is nothing but data and one number."""
        return self._fields == [_SCALE] and self._params.scale.numel() == 1

    @property
    def is_scale_kept(self) -> bool:
        """Whether its scale is always on the device."""
        return not isinstance(self._stand_ins[_SCALE], ForebayTensor)

    @property
    def data(self) -> torch.Tensor:
        """What stands in for its data."""
        data = self._holder._parameters[_DATA]
        assert data is not None
        return data

    def stand_in(self) -> None:
        """Puts a quantized tensor of stand-ins into the layer."""
        del self.module._modules[self._holder_name]
        self._stand_ins = {name: getattr(self._holder, name) for name in (_DATA, *self._fields)}
        self._weights = [part._weight for part in self._stand_ins.values() if isinstance(part, ForebayTensor)]
        self._put()
        self.module.__dict__.setdefault(_ATTRIBUTE, {})[self.name] = self

    def restore(self) -> None:
        """Puts the layer's own weight back, once the model is detached."""
        self.module.__dict__.pop(_ATTRIBUTE, None)
        self.module._modules.pop(self._holder_name, None)
        self.module._parameters[self.name] = self.original
        self._unpinned, self._stand_ins, self._weights = None, {}, []

    def plain(self) -> Any:
        """The weight, made of plain tensors on the device. They stay as long as it does."""
        if self._uses is not None:
            self._uses.enter()
        return self._made_of({name: _plain(getattr(self._holder, name)) for name in (_DATA, *self._fields)})

    def unpinned(self, held: list[Weight]) -> Any:
        """The weight, made of plain tensors that are there while its parts are held.

        Args:
            held: Gets those parts.
        """
        held += self._weights
        if self._uses is not None:
            self._uses.enter()
        if self._unpinned is None:
            parts = {
                name: part._weight.unpinned if isinstance(part, ForebayTensor) else part.data
                for name, part in self._stand_ins.items()
            }
            with torch.inference_mode(False):
                self._unpinned = self._made_of(parts)
        return self._unpinned

    def patched(
        self, compute: Callable[[Any], Any]
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], None]]:
        """Has its data computed by a patch, which also gives it another scale.

        Args:
            compute: Gives the patched quantized weight from the stored one.

        Returns:
            What computes the data from the stored data, and what gives the weight its own scale back.
        """
        stored = _plain(self._holder._parameters[_SCALE])  # type: ignore[arg-type]
        with torch.inference_mode(False):
            scale = stored.clone()
        undo = self.scaled(scale)

        def data(value: torch.Tensor) -> torch.Tensor:
            params = dataclasses.replace(self._params, scale=stored)
            found = compute(QuantizedTensor(value, self.original._layout_cls, params))
            # In the stream that the data is computed in: whoever waits for the data finds its scale.
            scale.copy_(found._params.scale)
            if scale.is_cuda:
                scale.record_stream(torch.cuda.current_stream(scale.device))
            result: torch.Tensor = found._qdata
            return result

        return data, undo

    def scaled(self, scale: torch.Tensor) -> Callable[[], None]:
        """Gives it another scale, beside data that is patched elsewhere.

        Returns:
            What gives it its own back.
        """
        self._scale, self._uses = scale, Uses(scale)
        self._put()

        def undo() -> None:
            if self._scale is scale:
                self._scale = self._uses = None
                self._put()

        return undo

    def _put(self) -> None:
        with torch.inference_mode(False):
            tensor = self._made_of(self._holder._parameters)
        tensor._is_param = True
        self.tensor, self._unpinned = tensor, None
        self.module._parameters[self.name] = tensor

    def _made_of(self, parts: Any) -> Any:
        fields = {name: parts[name] for name in self._fields}
        if self._scale is not None:
            fields[_SCALE] = self._scale
        return QuantizedTensor(
            parts[_DATA], self.original._layout_cls, dataclasses.replace(self._params, **fields)
        )


def data_of(weight: Any) -> torch.Tensor:
    """The data of a quantized weight; of another one itself."""
    data: torch.Tensor = weight._qdata if isinstance(weight, QuantizedTensor) else weight
    return data


def with_data(weight: Any, data: torch.Tensor) -> Any:
    """The weight with other data."""
    if isinstance(weight, QuantizedTensor):
        return QuantizedTensor(data, weight._layout_cls, weight._params)
    return data


def unpinned(weight: torch.Tensor, held: list[Weight]) -> torch.Tensor:
    """A plain tensor, that is there while what is added to the list is held."""
    if not isinstance(weight, ForebayTensor):
        return weight
    held.append(weight._weight)
    return weight._weight.unpinned


def _plain(part: torch.Tensor) -> torch.Tensor:
    return part._weight.view() if isinstance(part, ForebayTensor) else part.data

"""The parameters of a module that is attached, and the places that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from forebay.converting import Conversion, Dtypes, conversion_of
from forebay.parameter import ForebayTensor
from forebay.places import Place
from forebay.small import small_of


class ManagedWeight:
    """A parameter to be managed and the places that hold it."""

    def __init__(self, name: str, parameter: torch.Tensor) -> None:
        self.name = name
        self.names: list[str] = []
        self.parameter = parameter
        self.source = parameter.detach()
        self.conversion: Conversion | None = None
        self.places: list[Place] = []

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is used in."""
        return self.source.dtype if self.conversion is None else self.conversion.dtype

    @property
    def is_table(self) -> bool:
        """Whether only embeddings use it, so that rows can be looked up."""
        owners = [place.owner for place in self.places]
        embeddings = all(isinstance(owner, nn.Embedding) and owner.max_norm is None for owner in owners)
        return embeddings and self.source.ndim == 2 and self.source.is_contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last, by the strides."""
        if self.source.is_contiguous():
            return self.source.nbytes
        spans = zip(self.source.size(), self.source.stride(), strict=True)
        return (1 + sum((size - 1) * stride for size, stride in spans)) * self.source.element_size()


class Weights:
    """The parameters of a module: those to be managed, and the others, which move to the device as they are."""

    def __init__(
        self,
        label: str,
        root: nn.Module,
        known_stand_ins: set[int],
        dtypes: Dtypes | None,
        scales: Mapping[str, torch.Tensor] | None,
    ) -> None:
        self.managed: list[ManagedWeight] = []
        self.others: list[tuple[Place, torch.Tensor]] = []
        known: dict[tuple[Any, ...], ManagedWeight] = {}
        for prefix, owner in root.named_modules():
            for name, parameter in owner._parameters.items():
                # Parts of a pipeline may share modules.
                if parameter is None or id(parameter) in known_stand_ins:
                    continue
                place, path = Place(owner, name), f"{prefix}.{name}" if prefix else name
                _check(label, path, parameter)
                if not _is_plain(parameter):
                    self.others.append((place, parameter))
                    continue
                identity = _identity(parameter)
                weight = known.get(identity)
                if weight is None:
                    weight = known[identity] = ManagedWeight(path, parameter)
                    weight.conversion = conversion_of(path, label, weight.source, dtypes, scales)
                    self.managed.append(weight)
                weight.places.append(place)
                weight.names.append(path)

    def conversions(self, device: torch.device) -> list[Any]:
        """As the engine takes them; none where no weight is converted."""
        of = [(weight.conversion, weight.source) for weight in self.managed]
        if not any(conversion for conversion, _ in of):
            return []
        return [None if conversion is None else conversion.on(source, device) for conversion, source in of]

    def specs(self) -> list[tuple[str, int, int, object, bool]]:
        """As the engine takes them."""
        return [
            (weight.name, weight.source.data_ptr(), weight.nbytes, weight.source, weight.is_table)
            for weight in self.managed
        ]


def _check(label: str, path: str, parameter: torch.Tensor) -> None:
    if isinstance(parameter, ForebayTensor) or small_of(parameter):
        raise ValueError(f"is attached already; detach() it first: {path} of {label}")
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"is not initialized; run the module once before attach: {path} of {label}")
    if parameter.is_meta:
        raise ValueError(f"has no bytes (meta device); load the weights before attach: {path} of {label}")
    if parameter.device.type != "cpu":
        raise ValueError(
            f"is on {parameter.device} already; attach takes models whose weights are on the CPU, where their bytes "
            f"can stay: {path} of {label}"
        )


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether the parameter is a strided tensor of its own storage, without a subclass's meaning in it."""
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is torch.Tensor
        and parameter.layout is torch.strided
        and parameter.numel() > 0
        and not parameter.is_conj()
        and not parameter.is_neg()
        and not parameter.is_quantized
    )


def _identity(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tied parameters."""
    return (parameter.data_ptr(), parameter.dtype, parameter.size(), parameter.stride())

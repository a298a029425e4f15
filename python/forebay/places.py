"""Where modules hold parameters, and what stands there."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """A parameter of a module by its name there."""

    owner: nn.Module
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the place as long as its owner lives."""
        return (id(self.owner), self.name)

    def get(self) -> torch.Tensor | None:
        """What stands there."""
        return self.owner._parameters.get(self.name)

    def put(self, parameter: torch.Tensor | None) -> None:
        """Puts a tensor there, without the checks and hooks of an assignment."""
        self.owner._parameters[self.name] = parameter  # type: ignore[assignment]
        if isinstance(self.owner, nn.RNNBase) and hasattr(self.owner, "_flat_weights"):
            _renew_flat_weights(self.owner)


def _renew_flat_weights(module: nn.RNNBase) -> None:
    """Recurrent modules keep lists of their own, and join their weights in memory when they find another tensor."""
    weights = [module._parameters.get(name) for name in module._flat_weights_names]
    module._flat_weights = weights
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]

"""A patched weight in ComfyUI's own arithmetic, one weight at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn


class WeightPatch:
    """Computes a patched weight from the stored one."""

    def __init__(self, layer: nn.Module, key: str, patches: Sequence[Any], device: torch.device) -> None:
        """Takes the patches to the device.

        Args:
            layer: The module that has the weight.
            key: The weight's name in the model.
            patches: ComfyUI's for this weight.
            device: Where it is computed.
        """
        self._name = key.rpartition(".")[2]
        self._key = key
        self._layer = layer
        self._device = device
        weight = getattr(layer, self._name)
        self._memory, self._patches = _on_device(patches, device, weight.nbytes)

    def __call__(self, stored: torch.Tensor) -> Any:
        """Computes it, in new memory, in the current stream."""
        if self._memory is not None:
            # What it reads is not given to others before it has read it.
            self._memory.record_stream(torch.cuda.current_stream(self._device))
        view = SimpleNamespace(**{self._name: stored})
        for method in (f"set_{self._name}", f"convert_{self._name}"):
            if hasattr(self._layer, method):
                setattr(view, method, getattr(self._layer, method))
        patcher = SimpleNamespace(
            model=_nested(self._key, view),
            patches={self._key: self._patches},
            backup={},
            weight_inplace_update=False,
        )
        with torch.no_grad():
            return ModelPatcher.patch_weight_to_device(
                patcher, self._key, device_to=self._device, return_weight=True
            )


def _nested(key: str, layer: Any) -> Any:
    """A model that has nothing but this layer, in its place."""
    for name in reversed(key.split(".")[:-1]):
        layer = SimpleNamespace(**{name: layer})
    return layer


def _on_device(
    patches: Sequence[Any], device: torch.device, most: int
) -> tuple[torch.Tensor | None, list[Any]]:
    """The patches with their tensors on the device, and the memory they are in there.

    Those that take more than the weight itself stay where they are: whole weights, of models that are merged.
    """
    values = [patch[1] for patch in patches]
    counter = [0]
    comfy.lora.prefetch_prepared_value(values, counter, None, None, False)
    if device.type == "cpu" or not 0 < counter[0] <= most:
        return None, list(patches)
    memory = torch.empty(counter[0], dtype=torch.uint8, device=device)
    moved = comfy.lora.prefetch_prepared_value(values, [0], memory, None, True)
    return memory, [(patch[0], value, *patch[2:]) for patch, value in zip(patches, moved, strict=True)]

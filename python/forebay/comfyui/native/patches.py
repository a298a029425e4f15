"""Patches of weights, as LoRAs are, computed by ComfyUI's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from forebay.instance_methods import InstanceMethod


class Patched:
    """The patches of one patcher on a loaded model: what a layer's forward sees in place of its weights."""

    def __init__(self, patcher: Any, device: torch.device) -> None:
        """Patches every weight that the patcher has patches for, until :meth:`remove`."""
        self.uuid = patcher.patches_uuid
        self._methods: list[InstanceMethod] = []
        self._compute = _Computing(patcher, device)
        by_module: dict[int, tuple[nn.Module, dict[str, str]]] = {}
        for key in patcher.patches:
            path, _, name = key.rpartition(".")
            module = patcher.model.get_submodule(path)
            if name in module._parameters:
                by_module.setdefault(id(module), (module, {}))[1][name] = key
        for module, keys in by_module.values():
            self._methods.append(InstanceMethod(module, "forward", _Forward(module, keys, self._compute)))

    def remove(self) -> None:
        """Leaves the weights as they are in their files."""
        while self._methods:
            self._methods.pop().remove()


class _Computing:
    """Computes patched weights as ComfyUI does where it loads a model as a whole."""

    def __init__(self, patcher: Any, device: torch.device) -> None:
        self._model = patcher.model
        self._patches = {key: list(patches) for key, patches in patcher.patches.items()}
        self._device = device
        self.weight_inplace_update = False
        self.model = patcher.model
        self.patches = self._patches
        self.backup: dict[str, Any] = {}
        self.offload_device = patcher.offload_device

    def __call__(self, key: str) -> torch.Tensor:
        found: torch.Tensor = ModelPatcher.patch_weight_to_device(
            self, key, device_to=self._device, return_weight=True
        )
        return found


class _Forward:
    def __init__(self, module: nn.Module, keys: Mapping[str, str], compute: _Computing) -> None:
        self._module = module
        self._keys = keys
        self._compute = compute

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parameters = self._module._parameters
        originals = {name: parameters[name] for name in self._keys}
        parameters.update({name: self._compute(key) for name, key in self._keys.items()})
        try:
            return original(*args, **kwargs)
        finally:
            parameters.update(originals)

"""A model of ComfyUI's that is attached: what ComfyUI calls loaded.

One model has one of these, however many patchers share it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay._forebay import Engine
from forebay.attachment import Attachment, attach
from forebay.comfyui.native import HOST_BUDGET
from forebay.comfyui.native.float8_linear import Float8Linear, launching_directly
from forebay.comfyui.native.patches import Patches, are_added, are_products
from forebay.comfyui.native.quantized import ManagedQuantized, quantized_of
from forebay.converting import STORED, USED
from forebay.engines import engine
from forebay.parameter import ForebayTensor
from forebay.small import small_of

_ATTRIBUTE = "forebay_loaded"


def loaded_of(model: nn.Module) -> Loaded | None:
    """What is attached of a model, or nothing."""
    found: Loaded | None = model.__dict__.get(_ATTRIBUTE)
    return found


def engine_for(device: torch.device) -> Engine:
    """The engine of a device that ComfyUI loads models on."""
    budget = os.environ.get(HOST_BUDGET)
    if device.type == "cpu" and budget is not None:
        return engine("host", budget=float(budget))
    return engine(device)


class Loaded:
    """The weights of one model on one device."""

    def __init__(
        self, model: nn.Module, device: torch.device, patches: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Attaches a model. Its weights stay where they are: in the mapped file, where they came from one.

        Args:
            model: The model.
            device: Where to.
            patches: ComfyUI's, by the weights' names in the model, of which :meth:`patch` is about to be told.

        Raises:
            OutOfMemoryError: Where not even its small weights fit.
            ValueError: For weights that are elsewhere already.
        """
        self.device = device
        self._model = model
        self._quantized: list[ManagedQuantized] = []
        self._layers: list[Float8Linear] = []
        self._attachment: Attachment | None = None
        self._patches: Patches | None = None
        try:
            with torch.inference_mode(False):
                _initialize(model)
                self._quantized += [
                    ManagedQuantized(path, module, name, parameter)
                    for path, module in list(model.named_modules())
                    for name, parameter in list(module._parameters.items())
                    if isinstance(parameter, QuantizedTensor)
                ]
                dtypes = _model_dtypes(model)
                parameters = dict(model.named_parameters())
                used = {name: dtypes.get(name, parameter.dtype) for name, parameter in parameters.items()}
                self._size = sum(
                    parameter.numel() * used[name].itemsize for name, parameter in parameters.items()
                )
                fits, is_quantized = _fits(self._size, device), bool(self._quantized)
                self._attachment = attach(
                    model,
                    engine_for(device),
                    dtype=dtypes or None,
                    # Where the engine patches pages, it does not matter which of them stay.
                    whole=bool(patches)
                    and is_quantized
                    and not (device.type == "cuda" and are_products(patches or {})),
                    # What is added goes to what was read by then. Quantized weights that do not fit are patched when they are used.
                    # What else is computed as it is filled would be filled twice.
                    prefetch=not patches or are_added(patches, used) or (is_quantized and not fits),
                )
                for quantized in self._quantized:
                    quantized.stand_in()
                directly = map(launching_directly, self._quantized)
                self._layers += [layer for layer in directly if layer is not None]
        except BaseException:
            self.unload()
            raise
        self._patches = Patches(model, self._attachment, at_fill=fits)
        self._modules = {id(module) for module in model.modules()}
        model.__dict__[_ATTRIBUTE] = self

    @property
    def attachment(self) -> Attachment:
        """Its attachment."""
        assert self._attachment is not None
        return self._attachment

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that its weights take at this moment."""
        if self._attachment is None:
            return 0
        return sum(one["resident"] + one["streamed"] for one in self._attachment.stats())

    def patch(self, patches: Mapping[str, Sequence[Any]]) -> int:
        """Gives the weights these patches in place of those they have. How many changed."""
        assert self._patches is not None
        return self._patches.set(patches, fits=_fits(self._size, self.device))

    def stored(self, key: str, weight: Any) -> Any:
        """A weight as it is without patches, on the CPU, valid also when the model is unloaded."""
        path, _, name = key.rpartition(".")
        layer = self._model.get_submodule(path)
        quantized = quantized_of(layer, name)
        if quantized is not None:
            return quantized.original
        small = small_of(weight)
        source = (
            weight._source if isinstance(weight, ForebayTensor) else None if small is None else small._source
        )
        return weight if source is None else source.to(weight.dtype)

    def adopt(self) -> None:
        """Moves to the device what was put into the model since it was attached, as patches of objects do."""
        for module in self._model.modules():
            if id(module) not in self._modules:
                module.to(self.device)

    def unload(self) -> None:
        """Puts the model's own weights back, which lie on the CPU. Idempotent."""
        if self._model.__dict__.get(_ATTRIBUTE) is self:
            del self._model.__dict__[_ATTRIBUTE]
        if self._patches is not None:
            self._patches.withdraw()
            self._patches = None
        while self._layers:
            self._layers.pop().remove()
        if self._attachment is not None:
            # What was put in the place of its weights goes with their memory.
            self._attachment.detach()
            self._attachment = None
        while self._quantized:
            self._quantized.pop().restore()


def _initialize(model: nn.Module) -> None:
    """Gives weights that no file had, and that ComfyUI made without memory, the zeros it gives them."""
    for module in model.modules():
        if not hasattr(module, "comfy_cast_weights"):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                comfy.ops.disable_weight_init._zero_init_parameter(module, name)


def _model_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of weights that were taken from a file as they are, where ComfyUI gave the model another one.

    They are converted as they are filled, where the engine can. The others, and buffers, are converted here.
    """
    dtypes: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if parameter is None or dtype is None or parameter.dtype == dtype:
                continue
            if parameter.dtype in STORED and dtype in USED:
                dtypes[f"{path}.{name}" if path else name] = dtype
            else:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if buffer is not None and dtype is not None and buffer.dtype != dtype:
                module._buffers[name] = buffer.to(dtype)
    return dtypes


def _fits(size: int, device: torch.device) -> bool:
    """Whether a model of this size may stay on the device as a whole while it runs."""
    management = comfy.model_management
    # What the user reserves is no part of the budget.
    least = management.minimum_inference_memory() - management.extra_reserved_memory()
    others = 0 if device.type == "cpu" else least
    engine = engine_for(device)
    # The budget follows what others take, with a delay.
    free = engine.memory()[0] + engine.stats()["held"] - (engine.headroom or 0)
    return bool(size + others <= min(engine.budget, free))

"""A model of ComfyUI's that is attached: what ComfyUI calls loaded.

One model has one of these, however many patchers share it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay._forebay import Engine
from forebay.attachment import Attachment, attach
from forebay.comfyui.native.quantized import ManagedQuantized
from forebay.engines import engine

_log = logging.getLogger("forebay")

HOST_BUDGET = "FOREBAY_HOST_BUDGET"
"""Bytes of weights in memory at once where ComfyUI runs on the CPU: what stands for a card there."""

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

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Attaches a model. Its weights stay where they are: in the mapped file, where they came from one.

        Raises:
            OutOfMemoryError: Where not even its small weights fit.
            ValueError: For weights that are elsewhere already.
        """
        self.device = device
        self._model = model
        self._quantized: list[ManagedQuantized] = []
        self._attachment: Attachment | None = None
        try:
            with torch.inference_mode(False):
                _initialize(model)
                for module, name, weight in _quantized_weights(model):
                    self._quantized.append(ManagedQuantized(module, name, weight))
                self._attachment = attach(model, engine_for(device))
                for quantized in self._quantized:
                    quantized.stand_in()
        except BaseException:
            self.unload()
            raise
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

    def adopt(self) -> None:
        """Moves to the device what was put into the model since it was attached, as patches of objects do."""
        for module in self._model.modules():
            if id(module) not in self._modules:
                module.to(self.device)

    def unload(self, keep: bool = False) -> None:
        """Puts the model's own weights back, which lie on the CPU. Idempotent.

        Args:
            keep: As for :meth:`forebay.Attachment.detach`.
        """
        if self._model.__dict__.get(_ATTRIBUTE) is self:
            del self._model.__dict__[_ATTRIBUTE]
        for quantized in self._quantized:
            quantized.withdraw()
        if self._attachment is not None:
            self._attachment.detach(keep)
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


def _quantized_weights(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, QuantizedTensor)
    ]

"""What is not quantized of a quantized model, left as its file has it.

Where ComfyUI loads such a model it converts those weights to the dtype that it computes in, each to memory of its own: half a GiB for
an expert of Wan. Other models' weights it leaves in the mapped file, and notes beside them the dtype they are used in. So here: they are
converted on the device, and for whoever asks for them elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from forebay.converting import STORED, USED

_KEPT = "forebay_kept"


def keeping(load: Callable[..., None]) -> Callable[..., None]:
    """ComfyUI's loading of a layer of a quantized model, that leaves a weight as it is where the model's are taken from the file."""

    @functools.wraps(load)
    def loaded(
        module: Any,
        super_load: Any,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        own, weight = module.factory_kwargs, state_dict.get(f"{prefix}weight")
        dtype = own["dtype"]
        is_quantized = f"{prefix}comfy_quant" in state_dict
        if (
            is_quantized
            or not isinstance(weight, torch.Tensor)
            or not metadata.get("assign_to_params_buffers")
            or weight.dtype == dtype
            or weight.dtype not in STORED
            or dtype not in USED
        ):
            module.__dict__.pop(_KEPT, None)
            load(module, super_load, state_dict, prefix, metadata, *args, **kwargs)
            return
        # In the dtype that it has there is nothing to convert.
        module.factory_kwargs = {**own, "dtype": weight.dtype}
        try:
            load(module, super_load, state_dict, prefix, metadata, *args, **kwargs)
        finally:
            module.factory_kwargs = own
        module.weight_comfy_model_dtype = dtype
        module.__dict__[_KEPT] = True

    return loaded


def used(model: nn.Module, key: str, weight: Any) -> Any:
    """A weight of a model that is not attached as ComfyUI would have it in memory."""
    path, _, name = key.rpartition(".")
    module: Any = model.get_submodule(path)
    is_kept = name == "weight" and _KEPT in module.__dict__
    return weight.to(module.weight_comfy_model_dtype) if is_kept else weight


def convert(model: nn.Module) -> None:
    """From now on a model that is not attached has these weights as ComfyUI would."""
    with torch.inference_mode(False):
        module: Any
        for module in model.modules():
            if _KEPT in module.__dict__:
                weight = module.weight.to(module.weight_comfy_model_dtype)
                module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
                del module.__dict__[_KEPT]

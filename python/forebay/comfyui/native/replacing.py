"""What stands in ComfyUI's modules while native mode is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# By these names: while model_patcher is being imported, its package does not have it yet.
import comfy.memory_management as memory_management
import comfy.model_management as model_management
import comfy.model_patcher as model_patcher
import comfy.ops as ops
import comfy.utils as utils

from forebay._forebay import OutOfMemoryError
from forebay.comfyui import warming
from forebay.comfyui.native.casting import lending
from forebay.comfyui.native.kept import keeping
from forebay.comfyui.native.kernels import of_patches
from forebay.comfyui.native.patcher import ForebayModelPatcher

_undo: list[tuple[Any, str, Any]] = []


def replace(activate: bool) -> None:
    """Puts Forebay's patcher in the place of the dynamic one.

    Args:
        activate: Also makes it the patcher that models get from now on, and has files mapped instead of read. Otherwise
            ComfyUI's start does that, where dynamic VRAM is on.
    """
    if not _undo:
        _set(model_patcher, "ModelPatcherDynamic", ForebayModelPatcher)
        _set(ops, "cast_bias_weight", lending(ops.cast_bias_weight))
        # By this name only where ComfyUI has it: what it does not keep it copies.
        if hasattr(ops, "_load_quantized_module"):
            _set(ops, "_load_quantized_module", keeping(ops._load_quantized_module))
        # Weights of one operation that do not fit are what ComfyUI's retries with smaller tiles are for.
        known = model_management.OOM_EXCEPTION
        classes = known if isinstance(known, tuple) else (known,)
        _set(model_management, "OOM_EXCEPTION", (*classes, OutOfMemoryError))
        # A loop over bits in Python, for every patched weight of every step where it is computed on use.
        _set(utils, "string_to_seed", _remembering(utils.string_to_seed))
        _set(warming, "of_patches", of_patches)
    if activate and model_patcher.CoreModelPatcher is not ForebayModelPatcher:
        _set(model_patcher, "CoreModelPatcher", ForebayModelPatcher)
        _set(memory_management, "aimdo_enabled", True)


def restore() -> None:
    """Puts back what was there."""
    while _undo:
        setattr(*_undo.pop())
    if model_patcher.CoreModelPatcher is ForebayModelPatcher:
        model_patcher.CoreModelPatcher = model_patcher.ModelPatcherDynamic


def _remembering(function: Callable[[Any], int]) -> Callable[[Any], int]:
    """A pure function that remembers what it gave for strings."""
    known = functools.cache(function)

    @functools.wraps(function)
    def remembered(data: Any) -> int:
        return known(data) if isinstance(data, str) else function(data)

    return remembered


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)

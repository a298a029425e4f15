"""What stands in ComfyUI's modules while native mode is installed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from forebay._forebay import OutOfMemoryError

_undo: list[tuple[Any, str, Any]] = []


def replace(module: ModuleType) -> None:
    """Puts Forebay's patcher in the place of the dynamic one.

    Both names are replaced: ComfyUI makes its patchers of the one and sets it to the other once its devices are known.

    Args:
        module: ``comfy.model_patcher``.

    Raises:
        RuntimeError: Where it has no dynamic patcher.
    """
    if _undo:
        return
    if not hasattr(module, "ModelPatcherDynamic"):
        raise RuntimeError(
            f"native mode takes the place of ModelPatcherDynamic, which this ComfyUI has not: {module.__file__}"
        )
    from comfy import memory_management, model_management

    from forebay.comfyui.native.patcher import ForebayModelPatcher

    _set(module, "ModelPatcherDynamic", ForebayModelPatcher)
    _set(module, "CoreModelPatcher", ForebayModelPatcher)
    # Files are mapped, and layers wait for their weights instead of allocating memory for them.
    _set(memory_management, "aimdo_enabled", True)
    # Weights of one operation that do not fit are what ComfyUI's retries with smaller tiles are for.
    known = model_management.OOM_EXCEPTION
    _set(
        model_management,
        "OOM_EXCEPTION",
        (*(known if isinstance(known, tuple) else (known,)), OutOfMemoryError),
    )


def restore() -> None:
    """Puts back what was there."""
    while _undo:
        setattr(*_undo.pop())


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)

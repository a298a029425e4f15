"""ComfyUI's models on attached weights, in place of its own casting and offloading.

``install()`` replaces the patcher that ComfyUI takes for dynamic VRAM by :class:`patcher.ForebayModelPatcher`: a model is
attached where ComfyUI would load it, its weights stay where its file is mapped, and adapters (LoRA) are applied on the
device, by ComfyUI's own arithmetic. Nothing of the model is pinned or copied in RAM.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

from forebay.comfyui.arrival import on_import, withdraw

_log = logging.getLogger("forebay")

HOST_BUDGET = "FOREBAY_HOST_BUDGET"
"""An environment variable: has native mode stand in for ComfyUI's plain loading where it runs on the CPU, with so many bytes
of weights in memory at once. For tests of what otherwise needs a card."""

_PATCHERS = "comfy.model_patcher"


def install() -> None:
    """From now on ComfyUI's dynamic VRAM is attached weights. Idempotent; needs neither torch nor ComfyUI imported yet.

    Where ComfyUI is imported already, models that are loaded from now on are attached; models loaded before stay what
    they are. Where it is not, this waits for its import, and ComfyUI decides whether it uses dynamic VRAM at all
    (``--disable-dynamic-vram``, ``--cpu``).
    """
    if _PATCHERS in sys.modules:
        _replace(True)
    else:
        on_import(_PATCHERS, _replace_if_known)


def uninstall() -> None:
    """Undoes it. Models that are attached stay so until ComfyUI unloads them."""
    withdraw(_PATCHERS)
    replacing = sys.modules.get("forebay.comfyui.native.replacing")
    if replacing is not None:
        replacing.restore()


def _replace_if_known() -> None:
    """A ComfyUI that native mode does not know runs with its own casting: nothing that it asks for is missing then."""
    try:
        _replace(HOST_BUDGET in os.environ)
    except Exception as error:
        uninstall()
        _log.warning("native mode does not know this ComfyUI, whose own casting is used: %s", error)


def _replace(activate: bool) -> None:
    # Not imported before: it needs torch and ComfyUI.
    importlib.import_module("forebay.comfyui.native.replacing").replace(activate)


__all__ = ["HOST_BUDGET", "install", "uninstall"]

"""These tests need a checkout of ComfyUI, at COMFYUI_ROOT, and what it needs of Python packages."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
import torch

import forebay

ROOT = os.environ.get("COMFYUI_ROOT")

sys.path.insert(0, str(Path(__file__).parent))

if ROOT:
    from forebay.comfyui import substitute
    from forebay.comfyui.aimdo import control

    substitute.install()
    sys.path.insert(0, ROOT)
    import sound

    sound.import_or_stand_in()
    import comfy.cli_args

    comfy.cli_args.args.cpu = support.DEVICE == "host"
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd


@pytest.fixture(autouse=True)
def comfy_mode() -> Iterator[None]:
    """As ComfyUI runs its nodes. Nothing stays loaded."""
    with torch.inference_mode():
        yield
    comfy.model_management.current_loaded_models.clear()
    gc.collect()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def legacy() -> Callable[[], Any]:
    """A context in which ComfyUI loads models in its plain way."""

    @contextmanager
    def plain() -> Iterator[None]:
        from forebay.comfyui import native

        native.uninstall()
        assert comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcher
        assert not comfy.memory_management.aimdo_enabled
        yield
        comfy.model_management.unload_all_models()
        comfy.model_management.current_loaded_models.clear()

    return plain


@pytest.fixture
def native() -> Iterator[Callable[..., Any]]:
    """A context in which ComfyUI loads models by attaching them, within a budget of so many bytes."""
    engine = forebay.engine(support.DEVICE)

    @contextmanager
    def attached(budget: float = 1 << 32) -> Iterator[forebay.Engine]:
        from forebay.comfyui import native

        # Models of earlier tests that nobody has any more have memory until they are collected.
        gc.collect()
        engine.set_budget(budget=budget)
        native.install()
        if support.DEVICE != "host":
            # As main.py begins: what ComfyUI moves by itself asks for the device.
            assert control.init() and control.init_devices(iter([support.COMFY_DEVICE]))
        try:
            yield engine
        finally:
            comfy.model_management.unload_all_models()
            comfy.model_management.current_loaded_models.clear()
            native.uninstall()
            control.deinit()

    yield attached
    engine.set_budget(budget=1 << 32)

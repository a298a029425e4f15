"""What is not quantized of a quantized model stays in its file, and is for everybody what ComfyUI makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.model_management
import support
import torch
from running import load, sample, with_lora

_MIB = 1 << 20
_OUTSIDE = {
    "flux": ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"),
    "wan": ("text_embedding", "time_embedding", "time_projection", "head"),
}
"""The layers that are not quantized."""


# A GPU multiplies scaled float8 to 16 bits.
@pytest.fixture(params=["float16", "float32"] if support.DEVICE == "host" else ["float16"])
def computed_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype that ComfyUI computes in, which it would choose by the device."""
    dtype: torch.dtype = getattr(torch, request.param)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: dtype)
    return dtype


def _weights(model: Any, kind: str) -> dict[str, torch.Tensor]:
    parameters = model.model.diffusion_model.named_parameters()
    return {
        name: weight for name, weight in parameters if name.startswith(_OUTSIDE[kind]) and weight.ndim == 2
    }


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_nothing_is_copied(
    kind: str, computed_in: torch.dtype, folder: Path, native: Callable[..., Any]
) -> None:
    path = checkpoints.write(folder, kind, "fp8scaled")
    with native(24 * _MIB):
        model = load(path, None)
        kept = _weights(model, kind)
        assert len(kept) >= 5
        for name, weight in kept.items():
            assert weight.dtype == torch.bfloat16, name
            assert getattr(weight.untyped_storage(), "_comfy_tensor_file_slice", None), name
        sample(model, kind, steps=1)
        assert {weight.dtype for weight in _weights(model, kind).values()} == {computed_in}
        model.detach()
        again = _weights(model, kind)
        assert {name: weight.data_ptr() for name, weight in again.items()} == {
            name: weight.data_ptr() for name, weight in kept.items()
        }


@pytest.mark.parametrize("strength", [0.0, 0.8], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_same_result(
    kind: str,
    strength: float,
    computed_in: torch.dtype,
    folder: Path,
    legacy: Any,
    native: Callable[..., Any],
) -> None:
    path = checkpoints.write(folder, kind, "fp8scaled")

    def run() -> torch.Tensor:
        model = load(path, None)
        if strength:
            model = with_lora(model, checkpoints.lora(model, within=_OUTSIDE[kind]), strength)
        return sample(model, kind)

    with legacy():
        expected = run()
    with native(max(path.stat().st_size / 4, 24 * _MIB)):
        assert support.same(run(), expected)


@pytest.mark.parametrize("is_loaded", [False, True], ids=["unloaded", "loaded"])
def test_what_others_see_and_what_is_saved(
    is_loaded: bool, computed_in: torch.dtype, folder: Path, legacy: Any, native: Callable[..., Any]
) -> None:
    """As ComfyUI's nodes that merge, extract and save."""
    path = checkpoints.write(folder, "flux", "fp8scaled")

    def run(*, with_forebay: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        model = load(path, None)
        if with_forebay and is_loaded:
            sample(model, "flux", steps=1)
        # Of a quantized weight ComfyUI itself does not give any.
        seen = {
            key: patches[0][0].clone()
            for layer in _OUTSIDE["flux"]
            for key, patches in model.get_key_patches(f"diffusion_model.{layer}").items()
            if key.endswith(".weight")
        }
        patched = with_lora(model, checkpoints.lora(model, within=_OUTSIDE["flux"]))
        saved = {
            name: tensor.to("cpu").clone()
            for name, tensor in patched.state_dict_for_saving().items()
            if any(part in name for part in _OUTSIDE["flux"]) and name.endswith(".weight")
        }
        return seen, saved, sample(model, "flux", steps=1)

    with legacy():
        expected = run(with_forebay=False)
    assert len(expected[0]) >= 5 and len(expected[1]) >= 5
    with native(24 * _MIB):
        assert support.same(run(with_forebay=True), expected)

"""Every model gives bit for bit what ComfyUI's own way of loading gives, in a quarter of its weights' memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.sd
import support
import torch
from running import load, sample, with_lora

_MIB = 1 << 20

# ComfyUI's rounding to fp8 takes seconds a layer on a CPU.
_EVERY = {"bf16": 1, "fp16": 1, "fp32": 1, "fp8": 5, "fp8scaled": 5}


def _quarter(path: Path, least: float = 0) -> float:
    return max(path.stat().st_size / 4, least)


@pytest.mark.parametrize("strength", [0.0, 0.8], ids=["plain", "lora"])
@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32", "fp8", "fp8scaled"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_same_result(
    kind: str, stored: str, strength: float, folder: Path, legacy: Any, native: Callable[..., Any]
) -> None:
    path = checkpoints.write(folder, kind, stored)

    def run() -> torch.Tensor:
        model = load(path)
        if strength:
            model = with_lora(model, checkpoints.lora(model, every=_EVERY[stored]), strength)
        return sample(model, kind)

    with legacy():
        expected = run()
    with native(_quarter(path, 12 * _MIB)):
        assert support.same(run(), expected)


@pytest.mark.parametrize("kind, stored", [("zimage", "bf16"), ("zimage", "fp8scaled"), ("sd15", "fp16")])
def test_same_result_of_larger_ones(
    kind: str, stored: str, folder: Path, legacy: Any, native: Callable[..., Any]
) -> None:
    path = checkpoints.write(folder, kind, stored)
    dtype = torch.float16 if stored == "fp16" else torch.bfloat16

    def run() -> torch.Tensor:
        model = load(path, dtype)
        every = 40 if stored == "fp8scaled" else 3
        return sample(with_lora(model, checkpoints.lora(model, every=every)), kind, steps=1)

    with legacy():
        expected = run()
    with native(_quarter(path)):
        assert support.same(run(), expected)


@pytest.mark.parametrize("strength", [0.0, 0.8], ids=["plain", "lora"])
def test_stored_and_computed_in_different_dtypes(
    strength: float, folder: Path, legacy: Any, native: Callable[..., Any]
) -> None:
    path = checkpoints.write(folder, "flux", "fp8")

    def run() -> torch.Tensor:
        model = load(path, torch.float8_e4m3fn)
        if strength:
            model = with_lora(model, checkpoints.lora(model, every=_EVERY["fp8"]), strength)
        return sample(model, "flux")

    with legacy():
        expected = run()
    with native(_quarter(path, 12 * _MIB)):
        assert support.same(run(), expected)


@pytest.mark.parametrize("stored", ["bf16", "fp32"])
def test_autoencoder(stored: str, folder: Path, legacy: Any, native: Callable[..., Any]) -> None:
    path = checkpoints.write(folder, "vae", stored)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        image = vae.decode(latent)
        return image, vae.encode(image)

    with legacy():
        expected = run()
    with native(_quarter(path, 64 * _MIB)):
        assert support.same(run(), expected)


def test_text_encoder(folder: Path, legacy: Any, native: Callable[..., Any]) -> None:
    path = checkpoints.write(folder, "clip_l", "bf16")

    def run() -> Any:
        clip = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
        (found,) = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a (forebay:1.2)"))
        return found[0], found[1]["pooled_output"]

    with legacy():
        expected = run()
    with native(_quarter(path, 48 * _MIB)):
        assert support.same(run(), expected)

"""Running ComfyUI's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import torch

_LATENTS = {"flux": (1, 16, 8, 8), "wan": (1, 16, 2, 8, 8), "zimage": (1, 16, 8, 8), "sd15": (1, 4, 8, 8)}
_CONDITIONS = {"flux": (1, 32, 4096), "wan": (1, 32, 4096), "zimage": (1, 32, 2560), "sd15": (1, 77, 768)}


def load(path: Path, dtype: torch.dtype | None = torch.bfloat16) -> Any:
    """A patcher of a diffusion model. On the CPU ComfyUI itself would choose float32."""
    return comfy.sd.load_diffusion_model(str(path), {} if dtype is None else {"dtype": dtype})


def with_lora(model: Any, tensors: dict[str, torch.Tensor], strength: float = 0.8) -> Any:
    """A clone with an adapter."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def sample(model: Any, kind: str, steps: int = 2) -> torch.Tensor:
    """What the model makes of seeded noise."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.zeros(_LATENTS[kind])
    extra = (
        {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 3.5} if kind == "flux" else {}
    )
    condition = [[torch.randn(_CONDITIONS[kind], generator=generator), extra]]
    result: torch.Tensor = comfy.sample.sample(
        model, comfy.sample.prepare_noise(latent, 42), steps, 1.0, "euler", "simple", condition, condition, latent,
        disable_pbar=True, seed=42,
    )  # fmt: skip
    assert torch.isfinite(result).all()
    return result

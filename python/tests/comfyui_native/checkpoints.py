"""Checkpoint files with random weights of ComfyUI's own model classes, small but of shapes that it recognises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

_FLUX: dict[str, Any] = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 512,
    "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 3, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
_WAN: dict[str, Any] = {
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 512,
    "ffn_dim": 1024,
    "num_heads": 4,
    "num_layers": 4,
}
_ZIMAGE: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "dim": 3840, "n_layers": 1, "n_heads": 30, "n_kv_heads": 30, "qk_norm": True, "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
_SD15: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 4, 4),
    "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip
_VAE: dict[str, Any] = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip

BLOCKS = ("double_blocks.", "single_blocks.", "blocks.", "layers.", "input_blocks.", "output_blocks.")
"""What the layers that are quantised, or that adapters are for, are in."""


def write(folder: Path, kind: str, stored: str) -> Path:
    """A file of random weights, written once.

    Args:
        folder: Where to.
        kind: ``flux``, ``wan``, ``zimage``, ``sd15``, ``vae`` or ``clip_l``.
        stored: ``bf16``, ``fp16``, ``fp32``, ``fp8`` (the blocks' linear layers) or ``fp8scaled`` (with scales).
    """
    path = folder / f"{kind}-{stored}.safetensors"
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(len(kind))
    base = {"fp16": torch.float16, "fp32": torch.float32}.get(stored, torch.bfloat16)
    model = _model(kind)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = "model.diffusion_model." if kind == "sd15" else ""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in ((name, tensor.shape) for name, tensor in model.state_dict().items()):
        layer, _, what = name.rpartition(".")
        # Biases too: zeros would hide one that is missing.
        scale, offset = (0.02, 0.0) if len(shape) > 1 or what == "bias" else (0.05, 1.0)
        tensor = torch.randn(shape, generator=generator) * scale + offset
        if stored.startswith("fp8") and layer in linear and what == "weight" and layer.startswith(BLOCKS):
            tensors[prefix + name] = (tensor / 0.02).to(torch.float8_e4m3fn)
            if stored == "fp8scaled":
                tensors[f"{prefix}{layer}.weight_scale"] = torch.tensor(0.02)
                quant = json.dumps({"format": "float8_e4m3fn"}).encode()
                tensors[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(quant), dtype=torch.uint8)
        else:
            tensors[prefix + name] = tensor.to(base)
    safetensors.torch.save_file(tensors, path)
    return path


def lora(
    model: Any, seed: int = 7, rank: int = 4, every: int = 1, within: tuple[str, ...] = BLOCKS
) -> dict[str, torch.Tensor]:
    """A random adapter for every (or every n-th) linear layer of a diffusion model's blocks, or of what begins otherwise."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    layers = [
        (name, module)
        for name, module in model.model.diffusion_model.named_modules()
        if type(module).__name__ == "Linear" and name.startswith(within)
    ]
    for name, module in layers[::every]:
        down = torch.randn(rank, module.in_features, generator=generator) * 0.05
        up = torch.randn(module.out_features, rank, generator=generator) * 0.05
        found[f"diffusion_model.{name}.lora_down.weight"] = down.bfloat16()
        found[f"diffusion_model.{name}.lora_up.weight"] = up.bfloat16()
        found[f"diffusion_model.{name}.alpha"] = torch.tensor(float(rank))
    return found


def _model(kind: str) -> torch.nn.Module:
    import comfy.ops

    options: dict[str, Any] = {
        "device": "meta",
        "dtype": torch.bfloat16,
        "operations": comfy.ops.disable_weight_init,
    }
    if kind == "flux":
        from comfy.ldm.flux.model import Flux

        return Flux(**_FLUX, **options)
    if kind == "wan":
        from comfy.ldm.wan.model import WanModel

        return WanModel(**_WAN, **options)
    if kind == "zimage":
        from comfy.ldm.lumina.model import NextDiT

        return NextDiT(**_ZIMAGE, **options)
    if kind == "sd15":
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel(**_SD15, **options)
    if kind == "clip_l":
        import comfy.clip_model

        config = json.loads((Path(comfy.clip_model.__file__).parent / "sd1_clip_config.json").read_text())
        return comfy.clip_model.CLIPTextModel(config, torch.bfloat16, "meta", comfy.ops.disable_weight_init)
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    part = "comfy.ldm.modules.diffusionmodules.model"
    with torch.device("meta"):
        return AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{part}.Encoder", "params": _VAE},
            decoder_config={"target": f"{part}.Decoder", "params": _VAE},
        )

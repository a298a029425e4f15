"""Writes a tiny diffusion model and a decoder of random weights, with ComfyUI's own classes. Run in its folder."""

from __future__ import annotations

import sys
from pathlib import Path

from forebay.comfyui import substitute

substitute.install()

import comfy.options  # noqa: E402  reads the arguments once it is told to, and needs a GPU otherwise

folder = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]
comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencodingEngine  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(models: Path) -> None:
    torch.manual_seed(3)
    flux = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=128,
        mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    save(flux, models / "diffusion_models" / "tiny.safetensors")
    config = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    coder = "comfy.ldm.modules.diffusionmodules.model."
    decoder = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": coder + "Encoder", "params": config},
        decoder_config={"target": coder + "Decoder", "params": config},
    )
    save(decoder, models / "vae" / "tiny.safetensors")


def save(module: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in module.state_dict().items()}
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in weights.items()}, path)


if __name__ == "__main__":
    main(folder)

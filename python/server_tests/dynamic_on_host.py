"""Samples two models in turn, under ComfyUI's own offloading or under its dynamic VRAM on Forebay's device ``host``; prints
what came of it as JSON. Run in ComfyUI's folder: ``dynamic_on_host.py FOLDER BUDGET``, bytes, 0 for its own offloading.

ComfyUI takes its dynamic path on GPUs only. Here ``cpu:0``, which is not the device that its tensors tell, stands for one,
with two streams and a runtime that registers memory; what allocates, faults, fills, casts, pins and unpins is ComfyUI's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forebay
from forebay.comfyui import substitute

substitute.install()

import comfy_aimdo.control as control  # noqa: E402

control.init()

import comfy.options  # noqa: E402  reads the arguments once it is told to, and needs a GPU otherwise

folder, budget = Path(sys.argv[1]), int(sys.argv[2])
sys.argv[1:] = ["--cpu"] if budget else ["--cpu", "--disable-dynamic-vram"]
comfy.options.enable_args_parsing()

import comfy.memory_management  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher as patcher  # noqa: E402
import comfy.model_prefetch  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_aimdo.model_vbar as model_vbar  # noqa: E402
import comfy_aimdo.vram_buffer as vram_buffer  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

GPU = torch.device("cpu", 0)


class Runtime:
    """Registers memory as CUDA's runtime does: no part twice, and none that is not registered is given back."""

    def __init__(self) -> None:
        self.parts: dict[int, int] = {}
        self.refused = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if any(start < address + size and address < start + length for start, length in self.parts.items()):
            self.refused += 1
            return 712
        self.parts[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 713 if self.parts.pop(address, None) is None else 0


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def as_context(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def stand_in_for_a_gpu() -> Runtime:
    """Lets ComfyUI take ``cpu:0`` for a GPU whose weights are dynamic."""
    runtime, streams = Runtime(), [Stream(), Stream()]
    is_cpu, cast = management.is_device_cpu, comfy.ops.cast_bias_weight

    def next_stream(device: torch.device) -> Stream:
        streams.reverse()
        return streams[0]

    def cast_dynamic(
        module: Any, input: Any = None, dtype: Any = None, device: Any = None, **more: Any
    ) -> Any:
        return cast(module, input, dtype, GPU if hasattr(module, "_v") else device, **more)

    torch.cuda.cudart = lambda: runtime
    patcher.ModelPatcherDynamic.__new__ = lambda cls, *_, **__: object.__new__(cls)
    management.is_device_cpu = lambda device: is_cpu(device) and device.index is None
    management.get_torch_device = lambda: GPU
    management.device_supports_non_blocking = lambda device: True
    management.get_offload_stream = next_stream
    management.current_stream = lambda device: streams[0]
    management.NUM_STREAMS, management.MAX_PINNED_MEMORY = len(streams), 8 << 30
    comfy.ops.cast_bias_weight = cast_dynamic
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return runtime


def weights(path: Path, seed: int) -> Path:
    """A model of about 230 MiB."""
    if path.exists():
        return path
    with torch.device("meta"):
        flux = Flux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=768,
            mlp_ratio=4.0, num_heads=6, depth=3, depth_single_blocks=6, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
            qkv_bias=True, guidance_embed=True, txt_ids_dims=[], operations=comfy.ops.disable_weight_init,
            dtype=torch.bfloat16,
        )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in flux.state_dict().items()}
    save_file(
        {name: (torch.randn(shape, generator=random) * 0.02).bfloat16() for name, shape in shapes.items()},
        path,
    )
    return path


def sample(model: Any) -> str:
    random = torch.Generator().manual_seed(1)
    positive = [
        [
            torch.randn(1, 64, 4096, generator=random),
            {"pooled_output": torch.randn(1, 768, generator=random), "guidance": 3.5},
        ]
    ]
    latent = torch.zeros(1, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 42)
    result = comfy.sample.sample(
        model, noise, 2, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=42
    )
    return hashlib.sha256(result.float().numpy().tobytes()).hexdigest()


def main() -> SimpleNamespace:
    told = SimpleNamespace(hashes=[], patchers=[], refused=0, lent=0, filled=0, held=[])
    runtime = None
    if budget:
        forebay.engine("host", budget=budget)
        assert control.init_devices(["host"])
        control.devctxs[GPU.index] = control.devctxs["host"]
        runtime = stand_in_for_a_gpu()
    paths = [weights(folder / f"{seed}.safetensors", seed) for seed in (1, 2)]
    with torch.inference_mode():
        models = [comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16}) for path in paths]
        for model in models * 2:
            told.hashes.append(sample(model))
            told.patchers.append(type(model).__name__)
            if runtime is not None:  # what ComfyUI does after each node
                told.held.append(model_vbar.vbars_analyze())
                management.reset_cast_buffers()
                comfy.model_prefetch.cleanup_prefetch_queues()
                model_vbar.vbars_reset_watermark_limits()
    if runtime is not None:
        told.refused, told.lent = runtime.refused, vram_buffer.VRAMBuffer.lent_bytes
        told.pinned = [sum(page >> 1 & 1 for page in vbar.get_residency()) for vbar in model_vbar._vbars]
        told.registered = sum(runtime.parts.values())
    return told


if __name__ == "__main__":
    print(json.dumps(vars(main())))

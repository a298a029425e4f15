"""Kernels that are loaded before a model is to run.

The driver loads a kernel when it is first used. For a diffusion transformer that is 0.3 to 0.4 s of its first step, in which the
device waits. So while ComfyUI starts, a thread uses the usual ones once, on memory whose contents do not matter: matrix products of
the sizes that such models have, attention, norms, what stands between them. A model that uses others loads those as before.

Torch's own are used as soon as ComfyUI has chosen its device, while it imports the rest of itself; ComfyUI's behind them, once it
has initialised that device.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from forebay.comfyui.arrival import on_import

if TYPE_CHECKING:
    import torch

    from forebay.comfyui.aimdo.devices import DevCtx

SWITCH = "FOREBAY_COMFYUI_WARM"
"""An environment variable: with 0 nothing is loaded before it is used."""

Kernels = Callable[["torch.device", "torch.dtype"], Iterator[Callable[[], object]]]
"""Gives what uses kernels, one after another, on a device in a dtype."""

_WIDTH = 3088
"""Of the hidden state: near that of Flux, Qwen-Image and others, and that of none. So whatever a library may note of a shape is not
of a model's. (cuBLAS gave a model's products the same bits either way.)"""
_HEADS, _HEAD = 24, 128
_TOKENS = (4096, 256, 1)
"""Of an image of a megapixel, of a text, and of what is the same for all of them."""
BLOCK = (1, 1), (3, 1), (4, 1), (7, 1), (1, 4), (1, 5)
"""Rows and columns of a block's weights, in widths of the hidden state."""
MODULATION = 6, 1
"""Of what modulates it."""
_FREE = 2 << 30
"""Bytes that are to be free on the device: the largest product takes 0.4 GiB."""

_MANAGEMENT = "comfy.model_management"
"""ComfyUI's module that chooses the device."""

_log = logging.getLogger("forebay")
_lock = threading.Lock()
_begun: dict[tuple[str, bool], threading.Thread] = {}
"""By the device, and by whether they use ComfyUI's kernels."""

of_patches: Kernels | None = None
"""Native mode's own, behind the usual ones."""


def expect() -> None:
    """Begins to load torch's kernels once ComfyUI has chosen its device: at once, or when that is imported."""
    if _MANAGEMENT in sys.modules:
        _begin_early()
    else:
        on_import(_MANAGEMENT, _begin_early)


def begin(context: DevCtx) -> threading.Thread | None:
    """Begins to load all kernels for a device, in a thread of its own, once a process.

    Returns:
        The thread; None where there is nothing to load: without a GPU, without ComfyUI, or where it is switched off.
    """
    if context.engine.device == "host":
        return None
    return _begin(context.device, of_comfyui=True, behind=_begin(context.device))


def wait() -> None:
    """Waits until what was begun is loaded."""
    for thread in list(_begun.values()):
        thread.join()


def _begin_early() -> None:
    """What comes of it is none of ComfyUI's concern, whose import it is in the middle of."""
    try:
        device = sys.modules[_MANAGEMENT].get_torch_device()
        if device.type == "cuda":
            _begin(device)
    except Exception as error:
        _log.debug("kernels are loaded later: %s", error)


def _begin(
    device: torch.device, *, of_comfyui: bool = False, behind: threading.Thread | None = None
) -> threading.Thread | None:
    management = sys.modules.get(_MANAGEMENT)
    if management is None or os.environ.get(SWITCH) == "0":
        return None
    with _lock:
        key = str(device), of_comfyui
        known = _begun.get(key)
        if known is None:
            # No daemon: one that comes back from torch to an interpreter that has ended takes the process with it.
            known = _begun[key] = threading.Thread(
                target=_load, args=(device, management, of_comfyui, behind), name="forebay-warm", daemon=False
            )
            known.start()
        return known


def _load(
    device: torch.device, management: Any, of_comfyui: bool, behind: threading.Thread | None = None
) -> None:
    """Loads what is ComfyUI's, or what is torch's, behind what another thread loads."""
    import torch

    if behind is not None:
        behind.join()
    part = "ComfyUI's" if of_comfyui else "torch's"
    begun, count = time.perf_counter(), 0
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            dtype = torch.bfloat16 if management.should_use_bf16(device) else torch.float16
            try:
                for use in _all(_comfyuis() if of_comfyui else _torchs(), device, dtype):
                    # What this torch, this ComfyUI or this device does not have is not needed either.
                    with contextlib.suppress(Exception):
                        use()
                        count += 1
            finally:
                torch.cuda.empty_cache()
    except Exception as error:
        _log.debug("kernels are loaded when they are used: %s", error)
    _log.debug("%s: %d of %s operations in %.2f s", device, count, part, time.perf_counter() - begun)


def _torchs() -> Iterable[Kernels]:
    return _of_blocks, _of_samplers, _of_others, _of_attention


def _comfyuis() -> Iterable[Kernels]:
    return filter(None, (_of_layers, _of_float8, of_patches))


def _all(
    chosen: Iterable[Kernels], device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[], object]]:
    """What is used, as long as there is memory for it and the process does not end."""
    import torch

    main = threading.main_thread()
    for kernels in chosen:
        if torch.cuda.mem_get_info(device)[0] < _FREE:
            _log.debug("%s has too little free memory to load kernels before they are used", device)
            return
        try:
            for use in kernels(device, dtype):
                if not main.is_alive():
                    return
                yield use
        except Exception as error:
            _log.debug("what kernels are used with cannot be made: %s", error)


def _products() -> Iterator[tuple[int, int, int]]:
    """Tokens, columns and rows of the products of a block."""
    for tokens, (rows, columns) in (*itertools.product(_TOKENS, BLOCK), (1, MODULATION)):
        yield tokens, columns * _WIDTH, rows * _WIDTH


def _linear(
    empty: Callable[..., torch.Tensor], tokens: int, columns: int, rows: int, *, has_bias: bool = True
) -> Callable[[], object]:
    from torch.nn.functional import linear

    return lambda: linear(empty(1, tokens, columns), empty(rows, columns), empty(rows) if has_bias else None)


def _of_blocks(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What transformers of images are made of."""
    import torch
    from torch.nn import functional

    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    linear = functools.partial(_linear, empty)
    # The first has the libraries start, for which everything waits.
    yield from itertools.starmap(linear, _products())
    yield linear(1, 256, _WIDTH)
    image, text = (empty(1, tokens, _WIDTH) for tokens in _TOKENS[:2])
    one = empty(1, 1, _WIDTH)
    query = empty(1, _HEADS, _TOKENS[0], _HEAD)
    yield linear(_TOKENS[0], 64, _WIDTH)
    yield linear(_TOKENS[0], _WIDTH, 64)
    yield lambda: functional.layer_norm(image, (_WIDTH,), eps=1e-6)
    yield lambda: functional.layer_norm(image, (_WIDTH,), image[0, 0], image[0, 0])
    yield lambda: functional.rms_norm(query, (_HEAD,), empty(_HEAD))
    yield lambda: functional.silu(one)
    yield lambda: functional.gelu(image, approximate="tanh")
    yield lambda: functional.gelu(image[:, :, ::2], approximate="tanh")
    yield lambda: image.add_(image * one)
    yield lambda: torch.cat((text, image), 1)
    yield lambda: torch.cat((query[:, :, :256], query), 2)
    yield lambda: torch.cat((image, torch.cat((image, image), 2)), 2)
    yield lambda: query.transpose(1, 2).contiguous()
    yield lambda: image.transpose(1, 2).contiguous()


def _of_samplers(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What stands around a model: noise, steps, and where the parts of an image are."""
    import torch
    from torch.nn import functional

    latent = torch.zeros(1, 16, 128, 128, dtype=torch.float32, device=device)
    number = torch.ones(1, dtype=torch.float32, device=device)
    yield lambda: bool(torch.count_nonzero(latent) > 0)
    yield lambda: (latent * number + latent).to(dtype).float() - latent / number
    yield lambda: latent.clone().add_(latent * number.view(1, 1, 1, 1)).div_(latent)
    yield lambda: torch.zeros_like(latent) + torch.ones_like(latent) * 1e-37 + latent.new_ones([1])
    yield lambda: 1.0 - number * 2.0
    yield lambda: -number
    yield lambda: -(latent * latent).to(dtype) * 1000.0
    yield lambda: number.repeat(2) ** 2
    yield lambda: torch.sqrt(1.0 + number**2.0) / (number**2 + 1.0) ** 0.5
    yield lambda: (number.log() - latent[0, 0, :, :1]).abs().argmin()
    yield lambda: torch.cat((latent, latent))
    yield lambda: torch.stack((latent[0], latent[0]))
    yield lambda: torch.stack((latent[0].to(dtype), latent[0].to(dtype)))
    yield lambda: functional.pad(latent, (0, 0, 0, 2))
    yield lambda: functional.pad(latent.to(dtype), (0, 0, 0, 0), mode="circular")
    yield lambda: latent.to(dtype).view(1, 16, 64, 2, 64, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 64)
    line = torch.linspace(0, 63, steps=64, dtype=torch.float32, device=device)
    yield lambda: latent[0, 0].add_(line.repeat(2)[:, None] + 1.0)
    yield lambda: torch.arange(64, dtype=torch.float32, device=device).exp() * latent[0, 0, :, :64]
    places = torch.zeros(64, 3, dtype=torch.float32, device=device)[:, 1]
    yield lambda: places.fill_(1.0).copy_(line)
    yield lambda: (places + 1.0) * (places + line)


def _of_attention(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    import torch

    query = torch.zeros(1, _HEADS, _TOKENS[0], _HEAD, dtype=dtype, device=device)
    # By these names: of all choices among them the first is cuDNN's, whatever order is asked for, and it is left to a model.
    attention = torch.ops.aten
    yield lambda: attention._scaled_dot_product_flash_attention(query, query, query)
    yield lambda: attention._scaled_dot_product_cudnn_attention(query, query, query, None, False)


def _of_layers(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What such models have of ComfyUI's own functions."""
    import torch

    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    image, one = empty(1, _TOKENS[0], _WIDTH), empty(1, 1, _WIDTH)
    number = torch.empty(1, dtype=torch.float32, device=device)
    layers, rotary = (sys.modules.get(f"comfy.ldm.flux.{name}") for name in ("layers", "math"))
    quantized = sys.modules.get("comfy.quant_ops")
    if layers is not None:
        yield lambda: layers.timestep_embedding(number, 256).to(dtype)
        yield lambda: layers.apply_mod(image, 1 + one, one)
    if rotary is None:
        return
    turns = _turns(rotary, device)
    query = empty(1, _HEADS, _TOKENS[0], _HEAD)
    yield lambda: rotary.apply_rope(query, query, turns)
    if quantized is not None:
        by_token, turns_of_tokens, scale = (
            query.transpose(1, 2).contiguous(),
            turns.transpose(1, 2),
            empty(_HEAD),
        )
        yield lambda: rotary.apply_rope1(by_token, turns_of_tokens)
        yield lambda: quantized.ck.rms_rope(by_token, by_token, turns_of_tokens, scale, scale, 1e-5)


def _turns(rotary: Any, device: torch.device) -> torch.Tensor:
    """By how much each pair of a head's numbers is turned, of tokens in one place."""
    import torch

    place = torch.zeros(1, _TOKENS[0], 3, dtype=torch.float32, device=device)
    turned = torch.cat([rotary.rope(place[..., axis], 56, 10000) for axis in range(2)], dim=-3)
    return torch.cat([turned, rotary.rope(place[..., 2], 16, 10000)], dim=-3).unsqueeze(1)


def _of_float8(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    import torch
    from torch.nn import functional

    management = sys.modules["comfy.model_management"]
    quantized, layout = sys.modules.get("comfy.quant_ops"), "TensorCoreFP8E4M3Layout"
    if quantized is None or not management.supports_fp8_compute(device):
        return
    scale = torch.ones((), dtype=torch.float32, device=device)

    def linear(tokens: int, columns: int, rows: int) -> Callable[[], object]:
        def use() -> object:
            shapes = (tokens, columns), (rows, columns)
            both = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            value, weight = (quantized.QuantizedTensor.from_float(one, layout, scale=scale) for one in both)
            return functional.linear(value, weight, torch.zeros(rows, dtype=dtype, device=device))

        return use

    yield from itertools.starmap(linear, _products())
    yield lambda: quantized.QuantizedTensor.from_float(
        torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device),
        layout,
        scale="recalculate",
        stochastic_rounding=1,
    )


def _of_others(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """What other transformers have in such places: Z-Image, Wan."""
    import torch
    from torch.nn import functional

    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    for shape in _products():
        if shape[0] > 1:
            yield _linear(empty, *shape, has_bias=False)
    image, one = empty(1, _TOKENS[0], _WIDTH), empty(1, 1, _WIDTH)
    yield lambda: functional.silu(image) * image + image
    yield lambda: torch.tanh(one)
    yield lambda: one.repeat(1, 32, 1)

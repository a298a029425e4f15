"""Adapters (LoRA): what files of them say, in the formats that are common.

Whatever a file calls them, an adapter of a weight is a product of low rank: ``strength * alpha / rank * up @ down`` is
added to the weight, its dimensions after the first flattened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from forebay.loading import load

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]
"""A file of adapters or its state dict."""

# What a key ends with, and which part of an adapter that is.
_UP = (
    ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_linear_layer.up.weight",
    "_lora.up.weight", ".lora_up", ".lora_B",
)  # fmt: skip
_DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight",
    ".lora_linear_layer.down.weight", "_lora.down.weight", ".lora_down", ".lora_A",
)  # fmt: skip
_PARTS = {
    **dict.fromkeys(_UP, "up"),
    **dict.fromkeys(_DOWN, "down"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
}
_IGNORED = (".lora_A.bias", ".scale")
"""Not used by what reads these formats either."""

_OTHERS = {
    ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".lora_magnitude_vector.weight": "DoRA",
    ".lora_magnitude_vector.default.weight": "DoRA",
    ".hada_w1_a": "LoHa", ".hada_w1_b": "LoHa", ".hada_w2_a": "LoHa", ".hada_w2_b": "LoHa", ".hada_t1": "LoHa",
    ".hada_t2": "LoHa",
    ".lokr_w1": "LoKr", ".lokr_w2": "LoKr", ".lokr_w1_a": "LoKr", ".lokr_w1_b": "LoKr", ".lokr_w2_a": "LoKr",
    ".lokr_w2_b": "LoKr", ".lokr_t2": "LoKr",
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".diff": "full difference", ".diff_b": "full difference of a bias", ".set_weight": "full weight",
    ".lora_B.bias": "bias of an adapter", ".lora_up.bias": "bias of an adapter", ".w_norm": "full difference",
    ".b_norm": "full difference of a bias",
}  # fmt: skip
"""Formats that are no products of low rank, by what their keys end with."""


@dataclass(frozen=True)
class Adapter:
    """One weight's product of low rank.

    Attributes:
        target: What the file calls the module whose weight it is for.
        origin: The file, for messages.
        up: Rows x rank.
        down: Rank x columns.
        scale: What the product is multiplied with, without the strength.
        identity: Equal for adapters that are the same.
        keep: What the identity names, so that nothing else takes it.
    """

    target: str
    origin: str
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    identity: tuple[tuple[int, int], ...]
    keep: tuple[torch.Tensor, ...] = field(repr=False)

    @property
    def rank(self) -> int:
        """The product's rank."""
        return int(self.up.shape[1])


def read_adapters(source: Source) -> list[Adapter]:
    """The adapters of a file or state dict.

    Raises:
        ValueError: For keys of other formats, and where parts are missing or do not fit each other.
        SourceError: Where the file cannot be read.
    """
    origin, state = _state_of(source)
    parts: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for key, tensor in state.items():
        if key.endswith(_IGNORED):
            continue
        target, part = _split(key, origin)
        parts.setdefault(target, {})[part] = (key, tensor)
    return [_adapter(target, origin, found) for target, found in parts.items()]


def file_identity(source: Source) -> tuple[str, int, int] | None:
    """Equal as long as a file is the same; ``None`` for a state dict."""
    if isinstance(source, Mapping):
        return None
    path = os.path.realpath(source)
    try:
        status = os.stat(path)
    except OSError:
        return None
    return path, status.st_mtime_ns, status.st_size


def names_of(target: str) -> Iterator[str]:
    """What a target may be called in a model, the likeliest first: without the prefixes that programs put before it."""
    yield target
    processor = target.replace(".processor.", ".")
    if processor != target:
        yield from names_of(processor)
    for prefix in _PREFIXES:
        if target.startswith(prefix):
            yield from names_of(target[len(prefix) :])


_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "lycoris_", "model.")

COMPONENTS: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer"), "lora_transformer_": ("transformer", "unet"), "unet.": ("unet",),
    "transformer.": ("transformer",), "diffusion_model.": ("unet", "transformer"),
    "lora_te1_": ("text_encoder",), "lora_te2_": ("text_encoder_2",), "lora_te3_": ("text_encoder_3",),
    "lora_te_": ("text_encoder",), "text_encoder.": ("text_encoder",), "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",), "transformer_2.": ("transformer_2",),
}  # fmt: skip
"""The parts of a pipeline that a prefix means."""


def _state_of(source: Source) -> tuple[str, Mapping[str, torch.Tensor]]:
    if isinstance(source, Mapping):
        return "a state dict", source
    path = os.fspath(source)
    if path.endswith((".pt", ".pth", ".bin", ".ckpt")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return path, state.get("state_dict", state)
    return path, load(path)


def _split(key: str, origin: str) -> tuple[str, str]:
    for ending, part in _PARTS.items():
        if key.endswith(ending):
            return key[: -len(ending)], part
    for ending, kind in _OTHERS.items():
        if key.endswith(ending):
            raise ValueError(
                f"{kind} is no product of low rank; compute the weight yourself in set_patch: {key!r} of {origin}"
            )
    raise ValueError(f"is no key of an adapter in a known format: {key!r} of {origin}")


def _adapter(target: str, origin: str, parts: dict[str, tuple[str, torch.Tensor]]) -> Adapter:
    missing = [part for part in ("up", "down") if part not in parts]
    if missing:
        raise ValueError(f"an adapter without {' and '.join(missing)}: {target!r} of {origin}")
    tensors = {part: tensor for part, (_, tensor) in parts.items()}
    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    alpha = float(tensors["alpha"].item()) if "alpha" in tensors else None
    if up.ndim < 2 or down.ndim < 2 or up.shape[2:].numel() != 1:
        raise ValueError(
            f"up is rows x rank and down rank x columns: {tuple(up.shape)} and {tuple(down.shape)}, {target!r} of {origin}"
        )
    rank = int(down.shape[0])
    if mid is not None:
        # A convolution in three parts: the kernel between the two is part of the way down.
        down = torch.einsum("ijkl,jr->irkl", mid.float(), down.float().flatten(1))
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != down.shape[0] or not up.numel() or not down.numel():
        raise ValueError(
            f"ranks of up and down differ: {tuple(up.shape)} and {tuple(down.shape)}, {target!r} of {origin}"
        )
    keep = tuple(tensors.values())
    identity = tuple((id(tensor), tensor._version) for tensor in keep)
    return Adapter(target, origin, up, down, 1.0 if alpha is None else alpha / rank, identity, keep)

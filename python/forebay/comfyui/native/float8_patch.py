"""A patched float8 weight, with fewer passes over it than ComfyUI's own function takes.

ComfyUI adds products of low rank to what a float8 weight stands for, finds the largest element for a new scale, and rounds by
random numbers that are drawn for the whole weight. The scale is remembered. On a GPU the engine does all of the rest in one
pass; where that does not give ComfyUI's bits it adds the products in one, and ComfyUI's function rounds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import comfy.float
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay.attachment import Attachment
from forebay.comfyui.native.quantized import data_of
from forebay.comfyui.native.weight_patch import WeightPatch
from forebay.converting import dtype_name
from forebay.low_rank import LowRank, multiplied

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_BLOCK = 256
"""Threads of a block of torch's generators on a GPU."""
_AT_ONCE = 8
"""Elements that the engine works on at once: a row is a multiple of them."""

_known: dict[tuple[object, ...], str] = {}
"""The way that gives ComfyUI's bits, by all that they may depend on but the numbers."""


class Float8Patch:
    """Computes a patched weight from the stored one, which is float8, or quantized as float8 with one scale.

    The first time ComfyUI's own function does, which gives the scale, and for each shape tells which of the other ways does the
    same. Where none does, ComfyUI's function does it every time.
    """

    def __init__(
        self, layer: nn.Module, key: str, patches: Sequence[Any], products: LowRank, attachment: Attachment
    ) -> None:
        """Takes the products to the device.

        Args:
            layer: The module that has the weight.
            key: The weight's name in the model.
            patches: ComfyUI's for this weight.
            products: What they come to.
            attachment: Of the model.
        """
        self._engine = attachment.engine
        self._device = attachment.device
        self._through = products.through
        self._columns = products.shape[1]
        self._ranks = tuple(products.ranks)
        self._memory, self._product = products.place(self._device)
        self._seed = comfy.utils.string_to_seed(key)
        self._own: WeightPatch | None = None
        self._own_arguments = layer, key, patches, self._device
        self._way: Callable[[Any], Any] | None = None
        self._params: Any = None
        self._to_scale: torch.Tensor | None = None

    def __call__(self, stored: Any) -> Any:
        """Computes it, in new memory, in the current stream."""
        with torch.no_grad():
            return self._first(stored) if self._way is None else self._way(stored)

    def _first(self, stored: Any) -> Any:
        if self._own is None:
            self._own = WeightPatch(*self._own_arguments)
        found = self._own(stored)
        if isinstance(stored, QuantizedTensor):
            self._params = found._params
            # The rounded factor that ComfyUI multiplies with, as the engine takes it.
            self._to_scale = (1.0 / self._params.scale).to(self._through).to(torch.float32)
            self._product = multiplied(self._product, self._to_scale.data_ptr())
        data, tried = data_of(found), data_of(stored)
        factors = self._product[5]
        key = (str(self._device), type(stored), tried.dtype, tried.shape, self._ranks, self._through, factors)
        ways = {"requantized": self._requantized, "rounded": self._rounded}
        if key not in _known:
            same = (name for name, way in ways.items() if _is_same(way(stored), data))
            _known[key] = next(same, "own")
        self._way = ways.get(_known[key])
        if self._way is not None:
            self._own = None
        return found

    def _requantized(self, stored: Any) -> Any:
        """In one pass of the engine's. None where it has none for such a weight."""
        data = data_of(stored)
        scale = stored._params.scale if isinstance(stored, QuantizedTensor) else None
        if self._columns % _AT_ONCE or not data.is_contiguous():
            return None
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return None
        found = torch.empty_like(data)
        self._engine.requantize(
            found.data_ptr(),
            data.data_ptr(),
            dtype_name(data.dtype),
            self._columns,
            self._product,
            0 if scale is None else scale.data_ptr(),
            self._seed,
            _generator_threads(self._device, data.numel()),
            self._enter_stream(),
        )
        return self._made_of(found, stored)

    def _rounded(self, stored: Any) -> Any:
        """The products in one pass of the engine's, the rest in ComfyUI's."""
        if isinstance(stored, QuantizedTensor):
            params = dataclasses.replace(stored._params, orig_dtype=self._through)
            value = stored.layout_cls.dequantize(stored._qdata, params)
        else:
            value = stored.to(self._through)
        stream = self._enter_stream()
        self._engine.add_product(
            value.data_ptr(), dtype_name(self._through), self._columns, self._product, stream
        )
        return self._made_of(
            comfy.float.stochastic_rounding(value, data_of(stored).dtype, self._seed), stored
        )

    def _enter_stream(self) -> int:
        """The handle of the current stream. What is read in it is not given to others before it was."""
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        self._memory.record_stream(stream)
        if self._to_scale is not None:
            self._to_scale.record_stream(stream)
        handle: int = stream.cuda_stream
        return handle

    def _made_of(self, data: torch.Tensor, stored: Any) -> Any:
        return data if self._params is None else QuantizedTensor(data, stored._layout_cls, self._params)


def _generator_threads(device: torch.device, count: int) -> int:
    """The threads with which torch draws so many numbers on a GPU."""
    return _BLOCK * min(_most_blocks(device), -(-count // _BLOCK))


@functools.cache
def _most_blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    has = torch.cuda.get_device_properties(device)
    return int(has.multi_processor_count * (has.max_threads_per_multi_processor // _BLOCK))


def _is_same(found: Any, expected: torch.Tensor) -> bool:
    return found is not None and torch.equal(data_of(found).view(torch.uint8), expected.view(torch.uint8))

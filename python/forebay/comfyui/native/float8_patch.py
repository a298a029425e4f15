"""A patched float8 weight, with fewer passes over it than ComfyUI's own function takes.

ComfyUI adds products of low rank to what a float8 weight stands for, finds the largest element for a new scale, and rounds by
random numbers that are drawn for the whole weight. On a GPU the engine does all of that in one pass for the largest element, whose
scale is remembered, and one for the rest; where that does not give ComfyUI's bits it adds the products, and ComfyUI's function
rounds.
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

from forebay import streams
from forebay._forebay import EightBitSum
from forebay.attachment import Attachment
from forebay.comfyui.native.quantized import data_of
from forebay.comfyui.native.weight_patch import WeightPatch
from forebay.converting import dtype_name
from forebay.low_rank import LowRank, Placed, multiplied

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_BLOCK = 256
"""Threads of a block of torch's generators on a GPU."""
_AT_ONCE = 8
"""Elements that the engine works on at once: a row is a multiple of them."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """What gives ComfyUI's bits.

    Attributes:
        way: How a weight is computed.
        scaled: Whether the engine finds the largest element, of which ComfyUI's layout makes the scale.
    """

    way: str
    scaled: bool


_known: dict[tuple[object, ...], _Known] = {}
"""By all that it may depend on but the numbers."""


class Float8Patch:
    """Computes a patched weight from the stored one, which is float8, or quantized as float8 with one scale.

    ComfyUI's own function computes the first one of each shape, which tells what does the same. Where nothing does, it computes all
    of them every time.
    """

    def __init__(
        self,
        layer: nn.Module,
        key: str,
        patches: Sequence[Any],
        products: LowRank,
        placed: Placed,
        attachment: Attachment,
    ) -> None:
        """Nothing is computed yet.

        Args:
            layer: The module that has the weight.
            key: The weight's name in the model.
            patches: ComfyUI's for this weight.
            products: What they come to.
            placed: That on the device.
            attachment: Of the model.
        """
        self._engine = attachment.engine
        self._device = attachment.device
        self._through = products.through
        self._columns = products.shape[1]
        self._ranks = tuple(products.ranks)
        self._memory, self._product = placed
        self._seed = comfy.utils.string_to_seed(key)
        self._own: WeightPatch | None = None
        self._own_arguments = layer, key, patches, self._device
        self._way: Callable[[Any], Any] | None = None
        self._params: Any = None
        self._to_scale: torch.Tensor | None = None
        self._streams: set[int] = set()
        """Those that its memory is known to be read in."""
        self._sum: EightBitSum | None = None
        """Of the latest weight."""

    def __call__(self, stored: Any) -> Any:
        """Computes it, in new memory, in the current stream."""
        way = self._first if self._way is None else self._way
        if not torch.is_grad_enabled():
            return way(stored)
        with torch.no_grad():
            return way(stored)

    def _first(self, stored: Any) -> Any:
        data = data_of(stored)
        kind = (str(self._device), type(stored), data.dtype, data.shape, data.is_contiguous())
        key = (*kind, self._ranks, self._through, self._product[5])
        ways = {"requantized": self._requantized, "rounded": self._rounded}
        is_quantized = isinstance(stored, QuantizedTensor)
        known, found = _known.get(key), None
        if known is None:
            found = self._own_result(stored)
            params = self._new_params(stored) if is_quantized else None
            if is_quantized:
                self._round_to(found._params)
            same = (name for name, way in ways.items() if _is_same(way(stored), data_of(found)))
            way = next(same, "own")
            # One element tells little. All of them tell that the engine begins with the numbers that ComfyUI begins with.
            scaled = way == "requantized" and is_quantized and _are_alike(params, found._params)
            known = _known[key] = _Known(way, scaled)
        elif is_quantized and known.scaled:
            self._round_to(self._new_params(stored))
        elif is_quantized:
            found = self._own_result(stored)
            self._round_to(found._params)
        self._way = ways.get(known.way, self._own_result)
        if known.way != "own":
            self._own = None
        return self._way(stored) if found is None else found

    def _own_result(self, stored: Any) -> Any:
        """ComfyUI's own."""
        if self._own is None:
            self._own = WeightPatch(*self._own_arguments)
        return self._own(stored)

    def _round_to(self, params: Any) -> None:
        """From now on a quantized weight gets this scale."""
        if self._to_scale is None:
            self._params = params
            # The rounded factor that ComfyUI multiplies with, as the engine takes it.
            self._to_scale = (1.0 / params.scale).to(self._through).to(torch.float32)
            self._product = multiplied(self._product, self._to_scale.data_ptr())
            self._streams, self._sum = set(), None

    def _new_params(self, stored: Any) -> Any:
        """What ComfyUI's layout makes of the largest element, for the whole weight. None where the engine does not find it."""
        eight_bit_sum = self._eight_bit_sum(stored)
        if eight_bit_sum is None:
            return None
        largest = torch.zeros((), dtype=torch.float32, device=self._device)
        self._engine.largest(largest.data_ptr(), eight_bit_sum, self._enter_stream())
        # Rounded to nearest: the element itself is of no use, and random numbers take as long as all the rest.
        alone = largest.to(self._through).reshape(1, 1)
        _, params = stored.layout_cls.quantize(alone, scale="recalculate")
        return dataclasses.replace(
            params, orig_shape=tuple(stored.shape), orig_dtype=stored._params.orig_dtype
        )

    def _eight_bit_sum(self, stored: Any) -> EightBitSum | None:
        """What the engine rounds. None where it cannot."""
        data = data_of(stored)
        if self._sum is None or self._sum.source != data.data_ptr():
            self._sum = self._new_sum(stored, data)
        return self._sum

    def _new_sum(self, stored: Any, data: torch.Tensor) -> EightBitSum | None:
        scale = stored._params.scale if isinstance(stored, QuantizedTensor) else None
        if self._columns % _AT_ONCE or not data.is_contiguous():
            return None
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return None
        scale_at = 0 if scale is None else scale.data_ptr()
        return EightBitSum(data.data_ptr(), dtype_name(data.dtype), self._columns, self._product, scale_at)

    def _requantized(self, stored: Any) -> Any:
        """In one pass of the engine's. None where it has none for such a weight."""
        eight_bit_sum = self._eight_bit_sum(stored)
        if eight_bit_sum is None:
            return None
        data = data_of(stored)
        found = torch.empty_like(data)
        threads = _generator_threads(self._device, data.numel())
        self._engine.requantize(found.data_ptr(), eight_bit_sum, self._seed, threads, self._enter_stream())
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
        handle = streams.current(self._device)
        if handle not in self._streams:
            stream = torch.cuda.current_stream(self._device)
            self._memory.record_stream(stream)
            if self._to_scale is not None:
                self._to_scale.record_stream(stream)
            self._streams.add(handle)
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


def _are_alike(found: Any, expected: Any) -> bool:
    """Whether quantized weights have the same numbers beside their elements."""
    if type(found) is not type(expected):
        return False
    names = [field.name for field in dataclasses.fields(expected)]
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    return all(
        torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other for one, other in pairs
    )

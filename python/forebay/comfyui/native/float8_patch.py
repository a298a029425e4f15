"""A patched float8 weight, with fewer passes over it than ComfyUI's own function takes.

ComfyUI adds products of low rank to what a float8 weight stands for, finds the largest element for a new scale, and rounds by
random numbers that are drawn for the whole weight. On a GPU the engine does all of that in one pass for the largest element, whose
scale it looks up and remembers, and one for the rest; where that does not give ComfyUI's bits it adds the products, and ComfyUI's
function rounds. What takes the engine one pass it does by itself, page by page, once the scale is known.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import comfy.float
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay._forebay import EightBitSum
from forebay.attachment import Attachment
from forebay.comfyui.native.quantized import data_of
from forebay.comfyui.native.weight_patch import WeightPatch
from forebay.converting import dtype_name
from forebay.eight_bits import EightBitPatch
from forebay.low_rank import LowRank, Placed, multiplied
from forebay.streams import Uses

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_log = logging.getLogger("forebay")

_BLOCK = 256
"""Threads of a block of torch's generators on a GPU."""
_AT_ONCE = 8
"""Elements that the engine works on at once: a row is a multiple of them."""
_NUMBERS = 8
"""Float32 of each weight: its scale, what is multiplied with in its place, and behind 16 bytes the largest magnitude."""
_LARGEST = 4

_known: dict[tuple[object, ...], str] = {}
"""Which way gives ComfyUI's bits, by all that it may depend on but the numbers."""


class Float8Patch:
    """Computes a patched weight from the stored one, which is float8, or quantized as float8 with one scale.

    ComfyUI's own function computes the first one of each shape, which tells what does the same: the engine with the scale that it
    finds itself, or with ComfyUI's, or the engine's products and ComfyUI's rounding. Where nothing does, it computes all of them every
    time.
    """

    def __init__(
        self,
        layer: nn.Module,
        key: str,
        patches: Sequence[Any],
        products: LowRank,
        placed: Placed,
        numbers: torch.Tensor,
        attachment: Attachment,
    ) -> None:
        """Nothing is computed yet.

        Args:
            layer: The module that has the weight.
            key: The weight's name in the model.
            patches: ComfyUI's for this weight.
            products: What they come to.
            placed: That on the device.
            numbers: Those of :func:`new_numbers` for this weight.
            attachment: Of the model.
        """
        self._engine = attachment.engine
        self._device = attachment.device
        self._through = products.through
        self._shape = products.shape
        self._ranks = tuple(products.ranks)
        self._memory, self._products = placed
        self._product = self._products
        self._numbers = numbers
        self._seed = comfy.utils.string_to_seed(key)
        self._own: WeightPatch | None = None
        self._own_arguments = layer, key, patches, self._device
        self._way: Callable[[Any], Any] | None = None
        self._params: Any = None
        self._to_scale: torch.Tensor | None = None
        self._uses = Uses(self._memory)
        """Of what it is computed from."""
        self._sum: EightBitSum | None = None
        """Of the latest weight."""
        self._stored_scale: torch.Tensor | None = None
        self._is_only_scaled = False
        """Whether a patched weight has nothing but another scale beside its elements."""

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
        known, found = _known.get(key), None
        if known is None:
            known, found = self._compared(stored)
            _known[key] = known
        elif known == "scaled":
            found = self._scaled(stored)
            known = "own" if found is None else known
        elif isinstance(stored, QuantizedTensor):
            found = self._own_result(stored)
            self._round_to(found._params)
        # The scale is found once.
        self._way = self._way_called(known)
        if isinstance(stored, QuantizedTensor):
            self._stored_scale = stored._params.scale
            self._is_only_scaled = _are_alike(self._params, stored._params, but=("scale",))
        else:
            self._is_only_scaled = True
        if known != "own":
            self._own = None
        return self._way(stored) if found is None else found

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        rows, columns = self._shape
        return rows * columns

    @property
    def is_in_one_pass(self) -> bool:
        """Whether the engine patches it in one pass, as known since it was computed for the first time."""
        return self._way == self._requantized and self._sum is not None and self._is_only_scaled

    @property
    def streams(self) -> Collection[torch.cuda.Stream]:
        """Those in which it was computed."""
        return self._uses.streams.values()

    @property
    def scale(self) -> torch.Tensor | None:
        """What the patched weight is scaled by, if it is, once it was computed."""
        return None if self._params is None else self._params.scale

    def for_pages(self, random: torch.Tensor) -> EightBitPatch:
        """What patches the weight's pages in one pass.

        Args:
            random: Memory for the random bytes of one page.
        """
        threads = _generator_threads(self._device, self.nbytes)
        keep = self._memory, self._numbers, self._to_scale
        return EightBitPatch(
            self._engine, self._shape[1], self._product, self._stored_scale, self._seed, threads, random, keep
        )

    def _compared(self, stored: Any) -> tuple[str, Any]:
        """The way that gives ComfyUI's bits, and what that is."""
        own = self._own_result(stored)
        if isinstance(stored, QuantizedTensor):
            scaled = self._scaled(stored)
            # One element tells little. All of them tell that the engine begins with the numbers that ComfyUI begins with.
            if scaled is not None and _is_same(scaled, own) and _are_alike(scaled._params, own._params):
                return "scaled", own
            self._round_to(own._params)
        names = "requantized", "rounded"
        return next((name for name in names if _is_same(self._way_called(name)(stored), own)), "own"), own

    def _way_called(self, name: str) -> Callable[[Any], Any]:
        """What computes a weight whose scale is found."""
        ways = {"scaled": self._requantized, "requantized": self._requantized, "rounded": self._rounded}
        return ways.get(name, self._own_result)

    def _own_result(self, stored: Any) -> Any:
        """ComfyUI's own."""
        if self._own is None:
            self._own = WeightPatch(*self._own_arguments)
        return self._own(stored)

    def _round_to(self, params: Any) -> None:
        """From now on a quantized weight gets this scale."""
        # The rounded factor that ComfyUI multiplies with, as the engine takes it.
        self._multiply(params, (1.0 / params.scale).to(self._through).to(torch.float32))

    def _multiply(self, params: Any, factor: torch.Tensor) -> None:
        """From now on a quantized weight gets this scale, for which it is multiplied with a float32."""
        self._params, self._to_scale = params, factor
        self._product = multiplied(self._products, factor.data_ptr())
        self._uses, self._sum = Uses(self._memory, factor), None

    def _scaled(self, stored: Any) -> Any:
        """In two passes of the engine's, of which the first finds the scale. None where it cannot."""
        table = scales(self._device, stored.layout_cls, data_of(stored).dtype, self._through)
        if table is None:
            return None
        scale, factor = self._numbers[:2]
        self._multiply(dataclasses.replace(stored._params, scale=scale), factor)
        return self._requantized(stored, scaling_of(self._numbers, table))

    def _eight_bit_sum(self, stored: Any) -> EightBitSum | None:
        """What the engine rounds. None where it cannot."""
        data = data_of(stored)
        if self._sum is None or self._sum.source != data.data_ptr():
            self._sum = self._new_sum(stored, data)
        return self._sum

    def _new_sum(self, stored: Any, data: torch.Tensor) -> EightBitSum | None:
        scale = stored._params.scale if isinstance(stored, QuantizedTensor) else None
        if self._shape[1] % _AT_ONCE or not data.is_contiguous():
            return None
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return None
        scale_at = 0 if scale is None else scale.data_ptr()
        return EightBitSum(data.data_ptr(), dtype_name(data.dtype), self._shape[1], self._product, scale_at)

    def _requantized(self, stored: Any, scaling: tuple[int, int, int] | None = None) -> Any:
        """In one pass of the engine's. None where it has none for such a weight."""
        eight_bit_sum = self._eight_bit_sum(stored)
        if eight_bit_sum is None:
            return None
        data = data_of(stored)
        found = torch.empty_like(data)
        threads = _generator_threads(self._device, data.numel())
        stream = self._uses.enter()
        self._engine.requantize(found.data_ptr(), eight_bit_sum, self._seed, threads, stream, scaling)
        return self._made_of(found, stored)

    def _rounded(self, stored: Any) -> Any:
        """The products in one pass of the engine's, the rest in ComfyUI's."""
        if isinstance(stored, QuantizedTensor):
            params = dataclasses.replace(stored._params, orig_dtype=self._through)
            value = stored.layout_cls.dequantize(stored._qdata, params)
        else:
            value = stored.to(self._through)
        stream = self._uses.enter()
        self._engine.add_product(
            value.data_ptr(), dtype_name(self._through), self._shape[1], self._product, stream
        )
        return self._made_of(
            comfy.float.stochastic_rounding(value, data_of(stored).dtype, self._seed), stored
        )

    def _made_of(self, data: torch.Tensor, stored: Any) -> Any:
        return data if self._params is None else QuantizedTensor(data, stored._layout_cls, self._params)


def new_numbers(count: int, device: torch.device) -> list[torch.Tensor]:
    """What the engine finds of so many weights, on a device."""
    # A scale's address is a multiple of 16, as some kernels may want it.
    return list(torch.zeros(count, _NUMBERS, dtype=torch.float32, device=device))


def scaling_of(numbers: torch.Tensor, table: torch.Tensor) -> tuple[int, int, int]:
    """Where the engine finds a weight's largest magnitude, looks it up, and puts what belongs to it."""
    return numbers[_LARGEST:].data_ptr(), table.data_ptr(), numbers.data_ptr()


@functools.cache
def scales(
    device: torch.device, layout: Any, dtype: torch.dtype, through: torch.dtype
) -> torch.Tensor | None:
    """What belongs to each largest magnitude of a weight that a layout quantizes.

    Returns:
        For each half without a sign the scale, and the factor in its place, rounded as ComfyUI rounds it. None where that is not
        what the layout says, or where numbers are no halves.
    """
    if through != torch.float16:
        return None
    halves = torch.arange(1 << 15, dtype=torch.int16, device=device).view(through)
    # A weight's largest element becomes the largest there is. What it is multiplied with for that is to be a half, too.
    reciprocal = 1.0 / (halves.to(torch.float32) / torch.finfo(dtype).max)
    scale = 1.0 / reciprocal.clamp(max=torch.finfo(through).max)
    table = torch.stack((scale, (1.0 / scale).to(through).to(torch.float32)), 1)
    some = [0, 1, *range(0x0400, 0x7C00, 0x0D35)]
    try:
        # In memory of its own: what quantizes may load more than one element at once.
        ones = (halves[n].clone().reshape(1, 1) for n in some)
        of_layout = [layout.quantize(one, scale="recalculate")[1].scale for one in ones]
        is_same = torch.equal(
            torch.stack(of_layout).flatten().view(torch.int32), scale[some].view(torch.int32)
        )
    except Exception as error:
        _log.debug("%s: scales are not found by the engine: %s", layout, error)
        return None
    return table if is_same else None


def _generator_threads(device: torch.device, count: int) -> int:
    """The threads with which torch draws so many numbers on a GPU."""
    return _BLOCK * min(_most_blocks(device), -(-count // _BLOCK))


@functools.cache
def _most_blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    has = torch.cuda.get_device_properties(device)
    return int(has.multi_processor_count * (has.max_threads_per_multi_processor // _BLOCK))


def _is_same(found: Any, expected: Any) -> bool:
    if found is None:
        return False
    ours, theirs = (data_of(one).view(torch.uint8) for one in (found, expected))
    return torch.equal(ours, theirs)


def _are_alike(found: Any, expected: Any, but: Sequence[str] = ()) -> bool:
    """Whether quantized weights have the same numbers beside their elements, but for some."""
    if type(found) is not type(expected):
        return False
    names = [field.name for field in dataclasses.fields(expected) if field.name not in but]
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    return all(
        torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other for one, other in pairs
    )

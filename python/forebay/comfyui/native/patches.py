"""Patches of weights (LoRA and its kin): what ComfyUI computes for a model that is loaded as a whole.

The usual LoRA is products of low rank, which the engine adds in ComfyUI's arithmetic while a page is filled, where torch is
found to multiply matrices as the engine does. Float8 is rounded by numbers that are drawn for a whole weight, and gets another
scale: so the first step computes one weight at a time, and from the second one on the engine does to each page what was found to
give the same. For all else ComfyUI's own function is called with one weight
at a time, on the device: its arithmetic, dtypes and seeded rounding. So results do not depend on what is resident. Where the
model fits, a weight is computed when its pages are filled and costs nothing afterwards. Where it does not, most pages would be
computed again in every step; then a layer's weights are computed when it runs, from what is on the device, and those that stay
there are replaced by what was computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import nn

from forebay._forebay import Weight
from forebay.attachment import Attachment
from forebay.comfyui.native.float8_patch import FLOAT8, Float8Patch, new_numbers
from forebay.comfyui.native.patched_layer import Compute, PatchedLayer, PatchedWeight
from forebay.comfyui.native.quantized import ManagedQuantized, quantized_of, stand_ins_of
from forebay.comfyui.native.weight_patch import WeightPatch
from forebay.converting import USED
from forebay.low_rank import LowRank, sums_as_torch, to_device
from forebay.parameter import ForebayTensor
from forebay.small import small_of

Function = Callable[[torch.Tensor], torch.Tensor]

_log = logging.getLogger("forebay")


@dataclass(eq=False)
class _Patch:
    """A weight's patches.

    Attributes:
        patches: ComfyUI's.
        filled: The name of the weight that is computed as it is filled, if it is.
        at_fill: Whether that is so because the model fits.
        undo: Takes the rest away.
        computed: What is computed when its layer runs, if it is.
    """

    patches: list[Any]
    filled: str | None
    undo: Callable[[], None] | None
    computed: PatchedWeight | None = None
    at_fill: bool = False

    @property
    def for_pages(self) -> tuple[PatchedWeight, Float8Patch] | None:
        """What its layer computed when it ran, where the engine can do the same to its pages."""
        computed = self.computed
        if computed is None or computed.weight is None or not isinstance(computed.compute, Float8Patch):
            return None
        is_scale_kept = computed.quantized is None or computed.quantized.is_scale_kept
        return (computed, computed.compute) if computed.compute.is_in_one_pass and is_scale_kept else None


@dataclass(frozen=True, eq=False)
class _New:
    """A weight that is to be patched.

    Attributes:
        key: The weight's name in the model.
        patches: ComfyUI's.
        layer: The module that has it.
        name: The weight's name there.
        weight: What the module has.
        quantized: How it is managed, if it is quantized.
        stored: What is patched: the weight, or its elements if one scale is for all of them.
        added: What the patches come to, if the engine adds that as the weight is filled.
        rounded: Likewise, if the weight is float8, which is rounded behind that.
    """

    key: str
    patches: list[Any]
    layer: nn.Module
    name: str
    weight: torch.Tensor
    quantized: ManagedQuantized | None
    stored: Any
    added: LowRank | None
    rounded: LowRank | None

    @property
    def products(self) -> LowRank | None:
        """What the engine adds in either way."""
        return self.rounded if self.added is None else self.added


class Patches:
    """The patches of an attached model, which change with the patcher that is loaded."""

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        *,
        at_fill: bool,
    ) -> None:
        """None at first.

        Args:
            model: The attached model.
            attachment: Its attachment.
            at_fill: Whether weights are computed when they are filled.
        """
        self._model = model
        self._attachment = attachment
        self._at_fill = at_fill
        self._of: dict[str, _Patch] = {}
        self._layers: dict[int, PatchedLayer] = {}
        self._first_run: PatchedLayer | None = None
        """The layer that ran first since others did not."""
        self._random: torch.Tensor | None = None
        """Where the engine draws the random bytes of a page."""
        self._places = Counter(id(one) for module in model.modules() for one in stand_ins_of(module))

    def set(self, patches: Mapping[str, Sequence[Any]], *, fits: bool = True) -> int:
        """Gives weights these patches in place of those they have. Weights whose patches are the same are left alone.

        Args:
            patches: ComfyUI's, by the weights' names in the model.
            fits: Whether the model still fits. Once it does not, its weights are no longer computed when they are filled.

        Returns:
            How many weights changed.
        """
        self._at_fill = self._at_fill and fits
        gone = [
            key
            for key, has in self._of.items()
            if not _same(has.patches, patches.get(key)) or (has.at_fill and not self._at_fill)
        ]
        functions: dict[str, Function | None] = {}
        for key in gone:
            patch = self._of.pop(key)
            if patch.filled is not None:
                functions[patch.filled] = None
            if patch.undo is not None:
                patch.undo()
            if patch.computed is not None:
                patch.computed.undo()
        new = self._summed_as_torch(
            [self._new(key, list(patches[key])) for key in patches if key not in self._of]
        )
        device = self._attachment.device
        rounded = [(one, one.rounded) for one in new if one.rounded is not None]
        placed = to_device((products for _, products in rounded), device)
        numbers = new_numbers(len(rounded), device)
        of_float8 = {
            one: Float8Patch(one.layer, one.key, one.patches, products, place, own, self._attachment)
            for (one, products), place, own in zip(rounded, placed, numbers, strict=True)
        }
        for one in new:
            self._of[one.key] = self._patched(one, of_float8.get(one), functions)
        if functions:
            if device.type == "cuda" and any(map(_is_computed, functions.values())):
                # Weights are computed in another stream than this one, which takes the patches to the device.
                torch.cuda.current_stream(device).synchronize()
            self._attachment.set_patch(functions)
        return len({*gone, *(one.key for one in new)})

    def withdraw(self) -> None:
        """Takes them from the layers, before the model is detached. What was computed goes with its pages."""
        for patch in self._of.values():
            if patch.undo is not None:
                patch.undo()
        self._of.clear()

    def _new(self, key: str, patches: list[Any]) -> _New:
        path, _, name = key.rpartition(".")
        layer = self._model.get_submodule(path)
        weight = getattr(layer, name)
        quantized = quantized_of(layer, name)
        stored: Any = weight if quantized is None else quantized.data if quantized.has_one_scale else None
        is_plain = quantized is None and not any(
            hasattr(layer, f"{does}_{name}") for does in ("set", "convert")
        )
        products = self._products(stored, patches) if is_plain or quantized is not None else None
        added = rounded = None
        if products is not None and is_plain and weight.dtype in USED:
            added = products
        elif products is not None and stored.dtype in FLOAT8 and stored.shape == weight.shape:
            rounded = products
        return _New(key, patches, layer, name, weight, quantized, stored, added, rounded)

    def _patched(
        self, new: _New, of_float8: Float8Patch | None, functions: dict[str, Function | None]
    ) -> _Patch:
        key, patches, layer, name, weight = new.key, new.patches, new.layer, new.name, new.weight
        quantized = new.quantized
        if new.added is not None:
            functions[key] = new.added
            return _Patch(patches, key, None)
        compute: Compute = of_float8 or WeightPatch(layer, key, patches, self._attachment.device)
        keeps_shape = comfy.lora.calculate_shape(patches, weight, key) == weight.shape
        asks = hasattr(layer, "comfy_cast_weights")
        if keeps_shape and (self._at_fill or not asks):
            if quantized is not None and quantized.has_one_scale:
                functions[quantized.data_name], undo = quantized.patched(compute)
                return _Patch(patches, quantized.data_name, undo, at_fill=asks)
            if quantized is None and _is_managed(weight):
                functions[key] = compute
                return _Patch(patches, key, None, at_fill=asks)
        known = self._layers.get(id(layer))
        if known is None:
            known = self._layers[id(layer)] = PatchedLayer(layer, self._before_run)
        computed = PatchedWeight(compute, quantized, self._own_memory(new.stored))
        known.add(name, computed)

        def undo_on_use() -> None:
            if not known.drop(name):
                self._layers.pop(id(layer), None)

        return _Patch(patches, None, undo_on_use, computed)

    def _before_run(self, layer: PatchedLayer) -> None:
        """A layer is about to run. Once the first one runs again it is known what was computed, in most models all of it."""
        if self._first_run is None:
            self._first_run = layer
        elif layer is self._first_run:
            self._hand_over()

    def _hand_over(self) -> None:
        """Has the engine patch what layers computed until now, from now on page by page, where it can."""
        able = {key: found for key, patch in self._of.items() if (found := patch.for_pages) is not None}
        if not able:
            return
        random = self._memory_for_random(max(of.nbytes for _, of in able.values()))
        if random is None:
            return
        # The engine's patching stream is not behind those in which the scales were found.
        for stream in {stream for _, of in able.values() for stream in of.streams}:
            stream.synchronize()
        functions: dict[str, Function | None] = {}
        for key, (computed, of) in able.items():
            computed.undo()
            functions[_data_name(key, computed.quantized)] = of.for_pages(random)
        failed: BaseException | None = None
        try:
            self._attachment.set_patch(functions)
        except ValueError:
            # Nothing has changed.
            raise
        except BaseException as error:
            # In force all the same, also where waiting was interrupted.
            failed = error
        for key, (computed, of) in able.items():
            patch, quantized = self._of[key], computed.quantized
            if patch.undo is not None:
                patch.undo()
            undo = None if quantized is None or of.scale is None else quantized.scaled(of.scale)
            self._of[key] = _Patch(patch.patches, _data_name(key, quantized), undo)
        self._first_run = None
        _log.debug("%d weights are patched as their pages are filled from now on", len(able))
        if failed is not None:
            raise failed

    def _memory_for_random(self, nbytes: int) -> torch.Tensor | None:
        """As much as a page has of a weight. None where there is no memory for it."""
        nbytes = min(nbytes, max(one["page_size"] for one in self._attachment.stats()))
        if self._random is None or self._random.nbytes < nbytes:
            try:
                self._random = torch.empty(nbytes, dtype=torch.uint8, device=self._attachment.device)
            except torch.OutOfMemoryError as error:
                _log.debug("weights are patched when their layers run: %s", error)
                return None
        return self._random

    def _own_memory(self, stored: Any) -> Weight | None:
        """Where what is computed of a weight may be put: nobody else reads it there, and it is filled with what is stored."""
        if (
            not isinstance(stored, ForebayTensor)
            or self._places[id(stored)] > 1
            or stored._conversion is not None
        ):
            return None
        return stored._weight

    def _products(self, weight: Any, patches: Sequence[Any]) -> LowRank | None:
        """What patches add to a weight, where they are products that the engine can add."""
        if not isinstance(weight, ForebayTensor) or weight.ndim < 2 or not weight.is_contiguous():
            return None
        terms = [_term(patch) for patch in patches]
        device = self._attachment.device
        through = comfy.model_management.lora_compute_dtype(device)
        if None in terms or through not in (torch.float16, torch.float32):
            return None
        try:
            products = LowRank([term for term in terms if term is not None], through)
        except ValueError:
            return None
        shape = (weight.shape[0], weight.shape[1:].numel())
        nbytes = sum(factor.nbytes for *factors, _ in products.terms for factor in factors)
        # As for other patches: what is larger than the weight does not go to the device to stay.
        return products if products.shape == shape and nbytes <= weight.nbytes else None

    def _summed_as_torch(self, new: Sequence[_New]) -> list[_New]:
        """The same, but that the engine adds nothing where torch, and so ComfyUI, would sum it in another order."""
        shapes = {shape for one in new if one.products is not None for shape in one.products.shapes}
        is_same = sums_as_torch(self._attachment.engine, self._attachment.device, shapes)
        return [
            one
            if one.products is None or all(is_same[shape] for shape in one.products.shapes)
            else replace(one, added=None, rounded=None)
            for one in new
        ]


def _data_name(key: str, quantized: ManagedQuantized | None) -> str:
    """What a weight's bytes are called in the model that is attached."""
    return key if quantized is None else quantized.data_name


def are_added(patches: Mapping[str, Sequence[Any]], dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether patches are nothing but products that the engine adds, as far as the patches tell.

    Args:
        patches: ComfyUI's, by the weights' names.
        dtypes: Those that weights are used in. Of quantized weights there is none.
    """
    return all(dtypes.get(key) in USED for key in patches) and are_products(patches)


def are_products(patches: Mapping[str, Sequence[Any]]) -> bool:
    """Whether patches are nothing but products of low rank."""
    return all(_term(patch) is not None for of_weight in patches.values() for patch in of_weight)


def _term(patch: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """The factors of the usual LoRA, and the number that ComfyUI multiplies their product with."""
    strength, adapter, strength_model, offset, function = patch
    if (
        type(adapter) is not LoRAAdapter
        or strength_model != 1.0
        or offset is not None
        or function is not None
    ):
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others) or not all(map(_is_factor, (up, down))):
        return None
    if not isinstance(strength, (int, float)) or not isinstance(alpha, (int, float, type(None))):
        return None
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return (up, down, scale) if abs(scale) <= torch.finfo(torch.float32).max else None


def _is_factor(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.ndim >= 2
        and tensor.numel() > 0
        and tensor.is_contiguous()
    )


def _is_computed(function: Function | None) -> bool:
    return function is not None and not isinstance(function, LowRank)


def _is_managed(weight: torch.Tensor) -> bool:
    return isinstance(weight, ForebayTensor) or small_of(weight) is not None


def _same(has: Sequence[Any], wanted: Sequence[Any] | None) -> bool:
    """Whether patches are the same: of the same strengths, and the very same tensors."""
    return (
        wanted is not None
        and len(has) == len(wanted)
        and all(
            one[0] == other[0] and one[1] is other[1] and one[2:] == other[2:]
            for one, other in zip(has, wanted, strict=True)
        )
    )

"""A layer whose weights are patched when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from forebay import streams
from forebay._forebay import Weight, hold
from forebay.comfyui.native.quantized import ManagedQuantized, data_of, unpinned, with_data
from forebay.instance_methods import InstanceMethod

Compute = Callable[[Any], Any]
"""Gives the patched weight, quantized if the stored one is."""


class PatchedLayer:
    """A layer whose forward sees patched weights."""

    def __init__(self, layer: nn.Module, before_run: Callable[[PatchedLayer], None]) -> None:
        """None at first.

        Args:
            layer: The layer.
            before_run: Is told each time that it is about to run, and may change which weights it sees patched.
        """
        self._layer = layer
        self._before_run = before_run
        self._patched: dict[str, PatchedWeight] = {}
        self._method = InstanceMethod(layer, "forward", self._run)

    def add(self, name: str, weight: PatchedWeight) -> None:
        """Has it see one of its weights patched."""
        self._patched[name] = weight

    def drop(self, name: str) -> bool:
        """Whether there are others."""
        self._patched.pop(name, None)
        if not self._patched:
            self._method.remove()
        return bool(self._patched)

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_run(self)
        if not self._patched:
            return original(*args, **kwargs)
        try:
            return self._run_patched(original, *args, **kwargs)
        finally:
            for one in self._patched.values():
                one.settle()

    def _run_patched(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parameters: dict[str, Any] = self._layer._parameters
        originals = {name: parameters[name] for name in self._patched}
        held: list[Weight] = []
        stored = {name: one.stored(originals[name], held) for name, one in self._patched.items()}
        holding = [hold(held)]
        try:
            is_in_place = False
            for name, one in self._patched.items():
                self._put(parameters, name, one.patched(stored[name]))
                is_in_place |= one.is_in_place
            if not is_in_place:
                holding.clear()  # behind what computes them
            return original(*args, **kwargs)
        finally:
            for name, original_weight in originals.items():
                self._put(parameters, name, original_weight)

    def _put(self, parameters: dict[str, Any], name: str, weight: Any) -> None:
        """As an item is set, also of a dict that is watched, without what that takes."""
        dict.__setitem__(parameters, name, weight)
        self._layer.__dict__.pop(name, None)


class PatchedWeight:
    """One of its weights, computed from what is on the device.

    Where the weight stays there, what was computed is put in its place, and is not computed again: its bytes are looked after
    by the serials of its pages. A page that was filled since then holds what is stored.

    Attributes:
        compute: Gives the patched weight from the stored one.
        quantized: What is known of a quantized weight.
        weight: What manages its bytes, or its data's, if something may be put there.
        is_in_place: Whether the latest one is there.
    """

    def __init__(self, compute: Compute, quantized: ManagedQuantized | None, weight: Weight | None) -> None:
        """Nothing is computed yet.

        Args:
            compute: See the attribute.
            quantized: Likewise.
            weight: Likewise. None where nothing may be put there: others read it as it is stored, or it is stored in another
                dtype.
        """
        self.is_in_place = False
        self.compute = compute
        self.quantized = quantized
        self.weight = weight
        self._put: frozenset[int] = frozenset()  # the serials of pages that were written to
        self._seen: list[int] = []
        self._found: Any = None
        self._stream: Any = None
        self._handle = 0
        self._is_torn = False

    def stored(self, parameter: Any, held: list[Weight]) -> Any:
        """The weight on the device, which is there once what is added to the list is held."""
        if self.quantized is None:
            return unpinned(parameter, held)
        return self.quantized.unpinned(held)

    def patched(self, stored: Any) -> Any:
        """The patched weight. The stored one is held, and longer than the result where that is in its place."""
        if self.weight is None:
            return self.compute(stored)
        self._follow_stream(stored)
        serials = self.weight.serials
        if self._put and self._put.issuperset(serials):
            self.is_in_place = True
            return self._found
        is_torn = not self._put.isdisjoint(serials)
        found = self.compute(self._read(stored) if is_torn else stored)
        # Who is to stay is known when it was there the last time.
        stays = (is_torn or serials == self._seen) and self.weight.is_resident
        self._seen = serials
        self.is_in_place = stays and _is_alike(found, stored)
        self._is_torn = is_torn and not self.is_in_place
        if not self.is_in_place:
            return found
        data_of(stored).copy_(data_of(found))
        self._put = frozenset(serials)
        self._found = with_data(found, data_of(stored))
        return self._found

    def settle(self) -> None:
        """Behind the layer: of a weight that was put in its place, and of which a part has left, the rest leaves as well."""
        if self._is_torn:
            assert self.weight is not None
            self.weight.discard()
            self._is_torn = False

    def undo(self) -> None:
        """Has its place filled with what is stored again."""
        if self._put:
            assert self.weight is not None
            self._put = frozenset()
            self.weight.refill()

    def _read(self, stored: Any) -> Any:
        """The stored weight, read from where it is stored."""
        assert self.weight is not None
        data = torch.empty_like(data_of(stored))
        self.weight.read_to_device(data.data_ptr(), data.nbytes, self._handle)
        return with_data(stored, data)

    def _follow_stream(self, stored: Any) -> None:
        """What is put in its place is read in other streams, and was read in others, in this order."""
        device = stored.device
        if device.type != "cuda":
            return
        handle = streams.current(device)
        if self._stream is not None and handle == self._handle:
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
            if isinstance(self._found, QuantizedTensor):
                self._found._params.scale.record_stream(stream)
        self._stream, self._handle = stream, handle


def _is_alike(found: Any, stored: Any) -> bool:
    """Whether one can be put in the place of the other."""
    ours, theirs = data_of(found), data_of(stored)
    return (
        isinstance(found, QuantizedTensor) == isinstance(stored, QuantizedTensor)
        and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        and theirs.is_contiguous()
    )

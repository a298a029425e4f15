"""Adapters (LoRA) on attached weights: which weight each is for, and what the device adds to it.

The engine adds them on the device as a page is filled; small weights, which are always there, are merged here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from forebay._forebay import DetachedError, ForebayError, Model
from forebay.adapters import COMPONENTS, Adapter, Source, file_identity, names_of, read_adapters
from forebay.converting import USED, Conversion, dtype_name
from forebay.eight_bits import EightBitPatch
from forebay.low_rank import LowRank, Patch, Product, joined_dtype, to_device

_log = logging.getLogger("forebay")

_FUSED = {
    "to_q": 0, "to_k": 1, "to_v": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2, "query": 0, "key": 1, "value": 2,
}  # fmt: skip
"""Parts of a weight that models may have fused, by their places in it."""
_FUSED_NAMES = ("to_qkv", "qkv", "qkv_proj", "in_proj", "c_attn")

Function = Callable[[torch.Tensor], torch.Tensor]
"""Computes a weight, on its device, from what is stored."""

Rename = Mapping[str, str | tuple[str, slice]] | Callable[[str], str | tuple[str, slice] | None]
"""Gives a file's name of a module the model's, and the rows of its weight where it is only a part."""


@dataclass(eq=False)
class Target:
    """A weight that can be patched.

    Attributes:
        label: The model's name.
        names: What the module calls it; several where it is tied.
        model: The model in the engine.
        index: Its number there.
        source: Its bytes as they are stored.
        conversion: What its elements on the device are made of them by.
        small: Its parameter, where it is always resident.
        function: What computes it from what is stored, at this moment.
        terms: What is added to it at this moment.
    """

    label: str
    names: list[str]
    model: Model
    index: int
    source: torch.Tensor
    conversion: Conversion | None
    small: torch.Tensor | None
    function: Function | None = None
    terms: list[Term] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.names[0]} of {self.label}"

    @property
    def dtype(self) -> torch.dtype:
        """Its elements on the device."""
        return self.source.dtype if self.conversion is None else self.conversion.dtype

    @property
    def value(self) -> torch.Tensor:
        """What it is without adapters, on the CPU."""
        return self.used(self.source)

    def used(self, stored: torch.Tensor) -> torch.Tensor:
        """What is made of its bytes as they are stored, where these are."""
        return stored if self.conversion is None else self.conversion.value(stored)

    @property
    def columns(self) -> int:
        """Elements a row."""
        return self.source.shape[1:].numel()


@dataclass(frozen=True)
class Term:
    """An adapter of a strength on some rows of a weight."""

    adapter: Adapter
    scale: float
    first: int
    last: int

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for terms that add the same."""
        return (self.adapter.identity, self.scale, self.first, self.last)


class Patches:
    """The adapters of an attachment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._targets: list[Target] = []
        self._files: dict[tuple[str, int, int], list[Adapter]] = {}
        # Not the caller's: its work may wait for pages that wait for this.
        self._own = _OwnStream(device)
        self._reading = _OwnStream(device)
        self._is_detached = False
        self._computing: weakref.WeakSet[_Computing] = weakref.WeakSet()
        # For the whole of a change. Taken before everything else, and never while the engine calls Python.
        self._lock = threading.Lock()

    def add(self, target: Target) -> None:
        """A weight was attached."""
        self._targets.append(target)

    def is_any(self) -> bool:
        """Whether any weight is another one than what is stored."""
        return any(target.function is not None or target.terms for target in self._targets)

    def clear(self) -> None:
        """The weights are detached."""
        self._is_detached = True
        self._targets.clear()
        self._files.clear()
        for one in list(self._computing):
            one.close()

    def set_loras(
        self, loras: Iterable[tuple[Source, float]], *, strict: bool = True, rename: Rename | None = None
    ) -> None:
        """See :meth:`forebay.Attachment.set_loras`."""
        with self._lock:
            self._check_attached()
            files: dict[tuple[str, int, int], list[Adapter]] = {}
            terms: dict[int, list[Term]] = {}
            finder = _Finder(self._targets, rename)
            for source, strength in loras:
                if not isinstance(strength, (int, float)):
                    raise TypeError(
                        f"a LoRA is a file or state dict and a number, its strength: {strength!r}"
                    )
                unmatched: list[str] = []
                adapters = self._read(source, files)
                for adapter in adapters:
                    found = finder.find(adapter)
                    if found is None:
                        unmatched.append(adapter.target)
                        continue
                    target, rows = found
                    term = _term(target, adapter, float(strength), rows)
                    if term.scale != 0.0:
                        terms.setdefault(id(target), []).append(term)
                _report(unmatched, adapters, strict)
            self._change((target, target.function, terms.get(id(target), [])) for target in self._targets)
            self._files = files

    def set_functions(self, functions: Mapping[str, Function | None]) -> None:
        """See :meth:`forebay.Attachment.set_patch`."""
        with self._lock:
            self._check_attached()
            called = self._by_name()
            wanted = []
            for name, function in functions.items():
                found = called.get(name, [])
                if len(found) != 1:
                    names = ", ".join(target.name for target in found) or "no weight that is attached"
                    raise ValueError(f"is the name of {names}: {name!r}")
                if function is not None and not callable(function):
                    raise TypeError(f"a patch is a callable, or None: {function!r}")
                if isinstance(function, LowRank):
                    _check_shape(found[0], function)
                wanted.append((found[0], function, found[0].terms))
            self._change(wanted)

    def _by_name(self) -> dict[str, list[Target]]:
        """The weights that a name may mean."""
        called: dict[str, list[Target]] = {}
        for target in self._targets:
            for name in {*target.names, *(f"{target.label}.{own}" for own in target.names)}:
                called.setdefault(name, []).append(target)
        return called

    def _check_attached(self) -> None:
        if self._is_detached:
            raise DetachedError("the model was detached; attach it again to patch its weights")

    def _read(self, source: Source, files: dict[tuple[str, int, int], list[Adapter]]) -> list[Adapter]:
        """A file that is in force already is not read again: what it adds is known to be the same."""
        identity = file_identity(source)
        adapters = None if identity is None else (files.get(identity) or self._files.get(identity))
        if adapters is None:
            adapters = read_adapters(source)
        if identity is not None:
            files[identity] = adapters
        return adapters

    def _change(self, wanted: Iterable[tuple[Target, Function | None, list[Term]]]) -> None:
        """Gives weights their functions and terms. Those that have them already are left alone."""
        by_model: dict[Model, list[_Change]] = {}
        with torch.inference_mode(False), torch.no_grad(), self._own.current() as stream:
            changes = [_Change(*one) for one in wanted if _is_new(*one)]
            self._place(changes)
            for change in changes:
                target, function, terms = change.target, change.function, change.terms
                if target.small is not None:
                    change.merged = self._merged(target, function, terms)
                elif change.patch is None and (function is not None or terms):
                    change.patch = self._patch(target, function, terms)
                by_model.setdefault(target.model, []).append(change)
        failed: ForebayError | None = None
        for model, changes in by_model.items():
            large = [(change.target.index, change.patch) for change in changes if change.target.small is None]
            try:
                if large:
                    model.change_patches(large, stream)
            except ForebayError as error:
                # In force all the same; the other models' go on.
                failed = failed or error
            for change in changes:
                change.note()
        if failed is not None:
            raise failed

    def _place(self, changes: Iterable[_Change]) -> None:
        """What the engine is given for functions that it need not call."""
        changes = [change for change in changes if change.target.small is None and not change.terms]
        for change in changes:
            if isinstance(change.function, EightBitPatch):
                change.patch = change.function.for_engine(change.target.dtype)
        added = [
            (change, change.function)
            for change in changes
            if isinstance(change.function, LowRank) and _is_added(change.target)
        ]
        placed = to_device((function for _, function in added), self._device)
        for (change, _), (memory, product) in zip(added, placed, strict=True):
            target = change.target
            change.patch = dtype_name(target.dtype), target.columns, [product], memory, None, None

    def _patch(self, target: Target, function: Function | None, terms: Sequence[Term]) -> Patch:
        """What the engine is given: for each run of rows with the same terms one product of their joined factors."""
        kept: list[torch.Tensor] = []
        products: list[Product] = []
        for first, last, of in _runs(terms):
            dtype = joined_dtype(tensor for term in of for tensor in (term.adapter.up, term.adapter.down))
            up = [term.adapter.up[first - term.first : last - term.first].to(dtype) for term in of]
            down = [term.adapter.down.to(dtype) for term in of]
            scale = [torch.full((term.adapter.rank,), term.scale, dtype=torch.float32) for term in of]
            factors = [
                torch.cat(parts, dim).contiguous().to(self._device, copy=True)
                for parts, dim in ((up, 1), (down, 0), (scale, 0))
            ]
            kept += factors
            up_at, down_at, scale_at = (factor.data_ptr() for factor in factors)
            rank = factors[1].shape[0]
            products.append((first, last, up_at, down_at, scale_at, dtype_name(dtype), rank, None))
        compute = None
        if function is not None:
            compute = _Computing(self._computed, target, function)
            self._computing.add(compute)
        # Without terms nobody computes with the elements.
        name = dtype_name(target.dtype if terms else torch.float32)
        return name, target.columns if terms else 1, products, kept, compute, None

    def _computed(self, target: Target, function: Function) -> tuple[int, int, object]:
        """Computes a weight, on a thread of the engine. Its address, the stream's handle, and what keeps it."""
        with torch.inference_mode(False), torch.no_grad(), self._own.current() as stream:
            result = self._called(target, function)
            return result.data_ptr(), stream, result

    def _called(self, target: Target, function: Function) -> torch.Tensor:
        """What a function makes of a weight, laid out as the weight is."""
        value = target.used(self._stored(target))
        result = function(value)
        if not isinstance(result, torch.Tensor) or (result.shape, result.dtype) != (value.shape, value.dtype):
            got = (
                (result.dtype, tuple(result.shape))
                if isinstance(result, torch.Tensor)
                else type(result).__name__
            )
            raise ValueError(f"a patch gives a tensor of {value.dtype} and shape {tuple(value.shape)}: {got}")
        placed = torch.empty_strided(
            target.source.size(), target.source.stride(), dtype=value.dtype, device=self._device
        )
        return placed.copy_(result.detach())

    def _stored(self, target: Target) -> torch.Tensor:
        """A copy of a weight as it is stored, on the device: a function may write to it.

        The engine's readers bring it, as they bring pages. They would wait for what is computed with the weight before, so
        it comes in a stream of its own.
        """
        if target.small is not None:
            return target.source.to(self._device, copy=True)
        source = target.source
        with self._reading.current() as reading:
            stored = torch.empty_strided(
                source.size(), source.stride(), dtype=source.dtype, device=self._device
            )
            target.model.weight(target.index).read_to_device(stored.data_ptr(), stored.nbytes, reading)
        self._reading.hand_over(stored)
        return stored

    def _merged(self, target: Target, function: Function | None, terms: Sequence[Term]) -> torch.Tensor:
        """A weight with its function and terms: sums in float32 on the CPU, rounded once."""
        value = target.value if function is None else self._called(target, function).cpu()
        if not terms:
            return value
        merged = value.float()
        flat = torch.zeros_like(merged).flatten(1)
        for term in terms:
            flat[term.first : term.last] += (term.scale * term.adapter.up.float()) @ term.adapter.down.float()
        return (merged + flat.view(merged.shape)).to(target.dtype)


@dataclass(eq=False)
class _Change:
    """What one weight is to be, and what gets it there."""

    target: Target
    function: Function | None
    terms: list[Term]
    patch: Patch | None = None
    merged: torch.Tensor | None = None

    def note(self) -> None:
        """It is in force. A small weight is written to: it is an ordinary tensor."""
        self.target.function, self.target.terms = self.function, self.terms
        if self.target.small is not None and self.merged is not None:
            self.target.small.data.copy_(self.merged)


class _Computing:
    """What the engine calls for a computed weight, until the model is detached.

    The engine has it as long as it has the weights, which have memory as long as anybody has their stand-ins. So it lets go of
    everything then: what computes a weight may well have a stand-in, and the garbage collector does not see the engine.
    """

    def __init__(
        self,
        compute: Callable[[Target, Function], tuple[int, int, object]],
        target: Target,
        function: Function,
    ) -> None:
        self._call: Callable[[], tuple[int, int, object]] | None = functools.partial(
            compute, target, function
        )

    def __call__(self) -> tuple[int, int, object]:
        call = self._call
        if call is None:
            raise DetachedError("the model was detached")
        return call()

    def close(self) -> None:
        self._call = None


class _OwnStream:
    """A stream beside the application's, made when it is first used. On the CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def current(self) -> Iterator[int]:
        """Makes it the current one. Its handle."""
        if self._device.type != "cuda":
            yield 0
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield int(self._stream.cuda_stream)

    def hand_over(self, made: torch.Tensor) -> None:
        """The current stream goes on with what was made in this one."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            made.record_stream(current)


class _Finder:
    """Finds the weights that adapters are for."""

    def __init__(self, targets: Sequence[Target], rename: Rename | None) -> None:
        self._rename: Callable[[str], Any] | None = rename.get if isinstance(rename, Mapping) else rename
        self._labels = {target.label for target in targets}
        self._by_name: dict[str, list[Target]] = {}
        self._by_underscored: dict[str, list[Target]] = {}
        for target in targets:
            for name in target.names:
                self._by_name.setdefault(name, []).append(target)
                if name.endswith(".weight"):
                    module = name[: -len(".weight")]
                    self._by_name.setdefault(module, []).append(target)
                    self._by_underscored.setdefault(module.replace(".", "_"), []).append(target)

    def find(self, adapter: Adapter) -> tuple[Target, slice] | None:
        """The weight and its rows.

        Raises:
            ValueError: Where several weights could be meant.
        """
        renamed = self._rename(adapter.target) if self._rename is not None else None
        if renamed is not None:
            name, rows = renamed if isinstance(renamed, tuple) else (renamed, slice(None))
            target = self._one(adapter, self._by_name.get(name, []), None)
            return None if target is None else (target, rows)
        for name, label in self._candidates(adapter.target):
            target = self._one(adapter, self._by_name.get(name, []), label)
            if target is None and "." not in name:
                target = self._one(adapter, self._by_underscored.get(name, []), label)
            if target is None:
                target = self._one(adapter, self._by_name.get(f"{name}.0", []), label)
            if target is not None:
                return target, slice(None)
            fused = self._fused(adapter, name, label)
            if fused is not None:
                return fused
        return None

    def _candidates(self, target: str) -> Iterable[tuple[str, str | None]]:
        """What the weight may be called, and the part of a pipeline that it belongs to."""
        for name in names_of(target):
            for prefix, labels in COMPONENTS.items():
                if name.startswith(prefix):
                    rest = name[len(prefix) :]
                    known = [label for label in labels if label in self._labels]
                    # A model that was attached alone is what all of the file is for, whatever it is called.
                    if known or len(self._labels) == 1:
                        yield rest, known[0] if known else None
            for label in self._labels:
                if name.startswith(f"{label}."):
                    yield name[len(label) + 1 :], label
            yield name, None

    def _one(self, adapter: Adapter, targets: Sequence[Target], label: str | None) -> Target | None:
        fitting = {id(target): target for target in targets if label is None or target.label == label}
        if len(fitting) > 1:
            names = ", ".join(target.name for target in fitting.values())
            raise ValueError(f"may be for {names}: {adapter.target!r} of {adapter.origin}")
        return next(iter(fitting.values()), None)

    def _fused(self, adapter: Adapter, name: str, label: str | None) -> tuple[Target, slice] | None:
        """A third of a weight that a model has fused of three of the same size."""
        for part, place in _FUSED.items():
            for mark, found in ((".", self._by_name), ("_", self._by_underscored)):
                if not name.endswith(mark + part):
                    continue
                for fused in _FUSED_NAMES:
                    target = self._one(adapter, found.get(name[: -len(part)] + fused, []), label)
                    rows = adapter.up.shape[0]
                    if target is not None and target.source.shape[0] == 3 * rows:
                        return target, slice(place * rows, (place + 1) * rows)
        return None


def _term(target: Target, adapter: Adapter, strength: float, rows: slice) -> Term:
    shape, what = tuple(target.source.shape), f"{adapter.target!r} of {adapter.origin}"
    first, last, step = rows.indices(target.source.shape[0]) if shape else (0, 0, 1)
    if (
        target.source.ndim < 2
        or step != 1
        or adapter.up.shape[0] != last - first
        or adapter.down.shape[1] != target.columns
    ):
        raise ValueError(
            f"rows {first}:{last} of a weight of shape {shape} take no product of {tuple(adapter.up.shape)} and "
            f"{tuple(adapter.down.shape)}: {what} for {target.name}"
        )
    if target.dtype not in USED:
        raise ValueError(
            f"a weight of {dtype_name(target.dtype)} takes no adapter; attach with dtype=torch.bfloat16, say, and it is "
            f"converted first: {what} for {target.name}"
        )
    if not target.source.is_contiguous():
        raise ValueError(
            f"a weight that is not contiguous takes no adapter; make it so before attach: {what} for {target.name}"
        )
    return Term(adapter, strength * adapter.scale, first, last)


def _runs(terms: Sequence[Term]) -> Iterable[tuple[int, int, list[Term]]]:
    """Runs of rows that the same terms are for."""
    edges = sorted({edge for term in terms for edge in (term.first, term.last)})
    for first, last in itertools.pairwise(edges):
        of = [term for term in terms if term.first <= first and last <= term.last]
        if of:
            yield first, last, of


def _check_shape(target: Target, products: LowRank) -> None:
    shape = tuple(target.source.shape)
    if len(shape) < 2 or products.shape != (shape[0], target.columns):
        raise ValueError(f"a weight of shape {shape} takes no products of {products.shape}: {target.name}")


def _is_added(target: Target) -> bool:
    """Whether the engine adds products to it."""
    return target.dtype in USED and target.source.is_contiguous()


def _is_new(target: Target, function: Function | None, terms: Sequence[Term]) -> bool:
    """Whether a weight does not have these already."""
    has = [term.identity for term in target.terms]
    return function is not target.function or [term.identity for term in terms] != has


def _report(unmatched: Sequence[str], adapters: Sequence[Adapter], strict: bool) -> None:
    if not unmatched:
        return
    some = ", ".join(repr(name) for name in unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
    text = f"{len(unmatched)} of {len(adapters)} adapters are for no weight that is attached"
    if strict:
        raise ValueError(f"{text}; strict=False leaves them out, rename= says whose they are: {some}")
    _log.warning("%s of %s: %s", text, adapters[0].origin, some)

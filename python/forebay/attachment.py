"""Attaching modules: every weight gets one device address for life."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from forebay import streams
from forebay._forebay import Engine, Model, Weight
from forebay.adapters import Source
from forebay.allocations import redirect_for
from forebay.conversions import refusing_conversions, refusing_loads
from forebay.converting import Dtypes
from forebay.engines import engine as engine_of
from forebay.engines import torch_device
from forebay.instance_methods import InstanceMethod
from forebay.lending import lend_in_forward, plain_tensor, restore, takes_loans
from forebay.parameter import ForebayParameter, ForebayTensor
from forebay.patching import Function, Patches, Rename, Target
from forebay.places import Place
from forebay.reclaiming import Reclaimer
from forebay.rerunning import Rerun, rerun_in_forward
from forebay.shadows import entries, shadow_in_forward
from forebay.small import small_of, small_parameter
from forebay.weights import ManagedWeight, Weights

_log = logging.getLogger("forebay")

# By the target's identity. A module keeps its attachment alive and goes with it.
_attached: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def attach(
    module: Any,
    device: str | torch.device | Engine | None = None,
    *,
    budget: float | None = None,
    headroom: float | None = None,
    page_size: int | None = None,
    small: int | None = None,
    whole: bool = False,
    prefetch: bool = False,
    lend: Sequence[type[nn.Module]] = (),
    dtype: Dtypes | None = None,
    scales: Mapping[str, torch.Tensor] | None = None,
    rerun: Rerun = True,
    name: str | None = None,
) -> Attachment:
    """Runs a model on a device whose memory may be far smaller than its weights.

    The module's parameters become stand-ins that report the device; their bytes stay where they are (read from the file
    where they are an unmodified part of a mapped one) and stream to the device as layers use them. Results are
    bit-identical to the plain module's on that device. For inference: the weights cannot be written or trained until
    :meth:`Attachment.detach`.

    Args:
        module: An ``nn.Module`` with its weights on the CPU; a pipeline with ``components`` (as in diffusers); a mapping
            or sequence of modules.
        device: ``"cuda"``, ``"cuda:N"``, ``"host"`` (the CPU with a budget of its own), a ``torch.device``, or an
            :class:`Engine`. Default: the current CUDA device where there is one, else ``"host"``.
        budget: Bytes that the weights of all models on this device may take together. Default: what is free.
        headroom: Bytes to keep free for everyone else instead (default 512 MiB).
        page_size: Bytes a page: a power of two from 2 MiB up. Default: 1/64 of the weights, between 2 and 64 MiB.
        small: Weights below this many bytes (default 64 KiB) stay on the device as ordinary tensors.
        whole: Whether a weight is to be resident with all of its pages or with none, where that can be: for who makes something
            of weights that lasts as long as they are there. Otherwise single pages are spread, which evens out better.
        prefetch: Whether a forward comes at once: weights are read from the moment on at which their places are known. See
            :meth:`Attachment.prefetch`.
        lend: Module classes whose weights are to be lent as plain tensors for the length of their ``forward``, as
            ``nn.MultiheadAttention``'s are: for kernels that take raw pointers.
        dtype: The dtype to use weights in: float32, float16 or bfloat16. Those stored in another one of these, or in
            float8 (``e4m3fn``, ``e5m2``), are converted on the device while they are filled, as
            ``weight.to(torch.float32).to(dtype)`` does. Or a mapping with the names of weights or of modules above them.
            Buffers stay as they are, and so does ``state_dict()``. Default: as stored.
        scales: What converted weights are multiplied with, in float32: one number, or one for each row, under the name of
            the weight with ``_scale`` behind it, or with ``scale_weight`` in place of ``weight``. The state dict of a
            checkpoint that has such tensors will do.
        rerun: Whether a forward that ran out of device memory is run once more with all weights gone, where it cannot have
            changed what it was given; ``"always"``: also where it was given tensors made under
            ``torch.inference_mode``, of which that cannot be told.
        name: The model's name in reports. Default: its class.

    Returns:
        The attachment: a context manager that detaches at its end.

    Raises:
        TypeError: Where there is no module.
        ValueError: For a weight that has no bytes (meta), is on another device already, or is attached already; for
            a budget that is no number of bytes or below one page; for a conversion or scale that cannot be.
        OutOfMemoryError: Where not even the small weights fit.
        DeviceError: Where the device is missing.
    """
    modules = _modules_of(module, name)
    chosen = engine_of(device, budget=budget, headroom=headroom)
    redirect_for(chosen)
    attachment = Attachment(module, chosen)
    try:
        with torch.inference_mode(False), _without_collections():
            for label, root in modules:
                weights = Weights(label, root, attachment._stand_ins, dtype, scales)
                attachment._add(label, root, weights, page_size, small, whole, prefetch, tuple(lend), rerun)
    except BaseException:
        attachment.detach()
        raise
    with _lock:
        _attached[id(module)] = attachment
    return attachment


@contextmanager
def _without_collections() -> Iterator[None]:
    """Some 26 objects are made for each weight, of which none is garbage: enough to have the collector look at everything
    there is in the middle of it, which takes 250 ms in a process like ComfyUI's.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def detach(module: Any, keep: bool = False) -> None:
    """Undoes :func:`attach`: the module's parameters are what they were.

    Args:
        module: What was given to ``attach``.
        keep: As for :meth:`Attachment.detach`.

    Raises:
        ValueError: Where it is not attached.
    """
    with _lock:
        attachment = _attached.get(id(module))
    if attachment is None:
        raise ValueError(f"not attached: {type(module).__name__}")
    attachment.detach(keep)


class Attachment:
    """What :func:`attach` returns."""

    def __init__(self, target: Any, engine: Engine) -> None:
        self._target = target
        self._engine = engine
        self._models: list[Model] = []
        self._undo: list[Callable[[], None]] = []
        self._small: list[tuple[str, nn.Parameter]] = []
        self._stand_ins: set[int] = set()
        self._patches = Patches(self.device)

    @property
    def engine(self) -> Engine:
        """The engine of the device."""
        return self._engine

    @property
    def device(self) -> torch.device:
        """The device that the weights report."""
        return torch_device(self._engine)

    @property
    def models(self) -> Sequence[Model]:
        """One model for each module attached."""
        return tuple(self._models)

    def detach(self, keep: bool = False) -> None:
        """Puts the module's parameters back and gives the memory up as soon as nothing uses it. Idempotent.

        Args:
            keep: Leave on the device what nobody else needs: attaching the same files under the same name again finds it.
                It is the first memory that is taken for other models, and by ``make_room`` and ``headroom``. For models
                whose weights are all in files, as they are stored; others are detached as usual. ``engine.clear_parked()`` ends it.
        """
        with _lock:
            if _attached.get(id(self._target)) is self:
                del _attached[id(self._target)]
        written = [name for name, parameter in self._small if parameter._version > 0]
        if written:
            _log.warning(
                "small weights were written to while attached, and are what they were: %s", ", ".join(written)
            )
        # Small weights stay as they are on the device, where the next attachment would find them so.
        keep = keep and not written and not self._patches.is_any()
        self._small.clear()
        self._patches.clear()
        while self._undo:
            self._undo.pop()()
        for model in self._models:
            if keep:
                model.park()
            else:
                model.detach()
        self._models.clear()

    def set_loras(
        self,
        loras: Iterable[tuple[Source, float]],
        *,
        strict: bool = True,
        rename: Rename | None = None,
    ) -> None:
        """Adds adapters (LoRA) to the weights, in place of those that were set before.

        They are added on the device whenever a page is filled, in float32 and rounded once to the weight's dtype, so the
        weights are what merging on the CPU gives, whatever is resident. Only weights whose adapters change are filled
        again; those that had none get theirs where they are. Stored weights stay as they are: ``state_dict()`` does not
        see adapters. Uses that begin after this returned see all of it; do not run the model meanwhile on other threads if
        that matters. A table with an adapter (an embedding) is used as a whole, and a model with adapters is not kept by
        ``detach(keep=True)``.

        Args:
            loras: Pairs of a file (``.safetensors``, or what ``torch.load`` reads) or state dict, and a strength. The
                formats of diffusers and peft (``lora_A``, ``lora_B``), kohya (``lora_unet_..._lora_down``, ``alpha``) and
                ComfyUI (``diffusion_model.``). None: an empty sequence.
            strict: Whether an adapter for no attached weight is an error; otherwise it is logged.
            rename: Gives a file's name of a module (without ``.lora_A.weight``) the model's, or a pair of that and the
                rows where it is a part of a fused weight: a mapping or a callable. What it does not know is found by name.

        Raises:
            ValueError: For formats that are no products of low rank (DoRA, LoHa, LoKr: see :meth:`set_patch`), adapters
                that do not fit, and adapters for no weight. Nothing has changed then.
            SourceError: Where a file cannot be read. Nothing has changed then.
            ForebayError: Where a view of a weight holds it as it was for longer than a second. The adapters are set then;
                the weights named change when their views go, and cannot be used before.
        """
        self._patches.set_loras(loras, strict=strict, rename=rename)

    def set_patch(self, name: str | Mapping[str, Function | None], patch: Function | None = None) -> None:
        """Has a weight computed from what is stored, whatever the computation: for adapters that are no products of low rank.

        The callable gets the whole weight as a tensor on the device, which it may write to, and gives one of the same
        shape and dtype. It is called on a thread of its own, without gradients, whenever pages of the weight are filled,
        once for those that are filled around the same time: it should give the same every time, and must not use the
        weights of this attachment. Adapters of :meth:`set_loras` are added to what it gives. The memory that it takes is
        not part of the budget.

        A :class:`forebay.low_rank.LowRank` is a callable that the device need not call: it adds the products as a page is
        filled, in the same arithmetic. A :class:`forebay.eight_bits.EightBitPatch` likewise, for weights of float8.

        Args:
            name: The weight's name in its module (``blocks.0.attn.weight``), in a pipeline with the part before it where
                several have such a weight; or a mapping of names to callables.
            patch: The callable, or ``None`` for the weight as it is stored.

        Raises:
            ValueError: Where there is no such weight, or several.
            ForebayError: As for :meth:`set_loras`. An exception in the callable becomes one of the weight's use.
        """
        self._patches.set_functions(name if isinstance(name, Mapping) else {name: patch})

    def prioritize(self) -> None:
        """To the top of the priorities, as using the model does."""
        for model in self._models:
            model.prioritize()

    def prefetch(self) -> None:
        """Begins to read weights ahead of a forward that will come, as using the model does. Returns at once.

        They are read in the order in which they will be used as far as that is known, else in that of the module, as far as
        there is memory for them. Of several modules the first is read.
        """
        for model in self._models[:1]:
            model.prefetch()

    def deprioritize(self) -> None:
        """To the bottom of the priorities: this model's memory is taken first."""
        for model in self._models:
            model.deprioritize()

    def stats(self) -> list[dict[str, Any]]:
        """What was moved and who waited, a dict for each module; the keys are those of :func:`forebay.stats`."""
        return [model.stats() for model in self._models]

    def memory_summary(self) -> str:
        """What is where on the device, as a table a person reads."""
        return self._engine.summary()

    def page_map(self) -> dict[str, str]:
        """For each module one character a page: ``R`` resident, ``S`` streamed and backed now, ``.`` absent."""
        return {model.name: model.page_map() for model in self._models}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        names = ", ".join(model.name for model in self._models) or "detached"
        return f"<forebay.Attachment {names} on {self._engine.device}>"

    def _add(
        self,
        label: str,
        root: nn.Module,
        weights: Weights,
        page_size: int | None,
        small: int | None,
        whole: bool,
        prefetch: bool,
        lend: tuple[type[nn.Module], ...],
        rerun: Rerun,
    ) -> None:
        conversions = weights.conversions(self.device)
        model = self._engine.attach(
            label,
            weights.specs(),
            page_size=page_size,
            small=small,
            conversions=conversions,
            whole=whole,
        )
        self._models.append(model)
        streams.follow_current(model, self.device)
        if prefetch:
            self.prefetch()
        for index, weight in enumerate(weights.managed):
            always_there = self._replace(model.weight(index), weight)
            target = Target(label, weight.names, model, index, weight.source, weight.conversion, always_there)
            self._patches.add(target)
        moved = _Moved(self.device)
        for place, parameter in weights.others:
            self._set(place, moved.parameter(parameter))
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = moved.tensor(buffer)
                    self._undo.append(functools.partial(moved.put_back, module, name, buffer))
        self._install_methods(
            root, {id(place.owner) for weight in weights.managed for place in weight.places}, lend
        )
        before, after = shadow_in_forward(model, root, lend, self.device)
        self._undo[:0] = after
        self._undo.extend(reversed(before))
        # Around what lends: whoever runs out of memory gives that back as well.
        self._undo.extend(rerun_in_forward(self._engine, [root, *entries(root, lend)], self.device, rerun))
        if self.device.type == "cuda":
            reclaimer = Reclaimer(self._engine, model, root)
            self._undo.append(InstanceMethod(root, "forward", reclaimer.run).remove)

    def _replace(self, weight: Weight, found: ManagedWeight) -> nn.Parameter | None:
        """Puts a stand-in in a weight's places. A small weight's parameter."""
        source = found.source
        weight.set_viewer(
            functools.partial(plain_tensor, dtype=found.dtype, size=source.size(), stride=source.stride())
        )
        stand_in: torch.Tensor
        small = None
        if weight.is_small:
            stand_in = small = small_parameter(weight, source, found.conversion)
            self._small.append((weight.name, small))
        else:
            stand_in = ForebayParameter(weight, source, self.device, found.is_table, found.conversion)
        for name, noted in found.parameter.__dict__.items():
            # By applications.
            stand_in.__dict__.setdefault(name, noted)
        self._stand_ins.add(id(stand_in))
        for place in found.places:
            self._set(place, stand_in)
        return small

    def _set(self, place: Place, stand_in: torch.Tensor) -> None:
        original = place.get()
        if stand_in is not original:
            self._undo.append(functools.partial(restore, place, stand_in, original))
            place.put(stand_in)

    def _install_methods(self, root: nn.Module, holders: set[int], lend: tuple[type[nn.Module], ...]) -> None:
        above: dict[int, bool] = {}
        for module in root.modules():
            if module is root or _is_above(module, holders, above):
                self._install(module, "_apply", refusing_conversions)
                # A bound method: the module keeps its attachment.
                self._install(module, "load_state_dict", self._refuse_load)
            if id(module) in holders:
                self._install(module, "_save_to_state_dict", _save_sources)
            if isinstance(module, nn.RNNBase) and id(module) in holders:
                self._install(module, "flatten_parameters", _leave_as_is)
            if takes_loans(module, lend):
                self._undo.append(lend_in_forward(module).remove)

    def _install(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._undo.append(InstanceMethod(module, name, function).remove)

    def _refuse_load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return refusing_loads(original, *args, **kwargs)


def _modules_of(target: Any, name: str | None) -> list[tuple[str, nn.Module]]:
    if isinstance(target, nn.Module):
        return [(name or type(target).__name__, target)]
    parts: Iterable[tuple[str, Any]]
    if isinstance(getattr(target, "components", None), Mapping):
        parts = target.components.items()
    elif isinstance(target, Mapping):
        parts = target.items()
    elif isinstance(target, Sequence) and not isinstance(target, str):
        parts = ((f"{i}.{type(part).__name__}", part) for i, part in enumerate(target))
    else:
        parts = ()
    found = {id(part): (key, part) for key, part in parts if isinstance(part, nn.Module)}
    modules = [(f"{name}.{key}" if name else str(key), part) for key, part in found.values()]
    if not modules:
        raise TypeError(
            "attach takes an nn.Module, a pipeline with components, or a mapping or sequence of modules: "
            f"{type(target).__name__}"
        )
    return modules


class _Moved:
    """Tensors moved to the device as they are. What is shared stays shared."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def tensor(self, original: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if id(original) not in self._moved:
            moved = original.to(self._device)
            self._moved[id(original)] = (original, moved, moved._version)
        return self._moved[id(original)][1]

    def parameter(self, original: torch.Tensor) -> torch.Tensor:
        """The parameter on the device, of the same type."""
        if original.device == self._device:
            return original
        moved = self.tensor(original)
        if not isinstance(moved, nn.Parameter):
            if type(moved) is torch.Tensor:
                # As nn.Parameter makes itself, so that a subclass of it stays one.
                moved = torch.Tensor._make_subclass(type(original), moved, original.requires_grad)
                moved.__dict__.update(original.__dict__)
            else:
                moved = nn.Parameter(moved, original.requires_grad)
            self._moved[id(original)] = (original, moved, moved._version)
        return moved

    def put_back(self, module: nn.Module, name: str, original: torch.Tensor) -> None:
        """Puts a buffer back, with what was written to it since. Another one that stands there moves back as well."""
        _, moved, version = self._moved[id(original)]
        buffer = module._buffers.get(name)
        if buffer is moved and moved._version == version:
            module._buffers[name] = original
        elif buffer is not None:
            module._buffers[name] = buffer.to(original.device)


def _save_sources(
    original: Callable[..., Any], destination: dict[str, Any], prefix: str, keep_vars: bool, *args: Any
) -> None:
    """A state dict holds the sources themselves: nothing is copied, and saving it reads no device."""
    original(destination, prefix, keep_vars, *args)
    if keep_vars:
        return
    module: nn.Module = original.__self__  # type: ignore[attr-defined]
    for name, parameter in module._parameters.items():
        managed = parameter if isinstance(parameter, ForebayTensor) else small_of(parameter)
        if managed is not None and prefix + name in destination:
            destination[prefix + name] = managed._source


def _is_above(module: nn.Module, holders: set[int], known: dict[int, bool]) -> bool:
    """Whether a module is one of these, or has one below it. Each is looked at once."""
    found = known.get(id(module))
    if found is None:
        below = [_is_above(child, holders, known) for child in module._modules.values() if child is not None]
        found = known[id(module)] = id(module) in holders or any(below)
    return found


def _leave_as_is(original: Callable[..., Any]) -> None:
    """In place of ``flatten_parameters``: weights have their places in memory."""


__all__ = ["Attachment", "attach", "detach"]

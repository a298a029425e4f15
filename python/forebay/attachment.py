"""Attaching modules: every weight gets one device address for life."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from forebay._forebay import Engine, Model, Weight
from forebay.allocations import redirect_for
from forebay.conversions import refusing_conversions, refusing_loads
from forebay.engines import engine as engine_of
from forebay.engines import torch_device
from forebay.instance_methods import InstanceMethod
from forebay.lending import lend_in_forward, plain_tensor, restore, takes_loans
from forebay.parameter import ForebayParameter, ForebayTensor
from forebay.places import Place
from forebay.reclaiming import Reclaimer
from forebay.rerunning import Rerun, rerun_in_forward
from forebay.shadows import entries, shadow_in_forward
from forebay.small import small_of, small_parameter

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
    lend: Sequence[type[nn.Module]] = (),
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
        page_size: Bytes a page: a power of two from 2 MiB up. Default: 1/64 of the weights, between 2 and 32 MiB.
        small: Weights below this many bytes (default 64 KiB) stay on the device as ordinary tensors.
        lend: Module classes whose weights are to be lent as plain tensors for the length of their ``forward``, as
            ``nn.MultiheadAttention``'s are: for kernels that take raw pointers.
        rerun: Whether a forward that ran out of device memory is run once more with all weights gone, where it cannot have
            changed what it was given; ``"always"``: also where it was given tensors made under
            ``torch.inference_mode``, of which that cannot be told.
        name: The model's name in reports. Default: its class.

    Returns:
        The attachment: a context manager that detaches at its end.

    Raises:
        TypeError: Where there is no module.
        ValueError: For a weight that has no bytes (meta), is on another device already, or is attached already; for
            a budget that is no number of bytes or below one page.
        OutOfMemoryError: Where not even the small weights fit.
        DeviceError: Where the device is missing.
    """
    modules = _modules_of(module, name)
    chosen = engine_of(device, budget=budget, headroom=headroom)
    redirect_for(chosen)
    attachment = Attachment(module, chosen)
    try:
        with torch.inference_mode(False):
            for label, root in modules:
                attachment._add(label, root, page_size, small, tuple(lend), rerun)
    except BaseException:
        attachment.detach()
        raise
    with _lock:
        _attached[id(module)] = attachment
    return attachment


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
                whose weights are all in files; others are detached as usual. ``engine.clear_parked()`` ends it.
        """
        with _lock:
            if _attached.get(id(self._target)) is self:
                del _attached[id(self._target)]
        written = [name for name, parameter in self._small if parameter._version > 0]
        if written:
            _log.warning(
                "small weights were written to while attached, and are what they were: %s", ", ".join(written)
            )
        self._small.clear()
        while self._undo:
            self._undo.pop()()
        for model in self._models:
            if keep:
                model.park()
            else:
                model.detach()
        self._models.clear()

    def prioritize(self) -> None:
        """To the top of the priorities, as using the model does."""
        for model in self._models:
            model.prioritize()

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
        page_size: int | None,
        small: int | None,
        lend: tuple[type[nn.Module], ...],
        rerun: Rerun,
    ) -> None:
        weights = _Weights(label, root, self._stand_ins)
        model = self._engine.attach(label, weights.specs(), page_size=page_size, small=small)
        self._models.append(model)
        if self.device.type == "cuda":
            model.set_stream_source(functools.partial(torch._C._cuda_getCurrentRawStream, self.device.index))
        for index, weight in enumerate(weights.managed):
            self._replace(model.weight(index), weight)
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
            reclaimer = Reclaimer(self._engine, model)
            self._undo.append(InstanceMethod(root, "forward", reclaimer.run).remove)

    def _replace(self, weight: Weight, found: _Weight) -> None:
        source = found.source
        weight.set_viewer(
            functools.partial(plain_tensor, dtype=source.dtype, size=source.size(), stride=source.stride())
        )
        stand_in: torch.Tensor
        if weight.is_small:
            stand_in = small_parameter(weight, source)
            self._small.append((weight.name, stand_in))
        else:
            stand_in = ForebayParameter(weight, source, self.device, found.is_table)
        # What applications have noted on the parameter.
        stand_in.__dict__.update({**found.parameter.__dict__, **stand_in.__dict__})
        self._stand_ins.add(id(stand_in))
        for place in found.places:
            self._set(place, stand_in)

    def _set(self, place: Place, stand_in: torch.Tensor) -> None:
        original = place.get()
        if stand_in is not original:
            self._undo.append(functools.partial(restore, place, stand_in, original))
            place.put(stand_in)

    def _install_methods(self, root: nn.Module, holders: set[int], lend: tuple[type[nn.Module], ...]) -> None:
        for module in root.modules():
            if module is root or any(id(child) in holders for child in module.modules()):
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


class _Weight:
    """A parameter to be managed and the places that hold it."""

    def __init__(self, name: str, parameter: torch.Tensor) -> None:
        self.name = name
        self.parameter = parameter
        self.source = parameter.detach()
        self.places: list[Place] = []

    @property
    def is_table(self) -> bool:
        """Whether only embeddings use it, so that rows can be looked up."""
        owners = [place.owner for place in self.places]
        embeddings = all(isinstance(owner, nn.Embedding) and owner.max_norm is None for owner in owners)
        return embeddings and self.source.ndim == 2 and self.source.is_contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last, by the strides."""
        spans = zip(self.source.size(), self.source.stride(), strict=True)
        return (1 + sum((size - 1) * stride for size, stride in spans)) * self.source.element_size()


class _Weights:
    """The parameters of a module: those to be managed, and the others, which move to the device as they are."""

    def __init__(self, label: str, root: nn.Module, known_stand_ins: set[int]) -> None:
        self.managed: list[_Weight] = []
        self.others: list[tuple[Place, torch.Tensor]] = []
        known: dict[tuple[Any, ...], _Weight] = {}
        for prefix, owner in root.named_modules():
            for name, parameter in owner._parameters.items():
                # Parts of a pipeline may share modules.
                if parameter is None or id(parameter) in known_stand_ins:
                    continue
                place, path = Place(owner, name), f"{prefix}.{name}" if prefix else name
                _check(label, path, parameter)
                if not _is_plain(parameter):
                    self.others.append((place, parameter))
                    continue
                weight = known.get(_identity(parameter))
                if weight is None:
                    weight = known[_identity(parameter)] = _Weight(path, parameter)
                    self.managed.append(weight)
                weight.places.append(place)

    def specs(self) -> list[tuple[str, int, int, object, bool]]:
        """As the engine takes them."""
        return [
            (weight.name, weight.source.data_ptr(), weight.nbytes, weight.source, weight.is_table)
            for weight in self.managed
        ]


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


def _check(label: str, path: str, parameter: torch.Tensor) -> None:
    if isinstance(parameter, ForebayTensor) or small_of(parameter):
        raise ValueError(f"is attached already; detach() it first: {path} of {label}")
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"is not initialized; run the module once before attach: {path} of {label}")
    if parameter.is_meta:
        raise ValueError(f"has no bytes (meta device); load the weights before attach: {path} of {label}")
    if parameter.device.type != "cpu":
        raise ValueError(
            f"is on {parameter.device} already; attach takes models whose weights are on the CPU, where their bytes "
            f"can stay: {path} of {label}"
        )


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether the parameter is a strided tensor of its own storage, without a subclass's meaning in it."""
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is torch.Tensor
        and parameter.layout is torch.strided
        and parameter.numel() > 0
        and not parameter.is_conj()
        and not parameter.is_neg()
        and not parameter.is_quantized
    )


def _identity(parameter: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tied parameters."""
    return (parameter.data_ptr(), parameter.dtype, parameter.size(), parameter.stride())


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


def _leave_as_is(original: Callable[..., Any]) -> None:
    """In place of ``flatten_parameters``: weights have their places in memory."""


__all__ = ["Attachment", "attach", "detach"]

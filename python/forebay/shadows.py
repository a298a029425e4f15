"""Models that fit run at plain torch's speed: their forwards see plain tensors.

Where everything a model uses is resident, its weights are lent as a whole. While the model runs, plain tensors stand in
the ``__dict__`` of its modules, where Python looks before ``_parameters``: no call is intercepted, and everybody who
looks into ``_parameters`` (``parameters()``, ``state_dict()``) finds the stand-ins. The engine can have the weights back
at any moment; the forward then goes on with stand-ins.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from forebay import streams
from forebay._forebay import Model, Scope, Shadows, Weight, close_recalls, open_recalls, serve_recalls
from forebay.instance_methods import InstanceMethod
from forebay.lending import takes_loans
from forebay.parameter import ForebayTensor
from forebay.small import small_of

_own = frozenset({"_weight", "_source", "_lookup", "_conversion"})
"""What a stand-in has in its ``__dict__`` beside what applications noted there."""

_PRIORITIES = range(0, -4, -1)
"""Of the streams that torch hands out. A forward may use them without a call that tells."""

_lock = threading.Lock()
_server: threading.Thread | None = None


def shadow_in_forward(
    model: Model, root: nn.Module, lend: tuple[type[nn.Module], ...], device: torch.device
) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
    """From now on lends a model's weights for the length of its forwards, whenever all it uses is resident.

    Args:
        model: The model in the engine.
        root: The module it was made of, its stand-ins in place.
        lend: Further module classes that are lent to in another way.
        device: The device of the weights.

    Returns:
        What undoes it: before the stand-ins are taken away, and after.
    """
    owners = list(_owners(root, lend))
    weights: dict[int, tuple[Weight, torch.Tensor]] = {}
    places: list[tuple[dict[str, Any], dict[str, Any], str, int]] = []
    number_of: dict[int, int] = {}
    places_of: dict[int, list[int]] = {}
    before: list[Callable[[], None]] = []
    after: list[Callable[[], None]] = []
    for owner in owners:
        watched = WatchedParameters(owner)
        before.append(InstanceMethod(owner, "__reduce_ex__", _reduced_without).remove)
        # Last: a shallow copy of the module has this very dict, and finds the originals in it.
        after.append(watched.remove)
        for name, parameter in watched.items():
            weight = _weight_of(parameter)
            if weight is not None:
                weights.setdefault(id(parameter), (weight, parameter))
                number = number_of.setdefault(id(parameter), len(number_of))
                places_of.setdefault(id(owner), []).append(len(places))
                places.append((owner.__dict__, watched, name, number))
    if not places:
        return before, after
    _serve_recalls()
    all_streams = (
        functools.partial(streams.handed_out, device, _PRIORITIES) if device.type == "cuda" else None
    )
    shadows = Shadows(model, list(weights.values()), places, _parameter, all_streams)
    scope = shadows.scope(0, list(range(len(places))), None)
    scopes: list[tuple[nn.Module, Scope]] = [(root, scope)]
    for number, child in enumerate(entries(root, lend), start=1):
        below = [place for module in child.modules() for place in places_of.get(id(module), ())]
        if below:
            scopes.append((child, shadows.scope(number, below, scope)))
    before.extend(InstanceMethod(module, "forward", scope.run).remove for module, scope in scopes)
    return [shadows.close, *before], after


class WatchedParameters(dict[str, Any]):
    """A module's ``_parameters``. What is changed in here is seen at once, also where a plain tensor stands before it."""

    def __init__(self, module: nn.Module) -> None:
        """Takes the place of the module's own until :meth:`remove`."""
        self._module_dict = module.__dict__
        self._replaced = module._parameters
        super().__init__(self._replaced)
        self._module_dict["_parameters"] = self

    def remove(self) -> None:
        """Puts the module's own dict back, with what is in this one now."""
        self._replaced.clear()
        self._replaced.update(self)
        if self._module_dict.get("_parameters") is self:
            self._module_dict["_parameters"] = self._replaced

    def __setitem__(self, name: str, parameter: Any) -> None:
        super().__setitem__(name, parameter)
        self._module_dict.pop(name, None)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._module_dict.pop(name, None)

    def pop(self, name: str, *default: Any) -> Any:
        """As a dict's."""
        found = super().pop(name, *default)
        self._module_dict.pop(name, None)
        return found

    def popitem(self) -> tuple[str, Any]:
        """As a dict's."""
        name, found = super().popitem()
        self._module_dict.pop(name, None)
        return name, found

    def clear(self) -> None:
        """As a dict's."""
        while self:
            self.popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As a dict's."""
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's."""
        for name, parameter in dict(*args, **kwargs).items():
            self[name] = parameter

    def __ior__(self, other: Any) -> WatchedParameters:  # type: ignore[override, misc]
        self.update(other)
        return self

    def copy(self) -> dict[str, Any]:
        """As a dict's: nobody watches the copy."""
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (type(self._replaced), (), None, None, iter(self.items()))


def _owners(root: nn.Module, lend: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The modules whose own parameters are shadowed, each once.

    Not those that are lent to in another way, which must see plain tensors for the whole of their forward, nor recurrent
    ones, which keep lists of their parameters.
    """
    for module in _outside_loans(root, lend):
        is_plain = type(module.__dict__.get("_parameters")) in (dict, OrderedDict)
        if (
            is_plain
            and not isinstance(module, nn.RNNBase)
            and any(map(_weight_of, module._parameters.values()))
        ):
            yield module


def _weight_of(parameter: torch.Tensor | None) -> Weight | None:
    """The weight of a stand-in, or of a small weight's parameter, which is its own shadow."""
    if isinstance(parameter, ForebayTensor):
        return parameter._weight
    small = small_of(parameter)
    return None if small is None else small._weight


def _outside_loans(root: nn.Module, lend: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """A module and those below it, each once, but for what is lent to and all below that."""
    seen: set[int] = set()
    rest: list[nn.Module | None] = [root]
    while rest:
        module = rest.pop()
        if module is None or id(module) in seen or takes_loans(module, lend):
            continue
        seen.add(id(module))
        yield module
        rest.extend(reversed(module._modules.values()))


def entries(root: nn.Module, lend: tuple[type[nn.Module], ...]) -> Iterable[nn.Module]:
    """The parts that are called without the whole, as an autoencoder's are. Single layers are not worth it."""
    for child in root.children():
        has_parts = any(True for _ in child.children())
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if has_parts and not is_list and not takes_loans(child, lend):
            yield child


def _parameter(tensor: torch.Tensor, stand_in: torch.Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        parameter = nn.Parameter(tensor, requires_grad=False)
    noted = {name: value for name, value in stand_in.__dict__.items() if name not in _own}
    if noted:
        parameter.__dict__.update(noted)
    return parameter


def _reduced_without(original: Callable[..., Any], *args: Any) -> Any:
    """In place of ``__reduce_ex__``: a copy or pickle of a module that runs has no plain tensors before its parameters."""
    reduced = original(*args)
    if len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    state = dict(reduced[2])
    for name in [*state.get("_parameters", ()), "__reduce_ex__"]:
        state.pop(name, None)
    return (*reduced[:2], state, *reduced[3:])


def _serve_recalls() -> None:
    """Starts the thread that gives weights back when the engine asks for them."""
    global _server
    with _lock:
        if _server is None:
            open_recalls()
            _server = threading.Thread(target=serve_recalls, name="forebay-recall", daemon=True)
            _server.start()
            atexit.register(_stop_serving, _server)


def _stop_serving(server: threading.Thread) -> None:
    close_recalls()
    server.join(1.0)

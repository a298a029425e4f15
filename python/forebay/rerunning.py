"""A forward that ran out of device memory is run once more, with all weights out of its way.

This is what is left where memory could not be made before the allocation (``allocations.py``): expandable segments, other
builds of torch, allocations that only fit once torch's own cache is empty. It is done where it is safe, which is decided
from what the forward was given, not from what it does:

* In evaluation, where no gradient is recorded.
* Random numbers are drawn again from the same states: torch's default generators and those among the arguments. A part of a
  module that runs is run again by itself where nobody drew from the default ones since the whole began; else the whole is.
* Lists and dicts among the arguments are put back as they were. Tensors that were written to are not: torch counts writes, and
  then the error is raised. It counts none to tensors made under ``torch.inference_mode``; a forward that is given one
  is run again only with ``rerun="always"``.
* Any other object (a cache that the forward appends to) may have been changed: the error is raised.

What a module keeps in attributes of its own from one call to the next is not looked at.
"""

from __future__ import annotations

import enum
import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from forebay._forebay import Engine, ForebayError, OutOfMemoryError, begin_forward, end_forward, is_ending
from forebay.capturing import refuse_capture
from forebay.instance_methods import InstanceMethod
from forebay.shortage import Shortage, empty_cache

Rerun = bool | Literal["always"]

_MARK = "shortage"
_IMMUTABLE = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum, range, slice,
)  # fmt: skip
_ERRORS = (torch.OutOfMemoryError, OutOfMemoryError)


def rerun_in_forward(
    engine: Engine, modules: Iterable[nn.Module], device: torch.device, rerun: Rerun
) -> list[Callable[[], None]]:
    """From now on runs the forwards of these modules once more when they run out of memory. What undoes it."""
    if rerun is False:
        return []
    running = _Running()
    return [
        InstanceMethod(
            module, "forward", _Boundary(engine, module, device, rerun == "always", running).run
        ).remove
        for module in modules
    ]


class _Running(threading.local):
    """What a thread runs of one attachment."""

    drawn_from: _Generators | None = None
    """As they were when the outermost forward began."""


class _Boundary:
    """Around the forward of a module."""

    def __init__(
        self, engine: Engine, module: nn.Module, device: torch.device, always: bool, running: _Running
    ) -> None:
        self._engine = engine
        self._module = module
        self._device = device
        self._always = always
        self._running = running

    def run(self, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """In place of a ``forward``."""
        if self._device.type == "cuda":
            refuse_capture(self._module)
        if torch.compiler.is_dynamo_compiling():
            # This is left to Python: generators' states are not compiled. What is called here is.
            return self._run(original, _Before(args, kwargs, _Generators(self._device)), args, kwargs)
        running = self._running
        if running.drawn_from is not None:
            return self._run(original, _Before(args, kwargs), args, kwargs)
        begin_forward()
        try:
            running.drawn_from = _Generators(self._device)
            return self._run(original, _Before(args, kwargs, running.drawn_from), args, kwargs)
        except ForebayError as error:
            if is_ending():
                # What its frames hold is freed before the end of the process goes on.
                error.__traceback__ = None
            raise
        finally:
            running.drawn_from = None
            end_forward()

    def _run(
        self, original: Callable[..., Any], before: _Before, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return original(*args, **kwargs)
        except _ERRORS as error:
            if hasattr(error, _MARK):
                raise  # from a part of this module, which was run again already
            reason = self._why_not(before)
            if reason is not None:
                _note(error, f"forebay: this was not run again with all weights gone, because {reason}")
                raise
            failed = error
        # The frames of what failed hold its tensors.
        failed.__traceback__ = failed.__context__ = None
        del failed
        gc.collect()
        before.restore()
        with self._engine.squeeze():
            empty_cache(self._engine.device)
            try:
                return original(*args, **kwargs)
            except _ERRORS as error:
                if hasattr(error, _MARK):
                    raise
                shortage = Shortage.of(self._engine, error)
                error.shortage = shortage  # type: ignore[union-attr]
                _note(error, str(shortage))
                raise

    def _why_not(self, before: _Before) -> str | None:
        drawn_from = self._running.drawn_from
        if before.generators is None and drawn_from is not None and drawn_from.have_changed():
            return (
                "random numbers were drawn since the whole began, which is run again instead where it can be"
            )
        if self._module.training:
            return "the module is in training mode, where a forward may change what it keeps; call eval()"
        if torch.is_grad_enabled() and before.requires_grad():
            return "gradients are recorded; use torch.no_grad()"
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the stream is being captured"
        if before.opaque is not None:
            return f"it was given an object that it may have changed: {before.opaque}"
        if before.was_written():
            return "it wrote to a tensor that it was given"
        if before.uncounted and not self._always:
            return (
                "it was given tensors made under torch.inference_mode, to which torch counts no writes; "
                'use torch.no_grad(), or attach(..., rerun="always") where it does not write to its arguments'
            )
        return None


class _Generators:
    """The states of torch's default generators, as they are now."""

    __slots__ = ("_states",)

    def __init__(self, device: torch.device) -> None:
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [(generator, generator.get_state()) for generator in generators]

    def have_changed(self) -> bool:
        """Whether somebody drew from them since."""
        return any(not torch.equal(generator.get_state(), state) for generator, state in self._states)

    def restore(self) -> None:
        """Puts them back."""
        for generator, state in self._states:
            generator.set_state(state)


class _Before:
    """What a forward was given, as it was before."""

    __slots__ = ("_containers", "_given", "_tensors", "generators", "opaque", "uncounted")

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], generators: _Generators | None = None
    ) -> None:
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._given: list[tuple[torch.Generator, torch.Tensor]] = []
        self.generators = generators
        self.opaque: str | None = None
        self.uncounted = False
        for value in args:
            self._take(value)
        for value in kwargs.values():
            self._take(value)

    def _take(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_inference():
                self.uncounted = True
            else:
                self._tensors.append((value, value._version))
        elif isinstance(value, _IMMUTABLE):
            pass
        elif isinstance(value, tuple):
            for item in value:
                self._take(item)
        elif type(value) in (list, dict):
            self._containers.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                self._take(item)
        elif isinstance(value, torch.Generator):
            self._given.append((value, value.get_state()))
        else:
            self.opaque = type(value).__name__

    def requires_grad(self) -> bool:
        """Whether a gradient is wanted of anything that was given."""
        return any(tensor.requires_grad for tensor, _ in self._tensors)

    def was_written(self) -> bool:
        """Whether torch counted a write to anything that was given."""
        return any(tensor._version != version for tensor, version in self._tensors)

    def restore(self) -> None:
        """Puts back what can be."""
        if self.generators is not None:
            self.generators.restore()
        for generator, state in self._given:
            generator.set_state(state)
        for container, copy in self._containers:
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # Python 3.10, where nothing prints notes
        error.args = (f"{error}\n{text}",)

"""Stand-ins for managed weights.

A stand-in is a tensor without storage that reports the weight's device, dtype, shape and strides. Every torch function
called with one acquires the weight, runs on the plain tensor at its address and releases it. A result that shares the
weight's memory keeps the weight pinned as long as it lives. So no code path touches an address without memory behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from forebay._forebay import (
    ForebayError,
    Weight,
    intercept,
    run,
    set_interception,
    set_managed_types,
)
from forebay.converting import Conversion
from forebay.functions import (
    CONVERSIONS,
    DETACHED,
    FROM_SOURCE,
    HIDDEN_WRITES,
    METADATA,
    PURE,
    RAW,
    SETTERS,
    VIEWS,
    hidden_writes,
    writes_to_first,
)

_NO_ADDRESS = (
    "a managed weight has no address of its own: its memory is there only while an operation runs. Hand the weight to "
    "torch functions, or use forebay.lend(module) for code that takes raw pointers"
)


class ForebayTensor(torch.Tensor):
    """A stand-in for a managed weight. Made by :func:`forebay.attach`."""

    _weight: Weight
    _source: torch.Tensor
    _lookup: bool
    _conversion: Conversion | None

    @staticmethod
    def __new__(
        cls,
        weight: Weight,
        source: torch.Tensor,
        device: torch.device,
        lookup: bool,
        conversion: Conversion | None = None,
    ) -> ForebayTensor:
        self: ForebayTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            source.size(),
            strides=source.stride(),
            dtype=source.dtype if conversion is None else conversion.dtype,
            device=device,
            requires_grad=False,
        )
        self._weight = weight
        self._source = source
        self._lookup = lookup
        self._conversion = conversion
        with torch._C.DisableTorchFunctionSubclass():
            storage = torch.Tensor.untyped_storage(self)
            torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, f"{_NO_ADDRESS}: {weight.name}")
        return self

    __torch_function__: Any = classmethod(intercept)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The net for calls that come from C++, where ``__torch_function__`` is not asked."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return _another(args[0])
        if func is torch.ops.aten.embedding.default and _is_looked_up(args[0]):
            return _looked_up(args[1], args[0])
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for written in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(written, ForebayTensor):
                    raise _write_error(str(func), written)
        return run(func, args, kwargs, "checked")


class ForebayParameter(ForebayTensor):
    """A stand-in that is a parameter: ``isinstance(p, torch.nn.Parameter)`` holds."""

    _is_param = True


def _intercepted(
    func: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> Any:
    """Every call that :func:`intercept` does not run itself."""
    kwargs = kwargs or {}
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if torch._C._get_tracing_state() is not None:
        raise ForebayError(
            "a trace keeps addresses of weights, which are managed; trace the model before attach"
        )
    if func in HIDDEN_WRITES:
        for written in hidden_writes(func, args, kwargs):
            if isinstance(written, ForebayTensor):
                raise _write_error(func.__name__, written)
    if func is F.embedding:
        return _embedding(*args, **kwargs)
    if func in PURE and "out" not in kwargs:
        return run(func, args, kwargs, "views" if _is_kept_by_others(args, kwargs) else "pure")
    return _uncommon(func, args, kwargs)


def _another(weight: ForebayTensor) -> ForebayTensor:
    """Another stand-in for the same weight."""
    return ForebayTensor(weight._weight, weight._source, weight.device, weight._lookup, weight._conversion)


set_managed_types([ForebayTensor, ForebayParameter])
set_interception(PURE.difference(HIDDEN_WRITES, {F.embedding}), _intercepted)


def _uncommon(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(first, ForebayTensor):
        if func in DETACHED:
            return _another(first)
        if func in FROM_SOURCE:
            return _from_source(func, first, args, kwargs)
        if func in RAW:
            raise ForebayError(f"{_NO_ADDRESS}: {first._weight.name}")
        if func in SETTERS or func is torch.Tensor.requires_grad_:
            return _assign(func, first, *args[1:], **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func in CONVERSIONS and _changes_nothing(func, first, args, kwargs):
            return first
    written = [kwargs.get("out"), first if writes_to_first(func, kwargs) else None]
    for outs in written:
        for out in outs if isinstance(outs, (tuple, list)) else (outs,):
            if isinstance(out, ForebayTensor):
                raise _write_error(getattr(func, "__name__", str(func)), out)
    views = func in VIEWS or _is_kept_by_others(args, kwargs)
    return run(func, args, kwargs, "views" if views else "checked")


def _is_kept_by_others(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether somebody may keep the weight beyond the operation: autograd, a transform, or a mode that records."""
    if torch._C._len_torch_dispatch_stack():
        return True
    if not torch.is_grad_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    values = [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, (tuple, list)):
            values.extend(value)
        elif isinstance(value, torch.Tensor) and not isinstance(value, ForebayTensor) and value.requires_grad:
            return True
    return False


def _from_source(
    func: Callable[..., Any], weight: ForebayTensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    source = weight._source
    if weight._conversion is not None:
        source = weight._conversion.value(source)
    if func is torch.Tensor.__deepcopy__:
        memo = args[1] if len(args) > 1 else {}
        made: torch.Tensor = copy.deepcopy(source.detach(), memo)
        if isinstance(weight, ForebayParameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(weight)] = made
        return made
    if func is torch.Tensor.__reduce_ex__:
        is_parameter = isinstance(weight, ForebayParameter)
        plain: Any = torch.nn.Parameter(source, requires_grad=False) if is_parameter else source
        return plain.__reduce_ex__(*args[1:])
    if func is torch.Tensor.__repr__:
        kind = type(weight).__name__
        return f"{kind} {weight._weight.name!r} on {weight.device}, from {weight._weight.source}:\n{source!r}"
    rest = {name: value for name, value in kwargs.items() if value is not weight}
    found = func(source, *args[1:], **rest)
    if func in (torch.Tensor.numpy, torch.Tensor.__array__) and not found.flags.owndata:
        found.flags.writeable = False  # it is the source's own memory
    return found


def _assign(func: Callable[..., Any], weight: ForebayTensor, value: Any = True) -> Any:
    name = SETTERS.get(func, "requires_grad_")
    if name in ("requires_grad", "requires_grad_"):
        if value:
            raise ForebayError(
                "a managed weight cannot be trained; detach() its model before requires_grad is set: "
                f"{weight._weight.name}"
            )
        return weight
    if name == "grad" and value is None:
        return None
    if name == "data" and isinstance(value, ForebayTensor) and value._weight is weight._weight:
        return None
    raise _write_error(f"assignment to .{name}", weight)


def _changes_nothing(
    func: Callable[..., Any], weight: ForebayTensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a conversion gives the weight itself back; torch is asked with one element of the kind."""
    kwargs = dict(kwargs)
    layout = kwargs.pop("memory_format", torch.preserve_format)
    with torch._C.DisableTorchFunctionSubclass():
        one = torch.empty(1, dtype=weight.dtype, device=weight.device)
        if layout is not torch.preserve_format and not weight.is_contiguous(memory_format=layout):
            return False
    return func(one, *args[1:], **kwargs) is one


def _write_error(what: str, weight: ForebayTensor) -> ForebayError:
    return ForebayError(
        f"{what} would write to a managed weight, which is read-only; detach() the model to change its weights: "
        f"{weight._weight.name}"
    )


def _is_looked_up(weight: Any) -> bool:
    return isinstance(weight, ForebayTensor) and weight._lookup and not weight._weight.is_kept()


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None and isinstance(weight, ForebayTensor):
        raise _write_error("embedding with max_norm", weight)
    kept = _is_kept_by_others((input,), {})
    if not kept and _is_looked_up(weight):
        return _looked_up(input, weight)
    rest = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return run(F.embedding, (input, weight, *rest), {}, "views" if kept else "pure")


def _looked_up(indices: torch.Tensor, weight: Any) -> torch.Tensor:
    """Rows of a table that is not resident, read at their source: only what was asked for is moved."""
    source: torch.Tensor = weight._source
    if indices.dtype not in (torch.int64, torch.int32):
        empty = torch.empty_like(source[:0], device=weight.device, dtype=weight.dtype)
        return F.embedding(indices, empty)  # torch's own error
    rows, inverse = torch.unique(indices, return_inverse=True)
    wanted: list[int] = rows.tolist()
    if wanted and (wanted[0] < 0 or wanted[-1] >= source.shape[0]):
        wrong = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise IndexError(f"{weight._weight.name} has {source.shape[0]} rows, numbered from 0: {wrong}")
    table = torch.empty((len(wanted), *source.shape[1:]), dtype=source.dtype, device="cpu")
    if table.numel():
        row_bytes = table.element_size() * table[0].numel()
        weight._weight.read_rows(row_bytes, wanted, table.data_ptr())
    if weight._conversion is not None:
        table = weight._conversion.value(table, wanted)
    return F.embedding(inverse, table.to(weight.device))

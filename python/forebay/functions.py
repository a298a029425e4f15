"""What torch functions do with a weight: which never touch its bytes, which may alias them, which write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Function = Callable[..., Any]


def _getters(*names: str) -> set[Function]:
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


def _methods(*names: str) -> set[Function]:
    return {getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)}


METADATA: frozenset[Function] = frozenset(
    _getters(
        "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_mps",
        "is_mtia", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xpu", "itemsize", "layout", "names",
        "nbytes", "ndim", "output_nr", "requires_grad", "retains_grad", "shape", "_version", "_base", "is_vulkan",
        "is_ipu", "is_maia", "is_xla",
    )
    | _methods(
        "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_conj",
        "is_floating_point", "is_inference", "is_neg", "is_pinned", "is_same_size", "is_shared", "is_signed",
        "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "dim_order", "_is_view", "has_names",
    )
    | {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_conj, torch.is_neg, torch.is_inference}
)  # fmt: skip
"""Answered by the stand-in itself."""

PURE: frozenset[Function] = frozenset(
    {
        F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
        F.conv_transpose3d, F.embedding, F.embedding_bag, F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm,
        torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.conv1d, torch.conv2d, torch.conv3d,
        torch.layer_norm, torch.group_norm, torch.add, torch.mul, torch.sub, torch.div,
        torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.addmm,
        torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.mul, torch.Tensor.__mul__,
        torch.Tensor.__rmul__, torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.__rsub__, torch._VF.lstm,
        torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu, torch._VF.lstm_cell, torch._VF.gru_cell,
        torch.rms_norm, F.rms_norm,
    }
)  # fmt: skip
"""Results never share memory with a weight, and without ``out=`` nothing is written."""

HIDDEN_WRITES: dict[Function, tuple[tuple[str, ...], tuple[str, ...]]] = {
    F.embedding_bag: (("weight",), ("max_norm",)),
    F.batch_norm: (("running_mean", "running_var"), ("training",)),
    F.instance_norm: (("running_mean", "running_var"), ("use_input_stats",)),
    torch.batch_norm: (("running_mean", "running_var"), ("training",)),
    torch.instance_norm: (("running_mean", "running_var"), ("use_input_stats",)),
}
"""Functions that write to arguments (first) when asked to by others (second), which torch may not count as writes."""

_TORCH_NORM = ("input", "weight", "bias", "running_mean", "running_var")
_POSITIONS: dict[Function, tuple[str, ...]] = {
    torch.batch_norm: (*_TORCH_NORM, "training"),
    torch.instance_norm: (*_TORCH_NORM, "use_input_stats"),
}
"""Parameter names of functions without a signature."""


def hidden_writes(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that this call of one of :data:`HIDDEN_WRITES` writes to."""
    names = _POSITIONS.get(func)
    if names is None:
        names = _POSITIONS[func] = tuple(inspect.signature(func).parameters)
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    written, asked = HIDDEN_WRITES[func]
    # instance_norm writes unless told otherwise, the others only when told.
    default = True if "use_input_stats" in asked else None
    if all(values.get(name, default) in (None, False) for name in asked):
        return []
    return [values.get(name) for name in written]


VIEWS: frozenset[Function] = frozenset(
    _methods(
        "t", "transpose", "permute", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "chunk",
        "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "narrow", "select",
        "expand", "expand_as", "squeeze", "unsqueeze", "swapaxes", "swapdims", "movedim", "moveaxis", "diagonal",
        "unfold", "as_strided", "contiguous", "__getitem__", "__dlpack__", "adjoint", "real", "alias",
        "set_",
    )
    | _getters("T", "mT", "H", "mH", "real", "imag")
    | {
        torch.t, torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.chunk, torch.split,
        torch.tensor_split, torch.unbind, torch.narrow, torch.select, torch.squeeze, torch.unsqueeze, torch.swapaxes,
        torch.movedim, torch.diagonal, torch.as_strided,
    }
)  # fmt: skip
"""Results usually share memory with the weight, which stays pinned as long as they live."""

FROM_SOURCE: frozenset[Function] = frozenset(
    _methods(
        "__array__", "__deepcopy__", "__format__", "__reduce_ex__", "__repr__", "item", "numpy", "tolist"
    )
)
"""Answered from the weight's source, without the device."""

DETACHED: frozenset[Function] = frozenset(_getters("data") | _methods("detach"))
"""Give another stand-in for the same weight."""

RAW: frozenset[Function] = frozenset(
    _getters("__cuda_array_interface__")
    | _methods("data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_", "pin_memory")
)
"""Would hand out an address that has memory only at times."""

CONVERSIONS: frozenset[Function] = frozenset(
    _methods("to", "type", "cpu", "cuda", "half", "bfloat16", "float", "double")
)
"""Give the weight itself where it is already as asked."""

SETTERS: dict[Function, str] = {
    getattr(torch.Tensor, name).__set__: name
    for name in ("data", "grad", "requires_grad", "names", "real", "imag")
    if hasattr(torch.Tensor, name)
}
"""Assignments to a tensor's properties."""


def writes_to_first(func: Function, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes its first argument, by torch's naming convention (``add_``, ``__iadd__``) or when told."""
    name = getattr(func, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__index__", "__invert__", "__int__")
        )
    return name.partition(".")[0].endswith("_") or kwargs.get("inplace") is True

"""Layers of scaled float8, with fewer steps to their kernels than ComfyUI takes.

A step of such a model is limited by the thread that launches kernels: ComfyUI makes a quantized tensor of the input and takes
another from what casts the weight, and each function of torch that gets one comes back to Python, where a table knows what to do. Of
all that two kernels are launched: one rounds the input, one multiplies. Here they are called with nothing in between, as ComfyUI's
tables would call them. What a layer gives is compared with what ComfyUI's own forward gives, once for each kind of layer, and a
layer that is not as expected in any way runs that.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2
from torch import nn

from forebay import streams
from forebay._forebay import Weight, hold
from forebay.comfyui.native.quantized import ManagedQuantized, quantized_of, unpinned
from forebay.instance_methods import InstanceMethod
from forebay.parameter import ForebayTensor

Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rounds a tensor to float8, divided by a scale."""

_log = logging.getLogger("forebay")

_LAYOUTS = {
    "TensorCoreFP8Layout": torch.float8_e4m3fn,
    "TensorCoreFP8E4M3Layout": torch.float8_e4m3fn,
    "TensorCoreFP8E5M2Layout": torch.float8_e5m2,
}
"""The dtype that an input is rounded to, by the layout of the weight."""
_QUANTIZE = "quantize_per_tensor_fp8"
"""What does that, among comfy_kitchen's functions."""
_PARAMETERS = frozenset(("weight", "bias", "input_scale"))
"""A layer that has others does something else with its input."""
_FAILURES = RuntimeError, TypeError
"""What a product that there is not for such tensors raises. ComfyUI multiplies what they stand for then."""

_gives_the_same: dict[tuple[object, ...], bool] = {}
"""Whether it gives what ComfyUI's forward gives, by the kind of layer."""


class Float8Linear:
    """A linear layer whose forward launches its kernels without ComfyUI's tables."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """From now on.

        Args:
            layer: The layer, whose weight is managed and quantized.
            dtype: What its input is rounded to.
        """
        self._layer = layer
        self._dtype = dtype
        self._own = type(layer).forward
        self._method = InstanceMethod(layer, "forward", self._run)

    def remove(self) -> None:
        """Gives the layer its own forward back."""
        self._method.remove()

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self._is_usual(args[0]):
            return original(*args, **kwargs)
        value: torch.Tensor = args[0]
        kind = self._kind(value)
        known = _gives_the_same.get(kind)
        if known:
            try:
                found = self._directly(value)
            except _FAILURES:
                found = None
            return original(value) if found is None else found
        own = original(value)
        if known is None:
            self._compare(kind, value, own)
        return own

    def _compare(self, kind: tuple[object, ...], value: torch.Tensor, own: Any) -> None:
        """Notes whether a kind of layer gives what ComfyUI's forward gave. Later, where that cannot be said of this layer."""
        try:
            found = self._directly(value)
        except torch.OutOfMemoryError:
            return
        except _FAILURES as error:
            _log.debug("layers of scaled float8 run as ComfyUI runs them: %s", error)
            _gives_the_same[kind] = False
            return
        if found is not None:
            _gives_the_same[kind] = same = _is_same(found, own)
            if not same:
                _log.debug(
                    "layers of scaled float8 run as ComfyUI runs them, which gives something else: %s", kind
                )

    def _kind(self, value: torch.Tensor) -> tuple[object, ...]:
        """All that what it gives may depend on, but the numbers and how many there are."""
        parameters = self._layer._parameters
        has = parameters["bias"] is not None, parameters.get("input_scale") is not None
        return self._own.__code__, self._dtype, value.dtype, value.device, has

    def _is_usual(self, value: Any) -> bool:
        """Whether ComfyUI would round this input, as one of a layer that has nothing to it but a weight and a bias."""
        layer = self._layer
        has = layer.__dict__
        return (
            type(value) is torch.Tensor
            and not value.requires_grad
            and value.ndim > 1
            and not layer._buffers
            and layer._parameters.keys() <= _PARAMETERS
            and not layer.weight_function
            and not layer.bias_function
            and not has.get("_full_precision_mm")
            and not has.get("comfy_force_cast_weights")
            and not torch.compiler.is_compiling()
        )

    def _directly(self, value: torch.Tensor) -> torch.Tensor | None:
        """What the layer gives. None where it is for ComfyUI's forward to say."""
        comfy.ops.run_every_op()  # where a user's interruption takes effect
        parameters: dict[str, Any] = self._layer._parameters
        held: list[Weight] = []
        weight, bias = self._plain_weight(parameters["weight"], held), parameters["bias"]
        if bias is not None:
            bias = unpinned(bias, held)
        to_scale = parameters.get("input_scale")
        if to_scale is None:
            to_scale = _one(value.device)
        if (
            weight is None
            or weight._params.orig_dtype != value.dtype
            or not _is_there(weight._qdata, value.device, self._dtype)
            or not _is_there(to_scale, value.device, torch.float32)
            or not (bias is None or bias.dtype == value.dtype)
        ):
            return None
        rows = value.reshape(-1, value.shape[-1])
        rounded = _rounding(value.device, value.dtype, self._dtype)(rows, to_scale)
        holding = hold(held)
        scale = weight._params.scale
        found = _multiplied(rounded, weight._qdata.t(), to_scale, scale, bias, value.dtype)
        del holding
        return found.reshape(*value.shape[:-1], found.shape[-1])

    def _plain_weight(self, weight: Any, held: list[Weight]) -> Any:
        """The layer's weight on the device, which is there once what is added to the list is held."""
        quantized = quantized_of(self._layer, "weight")
        if quantized is not None and quantized.tensor is weight:
            return quantized.unpinned(held)
        # A patched one.
        return weight if type(weight) is QuantizedTensor and weight._layout_cls in _LAYOUTS else None


def launching_directly(quantized: ManagedQuantized) -> Float8Linear | None:
    """Has the layer of a weight launch its kernels directly, where that is one of ComfyUI's that rounds its input to float8."""
    module, layout = quantized.module, quantized.original._layout_cls
    has = module.__dict__
    rounds = comfy.quant_ops.QUANT_ALGOS.get(has.get("quant_format"), {}).get("quantize_input", True)
    is_known = (
        quantized.name == "weight"
        and quantized.has_one_scale
        and has.get("layout_type") == layout
        and layout in _LAYOUTS
        and rounds
        and "_full_precision_mm" in has
        and isinstance(module, comfy.ops.CastWeightBiasOp)
        and hasattr(type(module).forward, "__code__")
    )
    return Float8Linear(module, _LAYOUTS[layout]) if is_known else None


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    """What an input is scaled with where no other scale is stored."""
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


@functools.cache
def _rounding(device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Rounding:
    """What rounds an input of a dtype on a device: the function that comfy_kitchen would take, or the kernel behind it."""
    some = torch.linspace(-1000, 1000, 4096, device=device).to(dtype).reshape(-1, 64)
    kwargs = {"x": some, "scale": _one(device), "output_type": to}
    function = comfy.quant_ops.ck.registry.get_implementation(_QUANTIZE, kwargs=kwargs)

    def rounded(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = function(x=value, scale=scale, output_type=to)
        return found

    try:
        kernel = _kernel_of(sys.modules[function.__module__], device, dtype, to)
        if _is_same(kernel(some, _one(device)), rounded(some, _one(device))):
            return kernel
    except Exception as error:
        # Not the comfy_kitchen that is known, or another implementation.
        _log.debug("inputs of scaled float8 are rounded by comfy_kitchen's function: %r", error)
    return rounded


def _kernel_of(module: Any, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Rounding:
    """What comfy_kitchen's module for CUDA launches, without looking up each time which device and stream it is for."""
    launch = getattr(module._C, _QUANTIZE)
    from_code, to_code = module.DTYPE_TO_CODE[dtype], module.DTYPE_TO_CODE[to]

    def rounded(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        value = value.contiguous()
        found = torch.empty(value.shape, dtype=torch.uint8, device=device)
        # -1: what fills them is in this stream.
        tensors = [one.__dlpack__(stream=-1) for one in (value, scale, found)]
        launch(*tensors, from_code, to_code, value.numel(), streams.current(device))
        return found.view(to)

    return rounded


def _multiplied(
    value: torch.Tensor,
    weight: torch.Tensor,
    to_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of two float8 matrices, each with one scale: what comfy_kitchen's function comes to on CUDA."""
    if _TENSOR_WISE is None:
        found: torch.Tensor = scaled_mm_v2(
            value, weight, scale_a=to_scale, scale_b=scale, bias=bias, out_dtype=dtype
        )
        return found
    return torch._scaled_mm_v2(
        value, weight, [to_scale], *_TENSOR_WISE, [scale], *_TENSOR_WISE, bias, dtype, [], False
    )


def _tensor_wise() -> tuple[list[int], list[int]] | None:
    """How torch's operator takes that a scale is for all of a matrix. None where this torch, or its backend, has another one."""
    known = torch.nn.functional
    if (
        not hasattr(torch, "_scaled_mm_v2")
        or not hasattr(known, "ScalingType")
        or torch.version.hip is not None
    ):
        return None
    return [known.ScalingType.TensorWise.value], [known.SwizzleType.NO_SWIZZLE.value]


_TENSOR_WISE = _tensor_wise()


def _is_there(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return not isinstance(tensor, ForebayTensor) and tensor.dtype == dtype and tensor.device == device


def _is_same(found: torch.Tensor, own: Any) -> bool:
    if type(own) is not torch.Tensor or (own.dtype, own.shape) != (found.dtype, found.shape):
        return False
    ours, theirs = (one.contiguous().view(torch.uint8) for one in (found, own))
    return torch.equal(ours, theirs)

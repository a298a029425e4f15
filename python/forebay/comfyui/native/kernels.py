"""The kernels that patches (LoRA and its kin) are computed with, for :mod:`forebay.comfyui.warming`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import comfy.model_management
import comfy.quant_ops
import torch

from forebay import streams
from forebay._forebay import EightBitSum
from forebay.comfyui.native.float8_patch import new_numbers, scales, scaling_of
from forebay.comfyui.native.loaded import engine_for
from forebay.comfyui.warming import BLOCK, MODULATION
from forebay.converting import dtype_name
from forebay.low_rank import LowRank, sums_as_torch, to_device

_WIDTH, _RANK = 3072, 16
"""Of Flux, and of the usual LoRA: whether torch sums as the engine does is known of these shapes then."""
_ROWS, _COLUMNS = 256, 512
"""Of a weight that all kernels take."""


def of_patches(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Uses them once. The driver translates the engine's own for a GPU that it never did that for, some tenths of a second each."""
    engine, through = engine_for(device), comfy.model_management.lora_compute_dtype(device)
    factors = torch.zeros(_ROWS, _RANK), torch.zeros(_RANK, _COLUMNS)
    [(memory, product)] = to_device([LowRank([(*factors, 1.0)], through)], device)
    stream = streams.current(device)
    value = torch.zeros(_ROWS, _COLUMNS, dtype=dtype, device=device)
    stored, found = (value.to(torch.float8_e4m3fn) for _ in range(2))
    eight_bit_sum = EightBitSum(stored.data_ptr(), dtype_name(stored.dtype), _COLUMNS, product, 0)
    threads = _ROWS * _COLUMNS // 4
    yield lambda: engine.add_product(value.data_ptr(), dtype_name(dtype), _COLUMNS, product, stream)
    [numbers] = new_numbers(1, device)

    def requantize() -> None:
        table = scales(device, comfy.quant_ops.TensorCoreFP8E4M3Layout, stored.dtype, through)
        scaling = None if table is None else scaling_of(numbers, table)
        engine.requantize(found.data_ptr(), eight_bit_sum, 1, threads, stream, scaling)

    yield requantize
    for rows, columns in (*BLOCK, MODULATION):
        yield partial(sums_as_torch, engine, device, [(rows * _WIDTH, columns * _WIDTH, _RANK)])
    del memory  # which the engine's kernels read: torch gives it to others of this stream alone

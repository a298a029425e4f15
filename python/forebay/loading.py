"""State dicts that nobody copied."""

from __future__ import annotations

import os

import torch

from forebay._forebay import Checkpoint

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """A state dict of a checkpoint in milliseconds, whatever its size.

    The tensors lie in read-only mappings of the files: nothing is read before it is used, nothing is copied, and the
    operating system may take the memory back at any time. Give them to a model and attach it::

        model.load_state_dict(forebay.load("model.safetensors"), assign=True)
        forebay.attach(model)

    Args:
        path: A ``.safetensors`` file, a ``.safetensors.index.json`` of a sharded checkpoint, or a folder with either.

    Returns:
        Name to CPU tensor, in file order. The tensors are read-only; ``clone()`` one to change it (the operating system
        ends the process that writes to such memory).

    Raises:
        SourceError: For a file that is missing, truncated or malformed; the message names file and tensor.
        ValueError: For a dtype that torch does not have.
    """
    checkpoint = Checkpoint(os.fspath(path))
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype_name, shape, nbytes in checkpoint.entries():
        dtype = getattr(torch, _DTYPES.get(dtype_name, ""), None)
        if dtype is None:
            raise ValueError(f"torch has no dtype {dtype_name} (tensor {name!r}): {os.fspath(path)}")
        if nbytes == 0:
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            continue
        data = torch.utils.dlpack.from_dlpack(checkpoint.capsule(name))
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()  # torch wants aligned elements; a header of odd length left these unaligned
        tensors[name] = data.view(dtype).view(shape)
    return tensors

"""State dicts that nobody copied, and such as are on a device."""

from __future__ import annotations

import functools
import os

import torch

from forebay import streams
from forebay._forebay import Checkpoint, Engine, OutOfMemoryError
from forebay.engines import engine as engine_of
from forebay.engines import torch_device
from forebay.lending import plain_tensor

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def load(
    path: str | os.PathLike[str], device: str | torch.device | Engine | None = None
) -> dict[str, torch.Tensor]:
    """A state dict of a checkpoint in milliseconds, whatever its size.

    The tensors lie in read-only mappings of the files: nothing is read before it is used, nothing is copied, and the
    operating system may take the memory back at any time. Give them to a model and attach it::

        model.load_state_dict(forebay.load("model.safetensors"), assign=True)
        forebay.attach(model)

    With a device the tensors are ordinary ones in its memory, filled at the link's rate without a copy in RAM. They stay
    there, each page until the last tensor on it goes: for what fits. What does not fit is for ``attach``.

    Args:
        path: A ``.safetensors`` file, a ``.safetensors.index.json`` of a sharded checkpoint, or a folder with either.
        device: ``"cuda"``, ``"cuda:N"``, ``"host"``, a ``torch.device`` or an engine to load to. Default: none.

    Returns:
        Name to tensor, in file order. Without a device they are read-only CPU tensors; ``clone()`` one to change it (the
        operating system ends the process that writes to such memory). With a device their bytes are in order with the
        current stream.

    Raises:
        SourceError: For a file that is missing, truncated or malformed; the message names file and tensor.
        ValueError: For a dtype that torch does not have.
        OutOfMemoryError: Where the tensors do not fit on the device together.
        DeviceError: Where the device is missing.
    """
    if device is None:
        return _mapped(path)
    engine = engine_of(device)  # its readers get ready meanwhile
    return _on_device(os.fspath(path), _mapped(path), engine)


def _on_device(path: str, tensors: dict[str, torch.Tensor], engine: Engine) -> dict[str, torch.Tensor]:
    with_bytes = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    total = sum(tensor.nbytes for tensor in with_bytes.values())
    if total > engine.budget:
        raise OutOfMemoryError(
            f"{path} has {total} bytes of tensors, more than {engine.device} has room for; attach() a model to stream "
            f"what does not fit: {engine.budget}"
        )
    specs = [(name, tensor.data_ptr(), tensor.nbytes, tensor, False) for name, tensor in with_bytes.items()]
    # No region for small ones: it would be pinned as long as the model is attached, and these are pinned one by one.
    model = engine.attach(os.path.basename(path), specs, small=0)
    where = torch_device(engine)
    streams.follow_current(model, where)
    loaded = {name: tensor.to(where) for name, tensor in tensors.items() if not tensor.numel()}
    try:
        for index, (name, tensor) in enumerate(with_bytes.items()):
            weight = model.weight(index)
            weight.set_viewer(
                functools.partial(
                    plain_tensor, dtype=tensor.dtype, size=tensor.size(), stride=tensor.stride()
                )
            )
            # Waits until its copies are enqueued; what comes next in the file is read ahead meanwhile.
            loaded[name] = weight.view()
    finally:
        # The tensors keep what they need.
        model.detach()
    return {name: loaded[name] for name in tensors}


def _mapped(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
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

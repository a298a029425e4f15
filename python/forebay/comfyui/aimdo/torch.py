"""Tensors over memory that torch did not allocate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forebay._forebay import foreign_capsule
from forebay.comfyui.aimdo import devices

if TYPE_CHECKING:
    import torch

    from forebay.comfyui.aimdo.host_buffer import HostBuffer


def aimdo_to_tensor(alloc: tuple[Any, int, int], device: Any) -> torch.Tensor:
    """A one-dimensional uint8 tensor over a part of a range or of a device buffer.

    Args:
        alloc: The range or the buffer, an address in it and a length.
        device: The tensor's device: the one that the memory is on.

    Raises:
        ValueError: Where the part is not in the range.
    """
    owner, address, size = alloc
    if size == 0:
        import torch

        return torch.empty(0, dtype=torch.uint8, device=device)
    return _tensor(owner.capsule(address, size))


def get_tensor_from_raw_ptr(ptr: int, size: int, device: Any) -> torch.Tensor:
    """A one-dimensional uint8 tensor over memory that the caller keeps.

    Args:
        ptr: The first address.
        size: How many bytes.
        device: What it is an address of: an ordinal, a ``torch.device``, or None for host memory.

    Raises:
        ValueError: For no address, or a negative size.
    """
    ptr, size = devices.count("ptr", ptr), devices.count("size", size)
    if ptr == 0:
        raise ValueError("memory has an address other than 0")
    kind = getattr(device, "type", device)
    if device is None or kind in ("cpu", "host"):
        return _tensor(foreign_capsule("host", ptr, size))
    import torch

    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    ordinal = torch.cuda.current_device() if chosen.index is None else chosen.index
    return _tensor(foreign_capsule(f"cuda:{ordinal}", ptr, size))


def hostbuf_to_tensor(hostbuf: HostBuffer) -> torch.Tensor:
    """A one-dimensional uint8 CPU tensor over a host buffer as it is now. It keeps the memory."""
    return _tensor(hostbuf._buffer.capsule())


def get_torch_allocator() -> None:
    """The allocator that torch is to use: its own, which this package leaves as it is."""
    return None


def _tensor(capsule: Any) -> torch.Tensor:
    import torch

    # Not an inference tensor: ComfyUI keeps it from one run to the next.
    with torch.inference_mode(False):
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
        return tensor

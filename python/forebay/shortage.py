"""Who holds a device's memory, when it ran out."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from forebay._forebay import Engine
from forebay.allocations import has_expandable_segments

_WANTED = re.compile(r"Tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Shortage:
    """Where a device's memory was as an allocation failed although all weights that could had left. In bytes.

    Attributes:
        device: The device.
        needed: What was asked for, where the error says so.
        total: The device's memory.
        free: Nobody's.
        weights: Of weights.
        pinned: Of these, what cannot leave: small weights, and those of operations and views.
        operations: Operations that hold weights.
        views: Tensors that somebody keeps which share a weight's memory.
        allocated: In torch's tensors.
        cached: Kept by torch for later tensors.
        others: In use by anybody else: other processes, libraries, the driver.
    """

    device: str
    needed: int | None
    total: int
    free: int
    weights: int
    pinned: int
    operations: int
    views: int
    allocated: int
    cached: int
    others: int

    @staticmethod
    def of(engine: Engine, error: BaseException) -> Shortage:
        """The shortage on the device of an engine, as it is now."""
        free, total = engine.memory()
        stats = engine.stats()
        allocated, reserved = torch_memory(engine.device)
        found = _WANTED.search(str(error))
        return Shortage(
            device=engine.device,
            needed=round(float(found[1]) * _UNITS[found[2]]) if found else None,
            total=total,
            free=free,
            weights=stats["held"],
            pinned=sum(model["pinned"] for model in stats["models"]),
            operations=stats["operations"],
            views=stats["views"],
            allocated=allocated,
            cached=reserved - allocated,
            others=max(0, total - free - stats["held"] - reserved),
        )

    def __str__(self) -> str:
        asked = "" if self.needed is None else f"{_mib(self.needed)} were asked for. "
        text = (
            f"forebay: all weights that could leave {self.device} had left. {asked}Of {_mib(self.total)}, "
            f"{_mib(self.free)} were free, weights had {_mib(self.weights)} (of which {_mib(self.pinned)} cannot leave: "
            f"small weights, {self.operations} running operations, {self.views} views), torch's tensors "
            f"{_mib(self.allocated)}, torch's cache {_mib(self.cached)}, and others {_mib(self.others)}"
        )
        in_pieces = self.needed is not None and self.needed <= self.free + self.cached
        if in_pieces and not has_expandable_segments():
            text += (
                ". That would have been enough in one piece: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps "
                "torch's cache from being in pieces"
            )
        return text


def torch_memory(device: str) -> tuple[int, int]:
    """Bytes of torch's tensors on a device, and of all that its allocator has."""
    if device == "host":
        return 0, 0
    nested = torch._C._cuda_memoryStats(torch.device(device).index or 0)
    allocated, reserved = (nested[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes"))
    return allocated, reserved


def empty_cache(device: str) -> int:
    """Gives what torch keeps for later tensors back to the driver; how many bytes that was."""
    if device == "host" or torch.cuda.is_current_stream_capturing():
        return 0
    _, before = torch_memory(device)
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
    _, after = torch_memory(device)
    return max(0, before - after)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"

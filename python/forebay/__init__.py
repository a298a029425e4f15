"""Forebay: dynamic VRAM for model weights.

A model far larger than the GPU's free memory runs at nearly the speed the hardware allows, out of the operating
system's page cache, and nobody sets a quota::

    import forebay

    with forebay.attach(model, device="cuda"):
        output = model(inputs)

``attach`` gives every weight one device address for life and replaces the module's parameters by stand-ins; the memory
behind the addresses comes and goes as layers need it. Results are bit-identical to plain torch on the same device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forebay._forebay import (
    DetachedError,
    DeviceError,
    Engine,
    ForebayError,
    OutOfMemoryError,
    SourceError,
    __version__,
)

if TYPE_CHECKING:
    from forebay.allocations import redirect_allocations
    from forebay.attachment import Attachment, attach, detach
    from forebay.engines import engine, make_room, memory_summary, set_budget, set_headroom, stats
    from forebay.examination import doctor
    from forebay.explicit import Allocation, Signature, Vbar, fault, signature, unpin
    from forebay.lending import lend
    from forebay.loading import load
    from forebay.parameter import ForebayParameter, ForebayTensor

# Where each name lives. torch is imported with the first of them, not with the package: applications that must be first
# to import torch can import this package before.
_HOMES = {
    "Allocation": "explicit",
    "Attachment": "attachment",
    "ForebayParameter": "parameter",
    "ForebayTensor": "parameter",
    "Signature": "explicit",
    "Vbar": "explicit",
    "attach": "attachment",
    "detach": "attachment",
    "doctor": "examination",
    "engine": "engines",
    "fault": "explicit",
    "lend": "lending",
    "load": "loading",
    "make_room": "engines",
    "memory_summary": "engines",
    "redirect_allocations": "allocations",
    "set_budget": "engines",
    "set_headroom": "engines",
    "signature": "explicit",
    "stats": "engines",
    "unpin": "explicit",
}

__all__ = [
    "Allocation",
    "Attachment",
    "DetachedError",
    "DeviceError",
    "Engine",
    "ForebayError",
    "ForebayParameter",
    "ForebayTensor",
    "OutOfMemoryError",
    "Signature",
    "SourceError",
    "Vbar",
    "__version__",
    "attach",
    "detach",
    "doctor",
    "engine",
    "fault",
    "lend",
    "load",
    "make_room",
    "memory_summary",
    "redirect_allocations",
    "set_budget",
    "set_headroom",
    "signature",
    "stats",
    "unpin",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'forebay' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"forebay.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

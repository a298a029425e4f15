"""What the tests share."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
from torch import nn

import forebay

MIB = 1 << 20
DEVICE = os.environ.get("FOREBAY_TEST_DEVICE") or "host"
TORCH_DEVICE = torch.device("cpu" if DEVICE == "host" else DEVICE)
COMFY_DEVICE = "host" if DEVICE == "host" else TORCH_DEVICE.index or 0
"""As ``control.init_devices`` takes it."""

# Some of cuDNN's convolutions add in the order in which threads come: plain torch itself differs from run to run.
torch.backends.cudnn.deterministic = True

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def randomize(module: nn.Module) -> nn.Module:
    """Random parameters and buffers, also where modules start with zeros and ones. For inference."""
    with torch.no_grad():
        for tensor in module.parameters():
            if 0 not in tensor.stride():  # one element seen many times cannot be written
                tensor.copy_(torch.randn(tensor.shape) * 0.05)
        for tensor in module.buffers():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return module.eval().requires_grad_(False)


def reference(module: nn.Module) -> nn.Module:
    """The plain module on the device of the tests."""
    return copy.deepcopy(module).to(TORCH_DEVICE)


def move(value: Any) -> Any:
    """Inputs on the device of the tests."""
    if isinstance(value, torch.Tensor):
        return value.to(TORCH_DEVICE)
    if isinstance(value, dict):
        return {key: move(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(item) for item in value)
    return value


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit, NaN and signs of zero included, also in tuples and dicts."""
    if isinstance(left, torch.Tensor):
        if (left.shape, left.dtype, left.device) != (right.shape, right.dtype, right.device):
            return False
        if left.is_nested:
            return all(map(same, left.unbind(), right.unbind()))
        return torch.equal(bits(left), bits(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def numbers(message: str) -> tuple[int, int, int]:
    """The sizes in an out-of-memory message: needed, held by others, budget."""
    size = r"([\d.]+) (B|KiB|MiB|GiB)"
    one_operation = rf"needs {size} .* budget is {size}, of which {size} cannot leave"
    together = rf"{size} are needed, the budget is {size}, and {size} are pinned"
    found = re.search(one_operation, message) or re.search(together, message)
    assert found, message
    groups = found.groups()
    needed, budget, held = (
        round(float(number) * _UNITS[unit]) for number, unit in zip(groups[::2], groups[1::2], strict=True)
    )
    return needed, held, budget


def linears(count: int, width: int = 1024) -> nn.Sequential:
    """Layers of 2 MiB in half precision, or 4 MiB in single."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def press(engine: forebay.Engine) -> None:
    """Takes every page that nobody uses."""
    engine.make_room(1 << 60)

"""torch's streams, by the handles that the engine knows them by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from forebay._forebay import Model

_OF_A_PRIORITY = 32
"""How many streams torch hands out, one after the other, before it begins again."""


def current(device: torch.device) -> int:
    """The calling thread's current stream on a CUDA device; 0 on another one, which has one of its own."""
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def source(device: torch.device) -> Callable[[], int]:
    """What :func:`current` gives, for who asks it of one device again and again."""
    if device.type != "cuda":
        return int
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def follow_current(model: Model, device: torch.device) -> None:
    """Orders a model's weights with the current streams of the threads that use them."""
    if device.type == "cuda":
        model.set_stream_source(source(device))


def handed_out(device: torch.device, priorities: Iterable[int]) -> list[int]:
    """Every stream of these priorities that torch may hand out on a CUDA device, and its default one."""
    pools = [
        torch.cuda.Stream(device, priority=priority).cuda_stream  # type: ignore[no-untyped-call]
        for priority in priorities
        for _ in range(_OF_A_PRIORITY)
    ]
    return [torch.cuda.default_stream(device).cuda_stream, *dict.fromkeys(pools)]

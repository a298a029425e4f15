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


class Uses:
    """The streams in which tensors are used: torch does not give their memory to others before these have come so far.

    Attributes:
        streams: torch's, by their handles.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        """In none so far, beside the one that they were made in.

        Args:
            tensors: On one device.
        """
        self.streams: dict[int, torch.cuda.Stream] = {}
        self._tensors = tensors
        self._device = tensors[0].device

    def enter(self) -> int:
        """They are about to be used in the current stream. Its handle."""
        handle = current(self._device)
        if self._device.type == "cuda" and handle not in self.streams:
            stream = torch.cuda.current_stream(self._device)
            for tensor in self._tensors:
                tensor.record_stream(stream)
            self.streams[handle] = stream
        return handle


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

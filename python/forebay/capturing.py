"""CUDA graphs.

A graph that was captured works at the addresses that it saw, without asking anybody whether the weights are there. So a
model's forward is only captured while all its weights are lent, which keeps them there.
"""

from __future__ import annotations

import torch
from torch import nn

from forebay._forebay import ForebayError
from forebay.parameter import ForebayTensor


def refuse_capture(module: nn.Module) -> None:
    """To be called before a forward on a GPU.

    Raises:
        ForebayError: While the current stream is being captured and a weight of the module could leave.
    """
    if torch.cuda.is_current_stream_capturing() and _has_stand_ins(module):
        raise ForebayError(
            "a CUDA graph cannot be captured of weights that may leave the device before it is replayed: capture and replay "
            "it inside `with forebay.lend(model):`, which keeps them there, or detach() the model"
        )


def _has_stand_ins(module: nn.Module) -> bool:
    found = (parameter for part in module.modules() for parameter in part._parameters.values())
    return any(isinstance(parameter, ForebayTensor) for parameter in found)

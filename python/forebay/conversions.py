"""Conversions of attached modules: ``module.to(...)`` and its like may ask only for what is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from forebay._forebay import ForebayError
from forebay.parameter import ForebayTensor
from forebay.small import small_of

_checked = threading.local()


def refusing_conversions(
    original: Callable[..., Any], function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """In place of a module's ``_apply``. Every weight is asked before anything is changed, so a refusal changes nothing."""
    if getattr(_checked, "inside", False):
        return original(function, *args, **kwargs)
    module: nn.Module = original.__self__  # type: ignore[attr-defined]
    _checked.inside = True
    try:
        parameters = list(module.parameters())
        managed: list[torch.Tensor] = [one for one in parameters if isinstance(one, ForebayTensor)]
        managed += [one for one in parameters if small_of(one)]
        for parameter in managed:
            if function(parameter) is not parameter:
                raise ForebayError(
                    "an attached module keeps its device and dtype; detach() it before it is moved or converted: "
                    f"{type(module).__name__}"
                )
        return original(function, *args, **kwargs)
    finally:
        _checked.inside = False


def refusing_loads(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of a module's ``load_state_dict``."""
    module: nn.Module = original.__self__  # type: ignore[attr-defined]
    raise ForebayError(
        "load_state_dict would write to managed weights, which are read-only; detach() the model to change its weights: "
        f"{type(module).__name__}"
    )

"""Methods replaced on one module, in a way that copies and pickles of the module do not inherit."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


class InstanceMethod:
    """Stands in a module's ``__dict__`` in place of one of its class's methods.

    A deep copy or pickle of the module gets the class's own method back, with nothing of Forebay in it.
    """

    def __init__(self, module: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Replaces ``module.name`` by ``function(original, *args, **kwargs)`` until :meth:`remove`."""
        self._module = module
        self._name = name
        self._function = function
        self._had_own = name in module.__dict__
        # Also what `inspect.signature` follows, which applications ask for the arguments of `forward`.
        self.__wrapped__ = getattr(module, name)
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        """Puts the original back, unless somebody replaced the method again meanwhile."""
        if self._module.__dict__.get(self._name) is not self:
            return
        if self._had_own:
            self._module.__dict__[self._name] = self.__wrapped__
        else:
            del self._module.__dict__[self._name]

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._module, self._name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module), self._module)
        return MethodType(getattr(type(copied), self._name), copied)

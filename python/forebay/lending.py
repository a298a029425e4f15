"""Weights lent as plain tensors for the length of a ``forward``.

Some modules look for tensors that override torch functions and then take another, slower arithmetic
(``nn.MultiheadAttention`` and the transformer encoder leave their fast path), and some hand raw pointers to kernels.
Their weights are replaced by plain tensors that stay pinned while the call runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from forebay._forebay import ForebayError, Weight, lend_all
from forebay.instance_methods import InstanceMethod
from forebay.parameter import ForebayTensor
from forebay.places import Place

LENT: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Lent to without being asked."""


@dataclass(eq=False)
class _Loan:
    """A plain tensor that stands in a module in place of a stand-in, for as long as somebody borrows it."""

    place: Place
    stand_in: ForebayTensor
    tensor: torch.Tensor
    version: int
    borrowers: set[object] = field(default_factory=set)


_loans: dict[tuple[int, str], _Loan] = {}
"""By the owner's identity, which the loan keeps alive, and the parameter's name."""

_lock = threading.RLock()
"""For the loans and what stands in their places. Weights are not waited for under it: others must be able to return."""


@contextmanager
def lend(module: nn.Module) -> Iterator[None]:
    """Lends the weights of a module, for code that takes raw pointers.

    For the length of the block the module's managed parameters are plain device tensors, all pinned at once, so they
    must fit into the budget together::

        with forebay.lend(layer):
            extension.forward(x, layer.weight)

    Args:
        module: A module that is attached, or part of one.

    Raises:
        OutOfMemoryError: Where the weights do not fit together.
        ForebayError: At the end of the block, where torch counted writes to what was lent. They are discarded.
    """
    borrowed: list[_Loan] = []
    written: dict[str, Weight] = {}
    try:
        _borrow(module, borrowed)
        yield
    finally:
        try:
            _give_back(borrowed, written)
        except KeyboardInterrupt:
            _give_back(borrowed, written)
            raise
        borrowed.clear()
        for weight in written.values():
            weight.discard()
    if written:
        raise ForebayError(
            "managed weights were written to while they were lent, which are read-only; what was written is discarded. "
            f"detach() the model to change its weights: {', '.join(written)}"
        )


def lend_in_forward(module: nn.Module) -> InstanceMethod:
    """From now on lends a module's weights for the length of each ``forward``."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with lend(_borrowing_part(module)):
            return original(*args, **kwargs)

    return InstanceMethod(module, "forward", forward)


def restore(place: Place, stand_in: torch.Tensor, original: torch.Tensor | None) -> None:
    """Puts an original back where its stand-in stands, or is lent. Anything else stays."""
    with _lock:
        loan = _loans.get(place.key)
        lent = loan is not None and loan.stand_in is stand_in and place.get() is loan.tensor
        if lent or place.get() is stand_in:
            place.put(original)


def takes_loans(module: nn.Module, also: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module's weights are lent for its ``forward``."""
    return isinstance(module, LENT + also) and any(True for _ in module.parameters())


def plain_tensor(capsule: Any, dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a capsule of bytes. Not an inference tensor, so that writes to it are counted."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return plain_tensor(capsule, dtype, size, stride)
    # Not a view of the bytes either: torch would take the way back to them into account in every operation.
    return torch.utils.dlpack.from_dlpack(capsule).view(dtype).as_strided(size, stride).data


def _borrow(module: nn.Module, borrowed: list[_Loan]) -> None:
    """Lends what is not lent yet. What was borrowed is in the list, also after an error."""
    with _lock:
        places = [Place(owner, name) for owner in module.modules() for name in owner._parameters]
        wanted = {place: _to_be_lent(place, borrowed) for place in places}
    stand_ins = {id(stand_in): stand_in for stand_in in wanted.values() if stand_in is not None}
    tensors = lend_all([stand_in._weight for stand_in in stand_ins.values()])
    plain = dict(zip(stand_ins, tensors, strict=True))
    del tensors
    with _lock:
        for place, stand_in in wanted.items():
            # Another thread may have lent it meanwhile.
            if stand_in is None or _to_be_lent(place, borrowed) is not stand_in:
                continue
            tensor = plain[id(stand_in)]
            loan = _Loan(place, stand_in, tensor, tensor._version)
            borrowed.append(loan)
            loan.borrowers.add(id(borrowed))
            _loans[place.key] = loan
            place.put(tensor)


def _to_be_lent(place: Place, borrowed: list[_Loan]) -> ForebayTensor | None:
    """The stand-in at a place; a plain tensor that is lent there is borrowed instead."""
    parameter, loan = place.get(), _loans.get(place.key)
    if isinstance(parameter, ForebayTensor):
        return parameter
    if loan is not None and loan.tensor is parameter and loan not in borrowed:
        borrowed.append(loan)
        loan.borrowers.add(id(borrowed))
    return None


def _give_back(borrowed: list[_Loan], written: dict[str, Weight]) -> None:
    """Ends the loans that nobody else borrows. Once interrupted it can be called again."""
    with _lock:
        for loan in borrowed:
            loan.borrowers.discard(id(borrowed))
            if loan.borrowers:
                continue
            # Somebody may have put something else there meanwhile; that stays.
            if loan.place.get() is loan.tensor:
                loan.place.put(loan.stand_in)
            if _loans.get(loan.place.key) is loan:
                del _loans[loan.place.key]
            if loan.tensor._version != loan.version:
                written[loan.stand_in._weight.name] = loan.stand_in._weight


def _borrowing_part(module: nn.Module) -> nn.Module:
    """An encoder looks at its first layer's weights only."""
    if isinstance(module, nn.TransformerEncoder) and len(module.layers) > 0:
        first: nn.Module = module.layers[0]
        return first
    return module

"""Weights that are stored in another dtype than they are used in, with a scale perhaps (float8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""One dtype for all weights, or by the name of a weight or of a module above it; the longest name counts."""

STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""What can be converted."""
USED = (torch.float32, torch.float16, torch.bfloat16)
"""What it can be converted to."""


@dataclass(frozen=True)
class Conversion:
    """How a weight is converted: ``stored.to(float32) * scale``, rounded once to ``dtype``.

    Attributes:
        dtype: The dtype it is used in.
        scale: Nothing, one number, or one for each row: float32, one dimension, on the CPU.
    """

    dtype: torch.dtype
    scale: torch.Tensor | None = None

    def value(self, stored: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """A weight, or some rows of one, as it is used; where ``stored`` is."""
        value = stored.float()
        if self.scale is not None:
            scale = self.scale if rows is None or self.scale.numel() == 1 else self.scale[rows]
            value = value * scale.to(value.device).view(-1, *(1,) * (value.ndim - 1) if value.ndim else ())
        return value.to(self.dtype)

    def on(
        self, stored: torch.Tensor, device: torch.device
    ) -> tuple[str, str, int, int, torch.Tensor | None]:
        """As the engine takes it: both dtypes, the scale's address and elements a row, and what keeps it."""
        names = dtype_name(stored.dtype), dtype_name(self.dtype)
        if self.scale is None:
            return (*names, 0, 0, None)
        # A copy of its own: complete when this returns.
        scale = self.scale.clone() if device.type == "cpu" else self.scale.to(device)
        columns = 0 if scale.numel() == 1 else stored.shape[1:].numel()
        return (*names, scale.data_ptr(), columns, scale)


def conversion_of(
    name: str,
    label: str,
    stored: torch.Tensor,
    dtypes: Dtypes | None,
    scales: Mapping[str, torch.Tensor] | None,
) -> Conversion | None:
    """How a weight is to be converted, if it is.

    Raises:
        ValueError: For a dtype or scale that cannot be; names the weight.
    """
    dtype, key = _dtype_for(name, dtypes), _scale_key(name, scales)
    if dtype is None and key is None:
        return None
    what = f"{name} of {label}"
    if dtype is None or not stored.is_floating_point():
        if key is not None:
            raise ValueError(
                f"a scale is applied while a weight is converted; give its dtype, too: {key!r} for {what}"
            )
        return None
    if key is None and stored.dtype == dtype:
        return None
    if stored.dtype not in STORED or dtype not in USED:
        raise ValueError(f"{dtype_name(stored.dtype)} is not converted to {dtype_name(dtype)}: {what}")
    if key is None or scales is None:
        return Conversion(dtype)
    scale = scales[key].detach().to("cpu", torch.float32).flatten()
    rows = stored.shape[0] if stored.ndim else 1
    if scale.numel() not in (1, rows) or (scale.numel() > 1 and not stored.is_contiguous()):
        raise ValueError(
            f"a scale is one number, or one for each row of a contiguous weight: {tuple(scales[key].shape)}, {key!r} for "
            f"{what} of shape {tuple(stored.shape)}"
        )
    return Conversion(dtype, scale)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _dtype_for(name: str, dtypes: Dtypes | None) -> torch.dtype | None:
    if dtypes is None or isinstance(dtypes, torch.dtype):
        return dtypes
    while True:
        found = dtypes.get(name)
        if found is not None or not name:
            return found
        name = name.rpartition(".")[0]


def _scale_key(name: str, scales: Mapping[str, torch.Tensor] | None) -> str | None:
    """``weight_scale`` or ``scale_weight`` beside a ``weight``."""
    if scales is None:
        return None
    beside = [f"{name}_scale"]
    if name.endswith("weight"):
        beside.append(name.removesuffix("weight") + "scale_weight")
    return next((key for key in beside if key in scales), None)

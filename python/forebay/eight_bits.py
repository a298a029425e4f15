"""Products of low rank that are added to weights of eight-bit elements (float8), which are rounded up or down at random behind that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forebay import streams
from forebay._forebay import EightBitSum, Engine
from forebay.converting import dtype_name
from forebay.low_rank import Patch, Product


@dataclass(frozen=True, eq=False)
class EightBitPatch:
    """A patch for :meth:`forebay.Attachment.set_patch` that the device adds itself, where the weight is, once a page of it is filled.
    Called with a weight it gives the same in new memory.

    An element stands for its value times ``scale``. It is rounded to one of its neighbours by a random byte as torch's generator
    draws it on a GPU: the bytes belong to the elements, and are the same however much of the weight is patched at once.

    Attributes:
        engine: The device's.
        columns: Elements a row; a multiple of 8.
        product: What is added to all rows, as :func:`forebay.low_rank.to_device` gives it: its addresses stay valid as long as ``keep``
            does. Likewise what is written there by now in the stream that is current when the patch is set.
        scale: A float32 on the device, or None for 1. It stays as long as the patch does, as the model's own weights do.
        seed: Of the random bytes.
        threads: With which torch draws them; a multiple of 8.
        random: Memory on the device for the random bytes of one page, or of a weight that is smaller. Patches of one attachment may
            share it.
        keep: Keeps the product's memory.
    """

    engine: Engine
    columns: int
    product: Product
    scale: torch.Tensor | None
    seed: int
    threads: int
    random: torch.Tensor
    keep: object

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The patched weight."""
        found = torch.empty_like(weight)
        name = dtype_name(weight.dtype)
        eight_bit_sum = EightBitSum(weight.data_ptr(), name, self.columns, self.product, self._scale_at)
        stream = streams.current(weight.device)
        self.engine.requantize(found.data_ptr(), eight_bit_sum, self.seed, self.threads, stream)
        return found

    def for_engine(self, dtype: torch.dtype) -> Patch:
        """What the engine is given for a weight of a dtype."""
        rounding = self._scale_at, self.seed, self.threads, self.random.data_ptr(), self.random.nbytes
        # The engine keeps it as long as the weights, in whose memory the scale may lie.
        keep = self.keep, self.random
        return dtype_name(dtype), self.columns, [self.product], keep, None, rounding

    @property
    def _scale_at(self) -> int:
        return 0 if self.scale is None else self.scale.data_ptr()

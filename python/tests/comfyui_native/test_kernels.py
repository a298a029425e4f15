"""What is used before a model runs, so that the driver has its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.ldm.flux.model
import comfy.model_management
import support
import torch
from running import load, sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forebay.comfyui import warming
from forebay.comfyui.native import kernels
from forebay.low_rank import _known

CPU = torch.device("cpu")
USUAL = warming._of_blocks, warming._of_samplers, warming._of_others, warming._of_layers


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that a CPU computes in no time."""
    for module, name, value in (
        (warming, "_WIDTH", 400),
        (warming, "_HEADS", 3),
        (warming, "_TOKENS", (64, 16, 1)),
        (kernels, "_WIDTH", 64),
    ):
        monkeypatch.setattr(module, name, value)


def _used(uses: Any) -> int:
    with torch.inference_mode():
        return len([use() for use in uses])


def test_what_is_used_before_a_model_runs_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    # A use that fails goes by without a word where a model may not need it: here none does.
    counts = [_used(kernels_of(CPU, torch.bfloat16)) for kernels_of in USUAL]
    assert all(count >= least for count, least in zip(counts, (30, 20, 10, 5), strict=True)), counts
    # What a GPU's machine cannot say of a CPU.
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device: False)
    assert _used(warming._of_float8(CPU, torch.bfloat16)) == 0
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device: True)
    assert _used(warming._of_float8(CPU, torch.bfloat16)) > 10


class _Computing(TorchDispatchMode):
    """Notes the operations that compute, by their names and by the dtypes of their tensors: each has kernels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[tuple[str, frozenset[torch.dtype]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if not func.is_view:
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            dtypes = frozenset(tensor.dtype for tensor in tensors)
            self.operations.add((func.overloadpacket.__name__.rstrip("_"), dtypes))
        return result


@pytest.mark.skipif(support.DEVICE != "host", reason="a sampling on a CPU is held against what a CPU uses")
@pytest.mark.parametrize("kind", ["flux", "zimage"])
def test_what_a_sampling_computes_was_used_before(
    kind: str, folder: Path, legacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: in the dtype that weights are stored in.
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args, **kwargs: None)
    with legacy(), torch.inference_mode():
        model = load(checkpoints.write(folder, kind, "bf16"))
        with _Computing() as by_model:
            sample(model, kind)
    with torch.inference_mode(), _Computing() as before:
        for kernels_of in USUAL:
            _used(kernels_of(CPU, torch.bfloat16))
    # Views to torch but for these tools, memory, and what a CPU has in the place of a GPU's attention.
    no_kernels = set(
        "detach alias lift_fresh item reshape contiguous empty new_empty chunk to is_nonzero flatten set".split()
    )
    no_kernels.add("_has_compatible_shallow_copy_type")
    attention = {"baddbmm", "bmm", "softmax"}
    of_this_test = {"randn", "isfinite", "all"}
    others = no_kernels | attention | of_this_test
    assert {one for one in by_model.operations - before.operations if one[0] not in others} == set()


def test_random_numbers_are_the_applications() -> None:
    before = torch.get_rng_state()
    for kernels_of in USUAL:
        _used(kernels_of(CPU, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_of_patches_are_known_then(native: Callable[..., Any]) -> None:
    _known.clear()
    with native(1 << 30):
        assert warming.of_patches is kernels.of_patches
        assert _used(kernels.of_patches(CPU, torch.bfloat16)) > 5
    assert {(rows, columns) for _, rows, columns, *_ in _known} >= {(192, 64), (64, 256)}
    assert warming.of_patches is None

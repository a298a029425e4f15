"""Weights that are computed when their layer runs: once, where they stay on the device."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.float
import comfy.model_management as management
import comfy.quant_ops
import support
import torch
from running import load, sample, with_lora

import forebay
from forebay.comfyui.native import float8_patch, loaded, patches
from forebay.comfyui.native.loaded import loaded_of
from forebay.comfyui.native.patched_layer import PatchedWeight
from forebay.comfyui.native.quantized import stand_ins_of
from forebay.comfyui.native.weight_patch import WeightPatch
from forebay.parameter import ForebayTensor

_STEPS = 3


@pytest.fixture
def path(folder: Path) -> Path:
    """A small Flux of scaled float8."""
    return checkpoints.write(folder, "flux", "fp8scaled")


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The seeds of the weights that were computed. Rounding is in a way that takes less time on a CPU."""
    seeds: list[int] = []

    def stochastic_rounding(value: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        if value.numel() > 1:  # alone is the largest element, of which a scale is made
            seeds.append(seed)
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed & (1 << 40) - 1))
        return (value.float() * (1 + noise.to(value.device) / 16)).clamp(-448, 448).to(dtype)

    monkeypatch.setattr(comfy.float, "stochastic_rounding", stochastic_rounding)
    yield seeds


def _some_of(path: Path) -> float:
    """Memory for some of the weights: small pages, of which several weights have a part, and what is streamed take the rest."""
    return path.stat().st_size * 1.1


def _stand_ins(model: Any) -> list[ForebayTensor]:
    every = [one for module in model.model.modules() for one in stand_ins_of(module)]
    return [one for one in every if isinstance(one, ForebayTensor)]


def _patches_of(model: Any) -> list[Any]:
    loaded = loaded_of(model.model)
    assert loaded is not None and loaded._patches is not None
    return list(loaded._patches._of.values())


def _patched(path: Path, seed: int = 7) -> Any:
    model = load(path)
    return with_lora(model, checkpoints.lora(model, seed, every=2))


def _diffed(path: Path) -> Any:
    """A clone with a patch that is no product of low rank."""
    model = load(path).clone()
    key = "diffusion_model.single_blocks.1.linear1.weight"
    shape = model.model.diffusion_model.single_blocks[1].linear1.weight.shape
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    assert model.add_patches({key: ("diff", (difference,))}, 0.7) == [key]
    return model


def _expected(path: Path, legacy: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """With and without a LoRA."""
    with legacy():
        return sample(_patched(path), "flux", _STEPS), sample(load(path), "flux", _STEPS)


def test_weights_are_read_while_patches_are_made_unless_they_would_be_read_again(
    path: Path, folder: Path, native: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        at_once.append(kwargs["prefetch"])
        return forebay.attach(*args, **kwargs)

    monkeypatch.setattr(loaded, "attach", noted)
    files = [path, *(checkpoints.write(folder, "flux", stored) for stored in ("fp8", "bf16"))]
    for file in files:
        for budget in (1 << 32, _some_of(file)):
            for made in (load, _patched, _diffed):
                with native(budget):
                    management.load_models_gpu([made(file)])
    of_scaled = [True, False, False, True, True, True]
    # What is stored as float8 is used as bfloat16 here.
    of_others = [True, True, False] * 4
    assert at_once == of_scaled + of_others


def test_patches_are_added_to_what_was_read_by_then(
    folder: Path, legacy: Any, native: Callable[..., Any]
) -> None:
    file = checkpoints.write(folder, "flux", "bf16")
    with legacy():
        expected = sample(_patched(file), "flux", _STEPS)
    for budget in (1 << 32, _some_of(file) / 2):
        with native(budget):
            for _ in range(3):
                model = _patched(file)
                management.load_models_gpu([model])
                assert support.same(sample(model, "flux", _STEPS), expected)
                management.unload_all_models()


def test_what_stays_is_computed_once(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    expected, _ = _expected(path, legacy)
    with native():
        # Of each kind of weight the first is computed twice.
        assert support.same(sample(_patched(path), "flux", _STEPS), expected)
    with native(_some_of(path)) as engine:
        model = _patched(path)
        rounded.clear()
        assert support.same(sample(model, "flux", _STEPS), expected)
        weights = set(rounded)
        again = rounded.count
        assert any(again(seed) < _STEPS for seed in weights), "what is resident is not computed again"
        rounded.clear()
        assert support.same(sample(model, "flux", _STEPS), expected)
        streamed = set(rounded)
        assert len(streamed) < len(weights), "nor in the next run"
        assert all(again(seed) <= _STEPS for seed in streamed)
        for nbytes in (1, path.stat().st_size / 4, 1 << 60):
            assert engine.make_room(nbytes) > 0
            assert support.same(sample(model, "flux", _STEPS), expected)


def test_a_part_that_left_comes_back_as_it_is_stored(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _expected(path, legacy)
    torn: list[str] = []
    read = PatchedWeight._read

    def noted(self: PatchedWeight, stored: Any) -> Any:
        assert self.weight is not None
        torn.append(self.weight.name)
        return read(self, stored)

    monkeypatch.setattr(PatchedWeight, "_read", noted)
    with native(_some_of(path)) as engine:
        model = _patched(path)
        assert support.same(sample(model, "flux", _STEPS), expected)
        # All of them stay from now on, whatever did: what was computed is in every weight's place.
        engine.set_budget(budget=path.stat().st_size * 4)
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert not torn
        # Pages leave that weights share with their neighbours.
        engine.set_budget(budget=path.stat().st_size * 0.8)
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert torn
        torn.clear()
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert not torn, "what was torn is whole again, or not put there any more"


def test_a_model_that_no_longer_fits_is_computed_when_its_layers_run(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    expected, _ = _expected(path, legacy)
    with native() as engine:
        model = _patched(path)
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert all(one.computed is None for one in _patches_of(model))
        engine.set_budget(budget=_some_of(path))
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert all(one.computed is not None for one in _patches_of(model))
        # It stays so: to change costs each weight's pages.
        engine.set_budget(budget=1 << 32)
        assert support.same(sample(model, "flux", _STEPS), expected)
        assert all(one.computed is not None for one in _patches_of(model))


def test_without_patches_it_is_what_is_stored(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    def is_stored(one: ForebayTensor) -> bool:
        # What is not quantized is used in another dtype.
        stored = one._source.to(one.dtype)
        return torch.equal(one._weight.view().cpu().view(torch.uint8), stored.view(torch.uint8))

    with native(_some_of(path)):
        model = _patched(path)
        sample(model, "flux", _STEPS)
        loaded = loaded_of(model.model)
        assert loaded is not None
        assert not all(map(is_stored, _stand_ins(model))), "what was computed is in its place"
        loaded.patch({})
        assert all(map(is_stored, _stand_ins(model)))


def test_another_adapter_takes_its_place(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    def run() -> list[torch.Tensor]:
        model = load(path)
        results = []
        for seed in (7, 8, 7):
            one = with_lora(model, checkpoints.lora(model, seed, every=2))
            results.append(sample(one, "flux", _STEPS))
        return [*results, sample(model, "flux", _STEPS)]

    with legacy():
        expected = run()
    with native(_some_of(path)):
        rounded.clear()
        found = run()
    assert all(map(support.same, found, expected))
    assert not support.same(found[0], found[1])


def test_a_model_that_is_loaded_again_is_what_is_stored(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    expected, plain = _expected(path, legacy)
    with native(_some_of(path)):
        model = _patched(path)
        assert support.same(sample(model, "flux", _STEPS), expected)
        management.unload_all_models()
        assert support.same(sample(load(path), "flux", _STEPS), plain)


def _bytes(count: int, threads: int, seed: int) -> Any:
    """What torch's generator draws on a GPU: Philox4x32-10, four numbers a thread at a time."""
    n = np.arange(count, dtype=np.uint64)
    low, turn, thread = np.uint64(0xFFFFFFFF), n // np.uint64(threads), n % np.uint64(threads)
    zero = np.zeros_like(n)
    words = [turn // np.uint64(4), zero, thread, zero]
    for step in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        keys = [
            np.uint64(((seed & 0xFFFFFFFF) + 0x9E3779B9 * step) & 0xFFFFFFFF),
            np.uint64(((seed >> 32) + 0xBB67AE85 * step) & 0xFFFFFFFF),
        ]
        words = [
            second >> np.uint64(32) ^ words[1] ^ keys[0],
            second & low,
            first >> np.uint64(32) ^ words[3] ^ keys[1],
            first & low,
        ]
    return (np.choose((turn % np.uint64(4)).astype(np.int64), words) & np.uint64(255)).astype(np.float64)


@pytest.fixture
def gpus_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU patches are computed in float32, torch draws other numbers, and comfy_kitchen rounds scales before it multiplies with
    them.
    """
    if support.DEVICE != "host":
        return
    monkeypatch.setitem(management.LORA_COMPUTE_DTYPES, torch.device("cpu"), torch.float16)

    def stochastic_rounding(value: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        threads = float8_patch._generator_threads(value.device, value.numel())
        random = torch.from_numpy(_bytes(value.numel(), threads, seed)).view(value.shape)
        exponent = value.double().abs().log2().floor().clamp_min(-6)
        step = torch.exp2(exponent - 3)
        units = (value.double().abs() / step + random / 256).floor()
        return (torch.sign(value) * (units * step).clamp_max(448)).to(dtype)

    def dequantize(cls: type, data: torch.Tensor, params: Any) -> torch.Tensor:
        return (data.float() * params.scale).to(params.orig_dtype)

    monkeypatch.setattr(comfy.float, "stochastic_rounding", stochastic_rounding)
    monkeypatch.setattr(comfy.quant_ops.TensorCoreFP8E4M3Layout, "dequantize", classmethod(dequantize))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[object, ...], str]:
    """What is found out."""
    known: dict[tuple[object, ...], str] = {}
    monkeypatch.setattr(float8_patch, "_known", known)
    return known


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each time that ComfyUI's own function computes a weight."""
    own: list[int] = []
    compute = WeightPatch.__call__

    def noted(self: WeightPatch, stored: torch.Tensor) -> Any:
        own.append(stored.numel())
        return compute(self, stored)

    monkeypatch.setattr(WeightPatch, "__call__", noted)
    return own


def _two_adapters(path: Path, dtype: torch.dtype) -> torch.Tensor:
    model = load(path, dtype)
    one = with_lora(model, checkpoints.lora(model, 7, rank=16, every=3))
    return sample(with_lora(one, checkpoints.lora(model, 8, rank=5, every=6), -0.3), "flux", _STEPS)


@pytest.mark.usefixtures("gpus_arithmetic")
@pytest.mark.parametrize("stored", ["fp8", "fp8scaled"])
def test_the_engine_rounds_as_a_gpus_generator_says(
    stored: str,
    folder: Path,
    legacy: Any,
    native: Callable[..., Any],
    known: dict[tuple[object, ...], str],
    own: list[int],
) -> None:
    path = checkpoints.write(folder, "flux", stored)
    dtype = torch.float8_e4m3fn if stored == "fp8" else torch.bfloat16
    with legacy():
        expected = _two_adapters(path, dtype)
    for share in (0.5, 1.1):
        own.clear()
        known.clear()
        with native(path.stat().st_size * share):
            assert support.same(_two_adapters(path, dtype), expected)
        assert set(known.values()) == {"scaled" if stored == "fp8scaled" else "requantized"}
        assert len(own) == len(known), "the first of each kind tells"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each time that a layer computes a float8 weight."""
    computed: list[int] = []
    compute = float8_patch.Float8Patch.__call__

    def noted(self: float8_patch.Float8Patch, stored: Any) -> Any:
        computed.append(self._seed)
        return compute(self, stored)

    monkeypatch.setattr(float8_patch.Float8Patch, "__call__", noted)
    return computed


@pytest.mark.usefixtures("gpus_arithmetic")
@pytest.mark.parametrize(("stored", "share"), [("fp8", 0.8), ("fp8scaled", 1.1)])
def test_from_the_second_step_on_the_engine_patches_pages(
    stored: str, share: float, folder: Path, legacy: Any, native: Callable[..., Any], computed: list[int]
) -> None:
    path = checkpoints.write(folder, "flux", stored)
    budget = path.stat().st_size * share
    dtype = torch.float8_e4m3fn if stored == "fp8" else torch.bfloat16

    def adapted(model: Any, seed: int | None) -> Any:
        return model if seed is None else with_lora(model, checkpoints.lora(model, seed, rank=16, every=2))

    seeds = (7, 8, None)
    with legacy():
        model = load(path, dtype)
        expected = [sample(adapted(model, seed), "flux", _STEPS) for seed in seeds]
    assert not any(support.same(expected[0], other) for other in expected[1:])
    with native(budget) as engine:
        model = load(path, dtype)
        for seed, result in zip(seeds, expected, strict=True):
            one = adapted(model, seed)
            computed.clear()
            assert support.same(sample(one, "flux", _STEPS), result)
            patches = _patches_of(one)
            assert all(patch.computed is None and patch.filled for patch in patches)
            assert len(computed) == len(patches), "once each, in the first step"
            for nbytes in (path.stat().st_size / 4, 1 << 60):
                assert engine.make_room(nbytes) > 0
                assert support.same(sample(one, "flux", _STEPS), result)
            engine.set_budget(budget=path.stat().st_size * 4)
            assert support.same(sample(one, "flux", _STEPS), result)
            engine.set_budget(budget=budget)
            assert support.same(sample(one, "flux", _STEPS), result)
            assert len(computed) == len(patches), "and not again"
        management.unload_all_models()
        assert support.same(sample(load(path, dtype), "flux", _STEPS), expected[2])
        model = one = patches = None
        management.unload_all_models()
        gc.collect()
        engine.settle()
        assert not engine.stats()["models"], "nothing keeps what it is kept by"


@pytest.mark.usefixtures("gpus_arithmetic")
def test_layers_compute_weights_until_there_is_memory_for_random_bytes(
    path: Path,
    legacy: Any,
    native: Callable[..., Any],
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = _expected(path, legacy)

    def refused(self: Any, nbytes: int) -> None:
        return None

    with native(_some_of(path)):
        model = _patched(path)
        with monkeypatch.context() as refusing:
            refusing.setattr(patches.Patches, "_memory_for_random", refused)
            assert support.same(sample(model, "flux", _STEPS), expected)
        has = _patches_of(model)
        assert all(patch.computed is not None for patch in has)
        assert len(computed) > len(has)
        assert any(patch.computed._put for patch in has), "what is resident was put in its place"
        for _ in range(2):
            assert support.same(sample(model, "flux", _STEPS), expected)
        assert all(patch.computed is None for patch in _patches_of(model))


@pytest.mark.usefixtures("gpus_arithmetic")
def test_a_scale_that_is_not_comfyuis_is_asked_for_each_weight(
    folder: Path,
    legacy: Any,
    native: Callable[..., Any],
    known: dict[tuple[object, ...], str],
    own: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scales = float8_patch.scales

    def doubled(*args: Any) -> torch.Tensor:
        table = scales(*args)
        assert table is not None
        return table * torch.tensor([2.0, 1.0], device=table.device)

    monkeypatch.setattr(float8_patch, "scales", doubled)
    path = checkpoints.write(folder, "flux", "fp8scaled")
    with legacy():
        expected = _two_adapters(path, torch.bfloat16)
    own.clear()
    with native(path.stat().st_size / 2):
        assert support.same(_two_adapters(path, torch.bfloat16), expected)
    assert set(known.values()) == {"requantized"}
    assert len(own) > len(known)


def test_weights_that_two_layers_share_are_not_replaced(
    path: Path, legacy: Any, native: Callable[..., Any], rounded: list[int]
) -> None:
    name = "diffusion_model.double_blocks.0.img_mlp.0"

    def shared() -> Any:
        model = load(path)
        one, other = model.model.diffusion_model.double_blocks[:2]
        other.img_mlp[0].weight = one.img_mlp[0].weight
        adapter = {key: value for key, value in checkpoints.lora(model).items() if name in key}
        # It is the first one's alone.
        return with_lora(model, adapter)

    with legacy():
        expected = sample(shared(), "flux", _STEPS)
    with native(_some_of(path)):
        model = shared()
        assert support.same(sample(model, "flux", _STEPS), expected)
        weights = Counter(one._weight.address for one in _stand_ins(model))
        assert max(weights.values()) == 2
        (patch,) = _patches_of(model)
        assert patch.computed is not None and patch.computed.weight is None

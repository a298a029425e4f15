"""What ComfyUI's own calls find: loading, unloading, room for others, clones, adapters that change, hooks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import checkpoints
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import support
import torch
from running import load, sample, with_lora

import forebay

_MIB = 1 << 20
_LARGE = 64 << 10
"""Bytes of what is always resident, at most."""


@pytest.fixture
def path(folder: Path) -> Path:
    """A small Flux."""
    return checkpoints.write(folder, "flux", "bf16")


def _held(engine: forebay.Engine) -> int:
    """Bytes that weights take."""
    engine.settle()
    return sum(one["resident"] + one["streamed"] for one in engine.stats()["models"])


def test_unloading_gives_the_model_and_the_memory_back(path: Path, native: Callable[..., Any]) -> None:
    with native() as engine:
        model = load(path)
        before = {name: (p.device, p.dtype) for name, p in model.model.named_parameters()}
        stored = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        first = sample(model, "flux")
        assert _held(engine) > 0
        assert model.loaded_size() > 0
        management.unload_all_models()
        assert model.loaded_size() == 0
        assert _held(engine) == 0
        assert management.loaded_models() == []
        assert {name: (p.device, p.dtype) for name, p in model.model.named_parameters()} == before
        assert support.same(dict(model.model.state_dict()), stored)
        assert support.same(sample(model, "flux"), first)


def test_models_stay_loaded_beside_each_other(path: Path, folder: Path, native: Callable[..., Any]) -> None:
    other_path = checkpoints.write(folder, "wan", "bf16")
    with native(path.stat().st_size / 4) as engine:
        model, other = load(path), load(other_path)
        first, second = sample(model, "flux"), sample(other, "wan")
        assert {id(one.model) for one in management.loaded_models()} == {id(model.model), id(other.model)}
        assert _held(engine) <= path.stat().st_size / 4
        assert support.same(sample(model, "flux"), first)
        assert support.same(sample(other, "wan"), second)


def test_accounts(path: Path, native: Callable[..., Any]) -> None:
    with native(path.stat().st_size / 4) as engine:
        model = load(path)
        size = model.model_size()
        assert path.stat().st_size * 0.99 < size < path.stat().st_size * 1.01
        assert model.loaded_size() == 0
        management.load_models_gpu([model])
        assert model.is_dynamic() and model.model_size() == size
        assert model.current_loaded_device() == model.load_device
        sample(model, "flux")
        assert 0 < model.loaded_size() <= min(size, engine.budget)
        assert model.model_size() == size
        assert model.clone().model_size() == size
        freed = model.partially_unload(model.offload_device, 1e32)
        assert freed > 0
        assert model.loaded_size() < size / 8
        assert model in management.loaded_models()


def test_a_plain_model_gets_room(path: Path, native: Callable[..., Any]) -> None:
    """Loading a model that cannot leave by itself takes the memory of one that can."""
    with native() as engine:
        model = load(path)
        expected = sample(model, "flux")
        before = _held(engine)
        management.free_memory(1e30, model.load_device)
        assert _held(engine) < before / 4
        assert support.same(sample(model, "flux"), expected)


def test_a_model_that_nobody_has_any_more_leaves(path: Path, native: Callable[..., Any]) -> None:
    with native() as engine:
        model = load(path)
        clone = model.clone()
        sample(clone, "flux", steps=1)
        del model
        assert len(engine.stats()["models"]) == 1
        del clone
        management.cleanup_models_gc()
        gc.collect()
        assert _held(engine) == 0


@pytest.mark.parametrize("stored", ["bf16", "fp8scaled"])
def test_adapters_change(stored: str, folder: Path, legacy: Any, native: Callable[..., Any]) -> None:
    path = checkpoints.write(folder, "flux", stored)

    def variants(base: Any) -> list[Any]:
        # ComfyUI's rounding to fp8 takes seconds a layer on a CPU.
        every = 5 if stored == "fp8scaled" else 1
        one, other = checkpoints.lora(base, 7, every=every), checkpoints.lora(base, 8, every=every + 1)
        return [
            base,
            with_lora(base, one),
            with_lora(base, one, 0.3),
            with_lora(with_lora(base, one), other),
            with_lora(base, other),
        ]

    # Each from a fresh model: ComfyUI's backups are no part of what is compared.
    expected = []
    for number in range(5):
        with legacy():
            expected.append(sample(variants(load(path))[number], "flux", steps=1))
    assert not support.same(expected[0], expected[1])
    with native(12 * _MIB):
        models = variants(load(path))
        for number in [0, 1, 2, 1, 3, 4, 0, 3]:
            assert support.same(sample(models[number], "flux", steps=1), expected[number]), number


def _watch(monkeypatch: pytest.MonkeyPatch, note: Callable[[str, torch.Tensor], None]) -> None:
    """Tells of every weight that ComfyUI's own function computes, and of its stored bytes."""
    from forebay.comfyui.native.weight_patch import WeightPatch

    call = WeightPatch.__call__

    def noted(self: Any, stored: torch.Tensor) -> Any:
        note(self._key, stored)
        return call(self, stored)

    monkeypatch.setattr(WeightPatch, "__call__", noted)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The large weights that ComfyUI's own function computes."""
    names: set[str] = set()
    _watch(monkeypatch, lambda name, stored: names.update([name] if stored.nbytes > _LARGE else []))
    return names


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often ComfyUI's own function computes each weight."""
    times: Counter[str] = Counter()
    _watch(monkeypatch, lambda name, _: times.update([name]))
    return times


@pytest.fixture(params=["float16", "float32"])
def compute_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI computes patches in: the one on most cards, the other on the CPU."""
    device, dtype = management.get_torch_device(), getattr(torch, request.param)
    monkeypatch.setitem(management.LORA_COMPUTE_DTYPES, device, dtype)
    assert management.lora_compute_dtype(device) is dtype


@pytest.mark.usefixtures("compute_dtype")
@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
def test_the_engine_adds_products_of_low_rank(
    stored: str, folder: Path, legacy: Any, native: Callable[..., Any], computed: set[str]
) -> None:
    path = checkpoints.write(folder, "flux", stored)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model = load(path, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[stored])
        one = with_lora(model, checkpoints.lora(model, 7, rank=16))
        other = with_lora(one, checkpoints.lora(model, 8, rank=5, every=2), -0.3)
        return sample(one, "flux", steps=1), sample(other, "flux", steps=1)

    with legacy():
        expected = run()
    assert not support.same(*expected)
    for budget in (path.stat().st_size / 4, 1 << 30):
        with native(budget):
            assert support.same(run(), expected)
    if support.DEVICE == "host":
        # A card's own arithmetic decides.
        assert not computed


@pytest.mark.usefixtures("compute_dtype")
def test_what_is_no_product_alone_is_computed_by_comfyui(
    path: Path, legacy: Any, native: Callable[..., Any], computed: set[str]
) -> None:
    def run() -> tuple[torch.Tensor, set[str]]:
        model = load(path).clone()
        tensors = checkpoints.lora(model)
        layers = sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
        dora, offset, strength, diff, moved = layers[::4][:5]
        generator = torch.Generator().manual_seed(3)
        columns = model.model.get_submodule(dora).in_features
        tensors[f"{dora}.dora_scale"] = torch.rand(1, columns, generator=generator) + 0.5
        model = with_lora(model, tensors)
        patches = {f"{name}.weight": model.patches[f"{name}.weight"][0][1] for name in layers}
        rows = model.model.get_submodule(offset).out_features
        down = torch.randn(2, model.model.get_submodule(offset).in_features, generator=generator) * 0.05
        up = torch.randn(rows // 2, 2, generator=generator) * 0.05
        half = type(patches[f"{offset}.weight"])(set(), (up, down, None, None, None, None))
        model.add_patches({(f"{offset}.weight", (0, rows // 4, rows // 2)): half})
        model.add_patches({f"{strength}.weight": patches[f"{strength}.weight"]}, 0.5, 0.75)
        weight = model.model.get_submodule(diff).weight
        model.add_patches({f"{diff}.weight": ("diff", (torch.full(weight.shape, 0.001),))})
        model.add_patches({(f"{moved}.weight", None, lambda tensor: tensor * 2): patches[f"{moved}.weight"]})
        return sample(model, "flux", steps=1), {
            f"{name}.weight" for name in (dora, offset, strength, diff, moved)
        }

    with legacy():
        expected, others = run()
    for budget in (12 * _MIB, 1 << 30):
        with native(budget):
            result, _ = run()
            assert support.same(result, expected)
        if support.DEVICE == "host":
            assert computed == others
        computed.clear()


def test_where_the_sums_differ_comfyui_computes(
    path: Path, native: Callable[..., Any], computed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from forebay.comfyui.native import patches

    def run() -> torch.Tensor:
        model = load(path)
        return sample(with_lora(model, checkpoints.lora(model)), "flux", steps=1)

    with native(12 * _MIB):
        expected = run()
        computed.clear()
        monkeypatch.setattr(
            patches, "sums_as_torch", lambda _engine, _device, shapes: dict.fromkeys(shapes, False)
        )
        assert support.same(run(), expected)
    assert len(computed) > 10


@pytest.mark.usefixtures("compute_dtype")
@pytest.mark.parametrize("differs", [False, True], ids=["same", "other"])
@pytest.mark.parametrize("stored", ["fp8", "fp8scaled"])
def test_float8_weights_are_computed_by_comfyui_once(
    stored: str,
    differs: bool,
    folder: Path,
    legacy: Any,
    native: Callable[..., Any],
    times: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from forebay.comfyui.native import float8_patch

    path = checkpoints.write(folder, "flux", stored)
    steps = 3

    def run() -> torch.Tensor:
        model = load(path, torch.float8_e4m3fn if stored == "fp8" else torch.bfloat16)
        one = with_lora(model, checkpoints.lora(model, 7, rank=16, every=7))
        return sample(with_lora(one, checkpoints.lora(model, 8, rank=5, every=14), -0.3), "flux", steps=steps)

    with legacy():
        expected = run()
    times.clear()
    known: dict[tuple[object, ...], str] = {}
    monkeypatch.setattr(float8_patch, "_known", known)
    if differs:
        monkeypatch.setattr(float8_patch, "_is_same", lambda *_: False)
    with native(12 * _MIB):
        assert support.same(run(), expected)
    large = {name: count for name, count in times.items() if name.startswith("diffusion_model.")}
    if support.DEVICE == "host":
        assert set(large.values()) == ({steps} if differs else {1})
    assert len(large) > 3
    if differs:
        assert set(known.values()) == {"own"}


def test_adapters_do_not_depend_on_what_is_resident(path: Path, native: Callable[..., Any]) -> None:
    results = []
    for budget in (12 * _MIB, 1 << 30):
        with native(budget):
            model = load(path)
            results.append(sample(with_lora(model, checkpoints.lora(model)), "flux"))
    assert support.same(*results)


def test_differences_of_biases_and_norms(path: Path, legacy: Any, native: Callable[..., Any]) -> None:
    """Patches of small weights, and of parameters of modules that cast nothing."""
    generator = torch.Generator().manual_seed(5)

    def run() -> torch.Tensor:
        model = load(path).clone()
        patches = {
            name: ("diff", (torch.randn(tensor.shape, generator=generator.manual_seed(len(name))) * 0.01,))
            for name, tensor in model.model.state_dict().items()
            if name.startswith("diffusion_model.") and tensor.ndim == 1
        }
        assert len(model.add_patches(patches, 0.7)) == len(patches) > 10
        return sample(model, "flux", steps=1)

    with legacy():
        expected = run()
    with native(12 * _MIB):
        assert support.same(run(), expected)


def test_merged_models(path: Path, folder: Path, legacy: Any, native: Callable[..., Any]) -> None:
    """As ComfyUI's merge nodes: the weights of one model are patches of the other, also once it is unloaded."""
    other_folder = folder / "other"
    other_folder.mkdir(exist_ok=True)
    other_path = checkpoints.write(other_folder, "flux", "fp16")

    def run(load_other: bool) -> torch.Tensor:
        model, other = load(path), load(other_path)
        if load_other:
            sample(other, "flux", steps=1)
        merged = model.clone()
        for key, patches in other.get_key_patches("diffusion_model.").items():
            merged.add_patches({key: patches}, 0.25, 0.75)
        management.unload_all_models()
        return sample(merged, "flux", steps=1)

    with legacy():
        expected = run(False)
    with native(12 * _MIB):
        assert support.same(run(True), expected)


def test_patched_objects(path: Path, legacy: Any, native: Callable[..., Any]) -> None:
    """A layer that is put in another's place comes to the device, and the first comes back."""

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = load(path)
        first = sample(model, "flux", steps=1)
        clone = model.clone()
        layer = comfy.ops.manual_cast.Linear(64, 512, dtype=torch.bfloat16)
        weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
        layer.load_state_dict({"weight": weight.bfloat16(), "bias": torch.ones(512).bfloat16()})
        clone.add_object_patch("diffusion_model.img_in", layer)
        return first, sample(clone, "flux", steps=1), sample(model, "flux", steps=1)

    with legacy():
        expected = run()
    assert not support.same(expected[0], expected[1])
    with native(12 * _MIB):
        assert support.same(run(), expected)


def test_weight_wrappers(path: Path, legacy: Any, native: Callable[..., Any]) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model = load(path)
        clone = model.clone()
        clone.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * 1.5)
        return sample(clone, "flux", steps=1), sample(model, "flux", steps=1)

    with legacy():
        expected = run()
    assert not support.same(*expected)
    with native(12 * _MIB):
        assert support.same(run(), expected)


def test_another_compute_dtype(path: Path, legacy: Any, native: Callable[..., Any]) -> None:
    def run() -> torch.Tensor:
        model = load(path).clone()
        model.set_model_compute_dtype(torch.float32)
        return sample(model, "flux", steps=1)

    with legacy():
        expected = run()
    with native(12 * _MIB):
        assert support.same(run(), expected)


def test_weight_hooks_run_on_a_plain_copy(path: Path, native: Callable[..., Any]) -> None:
    with native():
        model = load(path)
        expected = sample(model, "flux", steps=1)
        plain = model.get_non_dynamic_delegate()
        assert not plain.is_dynamic() and plain.model is not model.model
        assert support.same(sample(plain, "flux", steps=1), expected)


def test_models_on_the_processor_beside_a_card_are_plain(
    path: Path, native: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    with native():
        model = load(path).model
        monkeypatch.setattr(management, "cpu_mode", lambda: False)
        kind = comfy.model_patcher.CoreModelPatcher
        assert not kind(model, load_device=cpu, offload_device=cpu).is_dynamic()
        assert kind(model, load_device=torch.device("cuda:0"), offload_device=cpu).is_dynamic()


def test_out_of_memory_is_what_comfyui_retries() -> None:
    assert management.is_oom(torch.cuda.OutOfMemoryError("none left"))


def test_an_operation_that_cannot_fit(path: Path, native: Callable[..., Any]) -> None:
    with native(4 * _MIB):
        model = load(path)
        with pytest.raises(forebay.OutOfMemoryError, match="needs") as caught:
            sample(model, "flux", steps=1)
        assert management.is_oom(caught.value)
        management.raise_non_oom(caught.value)


def test_the_file_is_mapped_not_copied(folder: Path, native: Callable[..., Any]) -> None:
    path = checkpoints.write(folder, "sd15", "fp16")
    with native(256 * _MIB):
        before = _anonymous()
        model = load(path, torch.float16)
        management.load_models_gpu([model])
        assert _anonymous() - before < path.stat().st_size / 8


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def test_installing_before_comfyui_is_imported() -> None:
    program = """
import sys
from forebay.comfyui import native, substitute
native.install()
native.install()
assert "torch" not in sys.modules
substitute.install()
sys.path[:0] = sys.argv[1:3]
import sound
sound.import_or_stand_in()
import comfy.cli_args
comfy.cli_args.args.cpu = sys.argv[3] == "host"
import comfy.model_patcher
assert comfy.model_patcher.ModelPatcherDynamic.__name__ == "ForebayModelPatcher"
native.uninstall()
assert comfy.model_patcher.ModelPatcherDynamic.__name__ == "ModelPatcherDynamic"
assert comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcher
"""
    folders = [os.environ["COMFYUI_ROOT"], str(Path(__file__).parent)]
    subprocess.run([sys.executable, "-c", program, *folders, support.DEVICE], check=True, timeout=200)

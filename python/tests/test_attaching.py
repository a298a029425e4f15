"""Attaching and detaching: what is put where, and back."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support import DEVICE, MIB, TORCH_DEVICE, linears, move, press, randomize, reference, same
from torch import nn

import forebay


def standing(module: nn.Module) -> list[tuple[str, int]]:
    """Which objects stand where in a module, its methods included."""
    return [
        (f"{prefix}.{name}", id(value))
        for prefix, part in module.named_modules()
        for table in (part._parameters, part._buffers, {k: v for k, v in vars(part).items() if callable(v)})
        for name, value in table.items()
    ]


@pytest.fixture
def module() -> nn.Module:
    return randomize(
        nn.ModuleList([
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.LSTM(256, 256), nn.MultiheadAttention(256, 4),
            nn.Embedding(1000, 64),
        ])
    )  # fmt: skip


def test_detach_puts_everything_back(module, engine) -> None:
    before, flat = standing(module), list(map(id, module[2]._flat_weights))
    attachment = forebay.attach(module, engine(16))
    assert standing(module) != before
    attachment.detach()
    attachment.detach()
    assert standing(module) == before
    assert list(map(id, module[2]._flat_weights)) == flat


def test_parameters_that_share_memory_come_back_each(engine) -> None:
    model = linears(2, 512)
    model[1].weight = nn.Parameter(model[0].weight.data)
    before = standing(model)
    with forebay.attach(model, engine(8)):
        assert model[0].weight is model[1].weight
    assert standing(model) == before


def test_weights_that_are_to_be_whole_give_the_same(engine) -> None:
    module = randomize(linears(8, 1500)).to(torch.bfloat16)
    plain = reference(module)
    x = move(torch.randn(2, 1500, dtype=torch.bfloat16))
    device = engine(30)
    with forebay.attach(module, device, page_size=2 * MIB, whole=True):
        for _ in range(3):
            assert same(module(x), plain(x))
        weights = [layer.weight._weight for layer in module]
        assert any(weight.is_resident for weight in weights)
        assert not all(weight.is_resident for weight in weights)
        for weight in weights:
            serials = weight.serials
            weight.refill()
            assert same(module(x), plain(x))
            assert set(weight.serials).isdisjoint(serials)


def test_the_context_manager_detaches(module, engine) -> None:
    before = standing(module)
    with pytest.raises(KeyError), forebay.attach(module, engine(16)) as attachment:
        assert isinstance(module[0].weight, forebay.ForebayParameter)
        assert "ModuleList" in repr(attachment)
        raise KeyError
    assert standing(module) == before
    assert "detached" in repr(attachment)


def test_detach_by_module(module, engine) -> None:
    forebay.attach(module, engine(16))
    forebay.detach(module)
    with pytest.raises(ValueError, match="not attached: ModuleList"):
        forebay.detach(module)


def test_stand_ins_of_a_detached_model_say_so(module, engine) -> None:
    with forebay.attach(module, engine(16)):
        weight = module[0].weight
    with pytest.raises(forebay.DetachedError, match=r"\"ModuleList\" was detached"):
        weight + 1
    assert weight.shape == (512, 512)


def test_attaching_twice_is_an_error_that_names_the_weight(module, engine) -> None:
    with forebay.attach(module, engine(16)):
        for part in (module, module[0], [module[2]], nn.Sequential(module[1])):
            with pytest.raises(ValueError, match=r"is attached already; detach\(\) it first: .*weight"):
                forebay.attach(part, engine(16))
        assert isinstance(module[0].weight, forebay.ForebayParameter)


@pytest.mark.parametrize("last", ["meta", "lazy"])
def test_an_attach_that_fails_leaves_the_module_as_it_was(module, engine, last) -> None:
    bad = nn.Linear(4, 4, device="meta") if last == "meta" else nn.LazyLinear(4)
    other = linears(2, 512)
    before = standing(module), standing(other)
    module.append(bad)
    with pytest.raises(ValueError, match=r"5\.weight of b"):
        forebay.attach({"a": other, "b": module}, engine(16))
    del module[5]
    assert (standing(module), standing(other)) == before


def test_small_weights_that_do_not_fit(module, engine) -> None:
    before = standing(module)
    with pytest.raises(forebay.OutOfMemoryError, match="the budget is 4 MiB"):
        forebay.attach(module, engine(4), page_size=2 * MIB, small=1 << 30)
    assert standing(module) == before


class Pipeline:
    def __init__(self, **parts: object) -> None:
        self.components = parts


@pytest.mark.parametrize("kind", ["pipeline", "dict", "list", "tuple"])
def test_several_modules_at_once(kind, engine) -> None:
    first, second = randomize(linears(2, 512)), randomize(linears(2, 512))
    x = move(torch.randn(2, 512))
    expected = reference(second)(reference(first)(x))
    target = {
        "pipeline": Pipeline(first=first, tokenizer=object(), second=second, again=first, nothing=None),
        "dict": {"first": first, "second": second},
        "list": [first, second],
        "tuple": (first, second),
    }[kind]
    with forebay.attach(target, engine(6), page_size=2 * MIB, name="both") as attachment:
        assert len(attachment.models) == 2
        assert all(model.name.startswith("both.") for model in attachment.models)
        for _ in range(2):
            assert same(second(first(x)), expected)
        assert attachment.page_map().keys() == {model.name for model in attachment.models}
    assert type(first[0].weight) is type(second[0].weight) is nn.Parameter


def test_parts_that_share_a_module(engine) -> None:
    shared = linears(1, 512)
    first, second = nn.Sequential(shared, nn.Linear(512, 512)), nn.Sequential(shared, nn.Linear(512, 512))
    x = move(torch.randn(2, 512))
    expected = reference(first)(x), reference(second)(x)
    with forebay.attach([first, second], engine(16)):
        assert same((first(x), second(x)), expected)
    assert type(shared[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    "wrong", [None, 3, "model", object(), [], {}, [1, 2], SimpleNamespace(components={})]
)
def test_no_module_is_a_type_error(wrong) -> None:
    with pytest.raises(TypeError, match=rf"attach takes an nn\.Module.*{type(wrong).__name__}"):
        forebay.attach(wrong, "host")


def test_a_parameter_replaced_meanwhile_stays(module, engine) -> None:
    with forebay.attach(module, engine(16)):
        mine = module[0].weight = nn.Parameter(torch.randn(512, 512))
    assert module[0].weight is mine


def test_buffers_keep_their_identity_and_what_was_written(engine) -> None:
    module = nn.BatchNorm1d(64)
    untouched, counter = module.running_mean, module.num_batches_tracked
    with forebay.attach(module, engine(4)):
        module.num_batches_tracked.add_(3)
        assert module.running_mean.device == TORCH_DEVICE
    assert module.running_mean is untouched
    assert module.num_batches_tracked.item() == counter.item() == 3 or DEVICE != "host"
    assert module.num_batches_tracked.device.type == "cpu"


def test_parameters_of_other_kinds_stay_what_they_are(engine) -> None:
    class Special(nn.Parameter):
        pass

    module = nn.Module()
    module.special = Special(torch.randn(300, 300), requires_grad=False)
    module.sparse = nn.Parameter(torch.eye(50).to_sparse(), requires_grad=False)
    special = module.special
    with forebay.attach(module, engine(4)):
        assert isinstance(module.special, Special)
        assert module.special.device == module.sparse.device == TORCH_DEVICE
        assert module.sparse.is_sparse
    assert module.special is special


def test_a_model_that_is_dropped_gives_its_memory_up(engine) -> None:
    held = engine(16)
    module = randomize(linears(3, 512))
    forebay.attach(module, held)
    module(move(torch.randn(1, 512)))
    assert held.stats()["models"]
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    held.settle()
    assert held.stats()["models"] == []


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at-once"])
@pytest.mark.parametrize("budget", [16, 64])
def test_weights_are_read_before_their_first_use_when_asked(budget, at_once, engine) -> None:
    model, x = randomize(linears(10)), move(torch.randn(4, 1024))
    expected = reference(model)(x)
    held = engine(budget)
    with forebay.attach(model, held, page_size=2 * MIB, prefetch=at_once) as attachment:
        if not at_once:
            assert attachment.stats()[0]["filled_pages"] <= 1, "small weights alone"
            attachment.prefetch()
        wanted, end = min(budget - 4, 40) * MIB, time.monotonic() + 20
        while attachment.stats()[0]["filled"] < wanted and time.monotonic() < end:
            time.sleep(0.002)
        assert attachment.stats()[0]["filled"] >= wanted
        assert same(model(x), expected)
    attachment.prefetch()  # of a detached model: nothing


def test_detach_while_a_view_lives(module, engine) -> None:
    held = engine(16)
    expected = module[0].weight.clone().to(TORCH_DEVICE)
    attachment = forebay.attach(module, held)
    view = module[0].weight[3:]
    attachment.detach()
    press(held)
    assert same(view, expected[3:])
    del view
    held.settle()
    press(held)
    assert held.stats()["held"] == 0


def test_detach_while_lent(module, engine) -> None:
    before = standing(module)
    attachment = forebay.attach(module, engine(16))
    with forebay.lend(module[3]):
        attachment.detach()
        assert standing(module) == before
    assert standing(module) == before


def test_a_second_model_takes_memory_from_the_first(engine) -> None:
    held = engine(8)
    models = [randomize(linears(5, 512)) for _ in range(2)]
    x = move(torch.randn(2, 512))
    expected = [reference(model)(x) for model in models]
    with forebay.attach(models[0], held, page_size=2 * MIB) as first:
        assert same(models[0](x), expected[0])
        alone = first.stats()[0]["resident"]
        with forebay.attach(models[1], held, page_size=2 * MIB) as second:
            for _ in range(3):
                assert same(models[1](x), expected[1])
            assert first.stats()[0]["resident"] < alone
            second.deprioritize()
            first.prioritize()
            assert same(models[0](x), expected[0])
            assert same(models[1](x), expected[1])


def resources() -> tuple[int, int, int]:
    """Descriptors, lines of the memory map that are not the allocator's, threads."""
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd" in line or "forebay" in line for line in maps)
    return (
        len(os.listdir("/proc/self/fd")),
        mapped,
        threading.active_count() + len(os.listdir("/proc/self/task")),
    )


def test_hundreds_of_rounds_leave_nothing_behind(engine) -> None:
    held = engine(8)
    module, x = randomize(linears(2, 256)), move(torch.randn(1, 256))
    expected = reference(module)(x)
    for round_ in range(300):
        with forebay.attach(module, held, page_size=2 * MIB):
            assert same(module(x), expected)
        if round_ == 20:
            held.settle()
            press(held)
            before, lines = resources(), map_lines()
    held.settle()
    press(held)
    assert resources() == before
    assert map_lines() <= lines + 20
    assert held.stats()["models"] == []


def map_lines() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def test_engines_leave_nothing_behind(engine) -> None:
    module = linears(1, 256)
    for round_ in range(30):
        forebay.attach(module, engine(8)).detach()
        if round_ == 5:
            before = resources()
    assert resources() == before


def test_a_model_detached_with_its_memory_kept_finds_it_again(engine, tmp_path) -> None:
    model = randomize(linears(4, 768))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    model.load_state_dict(forebay.load(path), assign=True)
    model.requires_grad_(False)
    x = move(torch.randn(1, 768))
    chosen = engine(64)
    first = forebay.attach(model, chosen)
    expected = model(x)
    first.detach(keep=True)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    (parked,) = forebay.stats(chosen)["models"]
    assert parked["parked"] and parked["resident"] > 0
    again = forebay.attach(model, chosen)
    same(model(x), expected)
    assert again.stats()[0]["filled"] == 0, "nothing was copied again"
    forebay.detach(model, keep=True)
    assert chosen.clear_parked() == 1
    chosen.settle()
    assert forebay.stats(chosen)["models"] == []


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_many_objects_are_made(engine, enabled) -> None:
    model, chosen, begun = linears(200, 64), engine(8), []
    forebay.attach(linears(1, 64), chosen).detach()  # what is imported and made once
    thresholds = gc.get_threshold()
    gc.callbacks.append(lambda phase, info: begun.append(phase) if phase == "start" else None)
    try:
        gc.set_threshold(100)
        if not enabled:
            gc.disable()
        begun.clear()
        attachment = forebay.attach(model, chosen)
        during = len(begun)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="attached already"):
            forebay.attach(nn.ModuleList([model]), chosen)
        assert gc.isenabled() == enabled, "also where attaching failed"
    finally:
        gc.callbacks.pop()
        gc.enable()
        gc.set_threshold(*thresholds)
    attachment.detach()
    # What comes before and after it makes objects as well; 26 for each weight would be 50 collections and more.
    assert during <= 5

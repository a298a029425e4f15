"""The explicit interface: fault, fill, use, unpin."""

from __future__ import annotations

import gc

import pytest
import torch
from support import MIB, TORCH_DEVICE, linears, press, randomize

import forebay

PAGE = 32 * MIB


def test_the_documented_round(engine) -> None:
    vbar = forebay.Vbar(10 << 30, engine(64))
    weight = torch.randn(1000, 777)
    place, before = vbar.alloc(weight.nbytes), None
    for round_ in range(4):
        now = forebay.fault(place)
        assert now is not None
        tensor = place.tensor(weight.dtype, weight.shape)
        assert tensor.data_ptr() == place.address
        if now != before:
            assert round_ in (0, 2)
            tensor.copy_(weight)
            before = now
        assert torch.equal(tensor, weight.to(TORCH_DEVICE))
        forebay.unpin(place)
        if round_ == 1:
            press(vbar._engine)
            assert forebay.fault(place) is None  # until it is asked for again
            vbar.prioritize()


def test_equal_signatures_mean_equal_contents(engine) -> None:
    vbar = forebay.Vbar(1 << 30, engine(64))
    places = [vbar.alloc(PAGE) for _ in range(5)]
    known: dict[int, tuple[forebay.Signature, int]] = {}
    for step in range(40):
        which = step * 7 % 5
        if (now := forebay.fault(places[which])) is None:
            continue
        tensor = places[which].tensor(torch.int64)
        if which in known and known[which][0] == now:
            assert (tensor[:: 1 << 16] == known[which][1]).all()
        else:
            tensor.fill_(step)
            known[which] = now, step
        forebay.unpin(places[which])
        if step % 11 == 0:
            vbar.free(PAGE)
    assert known


def test_a_pinned_allocation_is_never_taken(engine) -> None:
    vbar = forebay.Vbar(1 << 30, engine(64))
    first, second, third = (vbar.alloc(PAGE) for _ in range(3))
    now = forebay.fault(first)
    first.tensor(torch.int32).fill_(11)
    assert forebay.fault(second) is not None
    press(vbar._engine)
    assert forebay.signature(first) == now
    second.unpin()
    assert forebay.fault(third) is None or third.unpin() is None
    assert (first.tensor(torch.int32)[:: 1 << 18] == 11).all()
    first.unpin()


def test_signature_without_a_fault(engine) -> None:
    vbar = forebay.Vbar(1 << 30, engine(64))
    place = vbar.alloc(100)
    assert forebay.signature(place) is None
    now = forebay.fault(place)
    assert forebay.signature(place) == now == place.fault()
    place.unpin()
    place.unpin()
    press(vbar._engine)
    assert forebay.signature(place) is None
    assert vbar.residency[0] == (False, False)


def test_watermark(engine) -> None:
    vbar = forebay.Vbar(8 * PAGE, engine(256))
    places = [vbar.alloc(PAGE) for _ in range(8)]
    assert all(forebay.fault(place) for place in places)
    for place in places:
        place.unpin()
    assert vbar.watermark == 8
    vbar.set_watermark(3 * PAGE)
    assert vbar.watermark == 3
    vbar._engine.settle()
    assert [backed for backed, _ in vbar.residency] == [True] * 3 + [False] * 5
    assert forebay.fault(places[3]) is None
    vbar.prioritize()
    assert vbar.watermark == 8
    assert forebay.fault(places[3]) is not None
    places[3].unpin()


def test_watermark_limit(engine) -> None:
    held = engine(256)
    vbar = forebay.Vbar(4 * PAGE, held)
    places = [vbar.alloc(PAGE) for _ in range(4)]
    for place in places:
        assert forebay.fault(place)
        place.unpin()
    vbar.set_watermark_limit(2 * PAGE)
    assert vbar.free(1 << 40) == 2 * PAGE
    held.settle()
    assert [backed for backed, _ in vbar.residency] == [True, True, False, False]
    vbar.set_watermark_limit(0)
    press(held)
    assert not any(backed for backed, _ in vbar.residency)


def test_a_fault_beyond_the_budget_is_refused(engine) -> None:
    vbar = forebay.Vbar(8 * PAGE, engine(64))
    places = [vbar.alloc(PAGE) for _ in range(3)]
    assert forebay.fault(places[0]) and forebay.fault(places[1])
    assert forebay.fault(places[2]) is None
    whole = forebay.Vbar(8 * PAGE, vbar._engine).alloc(4 * PAGE)
    assert forebay.fault(whole) is None


def test_sizes_that_make_no_sense(engine) -> None:
    held = engine(64)
    for size in (0, -1, float("nan"), "1"):
        with pytest.raises(ValueError):
            forebay.Vbar(size, held)
    vbar = forebay.Vbar(PAGE, held)
    with pytest.raises(ValueError, match="has 32 MiB left, not 33 MiB"):
        vbar.alloc(33 * MIB)
    place = vbar.alloc(1001)
    assert vbar.alloc(1).address - place.address == 1024
    with pytest.raises(ValueError, match=r"a tensor of 2000 bytes does not fit in 1001"):
        place.tensor(torch.float16, (1000,))
    assert place.tensor().shape == (1001,)
    assert place.tensor(torch.float32).shape == (250,)
    assert place.tensor(torch.float32, ()).shape == ()
    assert place.tensor(torch.float32, (0, 3)).shape == (0, 3)


def test_tensors_outlive_the_vbar(engine) -> None:
    held = engine(64)
    vbar = forebay.Vbar(PAGE, held)
    place = vbar.alloc(4096)
    assert forebay.fault(place)
    tensor = place.tensor(torch.uint8)
    tensor.fill_(5)
    del vbar, place
    gc.collect()
    assert (tensor == 5).all()
    del tensor
    held.settle()
    press(held)


def test_beside_an_attached_model(engine) -> None:
    held = engine(64)
    model = randomize(linears(3, 1024))
    vbar = forebay.Vbar(4 * PAGE, held, name="mine")
    with forebay.attach(model, held):
        x = torch.randn(1, 1024, device=TORCH_DEVICE)
        expected = model(x)
        place = vbar.alloc(PAGE)
        assert forebay.fault(place) is not None
        assert torch.equal(model(x), expected)
        place.unpin()
        assert {one["name"] for one in held.stats()["models"]} == {"mine", "Sequential"}
    assert vbar.stats()["name"] == "mine"

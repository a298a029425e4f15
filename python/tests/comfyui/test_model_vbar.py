"""Address ranges of models: the contract by which ComfyUI uses them."""

from __future__ import annotations

import gc

import pytest
import torch
from support import MIB, press

from forebay.comfyui.aimdo import model_vbar
from forebay.comfyui.aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_signature_compare, vbar_unpin
from forebay.comfyui.aimdo.torch import aimdo_to_tensor

PAGE = 32 * MIB


def test_fault_fill_use_unpin(comfy) -> None:
    made = comfy(64)
    vbar = ModelVBAR(10 << 30, made.id)
    weight = torch.randint(0, 256, (3 * MIB + 7,), dtype=torch.uint8)
    place, before = vbar.alloc(weight.nbytes), None
    assert type(place) is tuple and place[0] is vbar and place[2] == weight.nbytes
    for step in range(4):
        now = vbar_fault(place)
        assert now is not None
        assert vbar_signature_compare(now, before) == (step % 2 == 1)
        tensor = aimdo_to_tensor(place, made.device)
        assert tensor.data_ptr() == place[1]
        if step % 2 == 0:
            tensor.copy_(weight)
            before = now
        assert torch.equal(tensor.cpu(), weight)
        vbar_unpin(place)
        if step == 1:
            press(made.engine)
            vbar.prioritize()


def test_allocations(comfy) -> None:
    vbar = ModelVBAR(PAGE, comfy(64).id)
    first, second = vbar.alloc(1001), vbar.alloc(1)
    assert first[1] == vbar.base_addr and second[1] - first[1] == 1024
    assert vbar.offset == 1025 and vbar.max_size == PAGE and vbar.get_nr_pages() == 1
    with pytest.raises(MemoryError):
        vbar.alloc(PAGE)
    assert vbar.offset == 1025
    for wrong in (-1, 1 << 70):
        with pytest.raises(ValueError):
            vbar.alloc(wrong)
    with pytest.raises(TypeError):
        vbar.alloc("1")
    nothing = vbar.alloc(0)
    assert vbar_fault(nothing) is not None
    assert aimdo_to_tensor(nothing, "cpu").numel() == 0
    vbar_unpin(nothing)


def test_ranges_that_make_no_sense(comfy) -> None:
    made = comfy(64)
    for wrong in (0, -1, 1 << 63):
        with pytest.raises(ValueError):
            ModelVBAR(wrong, made.id)
    with pytest.raises(TypeError):
        ModelVBAR(1.5, made.id)
    with pytest.raises(RuntimeError, match="no such device"):
        ModelVBAR(PAGE, 99)
    with pytest.raises(NotImplementedError):
        ModelVBAR(PAGE, made.id, print)
    vbar = ModelVBAR(PAGE, made.id, pageout_callback=None)
    for address, size in (
        (vbar.base_addr - 1, 1),
        (vbar.base_addr, PAGE + 1),
        (vbar.base_addr + PAGE, 1),
        (0, 1),
    ):
        for call in (vbar_fault, vbar_unpin, lambda place: aimdo_to_tensor(place, made.device)):
            with pytest.raises(ValueError):
                call((vbar, address, size))


def test_tuples_that_span_several_allocations(comfy) -> None:
    made = comfy(256)
    vbar = ModelVBAR(1 << 30, made.id)
    places = [vbar.alloc(20 * MIB) for _ in range(4)]
    block = (vbar, places[0][1], places[3][1] + places[3][2] - places[0][1])
    whole = vbar_fault(block)
    assert len(whole) == 3
    assert vbar.get_residency()[:4] == [3, 3, 3, 0]
    part = vbar_fault(places[1])
    assert list(part) == list(whole[:2])
    vbar_unpin(places[1])
    vbar_unpin(block)
    assert vbar.get_residency()[:4] == [1, 1, 1, 0]


def test_signatures() -> None:
    assert vbar_signature_compare([1, 2], [1, 2]) is True
    assert vbar_signature_compare([1, 2], [1, 3]) is False
    assert vbar_signature_compare(None, [1]) is False
    assert vbar_signature_compare([1], None) is False
    assert vbar_signature_compare(None, None) is False
    with pytest.raises(ValueError, match="length"):
        vbar_signature_compare([1], [1, 2])


def test_unpinning_what_is_not_pinned(comfy) -> None:
    vbar = ModelVBAR(PAGE, comfy(64).id)
    place = vbar.alloc(10)
    vbar_unpin(None)
    vbar_unpin(place)
    assert vbar_fault(place)
    vbar_unpin(place)
    vbar_unpin(place)
    assert vbar.get_residency() == [1]


def test_a_pinned_page_is_never_taken(comfy) -> None:
    made = comfy(64)
    first, second = ModelVBAR(PAGE, made.id), ModelVBAR(8 * PAGE, made.id)
    place = first.alloc(PAGE)
    signature = vbar_fault(place)
    aimdo_to_tensor(place, made.device).fill_(11)
    others = [second.alloc(PAGE) for _ in range(8)]
    assert [vbar_fault(other) is not None for other in others] == [True] + [False] * 7
    assert first.free_memory(1e32) == 0
    press(made.engine)
    assert vbar_signature_compare(vbar_fault(place), signature)
    assert (aimdo_to_tensor(place, made.device) == 11).all()


def test_a_higher_priority_takes_from_a_lower_one(comfy) -> None:
    made = comfy(64)
    first, second = ModelVBAR(2 * PAGE, made.id), ModelVBAR(2 * PAGE, made.id)
    for vbar in (first, second, first):
        vbar.prioritize()
        place = (vbar, vbar.base_addr, 2 * PAGE)
        assert vbar_fault(place) is not None
        vbar_unpin(place)
        assert vbar.loaded_size() == 2 * PAGE
        assert model_vbar.vbars_analyze() == 2 * PAGE
    first.deprioritize()
    second.prioritize()
    assert vbar_fault((second, second.base_addr, PAGE)) is not None
    assert first.get_residency() == [1, 0]
    assert vbar_fault((first, first.base_addr + PAGE, PAGE)) is None


def test_watermark(comfy) -> None:
    made = comfy(256)
    vbar = ModelVBAR(8 * PAGE, made.id)
    places = [vbar.alloc(PAGE) for _ in range(8)]
    assert all(vbar_fault(place) for place in places)
    for place in places[:7]:
        vbar_unpin(place)
    assert vbar.get_watermark() == 8
    vbar.set_watermark(3 * PAGE)
    assert vbar.get_watermark() == 3
    made.engine.settle()
    assert vbar.get_residency() == [1, 1, 1, 0, 0, 0, 0, 3]
    vbar_unpin(places[7])
    made.engine.settle()
    assert vbar.get_residency() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert vbar.loaded_size() == 3 * PAGE
    assert vbar_fault(places[3]) is None
    vbar.prioritize()
    assert vbar.get_watermark() == 8
    assert vbar_fault(places[3]) is not None


def test_watermark_limit(comfy) -> None:
    made = comfy(256)
    vbar = ModelVBAR(4 * PAGE, made.id)
    places = [vbar.alloc(PAGE) for _ in range(4)]
    for place in places:
        assert vbar_fault(place)
        vbar_unpin(place)
    vbar.set_watermark_limit(2 * PAGE)
    assert vbar.free_memory(1e32) == 2 * PAGE
    assert vbar.get_residency() == [1, 1, 0, 0]
    model_vbar.vbars_reset_watermark_limits()
    assert vbar.free_memory(1) == PAGE
    assert vbar.free_memory(10**40) == PAGE
    assert vbar.free_memory(0) == 0
    assert made.engine.stats()["held"] == 0
    for call in (vbar.free_memory, vbar.set_watermark, vbar.set_watermark_limit):
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError):
                call(wrong)
        with pytest.raises(TypeError):
            call("1")


def test_what_is_closed_or_dropped_frees_itself(comfy) -> None:
    made = comfy(256)
    closed, dropped = ModelVBAR(PAGE, made.id), ModelVBAR(PAGE, made.id)
    for vbar in (closed, dropped):
        assert vbar_fault((vbar, vbar.base_addr, 1))
    assert model_vbar.vbars_analyze(made.id) == 2 * PAGE
    vbar_unpin((closed, closed.base_addr, 1))
    closed.close()
    closed.close()
    vbar_unpin((closed, closed.base_addr, 1))
    assert closed.loaded_size() == 0
    for call in (closed.prioritize, closed.get_watermark, closed.get_residency, lambda: closed.alloc(1)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        vbar_fault((closed, closed.base_addr, 1))
    del vbar, dropped
    gc.collect()
    press(made.engine)
    assert made.engine.stats()["held"] == 0
    assert model_vbar.vbars_analyze() == 0
    with pytest.raises(RuntimeError, match="no such device"):
        model_vbar.vbars_analyze(99)


@pytest.mark.parametrize("rounds", [3])
def test_three_models_in_turn_each_larger_than_the_next(comfy, rounds: int) -> None:
    """The example of the original's description: fault what fits, use the rest once from memory of torch's, unpin."""
    made = comfy(5 * 32)
    models = []
    for layers in (9, 6, 3):
        vbar = ModelVBAR(layers * PAGE * 10, made.id)
        weights = [torch.randn(PAGE // 8, 2).mul(0.01) for _ in range(layers)]
        places = [vbar.alloc(weight.nbytes) for weight in weights]
        models.append((vbar, weights, places, [None] * layers))
    hits = 0
    for _ in range(rounds):
        for vbar, weights, places, signatures in models:
            vbar.prioritize()
            kept = 0
            for _ in range(2):
                for layer, (weight, place) in enumerate(zip(weights, places, strict=True)):
                    signature = vbar_fault(place)
                    if signature is None:
                        tensor = weight.to(made.device)
                    else:
                        tensor = aimdo_to_tensor(place, made.device).view(weight.dtype).view(weight.shape)
                        if vbar_signature_compare(signature, signatures[layer]):
                            hits += 1
                        else:
                            tensor.copy_(weight)
                            signatures[layer] = signature
                        kept += 1
                    assert torch.equal(tensor.sum(0).cpu(), weight.to(made.device).sum(0).cpu())
                    assert torch.equal(tensor.cpu(), weight)
                    if signature is not None:
                        vbar_unpin(place)
            # As many layers as fit stay, those at the lowest addresses.
            assert kept == 2 * min(len(weights), 5)
            assert vbar.loaded_size() == PAGE * min(len(weights), 5)
    assert hits >= rounds * (5 + 5 + 3)

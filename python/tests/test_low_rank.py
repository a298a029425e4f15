"""Products of low rank that the device adds as torch does: bit for bit, whatever is resident."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, reference, same
from torch import nn

import forebay
from forebay import low_rank
from forebay.low_rank import LowRank, sums_as_torch, to_device

EngineMaker = Callable[..., forebay.Engine]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def products(
    weight: torch.Tensor, ranks: Sequence[int], through: torch.dtype, dtypes: Sequence[torch.dtype] = DTYPES
) -> LowRank:
    """Random ones, of several dtypes."""
    terms = []
    for number, rank in enumerate(ranks):
        dtype = dtypes[number % len(dtypes)]
        up = (torch.randn(weight.shape[0], rank) * 0.2).to(dtype)
        down = (torch.randn(rank, *weight.shape[1:]) * 0.2).to(dtype)
        up = up[..., None, None] if weight.ndim == 4 else up
        terms.append((up, down, 0.8 / (number + 1)))
    return LowRank(terms, through)


def patched(weight: torch.Tensor, patch: LowRank) -> torch.Tensor:
    """What torch makes of it, written down as ComfyUI computes it."""
    value = weight.detach().to(TORCH_DEVICE).to(patch.through)
    for up, down, scale in patch.terms:
        product = torch.mm(move(up).float().flatten(1), move(down).float().flatten(1)).reshape(weight.shape)
        value += (scale * product).type(value.dtype)
    return value.to(weight.dtype)


@pytest.mark.parametrize("through", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_torchs(through: torch.dtype, dtype: torch.dtype, engine: EngineMaker) -> None:
    module = randomize(nn.ModuleList([nn.Linear(1000, 1500), nn.Conv2d(128, 512, 3), nn.Linear(700, 2000)]))
    module = module.to(dtype)
    with forebay.attach(module, engine(), page_size=2 * MIB) as attachment:
        for ranks in ([1], [16], [40], [8, 3, 21], [16, 16, 32]):
            for number, layer in enumerate(module):
                weight = layer.weight._source
                used = [DTYPES[number]] if len(ranks) == 1 else DTYPES
                patch = products(weight, ranks, through, used)
                is_torchs = sums_as_torch(attachment.engine, TORCH_DEVICE, patch.shapes)
                assert is_torchs.keys() == {(len(weight), weight[0].numel(), rank) for rank in ranks}
                # MKL keeps the sign of a zero where there is but one rank; these products have none.
                assert TORCH_DEVICE.type == "cuda" or ranks == [1] or all(is_torchs.values())
                if TORCH_DEVICE.type == "cuda" and not all(is_torchs.values()):
                    continue
                attachment.set_patch(f"{number}.weight", patch)
                assert same(layer.weight.clone(), patched(weight, patch)), (ranks, number)
                assert same(patch(move(weight)), patched(weight, patch))
        attachment.set_patch({f"{number}.weight": None for number in range(3)})
        assert all(same(layer.weight.clone().cpu(), layer.weight._source) for layer in module)


class AddsToFew:
    """An engine that does nothing to products of more than 1,000 rows. Notes the shapes."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.tried: list[tuple[int, int, int]] = []

    def add_product(self, address: int, dtype: str, columns: int, product: Any, stream: int) -> None:
        """Adds it, or not."""
        rows, rank = product[1], product[6]
        self.tried.append((rows, columns, rank))
        if rows <= 1000:
            self._engine.add_product(address, dtype, columns, product, stream)


def test_shapes_that_are_summed_in_another_way_are_found_out_once(
    engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(300, 200, 8), (1001, 64, 8), (300, 200, 9)]
    adds_all = engine()
    monkeypatch.setattr(low_rank, "_known", {})
    expected = sums_as_torch(adds_all, TORCH_DEVICE, shapes)
    # A card's own arithmetic decides.
    assert TORCH_DEVICE.type == "cuda" or all(expected.values())
    expected[shapes[1]] = False

    monkeypatch.setattr(low_rank, "_known", {})
    adds_to_few: Any = AddsToFew(adds_all)
    assert sums_as_torch(adds_to_few, TORCH_DEVICE, [*shapes, shapes[0]]) == expected
    assert sorted(adds_to_few.tried) == sorted(shapes)
    assert sums_as_torch(adds_to_few, TORCH_DEVICE, shapes) == expected
    assert sums_as_torch(adds_to_few, TORCH_DEVICE, []) == {}
    assert len(adds_to_few.tried) == len(shapes)

    monkeypatch.setattr(torch, "get_float32_matmul_precision", Mock(side_effect=RuntimeError))
    assert sums_as_torch(adds_to_few, TORCH_DEVICE, shapes) == dict.fromkeys(shapes, False)


def test_weights_do_not_depend_on_what_is_resident(engine: EngineMaker) -> None:
    module = randomize(linears(6)).to(torch.bfloat16)
    plain = reference(module)
    patches = {
        f"{i}.weight": products(module[i].weight, (8, 16, 4)[: i % 3 + 1], torch.float16) for i in range(5)
    }
    for name, patch in patches.items():
        plain.get_parameter(name).copy_(patched(module.get_parameter(name), patch))
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    before = reference(module)(x)
    for budget in (64, 10, 6):
        with forebay.attach(module, engine(budget)) as attachment:
            assert same(module(x), before)
            attachment.set_patch(patches)
            for _ in range(3):
                assert same(module(x), plain(x))
            press(attachment.engine)
            assert same(module(x), plain(x))
            attachment.set_patch(dict.fromkeys(patches))
            assert same(module(x), before)


@pytest.mark.parametrize("at_once", [MIB, 10_000])
def test_many_patches_go_to_the_device_a_few_together(
    at_once: int, engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_COPIED_AT_ONCE", at_once)
    module = randomize(linears(14)).to(torch.bfloat16)
    patches = {
        f"{i}.weight": products(layer.weight, [16, 8], torch.float16) for i, layer in enumerate(module)
    }
    moved = [(move(up), move(down), scale) for up, down, scale in patches["5.weight"].terms]
    patches["5.weight"] = LowRank(moved, torch.float16)
    placed = to_device(patches.values(), TORCH_DEVICE)
    copies = {memory.untyped_storage().data_ptr(): memory.untyped_storage().nbytes() for memory, _ in placed}
    assert sum(copies.values()) == sum(memory.nbytes for memory, _ in placed) > 2 * MIB
    if at_once == MIB:
        assert 2 < len(copies) < 7 and max(copies.values()) <= MIB
    else:
        assert len(copies) == len(patches), "each is larger than what is copied at once"
    expected = [patched(layer.weight, patch) for layer, patch in zip(module, patches.values(), strict=True)]
    with forebay.attach(module, engine()) as attachment:
        attachment.set_patch(patches)
        assert all(same(layer.weight.clone(), weight) for layer, weight in zip(module, expected, strict=True))


def test_halfs_overflow_as_in_torch(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.Linear(1024, 2048, dtype=torch.bfloat16)))
    weight = module[0].weight
    weight[::7] *= 1e6
    weight[1, 1] = float("inf")
    weight[2, 2] = -0.0
    patch = products(weight, [4, 4], torch.float16, [torch.float32])
    for factor in patch.terms[1][:2]:
        factor[:3] *= 2000
    expected = patched(weight, patch)
    assert expected.isinf().any() and expected.isfinite().any()
    with forebay.attach(module, engine()) as attachment:
        attachment.set_patch("0.weight", patch)
        got = module[0].weight.clone()
        assert same(got.isnan(), expected.isnan())
        assert same(got.nan_to_num(), expected.nan_to_num())


def test_where_the_device_does_not_add_it_is_called(engine: EngineMaker) -> None:
    """For a small weight, one that is not contiguous, and under adapters, which are added to what it gives."""
    module = randomize(nn.ModuleList([nn.Linear(64, 8), nn.Linear(1024, 2048), nn.Linear(1024, 1024)]))
    module[1].weight = nn.Parameter(torch.randn(1024, 2048).t(), requires_grad=False)
    patches = {f"{i}.weight": products(layer.weight, [4], torch.float16) for i, layer in enumerate(module)}
    expected = [patched(layer.weight, patches[f"{i}.weight"]) for i, layer in enumerate(module)]
    with forebay.attach(module, engine()) as attachment:
        attachment.set_patch(patches)
        assert all(same(layer.weight.clone(), weight) for layer, weight in zip(module, expected, strict=True))
        ones = {"2.lora_up.weight": torch.ones(1024, 1), "2.lora_down.weight": torch.ones(1, 1024)}
        attachment.set_loras([(ones, 0.5)])
        assert same(module[2].weight.clone(), expected[2] + 0.5)
        attachment.set_loras([])
        assert same(module[2].weight.clone(), expected[2])


def test_what_does_not_fit_is_refused(engine: EngineMaker) -> None:
    up, down = torch.ones(1024, 2), torch.ones(2, 1024)
    for terms in ([], [(up, up, 1.0)], [(up, down, 1.0), (up[:5], down, 1.0)]):
        with pytest.raises(ValueError, match="no products of one shape"):
            LowRank(terms, torch.float16)
    with pytest.raises(ValueError, match="float16 or float32"):
        LowRank([(up, down, 1.0)], torch.bfloat16)
    with pytest.raises(ValueError, match=r"no float32: -1e\+39"):
        LowRank([(up, down, 1.0), (up, down, -1e39)], torch.float16)
    with forebay.attach(randomize(linears(1)), engine()) as attachment:
        with pytest.raises(ValueError, match=r"takes no products of \(5, 1024\): 0.weight"):
            attachment.set_patch("0.weight", LowRank([(up[:5], down, 1.0)], torch.float16))
        with pytest.raises(ValueError, match="takes no products"):
            attachment.set_patch("0.bias", LowRank([(up, down, 1.0)], torch.float16))

"""Weights that are used in another dtype than they are stored in: what torch gives on the CPU, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, same
from torch import nn

import forebay

EngineMaker = Callable[..., forebay.Engine]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
USED = [torch.float32, torch.float16, torch.bfloat16]


def stored_as(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its weights in a dtype that layers do not compute with."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return module


def used_as(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain module of converted weights on the device of the tests."""
    plain = copy.deepcopy(module)
    for owner in plain.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                value = parameter.detach().float().to(dtype).to(TORCH_DEVICE)
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    return plain.to(TORCH_DEVICE)


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("stored", [*USED, *FP8])
def test_every_pair_is_converted_as_by_torch(
    stored: torch.dtype, used: torch.dtype, engine: EngineMaker
) -> None:
    module = stored_as(randomize(linears(5, 768)), stored)
    plain = used_as(module, used)
    x = move(torch.randn(3, 768, dtype=used))
    for budget in (64, 8):
        with forebay.attach(module, engine(budget), dtype=used) as attachment:
            assert all(parameter.dtype == used for parameter in module.parameters())
            for _ in range(3):
                assert same(module(x), plain(x))
            press(attachment.engine)
            for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
                assert same(mine.clone(), theirs.clone())
        assert all(parameter.dtype == stored for parameter in module.parameters())


def test_every_stored_value_of_8_bits(engine: EngineMaker) -> None:
    for dtype in FP8:
        every = torch.arange(256, dtype=torch.uint8).repeat(512).view(dtype).view(512, 256)
        module = nn.Module()
        module.weight = nn.Parameter(every, requires_grad=False)
        with forebay.attach(module, engine(), dtype=torch.bfloat16, small=0):
            got, expected = module.weight.clone().cpu(), every.float().to(torch.bfloat16)
            numbers = ~expected.isnan()
            assert same(got[numbers], expected[numbers]) and bool(got[~numbers].isnan().all())


@pytest.mark.parametrize("shape", [(), (1,), (1024,), (1024, 1)])
@pytest.mark.parametrize("key", ["weight_scale", "scale_weight"])
def test_scales_of_a_checkpoint(shape: tuple[int, ...], key: str, engine: EngineMaker) -> None:
    plain = randomize(linears(4)).to(torch.bfloat16)
    module = copy.deepcopy(plain)
    checkpoint: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(module):
        scale = torch.rand(shape) + 0.01
        stored = (layer.weight.float() * 100).to(torch.float8_e4m3fn)
        layer.weight = nn.Parameter(stored, requires_grad=False)
        checkpoint |= {f"{i}.weight": stored, f"{i}.{key}": scale}
        by_row = scale.view(-1, 1) if scale.numel() > 1 else scale
        plain[i].weight.copy_((stored.float() * by_row).to(torch.bfloat16))
    x = move(torch.randn(3, 1024, dtype=torch.bfloat16))
    expected = plain.to(TORCH_DEVICE)(x)
    for budget in (64, 6):
        with forebay.attach(module, engine(budget), dtype=torch.bfloat16, scales=checkpoint):
            for _ in range(3):
                assert same(module(x), expected)
            assert same(copy.deepcopy(module).to(TORCH_DEVICE)(x), expected), "a copy works by itself"
            assert same(pickle.loads(pickle.dumps(module)).to(TORCH_DEVICE)(x), expected)
            assert same(module.state_dict()["1.weight"], checkpoint["1.weight"]), "what is stored"


def test_tables_are_looked_up_converted(engine: EngineMaker) -> None:
    table = (torch.randn(20_000, 256) * 50).to(torch.float8_e5m2)
    scale = torch.rand(20_000, 1)
    module = nn.Sequential(nn.Embedding(20_000, 256), *randomize(linears(1, 256)))
    module[0].weight = nn.Parameter(table, requires_grad=False)
    x = move(torch.randint(20_000, (3, 5)))
    expected = (table.float() * scale).to(torch.float16).to(TORCH_DEVICE)[x]
    for budget in (6, 64):
        attached = forebay.attach(
            module, engine(budget), dtype={"0": torch.float16}, scales={"0.weight_scale": scale}
        )
        with attached as attachment:
            assert module[0].weight._weight.is_kept() is (budget == 64)
            assert same(module[0](x), expected)
            assert (attachment.stats()[0]["looked_up"] > 0) is (budget == 6)


def test_dtypes_by_name(engine: EngineMaker) -> None:
    module = randomize(nn.ModuleDict({"a": linears(2), "b": linears(2)}))
    dtypes = {"": torch.float16, "b": torch.bfloat16, "b.1.bias": torch.float32}
    with forebay.attach(module, engine(), dtype=dtypes):
        found = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert {found["a.0.weight"], found["a.1.bias"]} == {torch.float16}
    assert (found["b.1.weight"], found["b.1.bias"]) == (torch.bfloat16, torch.float32)


def test_what_is_moved_is_what_is_stored(engine: EngineMaker) -> None:
    module = stored_as(randomize(linears(4)), torch.float8_e4m3fn)
    with forebay.attach(module, engine(), dtype=torch.bfloat16) as attachment:
        module(move(torch.randn(1, 1024, dtype=torch.bfloat16)))
        stats = attachment.stats()[0]
        assert 4 * MIB <= stats["filled"] < 4.1 * MIB
        assert 8 * MIB <= stats["bytes"] < 8.1 * MIB


def test_sizes_that_no_page_or_piece_ends_with(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.Linear(1031, 4099), nn.Linear(4099, 257), nn.Linear(257, 1031)))
    plain = used_as(module, torch.bfloat16)
    x = move(torch.randn(3, 1031, dtype=torch.bfloat16))
    for budget in (64, 12):
        with forebay.attach(module, engine(budget), dtype=torch.bfloat16, page_size=2 * MIB) as attachment:
            for _ in range(2):
                for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
                    assert same(mine.clone(), theirs.clone())
                assert same(module(x), plain(x))
                press(attachment.engine)


def test_a_scale_without_another_dtype(engine: EngineMaker) -> None:
    module = randomize(linears(2)).to(torch.bfloat16)
    by_row, by_one = torch.rand(1024) + 0.5, torch.tensor(0.3)
    scales = {"0.weight_scale": by_row, "1.weight_scale": by_one}
    with forebay.attach(module, engine(), dtype=torch.bfloat16, scales=scales):
        for layer, scale in zip(module, (by_row[:, None], by_one), strict=True):
            expected = (layer.weight._source.float() * scale).to(torch.bfloat16)
            assert same(layer.weight.clone().cpu(), expected)


def test_a_model_that_comes_again_is_converted_as_it_is_attached(engine: EngineMaker, tmp_path: Path) -> None:
    stored = randomize(linears(3)).state_dict()
    save_file({key: tensor.clone() for key, tensor in stored.items()}, tmp_path / "model.safetensors")
    chosen = engine()
    for used in (None, torch.float16, torch.bfloat16, None):
        module = linears(3).requires_grad_(False)
        module.load_state_dict(forebay.load(tmp_path / "model.safetensors"), assign=True)
        with forebay.attach(module, chosen, dtype=used) as attachment:
            expected = stored["1.weight"].to(used or torch.float32)
            assert same(module[1].weight.clone().cpu(), expected)
            attachment.detach(keep=True)


def test_weights_that_are_not_contiguous_keep_their_strides(engine: EngineMaker) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(512, 768).t(), requires_grad=False)
    with forebay.attach(module, engine(), dtype=torch.bfloat16):
        assert module.weight.stride() == (1, 768)
        assert same(module.weight.clone().cpu(), module.weight._source.to(torch.bfloat16))


def test_conversions_that_cannot_be_name_their_weight(engine: EngineMaker) -> None:
    module = randomize(linears(2))
    scales = {"1.weight_scale": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"one for each row .*\(3,\), '1\.weight_scale' for 1\.weight of Sequential"
    ):
        forebay.attach(module, engine(), dtype=torch.bfloat16, scales=scales)
    with pytest.raises(
        ValueError, match=r"give its dtype, too: '1\.weight_scale' for 1\.weight of Sequential"
    ):
        forebay.attach(module, engine(), scales=scales)
    with pytest.raises(ValueError, match=r"float32 is not converted to float8_e5m2: 0\.weight of Sequential"):
        forebay.attach(module, engine(), dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float64 is not converted to float16: 0\.weight of Sequential"):
        forebay.attach(module.double(), engine(), dtype=torch.float16)


def test_adapters_are_added_to_what_is_converted(engine: EngineMaker) -> None:
    module = stored_as(randomize(linears(3)), torch.float8_e4m3fn)
    up, down = torch.randn(1024, 8) * 0.1, torch.randn(8, 1024) * 0.1
    lora = {"1.lora_up.weight": up, "1.lora_down.weight": down}
    seen = []
    for budget in (64, 6):
        with forebay.attach(module, engine(budget), dtype=torch.bfloat16) as attachment:
            attachment.set_loras([(lora, 0.5)])
            seen.append(module[1].weight.clone().cpu())
    expected = module[1].weight.float().to(torch.bfloat16).float() + 0.5 * up @ down
    assert same(seen[0], seen[1])
    assert ((seen[0].float() - expected).abs() <= expected.abs() * 2**-8 + 2**-21).all()
    with (
        forebay.attach(module, engine()) as attachment,
        pytest.raises(ValueError, match="float8_e4m3fn takes no adapter"),
    ):
        attachment.set_loras([(lora, 0.5)])


def test_small_weights_are_converted_as_well(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.LayerNorm(1024)))
    with forebay.attach(module, engine(), dtype=torch.float16) as attachment:
        assert same(module[0].weight.detach().cpu(), module[0].weight._forebay_small._source.half())
        assert attachment.stats()[0]["bytes"] == 2 * 1024 * 2

"""Weights that are stored in one dtype and used in another: bit for bit what converting on the CPU gives."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, same
from torch import nn

import forebay

EngineMaker = Callable[..., forebay.Engine]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EIGHTS = [torch.float8_e4m3fn, torch.float8_e5m2]


class Mixed(nn.Module):
    """Large and small weights, of sizes that no page ends with, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4099, 257)
        self.first = nn.Linear(257, 1031)
        self.blocks = nn.ModuleList([nn.Linear(1031, 1031), nn.Linear(1031, 999)])
        self.norm = nn.LayerNorm(999)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.table(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def model_of(stored: torch.dtype) -> nn.Module:
    module = randomize(Mixed())
    for parameter in module.parameters():
        parameter.data = parameter.data.to(stored)
    return module


def scales_of(
    module: nn.Module, name_of: Callable[[str], str] = "{}_scale".format
) -> dict[str, torch.Tensor]:
    """In turn one number, one in a tensor of one, and one for each row."""
    scales = {}
    for turn, (name, weight) in enumerate(module.named_parameters()):
        rows = weight.shape[0]
        shape: tuple[int, ...] = ((), (1,), (rows,), (rows, 1))[turn % (4 if weight.ndim > 1 else 2)]
        scales[name_of(name)] = torch.rand(shape) * 3 + 0.1
    return scales


def value(stored: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    single = stored.to(torch.float32)
    if scale is not None:
        single = single * (scale if scale.numel() == 1 else scale.reshape(-1, *(1,) * (stored.ndim - 1)))
    return single.to(dtype)


def plain(module: nn.Module, dtype: torch.dtype, scales: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The module converted on the CPU, on the device of the tests."""
    result = copy.deepcopy(module)
    for name, parameter in result.named_parameters():
        parameter.data = value(parameter.data, dtype, (scales or {}).get(f"{name}_scale"))
    return result.to(TORCH_DEVICE)


@pytest.mark.parametrize(("stored", "used"), list(itertools.product(FLOATS + EIGHTS, FLOATS)))
def test_every_dtype_to_every_other(stored: torch.dtype, used: torch.dtype, engine: EngineMaker) -> None:
    module = model_of(stored)
    expected = plain(module, used)
    x = move(torch.randint(4099, (3, 5)))
    for budget in (64, 13):
        with forebay.attach(module, engine(budget), dtype=used) as attachment:
            for name, weight in module.named_parameters():
                assert weight.dtype == used
                assert same(weight.clone(), expected.get_parameter(name)), name
            for _ in range(3):
                assert same(module(x), expected(x))
                press(attachment.engine)
    assert all(parameter.dtype == stored for parameter in module.parameters())


@pytest.mark.parametrize("stored", EIGHTS)
@pytest.mark.parametrize("name_of", ["{}_scale".format, lambda name: name.replace("weight", "scale_weight")])
def test_scales_of_tensors_and_rows(
    stored: torch.dtype, name_of: Callable[[str], str], engine: EngineMaker
) -> None:
    module = model_of(stored)
    weights = {name: weight for name, weight in scales_of(module).items() if name.endswith("weight_scale")}
    expected = plain(module, torch.bfloat16, weights)
    given = {name_of(name.removesuffix("_scale")): scale for name, scale in weights.items()}
    x = move(torch.randint(4099, (3, 5)))
    for budget in (64, 10):
        with forebay.attach(module, engine(budget), dtype=torch.bfloat16, scales=given) as attachment:
            for name, weight in module.named_parameters():
                assert same(weight.clone(), expected.get_parameter(name)), name
            for _ in range(3):
                assert same(module(x), expected(x))
                press(attachment.engine)


def test_a_scale_without_another_dtype(engine: EngineMaker) -> None:
    module = model_of(torch.bfloat16)
    scales = scales_of(module)
    expected = plain(module, torch.bfloat16, scales)
    with forebay.attach(module, engine(), dtype=torch.bfloat16, scales=scales):
        for name, weight in module.named_parameters():
            assert same(weight.clone(), expected.get_parameter(name)), name


def test_dtypes_by_name_the_longest_counts(engine: EngineMaker) -> None:
    module = model_of(torch.float32)
    dtypes = {
        "": torch.float16,
        "blocks": torch.bfloat16,
        "blocks.1.bias": torch.float32,
        "first": torch.float32,
    }
    with forebay.attach(module, engine(), dtype=dtypes):
        assert {name: weight.dtype for name, weight in module.named_parameters()} == {
            "table.weight": torch.float16,
            "first.weight": torch.float32,
            "first.bias": torch.float32,
            "blocks.0.weight": torch.bfloat16,
            "blocks.0.bias": torch.bfloat16,
            "blocks.1.weight": torch.bfloat16,
            "blocks.1.bias": torch.float32,
            "norm.weight": torch.float16,
            "norm.bias": torch.float16,
        }
        assert same(module.blocks[0].weight.clone().cpu(), module.state_dict()["blocks.0.weight"].bfloat16())


def test_rows_that_are_looked_up_are_converted(engine: EngineMaker) -> None:
    module = nn.Sequential(nn.Embedding(20_000, 256), nn.Linear(256, 1024), *linears(2))
    module = randomize(module).to(torch.float8_e4m3fn)
    rows = torch.rand(20_000) + 0.5
    expected = value(module[0].weight, torch.bfloat16, rows)
    indices = torch.tensor([[5, 19_999], [0, 5]])
    with forebay.attach(
        module, engine(8), dtype=torch.bfloat16, scales={"0.weight_scale": rows}
    ) as attachment:
        assert not module[0].weight._weight.is_kept()
        assert same(module[0](move(indices)), expected[indices].to(TORCH_DEVICE))
        assert attachment.stats()[0]["looked_up"] == 3 * 256, "as stored: one byte an element"


def test_copies_are_plain_and_converted(engine: EngineMaker) -> None:
    module = model_of(torch.float8_e5m2)
    stored = {name: weight.detach() for name, weight in module.named_parameters()}
    expected = plain(module, torch.float16)
    with forebay.attach(module, engine(), dtype=torch.float16):
        for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            for name, weight in made.named_parameters():
                assert type(weight) is nn.Parameter
                assert same(weight.data, expected.get_parameter(name).data.cpu()), name
        for name, saved in module.state_dict().items():
            assert same(saved, stored[name]), "a state dict is what is stored"


def test_adapters_are_added_to_what_was_converted(engine: EngineMaker) -> None:
    module = randomize(linears(6)).to(torch.float8_e4m3fn)
    scales = {
        f"{name}_scale": torch.rand(1024) + 0.5 for name, _ in module.named_parameters() if "weight" in name
    }
    up, down = torch.randn(1024, 3) * 0.1, torch.randn(3, 1024) * 0.1
    state = {"3.lora_A.weight": down, "3.lora_B.weight": up}
    single = module[3].weight.float() * scales["3.weight_scale"][:, None]
    unpatched = single.bfloat16()
    expected = (unpatched.float() + up @ down).bfloat16()
    for budget in (64, 6):
        with forebay.attach(module, engine(budget), dtype=torch.bfloat16, scales=scales) as attachment:
            for turn in (True, False):
                attachment.set_loras([(state, 1.0)] if turn else [])
                seen = module[3].weight.clone().cpu().float()
                want = (expected if turn else unpatched).float()
                near = torch.finfo(torch.bfloat16).eps * want.abs().clamp_min(1e-6) + (
                    2.0**-21 if turn else 0
                )
                assert ((seen - want).abs() <= (near if turn else 0)).all()
                assert same(
                    module[1].weight.clone().cpu(),
                    value(module[1].weight._source, torch.bfloat16, scales["1.weight_scale"]),
                )


def test_fewer_bytes_are_moved_than_used(engine: EngineMaker) -> None:
    module = randomize(linears(4)).to(torch.float8_e4m3fn)
    with forebay.attach(module, engine(), dtype=torch.float16, page_size=2 * MIB) as attachment:
        for layer in module:
            layer.weight.clone()
        assert 4 * MIB <= attachment.stats()[0]["filled"] < 5 * MIB
        assert attachment.page_map()["Sequential"].count("R") >= 4, "of 2 MiB each"


def test_a_model_comes_again_with_another_conversion(engine: EngineMaker, tmp_path: Any) -> None:
    randomized = randomize(linears(3)).state_dict()
    save_file({key: tensor.clone() for key, tensor in randomized.items()}, tmp_path / "m.safetensors")
    one = engine()
    seen = []
    for used in (None, torch.float16, torch.bfloat16, None):
        module = linears(3).requires_grad_(False)
        module.load_state_dict(forebay.load(tmp_path / "m.safetensors"), assign=True)
        stored = module[1].weight.detach()
        with forebay.attach(module, one, dtype=used) as attachment:
            seen.append(same(module[1].weight.clone().cpu(), value(stored, used or torch.float32)))
            attachment.detach(keep=True)
    assert all(seen)


@pytest.mark.parametrize(
    ("dtype", "scales", "message"),
    [
        (torch.float64, {}, r"^float32 is not converted to float64: table\.weight of Mixed$"),
        (torch.float8_e4m3fn, {}, r"^float32 is not converted to float8_e4m3fn: table\.weight"),
        (None, {"first.weight_scale": torch.ones(1)}, r"^a scale is applied while .*'first\.weight_scale' for first\.weight of"),
        (torch.float16, {"first.weight_scale": torch.ones(7)}, r"^a scale is one number.*\(7,\), 'first\.weight_scale' for first"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(
    dtype: Any, scales: dict[str, torch.Tensor], message: str, engine: EngineMaker
) -> None:
    module = model_of(torch.float32)
    with pytest.raises(ValueError, match=message):
        forebay.attach(module, engine(), dtype=dtype, scales=scales)
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters()), "nothing has changed"

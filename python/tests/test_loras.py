"""Adapters: the weights are what merging on the CPU gives, whatever is resident."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import MIB, TORCH_DEVICE, bits, linears, move, press, randomize, reference, same
from torch import nn

import forebay
from forebay.adapters import read_adapters

State = dict[str, torch.Tensor]
EngineMaker = Callable[..., forebay.Engine]


def adapter(
    weight: torch.Tensor, rank: int = 4, dtype: torch.dtype = torch.float32, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors for a weight, in the shapes that files have."""
    up = torch.randn(rows or weight.shape[0], rank, dtype=dtype) * 0.1
    down = torch.randn(rank, *weight.shape[1:], dtype=dtype) * 0.1
    return (up[..., None, None], down) if weight.ndim == 4 else (up, down)


def product(up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * up.float().flatten(1) @ down.float().flatten(1)


def merged(weight: torch.Tensor, *products: torch.Tensor) -> torch.Tensor:
    """A weight merged on the CPU, in float32, rounded once."""
    total = weight.float()
    for added in products:
        total = total + added.view(weight.shape)
    return total.to(weight.dtype)


def stored(weight: torch.Tensor) -> torch.Tensor:
    """What is on the device at a weight's address."""
    return weight.clone().cpu()


def is_near(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Within one unit in the last place, or where terms cancelled out of theirs."""
    assert left.dtype == right.dtype and left.shape == right.shape
    unit = torch.finfo(left.dtype).eps * right.double().abs().clamp_min(torch.finfo(left.dtype).tiny)
    return bool(((left.double() - right.double()).abs() <= unit + 2.0**-21).all())


class Small(nn.Module):
    """Layers of every kind that adapters are for, small and large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 256, 3)
        self.point = nn.Conv2d(256, 512, 1)
        self.blocks = nn.ModuleList([nn.Linear(512, 1536), nn.Linear(1536, 512)])
        self.tiny = nn.Linear(512, 16)
        self.norm = nn.LayerNorm(512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.conv(x)).flatten(2).mean(2)
        for block in self.blocks:
            x = block(x)
        return self.tiny(self.norm(x))


LAYERS = ["conv", "point", "blocks.0", "blocks.1", "tiny"]


def kohya(prefix: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> State:
    state = {}
    for name, (up, down) in factors.items():
        key = prefix + name.replace(".", "_")
        state |= {
            f"{key}.lora_up.weight": up,
            f"{key}.lora_down.weight": down,
            f"{key}.alpha": torch.tensor(alpha),
        }
    return state


def dotted(
    prefix: str, ends: tuple[str, str], factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> State:
    state = {}
    for name, (up, down) in factors.items():
        state |= {f"{prefix}{name}{ends[0]}": up, f"{prefix}{name}{ends[1]}": down}
    return state


PEFT, DIFFUSERS, PLAIN = (
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_up.weight", ".lora_down.weight"),
)
FORMATS: dict[str, Callable[[dict[str, Any]], State]] = {
    "kohya": lambda factors: kohya("lora_unet_", factors, 2.0),
    "kohya without prefix": lambda factors: kohya("", factors, 2.0),
    "lycoris": lambda factors: kohya("lycoris_", factors, 2.0),
    "peft": lambda factors: dotted("base_model.model.", PEFT, factors),
    "peft, named": lambda factors: dotted("", (".lora_B.default.weight", ".lora_A.default.weight"), factors),
    "diffusers": lambda factors: dotted("transformer.", PEFT, factors),
    "diffusers, older": lambda factors: dotted("unet.", DIFFUSERS, factors),
    "ComfyUI": lambda factors: dotted("diffusion_model.", PLAIN, factors),
    "ComfyUI, peft": lambda factors: dotted("diffusion_model.", PEFT, factors),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_merges_as_on_the_cpu(
    name: str, dtype: torch.dtype, engine: EngineMaker, tmp_path: Path
) -> None:
    module = randomize(Small()).to(dtype)
    plain = {layer: module.get_submodule(layer).weight.detach() for layer in LAYERS}
    factors = {layer: adapter(weight, dtype=dtype) for layer, weight in plain.items()}
    state = FORMATS[name](factors)
    scale = 0.75 * (2.0 / 4 if any(key.endswith("alpha") for key in state) else 1.0)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors")
    x = move(torch.randn(2, 64, 8, 8, dtype=dtype))
    with forebay.attach(module, engine()) as attachment:
        attachment.set_loras([(tmp_path / "lora.safetensors", 0.75)])
        now = {layer: stored(module.get_submodule(layer).weight) for layer in LAYERS}
        for layer, weight in plain.items():
            assert not torch.equal(now[layer], weight)
            assert is_near(now[layer], merged(weight, product(*factors[layer], scale))), layer
        result = module(x)
        assert same(module.state_dict()["conv.weight"], plain["conv"]), "what is stored stays as it is"
    for layer in LAYERS:
        assert same(module.get_submodule(layer).weight.detach(), plain[layer])
        module.get_submodule(layer).weight.copy_(now[layer])
    assert same(result, reference(module)(x))


def budgets() -> Iterator[float]:
    yield from (64, 24, 12, 8)


def test_weights_do_not_depend_on_what_is_resident(engine: EngineMaker) -> None:
    module = randomize(linears(8)).to(torch.bfloat16)
    loras = [
        (dotted("", PEFT, {f"{i}": adapter(module[i].weight, rank, torch.bfloat16) for i in which}), strength)
        for rank, which, strength in ((16, range(8), 1.0), (3, (1, 4, 6), -0.5))
    ]
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    seen = []
    for budget in budgets():
        with forebay.attach(module, engine(budget)) as attachment:
            module(x)
            attachment.set_loras(loras)
            results = [module(x) for _ in range(4)]
            press(attachment.engine)
            results += [module(x), *(stored(layer.weight) for layer in module)]
            assert all(same(result, results[0]) for result in results[:5])
            seen.append(results)
    assert all(same(results, seen[0]) for results in seen)
    for i, weight in enumerate(seen[0][5:]):
        added = [
            product(state[f"{i}.lora_B.weight"], state[f"{i}.lora_A.weight"], strength)
            for state, strength in loras
            if f"{i}.lora_B.weight" in state
        ]
        assert is_near(weight, merged(module[i].weight, *added))


def test_a_change_refills_only_what_it_touches_and_ends_without_a_trace(engine: EngineMaker) -> None:
    module = randomize(linears(8)).to(torch.bfloat16)
    first = dotted("", PEFT, {f"{i}": adapter(module[i].weight) for i in range(8)})
    second = dotted("", PEFT, {"5": adapter(module[5].weight)})
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    plain = reference(module)(x)
    with forebay.attach(module, engine(64), page_size=2 * MIB) as attachment:

        def filled() -> int:
            result: int = attachment.stats()[0]["filled"]
            return result

        def refilled(loras: Sequence[tuple[State, float]]) -> tuple[torch.Tensor, int]:
            before = filled()
            attachment.set_loras(loras)
            return module(x), filled() - before

        module(x)
        with_first, moved = refilled([(first, 1.0)])
        assert moved == 0 and not same(with_first, plain), "what had none gets it where it is"
        assert refilled([(first, 1.0)])[1] == 0, "the same set"
        both, moved = refilled([(first, 1.0), (second, 0.5)])
        assert 2 * MIB <= moved <= 4 * MIB and not same(both, with_first)
        again, moved = refilled([(first, 1.0)])
        assert same(again, with_first) and 2 * MIB <= moved <= 4 * MIB
        stronger, moved = refilled([(first, 2.0)])
        assert moved >= 8 * 2 * MIB and not same(stronger, with_first)
        without, moved = refilled([])
        assert same(without, plain) and moved >= 8 * 2 * MIB
        before = filled()
        module(x)
        assert filled() == before
        again, moved = refilled([(first, 1.0)])
        assert same(again, with_first) and moved == 0
    assert same(reference(module)(x), plain)


def test_a_file_is_known_again_until_it_changes(engine: EngineMaker, tmp_path: Path) -> None:
    module = randomize(linears(2)).to(torch.bfloat16)
    path = tmp_path / "lora.safetensors"
    save_file(dotted("", PEFT, {"0": adapter(module[0].weight)}), path)
    made = engine()
    with forebay.attach(module, made) as attachment:
        attachment.set_loras([(path, 1.0)])
        first = stored(module[0].weight)
        made.settle()  # what is read ahead meanwhile
        before = attachment.stats()[0]["filled"]
        attachment.set_loras([(path, 1.0)])
        assert same(stored(module[0].weight), first)
        assert attachment.stats()[0]["filled"] == before
        path.unlink()
        save_file(dotted("", PEFT, {"0": adapter(module[0].weight, rank=5)}), path)
        attachment.set_loras([(path, 1.0)])
        assert not same(stored(module[0].weight), first)


def test_adapters_made_in_inference_mode(engine: EngineMaker, tmp_path: Path) -> None:
    """Torch does not count writes to such tensors, so a state dict of them is set anew each time."""
    with torch.inference_mode():
        module = randomize(linears(2)).to(torch.bfloat16)
        weight = module[0].weight.clone()
        state = dotted("", PEFT, {"0": adapter(weight)})
        save_file(state, tmp_path / "lora.safetensors")
        with forebay.attach(module, engine()) as attachment:
            for source in (state, tmp_path / "lora.safetensors"):
                attachment.set_loras([(source, 1.0)])
                factors = state["0.lora_B.weight"], state["0.lora_A.weight"]
                assert is_near(stored(module[0].weight), merged(weight, product(*factors)))
            attachment.set_loras([(state, 1.0)])
            state["0.lora_A.weight"].neg_()
            attachment.set_loras([(state, 1.0)])
            assert is_near(stored(module[0].weight), merged(weight, product(*factors)))


def test_parts_of_a_fused_weight(engine: EngineMaker) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Module()
            self.attn.qkv = nn.Linear(512, 1536)

    module = randomize(Fused())
    weight = module.attn.qkv.weight
    q, v, named = (adapter(weight, rank, rows=512) for rank in (2, 3, 4))
    whole = adapter(weight, 5)
    state = dotted("attn.", PEFT, {"to_q": q, "to_v": v, "qkv": whole}) | dotted("", PEFT, {"other": named})
    with forebay.attach(module, engine()) as attachment:
        attachment.set_loras([(state, 1.0)], rename={"other": ("attn.qkv.weight", slice(400, 912))})
        added = torch.zeros(1536, 512)
        for (up, down), first in ((q, 0), (v, 1024), (named, 400)):
            added[first : first + 512] += product(up, down)
        assert is_near(stored(weight_of(module)), merged(weight, added + product(*whole)))


def weight_of(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.attn.qkv.weight
    return weight


def test_a_convolution_in_three_parts(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.Conv2d(64, 256, 3)))
    up, mid, down = (
        torch.randn(256, 4, 1, 1) * 0.1,
        torch.randn(4, 4, 3, 3) * 0.1,
        torch.randn(4, 64, 1, 1) * 0.1,
    )
    state = {"0.lora_up.weight": up, "0.lora_mid.weight": mid, "0.lora_down.weight": down}
    full = torch.einsum("ijkl,jr,pi->prkl", mid, down.flatten(1), up.flatten(1))
    weight = module[0].weight
    with forebay.attach(module, engine()) as attachment:
        attachment.set_loras([(state, 1.0)])
        assert (stored(module[0].weight) - merged(weight, full)).abs().max() < 1e-6


def test_parts_of_a_pipeline_by_their_prefixes(engine: EngineMaker) -> None:
    parts = {"unet": randomize(linears(2)), "text_encoder": randomize(linears(2))}
    before = {name: part[0].weight.detach() for name, part in parts.items()}
    factors = {name: {"0": adapter(weight)} for name, weight in before.items()}
    with forebay.attach(parts, engine()) as attachment:
        for state in (
            kohya("lora_unet_", factors["unet"], 4) | kohya("lora_te_", factors["text_encoder"], 4),
            dotted("unet.", PEFT, factors["unet"]) | dotted("text_encoder.", PEFT, factors["text_encoder"]),
        ):
            attachment.set_loras([(state, 1.0)])
            for name, part in parts.items():
                assert is_near(stored(part[0].weight), merged(before[name], product(*factors[name]["0"]))), (
                    name
                )
            attachment.set_loras([])
        with pytest.raises(
            ValueError, match=r"may be for 0\.weight of unet, 0\.weight of text_encoder: '0' of"
        ):
            attachment.set_loras([(dotted("", PEFT, factors["unet"]), 1.0)])


def test_tied_weights_and_tables(engine: EngineMaker) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4096, 256)
            self.other = nn.Embedding(4096, 256)
            self.head = nn.Linear(256, 4096, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x) + self.other(x))

    module = randomize(Tied())
    tied, other = adapter(module.head.weight), adapter(module.other.weight)
    state = dotted("", PEFT, {"head": tied, "other": other})
    expected = merged(module.head.weight, product(*tied)), merged(module.other.weight, product(*other))
    x = move(torch.randint(4096, (3, 7)))
    with forebay.attach(module, engine(9)) as attachment:
        attachment.set_loras([(state, 1.0)])
        rows = module.other(x)
        module(x)
        assert is_near(stored(module.embed.weight), expected[0])
        assert is_near(stored(module.other.weight), expected[1])
        assert same(rows, stored(module.other.weight).to(TORCH_DEVICE)[x])


def test_models_that_are_lent_are_patched_as_well(engine: EngineMaker) -> None:
    module = randomize(linears(6)).to(torch.bfloat16)
    state = dotted("", PEFT, {f"{i}": adapter(module[i].weight) for i in range(6)})
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    with forebay.attach(module, engine()) as attachment:
        for strength in (1.0, 0.0, -1.0):
            for _ in range(6):
                module(x)
            assert attachment.stats()[0]["lent"], "the test is of a model that is lent"
            attachment.set_loras([(state, strength)])
            seen = [stored(layer.weight) for layer in module]
            result = module(x)
            for i, weight in enumerate(seen):
                factors = state[f"{i}.lora_B.weight"], state[f"{i}.lora_A.weight"]
                assert is_near(weight, merged(module[i].weight._source, product(*factors, strength)))
            plain = reference(linears(6)).to(torch.bfloat16)
            for layer, weight, mine in zip(plain, seen, module, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(stored(mine.bias))
            assert same(result, plain(x))


def test_threads_use_a_model_while_its_adapters_change(engine: EngineMaker) -> None:
    module = randomize(linears(6)).to(torch.bfloat16)
    state = dotted("", PEFT, {f"{i}": adapter(module[i].weight) for i in range(6)})
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    errors: list[BaseException] = []
    stop = threading.Event()

    def use() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    module(x)
        except BaseException as error:
            errors.append(error)

    with forebay.attach(module, engine(10)) as attachment:
        before = module(x)
        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(12):
            attachment.set_loras([(state, turn % 3)])
        attachment.set_loras([])
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert same(module(x), before)


def test_a_view_that_stays_is_an_error_and_changes_when_it_goes(engine: EngineMaker) -> None:
    module = randomize(linears(2)).to(torch.bfloat16)
    state = dotted("", PEFT, {"0": adapter(module[0].weight)})
    with forebay.attach(module, engine()) as attachment:
        view = module[0].weight.t()
        before = view.clone()
        with pytest.raises(forebay.ForebayError, match=r"still held as they were.*: 0\.weight$"):
            attachment.set_loras([(state, 1.0)])
        assert same(view.clone(), before)
        del view
        assert not same(stored(module[0].weight).t(), before.cpu())


def test_what_is_no_product_of_low_rank_is_an_error_that_names_it(
    engine: EngineMaker, tmp_path: Path
) -> None:
    module = randomize(linears(2)).to(torch.bfloat16)
    up, down = adapter(module[0].weight)
    good = dotted("", PEFT, {"0": (up, down)})
    path = tmp_path / "strange.safetensors"
    cases: list[tuple[State, str]] = [
        (good | {"0.dora_scale": torch.ones(1024)}, r"DoRA is no product .*'0\.dora_scale' of .*strange\.safetensors$"),
        ({"0.hada_w1_a": up}, r"LoHa is no product"),
        ({"0.lokr_w1": up}, r"LoKr is no product"),
        ({"0.diff": up}, r"full difference is no product"),
        ({"0.what": up}, r"is no key of an adapter in a known format: '0\.what' of .*strange"),
        ({"0.lora_A.weight": down}, r"an adapter without up: '0' of .*strange"),
        (dotted("", PEFT, {"0": (up[:, :3].contiguous(), down)}), r"ranks of up and down differ: \(1024, 3\) and \(4, 1024\)"),
        (dotted("", PEFT, {"0": (up[:9].contiguous(), down)}), r"rows 0:1024 of a weight of shape \(1024, 1024\) take no"),
        (good | dotted("", PEFT, {f"n{i}": (up, down) for i in range(7)}), r"^7 of 8 adapters .*: 'n0', 'n1', 'n2', 'n3', 'n4', \.\.\.$"),
    ]  # fmt: skip
    with forebay.attach(module, engine()) as attachment:
        before = stored(module[0].weight)
        for state, message in cases:
            path.unlink(missing_ok=True)
            save_file({key: tensor.clone() for key, tensor in state.items()}, path)
            with pytest.raises(ValueError, match=message):
                attachment.set_loras([(path, 1.0)])
        assert same(stored(module[0].weight), before)
        with pytest.raises(forebay.SourceError, match="missing"):
            attachment.set_loras([(tmp_path / "missing.safetensors", 1.0)])


def test_what_is_for_no_weight_can_be_left_out(engine: EngineMaker, caplog: pytest.LogCaptureFixture) -> None:
    module = randomize(linears(2)).to(torch.bfloat16)
    factors = adapter(module[0].weight)
    with forebay.attach(module, engine()) as attachment:
        attachment.set_loras([(dotted("", PEFT, {"0": factors, "elsewhere": factors}), 1.0)], strict=False)
        assert "1 of 2 adapters are for no weight" in caplog.text and "'elsewhere'" in caplog.text
        assert is_near(stored(module[0].weight), merged(module[0].weight._source, product(*factors)))


def test_weights_that_take_no_adapter_are_named(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.Linear(512, 512)))
    factors = adapter(module[0].weight)
    module[0].weight = nn.Parameter(module[0].weight.t(), requires_grad=False)
    with (
        forebay.attach(module, engine()) as attachment,
        pytest.raises(ValueError, match=r"not contiguous .*'0' of a state dict for 0\.weight of Sequential$"),
    ):
        attachment.set_loras([(dotted("", PEFT, {"0": factors}), 1.0)])


@pytest.mark.parametrize("how", ["adapters", "written"])
def test_a_small_weight_that_is_another_is_not_kept(how: str, engine: EngineMaker, tmp_path: Path) -> None:
    expected = randomize(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 16))).state_dict()
    save_file({key: tensor.clone() for key, tensor in expected.items()}, tmp_path / "model.safetensors")
    chosen = engine()
    for _ in range(2):
        module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 16)).requires_grad_(False)
        module.load_state_dict(forebay.load(tmp_path / "model.safetensors"), assign=True)
        with forebay.attach(module, chosen) as attachment:
            assert same(stored(module[1].weight), expected["1.weight"])
            if how == "written":
                module[1].weight.mul_(2)
            else:
                attachment.set_loras([(dotted("", PEFT, {"1": adapter(expected["1.weight"])}), 1.0)])
            assert not same(stored(module[1].weight), expected["1.weight"])
            attachment.detach(keep=True)


def test_factors_are_given_back(engine: EngineMaker) -> None:
    """Nothing of the adapters stays once they are gone."""
    import gc
    import weakref

    module = randomize(linears(2)).to(torch.bfloat16)
    with forebay.attach(module, engine()) as attachment:
        state = dotted("", PEFT, {"0": adapter(module[0].weight)})
        gone = [weakref.ref(tensor) for tensor in state.values()]
        attachment.set_loras([(state, 1.0)])
        module[0](move(torch.randn(1, 1024, dtype=torch.bfloat16)))
        del state
        attachment.set_loras([])
        gc.collect()
        assert all(ref() is None for ref in gone)


def test_adapters_of_a_file_are_not_read_into_memory(tmp_path: Path) -> None:
    save_file(dotted("", PEFT, {"0": (torch.randn(8, 4), torch.randn(4, 8))}), tmp_path / "lora.safetensors")
    (found,) = read_adapters(tmp_path / "lora.safetensors")
    assert (found.rank, found.scale, found.target) == (4, 1.0, "0")
    assert bits(found.up).numel() == 8 * 4 * 4

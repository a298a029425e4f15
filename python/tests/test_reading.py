"""What reads a weight without running it: state dicts, copies, pickles, printing, metadata."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from support import MIB, TORCH_DEVICE, move, randomize, reference, same
from torch import nn

import forebay


@pytest.fixture
def model() -> nn.Sequential:
    return randomize(
        nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.LSTM(512, 64), nn.Embedding(400, 512))
    )


@pytest.fixture
def attachment(model, engine):
    with forebay.attach(model, engine(12), page_size=2 * MIB) as attached:
        yield attached


def addresses(state: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in state.items()}


def test_state_dict_gives_the_sources_themselves(model, engine) -> None:
    parameters = {name for name, _ in model.named_parameters()}
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if name in parameters}
    with forebay.attach(model, engine(12)):
        state = model.state_dict()
        assert {name: tensor.data_ptr() for name, tensor in state.items() if name in parameters} == before
        assert all(
            state[name].device.type == "cpu" and type(state[name]) is torch.Tensor for name in parameters
        )
        part = model[0].state_dict(prefix="part.")
        assert part["part.weight"].data_ptr() == before["0.weight"]
        assert part["part.bias"].data_ptr() == before["0.bias"]
        kept = model.state_dict(keep_vars=True)
        assert kept["0.weight"] is model[0].weight and kept["0.bias"] is model[0].bias
    assert addresses(model.state_dict()).items() >= before.items()


def test_state_dict_filled_by_hand(model, attachment) -> None:
    state: dict[str, torch.Tensor] = {}
    for name, child in model.named_children():
        child.state_dict(destination=state, prefix=f"{name}.")
    assert addresses(state) == addresses(model.state_dict())


def test_saved_files(model, attachment, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert same(safetensors.load_file(tmp_path / "m.safetensors"), expected)
    assert same(dict(torch.load(tmp_path / "m.pt", map_location="cpu", weights_only=True)), expected)
    assert same(forebay.load(tmp_path / "m.safetensors"), expected)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_plain_modules(model, engine, duplicate) -> None:
    tokens, x = move(torch.tensor([[3, 399]])), move(torch.randn(2, 512))
    expected = reference(model)[:3](x), reference(model)[3](tokens)
    with forebay.attach(model, engine(12)):
        copied = duplicate(model)
        assert isinstance(model[0].weight, forebay.ForebayParameter)
    assert {type(parameter) for parameter in copied.parameters()} == {nn.Parameter}
    assert {parameter.device.type for parameter in copied.parameters()} == {"cpu"}
    assert same({**dict(copied.named_parameters())}, dict(model.named_parameters()))
    copied = copied.to(TORCH_DEVICE)
    assert same((copied[:3](x), copied[3](tokens)), expected)
    assert "forebay" not in repr(vars(copied[0]))
    with torch.no_grad():
        copied[0].weight.add_(1)
    assert not same(copied[0].weight.cpu(), model[0].weight)


def test_copies_keep_ties(engine) -> None:
    model = nn.ModuleList([nn.Linear(512, 512), nn.Linear(512, 512)])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    with forebay.attach(model, engine(12)):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied[0].weight is copied[1].weight
            assert copied[0].bias is copied[1].bias


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight"])
def test_one_weight_saved(model, attachment, name) -> None:
    weight, buffer = model.get_parameter(name), io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="cpu")
    assert isinstance(loaded, nn.Parameter)
    assert same(loaded, model.state_dict()[name])
    assert same(copy.deepcopy(weight).cpu(), model.state_dict()[name])
    assert same(copy.copy(weight).cpu(), model.state_dict()[name])


def test_printing(model, attachment) -> None:
    text = repr(model[0].weight)
    assert text.startswith(f"ForebayParameter '0.weight' on {TORCH_DEVICE}, from CPU memory:")
    assert repr(model.state_dict()["0.weight"]) in text
    assert "Linear(in_features=512" in str(model)
    assert f"{model[0].weight.sum():.3f}" == f"{model.state_dict()['0.weight'].to(TORCH_DEVICE).sum():.3f}"


def test_metadata(model, attachment) -> None:
    filled = attachment.stats()[0]["filled"]
    for name, source in model.state_dict(keep_vars=False).items():
        if "running" in name or "batches" in name:
            continue
        weight = model.get_parameter(name)
        assert isinstance(weight, nn.Parameter)
        assert weight.device == TORCH_DEVICE
        assert (weight.dtype, weight.shape, weight.stride()) == (source.dtype, source.shape, source.stride())
        assert (weight.numel(), weight.ndim, weight.element_size()) == (
            source.numel(),
            source.ndim,
            source.element_size(),
        )
        assert weight.is_leaf and not weight.requires_grad and weight.grad is None
        assert len(weight) == len(source)
        assert weight.is_contiguous() and weight.is_floating_point()
        assert hash(weight) == id(weight)
    assert attachment.stats()[0]["filled"] == filled
    assert [name for name, _ in model.named_parameters()][:2] == ["0.weight", "0.bias"]


def test_what_was_noted_on_a_parameter_stays(model, engine) -> None:
    model[0].weight.note = "kept"
    model[0].bias.note = "kept as well"
    with forebay.attach(model, engine(12)):
        assert (model[0].weight.note, model[0].bias.note) == ("kept", "kept as well")


def test_a_lent_forward_tells_its_arguments(engine) -> None:
    module = nn.MultiheadAttention(256, 4)
    expected = inspect.signature(module.forward)
    with forebay.attach(module, engine(12)):
        assert inspect.signature(module.forward) == expected

"""Writes to managed weights are refused, and leave the bytes as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import MIB, TORCH_DEVICE, move, press, randomize, same
from torch import nn

import forebay


@pytest.fixture
def model() -> nn.Sequential:
    return randomize(
        nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Linear(512, 512))
    )


@pytest.fixture
def attachment(model, engine):
    with forebay.attach(model, engine(8), page_size=2 * MIB) as attached:
        yield attached


def outside(call):
    """Runs a call as C++ callers do, without asking __torch_function__."""

    def run(w):
        with torch._C.DisableTorchFunctionSubclass():
            return call(w)

    return run


WRITES = {
    "add_": lambda w: w.add_(1),
    "iadd": lambda w: w.__iadd__(1),
    "setitem": lambda w: w.__setitem__(0, 1),
    "data": lambda w: w.data.zero_(),
    "detach": lambda w: w.detach().mul_(2),
    "detach_": lambda w: w.detach_().mul_(2),
    "assigned-data": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "assigned-grad": lambda w: setattr(w, "grad", torch.zeros(512, 512)),
    "init": lambda w: nn.init.normal_(w),
    "init-kaiming": lambda w: nn.init.kaiming_uniform_(w),
    "out": lambda w: torch.mul(w, 2, out=w),
    "out-of-other": lambda w: torch.zeros(512, 512, device=w.device, out=w),
    "out-tuple": lambda w: torch.max(w, 0, out=(w, torch.empty(0, dtype=torch.long))),
    "relu": lambda w: F.relu(w, inplace=True),
    "relu_": lambda w: torch.relu_(input=w),
    "dropout": lambda w: F.dropout(w, 0.5, training=True, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w, torch.ones(2, device=w.device)], 2.0),
    "copy_": lambda w: w.copy_(torch.zeros(512, 512)),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(3, device=w.device)),
    "swapped": lambda w: w.t_(),
    "renormed": lambda w: torch.embedding_renorm_(w, torch.tensor([1], device=w.device), 0.1, 2.0),
    "op": lambda w: torch.ops.aten.mul_.Scalar(w, 2),
    "outside-add_": outside(lambda w: w.add_(1)),
    "outside-foreach": outside(lambda w: torch._foreach_add_([w], 1.0)),
    "outside-out": outside(lambda w: torch.mul(w, 2, out=w)),
    "trained": lambda w: w.requires_grad_(True),
    "trained-too": lambda w: setattr(w, "requires_grad", True),
}


@pytest.mark.parametrize("write", WRITES)
def test_refused_by_name_and_undone(write, model, attachment) -> None:
    expected = model.state_dict()["1.weight"].clone().to(TORCH_DEVICE)
    kept = model[1].weight[:1]  # what is pinned could not be read again
    with pytest.raises((forebay.ForebayError, RuntimeError), match=r"1\.weight"):
        WRITES[write](model[1].weight)
    assert same(kept, expected[:1])
    assert same(model[1].weight.clone(), expected)
    press(attachment.engine)
    assert same(model[1].weight.clone(), expected)
    assert same(model.state_dict()["1.weight"].to(TORCH_DEVICE), expected)


@pytest.mark.parametrize("norm", [F.batch_norm, torch.batch_norm])
def test_writes_that_torch_does_not_count(norm, engine) -> None:
    module = nn.Module()
    module.mean, module.var = (nn.Parameter(torch.rand(40_000), requires_grad=False) for _ in range(2))
    x = move(torch.randn(2, 40_000))
    with forebay.attach(module, engine(8)):
        before = module.mean.clone()
        with pytest.raises(forebay.ForebayError, match=r"batch_norm would write to a managed weight.*mean"):
            if norm is F.batch_norm:
                norm(x, module.mean, module.var, training=True)
            else:
                norm(x, None, None, module.mean, module.var, True, 0.1, 1e-5, False)
        assert same(module.mean.clone(), before)
        F.batch_norm(x, module.mean, module.var)


CONVERSIONS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to-dtype": lambda m: m.to(torch.bfloat16),
    "to-meta": lambda m: m.to("meta"),
    "to-empty": lambda m: m.to_empty(device=TORCH_DEVICE),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_are_refused_before_anything_changes(conversion, model, attachment) -> None:
    before = {
        name: (tensor.dtype, tensor.device) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    with pytest.raises(forebay.ForebayError, match=r"keeps its device and dtype; detach\(\) it.*Sequential"):
        CONVERSIONS[conversion](model)
    after = {name: (tensor.dtype, tensor.device) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == before


def test_a_model_of_small_weights_only_refuses_as_well(engine) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with forebay.attach(model, engine(4)):
        for refused in (model.half, model.requires_grad_, lambda: forebay.attach(model)):
            with pytest.raises((forebay.ForebayError, ValueError), match="detach"):
                refused()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_conversions_to_what_is_change_nothing(model, attachment) -> None:
    weights = list(model.parameters())
    dtype, device = torch.float32, TORCH_DEVICE
    for same_again in (
        model.to(device),
        model.float(),
        model.to(device, dtype),
        model.to(str(device)),
        model.eval(),
    ):
        assert same_again is model
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    weight = model[1].weight
    assert weight.to(device) is weight and weight.float() is weight and weight.to(weight) is weight
    assert weight.type(weight.type()) is weight
    assert weight.to(dtype, copy=True) is not weight
    assert weight.to(dtype, False, True) is not weight
    assert weight.to(dtype, memory_format=torch.contiguous_format) is weight
    assert weight.half().dtype == torch.float16


def test_a_layout_is_changed_in_a_copy(engine) -> None:
    module = randomize(nn.Conv2d(64, 64, 3))
    with forebay.attach(module, engine(4)):
        turned = module.weight.to(memory_format=torch.channels_last)
        assert turned.is_contiguous(memory_format=torch.channels_last)
        assert not module.weight.is_contiguous(memory_format=torch.channels_last)


def test_loading_a_state_dict_is_refused_before_anything_changes(model, attachment) -> None:
    other = {name: torch.rand_like(tensor.cpu()) if tensor.is_floating_point() else tensor
             for name, tensor in model.state_dict().items()}  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in (model, model[1]):
        with pytest.raises(forebay.ForebayError, match="load_state_dict would write"):
            module.load_state_dict(other, strict=False)
    with pytest.raises(forebay.ForebayError, match="load_state_dict would write"):
        model.load_state_dict(other, assign=True)
    assert same(dict(model.state_dict()), before)


def test_an_optimizer_changes_nothing(model, attachment) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.enable_grad():
        x = move(torch.randn(4, 512)).requires_grad_()
        model(x).sum().backward()
    optimizer.step()
    assert all(
        same(parameter.clone(), was) for parameter, was in zip(model.parameters(), before, strict=True)
    )


def test_written_while_lent(model, attachment) -> None:
    expected = model[1].weight.clone()
    with (
        pytest.raises(forebay.ForebayError, match=r"written to while they were lent.*1\.weight"),
        forebay.lend(model),
    ):
        model[1].weight.add_(1)
    assert same(model[1].weight.clone(), expected)


def test_written_small_weights_are_told(model, engine, caplog) -> None:
    before = model[1].bias.clone()
    with forebay.attach(model, engine(8)):
        model[1].bias.add_(1)
    assert "1.bias" in caplog.text
    assert same(model[1].bias, before)

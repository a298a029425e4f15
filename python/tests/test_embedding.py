"""Tables: rows looked up at the source, or the whole table resident."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import TORCH_DEVICE, linears, move, randomize, reference, same
from torch import nn

import forebay


@pytest.fixture
def model() -> nn.Module:
    return randomize(
        nn.Sequential(nn.Embedding(20_000, 256, padding_idx=7), nn.Linear(256, 1024), *linears(2))
    )


@pytest.fixture(params=[True, False], ids=["looked-up", "resident"])
def attachment(request, model, engine):
    with forebay.attach(model, engine(12 if request.param else 256)) as attached:
        assert model[0].weight._weight.is_kept() is not request.param
        yield attached


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (4, 9), (2, 3, 4)])
def test_indices_of_any_shape(model, attachment, shape, dtype) -> None:
    indices = move(torch.randint(0, 20_000, shape, dtype=dtype))
    attached, plain = model[0](indices), F.embedding(indices, attached_source(model).to(TORCH_DEVICE))
    assert same(attached, plain)


def test_only_rows_that_are_asked_for_move(model, engine) -> None:
    with forebay.attach(model, engine(12)) as attachment:
        model[0](move(torch.tensor([5, 5, 5, 19_999])))
        assert attachment.stats()[0]["looked_up"] == 2 * 256 * 4


@pytest.mark.parametrize("wrong", [-1, 20_000, 1 << 40])
def test_a_row_that_does_not_exist_is_named(model, engine, wrong) -> None:
    with forebay.attach(model, engine(12)):
        with pytest.raises(IndexError, match=rf"0\.weight has 20000 rows, numbered from 0: {wrong}"):
            model[0](move(torch.tensor([3, wrong])))
        assert model(move(torch.tensor([3]))).shape == (1, 1024)


@pytest.mark.parametrize("indices", [torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_indices_of_another_kind_are_refused_as_by_torch(model, attachment, indices) -> None:
    with pytest.raises(RuntimeError) as expected:
        F.embedding(move(indices), torch.zeros(3, 2, device=TORCH_DEVICE))
    with pytest.raises(type(expected.value)) as error:
        model[0](move(indices))
    assert str(error.value) == str(expected.value)


def test_another_default_device_changes_nothing(model, engine) -> None:
    """Rows are read to host memory, whatever device new tensors go to."""
    indices = move(torch.randint(0, 20_000, (6,)))
    expected = reference(model)(indices)
    with forebay.attach(model, engine(12)), torch.device("meta"):
        assert same(model(indices), expected)


def test_a_table_used_as_a_whole(model, attachment) -> None:
    source = attached_source(model).to(TORCH_DEVICE)
    x = move(torch.randn(2, 256))
    if not model[0].weight._weight.is_kept():
        with pytest.raises(forebay.OutOfMemoryError):
            x @ model[0].weight.t()
        return
    assert same(x @ model[0].weight.t(), x @ source.t())


def test_max_norm_would_write(engine) -> None:
    module = randomize(
        nn.ModuleList([nn.Embedding(500, 256, max_norm=1e-3), nn.EmbeddingBag(500, 256, max_norm=1e-3)])
    )
    before = [part.weight.clone() for part in module]
    with forebay.attach(module, engine(16)):
        for part in module:
            with pytest.raises(forebay.ForebayError, match=r"would write to a managed weight.*\d\.weight"):
                part(move(torch.tensor([[1, 2]])))
        assert all(same(part.weight.clone().cpu(), was) for part, was in zip(module, before, strict=True))


def attached_source(model: nn.Module) -> torch.Tensor:
    return model.state_dict()["0.weight"]

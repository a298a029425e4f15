"""Results are bit-identical to plain torch, in any budget that holds one operation's weights."""

from __future__ import annotations

import pytest
import torch
from support import MIB, TORCH_DEVICE, linears, move, numbers, press, randomize, reference, same
from torch import nn
from zoo import ZOO

import forebay

PAGE = 2 * MIB


@pytest.mark.parametrize("small", [None, 0], ids=["small-resident", "all-managed"])
@pytest.mark.parametrize("name", ZOO)
def test_every_budget_down_to_one_operation(name, small, engine) -> None:
    module, inputs = ZOO[name]()
    randomize(module)
    inputs = move(inputs)
    expected = reference(module)(*inputs)
    with forebay.attach(module, engine(), page_size=PAGE, small=small) as attachment:
        pages = attachment.stats()[0]["pages"]

    def refusal(budget: int) -> str:
        """What is said in this budget, in pages; empty where everything is right."""
        with forebay.attach(module, engine(2 * budget), page_size=PAGE, small=small) as attachment:
            try:
                for _ in range(2):
                    assert same(module(*inputs), expected), f"{budget} pages"
                press(attachment.engine)
                assert same(module(*inputs), expected), f"{budget} pages, after pressure"
                assert attachment.engine.stats()["held"] <= budget * PAGE
            except forebay.OutOfMemoryError as error:
                return str(error)
        return ""

    assert not refusal(pages + 1)
    enough, too_little, message = pages + 1, 0, ""
    while enough - too_little > 1:
        budget = (enough + too_little) // 2
        if said := refusal(budget):
            too_little, message = budget, said
        else:
            enough = budget
    if too_little:
        # One frame more was enough, and the numbers tell exactly that.
        needed, held, budget = numbers(message)
        assert budget == too_little * PAGE
        assert needed + held == enough * PAGE
    assert same(reference(module)(*inputs), expected)


def test_a_budget_of_one_layer_holds_one_layer(engine) -> None:
    module, x = randomize(linears(6)), move(torch.randn(3, 1024))
    expected = reference(module)(x)
    with forebay.attach(module, engine(3 * 2), page_size=PAGE, small=64 << 10) as attachment:
        assert same(module(x), expected)
        assert attachment.stats()[0]["filled"] >= 6 * 4 * MIB
    with forebay.attach(module, engine(2 * 2), page_size=PAGE):
        with pytest.raises(
            forebay.OutOfMemoryError, match=r"needs \S+ MiB of weights at once, the budget is 4 MiB"
        ):
            module(x)


def test_thousands_of_tiny_parameters(engine) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.randn(1 + i % 7, 5)) for i in range(2500))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([(weight * x).sum() for weight in self.weights])

    module, x = Tiny().requires_grad_(False), move(torch.randn(5))
    expected = reference(module)(x)
    for small in (None, 0):
        with forebay.attach(module, engine(2), small=small):
            assert same(module(x), expected)


def test_nan_payloads_keep_their_bits(engine) -> None:
    patterns = torch.randint(-(1 << 31), 1 << 31, (512, 1024), dtype=torch.int64).to(torch.int32)
    patterns[:, ::3] |= 0x7F800001
    module = nn.Linear(1024, 512, bias=False)
    module.weight = nn.Parameter(patterns.view(torch.float32), requires_grad=False)
    with forebay.attach(module, engine(4)):
        assert torch.equal(module.weight.view(torch.int32), patterns.to(TORCH_DEVICE))
        assert torch.equal(module.weight.clone().view(torch.int32), patterns.to(TORCH_DEVICE))


def test_empty_parameters_stay_as_they_are(engine) -> None:
    module = nn.Linear(0, 8)
    x = move(torch.randn(2, 0))
    expected = reference(module)(x)
    with forebay.attach(module, engine(4)):
        assert same(module(x), expected)


def test_inference_mode(engine) -> None:
    module, x = randomize(linears(3)), move(torch.randn(2, 1024))
    expected, weight = reference(module)(x), module[0].weight.to(TORCH_DEVICE)
    with torch.inference_mode():
        x = x.clone()
        with forebay.attach(module, engine(8)):
            assert same(module(x), expected)
            assert same(module[0].weight.t().contiguous(), weight.t().contiguous())
    with forebay.attach(module, engine(8)):
        assert same(module(x), expected)


def test_autocast(engine) -> None:
    module, x = randomize(linears(3)), move(torch.randn(2, 1024))
    with torch.autocast(TORCH_DEVICE.type, torch.bfloat16):
        expected = reference(module)(x)
        with forebay.attach(module, engine(8)):
            assert same(module(x), expected)

"""Gradients through frozen weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import MIB, linears, move, press, randomize, reference, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import forebay


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def gradient(call, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    call(x).square().sum().backward()
    return x.grad


MODULES = {
    "linear": (lambda: linears(3, 512), (4, 512)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 64, 3)), (1, 64, 9, 9)),
    "norm": (lambda: nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.BatchNorm1d(512)), (4, 512)),
    "lent": (lambda: nn.TransformerEncoderLayer(256, 4, 512), (3, 2, 256)),
}


@pytest.mark.parametrize("small", [None, 0])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_inputs(name, small, engine) -> None:
    make, shape = MODULES[name]
    module, x = randomize(make()), move(torch.randn(shape))
    expected = gradient(reference(module), x)
    with forebay.attach(module, engine(64), page_size=2 * MIB, small=small):
        assert same(gradient(module, x), expected)


def test_what_the_graph_needs_stays_until_the_backward_pass(engine) -> None:
    module, x = randomize(linears(2, 512)), move(torch.randn(4, 512)).requires_grad_()
    plain = reference(module)
    with forebay.attach(module, engine(64), page_size=2 * MIB) as attachment:
        out = module(x)
        press(attachment.engine)
        attachment.detach()
        out.sum().backward()
        attached, x.grad = x.grad, None
        plain(x).sum().backward()
        assert same(attached, x.grad)


def test_the_graph_gives_its_memory_back(engine) -> None:
    module, x = randomize(linears(6, 512)), move(torch.randn(4, 512))
    plain = reference(module)
    with forebay.attach(module, engine(6), page_size=2 * MIB):
        with pytest.raises(forebay.OutOfMemoryError, match="live views"):
            gradient(module, x)
        with torch.no_grad():
            assert same(module(x), plain(x))


def test_checkpointed_passes_need_one_layer(engine) -> None:
    module, x = randomize(linears(6, 512)), move(torch.randn(4, 512))

    def forward(module: nn.Sequential):
        def call(x: torch.Tensor) -> torch.Tensor:
            for layer in module:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

        return call

    expected = gradient(forward(reference(module)), x)
    with forebay.attach(module, engine(6), page_size=2 * MIB):
        assert same(gradient(forward(module), x), expected)


def test_an_adapter_is_trained_beside_frozen_weights(engine) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(512, 512).requires_grad_(False)
            self.down, self.up = nn.Linear(512, 8), nn.Linear(8, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x + self.up(self.down(x)))

    torch_module = Adapted()
    plain, x = reference(torch_module), move(torch.randn(3, 512))
    with forebay.attach(torch_module.base, engine(8)):
        for part in (torch_module.down, torch_module.up):
            part.to(x.device)
        for module in (torch_module, plain):
            module(x).square().sum().backward()
        assert same(torch_module.down.weight.grad, plain.down.weight.grad)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "hessian"])
def test_transforms(transform, engine) -> None:
    module, x = (
        randomize(nn.Sequential(nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 512))),
        move(torch.randn(512)),
    )
    plain = reference(module)

    def value(module: nn.Module):
        def loss(x: torch.Tensor) -> torch.Tensor:
            return module(x).square().sum()

        return {
            "grad": lambda: torch.func.grad(loss)(x),
            "vjp": lambda: torch.func.vjp(module, x)[1](torch.ones_like(x)),
            "jvp": lambda: torch.func.jvp(module, (x,), (torch.ones_like(x),)),
            "jacrev": lambda: torch.func.jacrev(module)(x),
            "hessian": lambda: torch.func.hessian(loss)(x[:512]),
        }[transform]()

    expected = value(plain)
    with forebay.attach(module, engine(16), page_size=2 * MIB, small=0) as attachment:
        # The very first use is inside the transform.
        attached = value(module)
        press(attachment.engine)
        assert same(attached, expected)
        with torch.no_grad():
            assert same(module(x), plain(x))


def test_a_function_of_ones_own(engine) -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight)

        @staticmethod
        def backward(ctx, grad):
            _, weight = ctx.saved_tensors
            return grad @ weight, None

    module, x = randomize(linears(3, 512)), move(torch.randn(2, 512))
    plain = reference(module)
    with forebay.attach(module, engine(8), page_size=2 * MIB):
        assert same(
            gradient(lambda x: Product.apply(x, module[1].weight), x),
            gradient(lambda x: Product.apply(x, plain[1].weight), x),
        )

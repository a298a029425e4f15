"""Weights in a C++ extension: one that calls torch works; one that takes an address is told so, or borrows."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import DEVICE, MIB, linears, move, press, randomize, reference, same
from torch import nn

import forebay

# Not all of torch's headers: they take minutes.
SOURCE = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/utils/pybind.h>

at::Tensor product(at::Tensor x, at::Tensor weight) { return at::linear(x, weight); }
at::Tensor turned(at::Tensor weight) { return weight.t(); }
at::Tensor joined(std::vector<at::Tensor> weights) { return at::cat(weights); }
void doubled(at::Tensor weight) { weight.mul_(2); }
double first(at::Tensor weight) { return weight.data_ptr<float>()[0]; }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("product", &product);
  module.def("turned", &turned);
  module.def("joined", &joined);
  module.def("doubled", &doubled);
  module.def("first", &first);
}
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    from torch.utils.cpp_extension import load

    folder = tmp_path_factory.mktemp("extension")
    source = folder / "extension.cpp"
    source.write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        # torch starts ninja by its name; it lies beside an interpreter whose environment was not activated.
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        if shutil.which("ninja") is None:
            pytest.skip("there is no ninja")
        return load(
            "forebay_test_extension", [str(source)], extra_cflags=["-O0"], build_directory=str(folder)
        )


@pytest.fixture
def model() -> nn.Module:
    return randomize(linears(3, 768))


def test_torch_called_from_cpp(model, extension, engine) -> None:
    plain, x = reference(model), move(torch.randn(2, 768))
    with forebay.attach(model, engine(10), page_size=2 * MIB) as attachment:
        for _ in range(2):
            for layer, other in zip(model, plain, strict=True):
                assert same(extension.product(x, layer.weight), extension.product(x, other.weight))
            weights, others = ([part[i].weight for i in (0, 1)] for part in (model, plain))
            assert same(extension.joined(weights), extension.joined(others))
        kept = extension.turned(model[0].weight)
        press(attachment.engine)
        model(x)
        assert same(kept, plain[0].weight.t())


def test_writes_from_cpp(model, extension, engine) -> None:
    with forebay.attach(model, engine(10), page_size=2 * MIB):
        before = model[0].weight.clone()
        with pytest.raises(RuntimeError, match=r"mul_.* would write to a managed weight.*0\.weight"):
            extension.doubled(model[0].weight)
        assert same(model[0].weight.clone(), before)


def test_addresses_taken_in_cpp(model, extension, engine) -> None:
    expected = model[1].weight[0, 0].item()
    with forebay.attach(model, engine(10), page_size=2 * MIB):
        with pytest.raises(
            RuntimeError, match=r"has no address of its own.*forebay\.lend\(module\).*1\.weight"
        ):
            extension.first(model[1].weight)
        if DEVICE == "host":
            with forebay.lend(model[1]):
                assert extension.first(model[1].weight) == expected


def test_a_module_class_that_borrows(extension, engine) -> None:
    class Raw(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.data_ptr() != 0
            return extension.product(x, self.weight)

    model, x = nn.Sequential(Raw(512, 512), nn.Linear(512, 512)), move(torch.randn(2, 512))
    expected = reference(randomize(model))(x)
    with forebay.attach(model, engine(8), page_size=2 * MIB, lend=[Raw]):
        assert same(model(x), expected)


def test_a_recurrent_module_that_borrows(engine) -> None:
    model, x = randomize(nn.LSTM(256, 256)), move(torch.randn(3, 2, 256))
    expected = reference(model)(x)
    with forebay.attach(model, engine(8), page_size=2 * MIB, lend=[nn.LSTM]):
        assert same(model(x), expected)
        with forebay.lend(model):
            assert all(weight.data_ptr() for weight in model._flat_weights)
        assert isinstance(model._flat_weights[0], forebay.ForebayParameter)

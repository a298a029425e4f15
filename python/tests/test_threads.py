"""Several threads on one attached model, and on several."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from support import DEVICE, MIB, linears, move, press, randomize, reference, same
from torch import nn

import forebay


def together(*calls: Callable[[], None]) -> None:
    """Runs calls in a thread each, and raises what they raise."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        try:
            barrier.wait()
            with torch.no_grad():
                call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


MODELS = {
    "linear": (lambda: linears(5, 512), lambda: torch.randn(2, 512)),
    "lent": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True), 3),
        lambda: torch.randn(2, 5, 256),
    ),
    "looked-up": (
        lambda: nn.Sequential(nn.Embedding(4000, 256), *linears(3, 256)),
        lambda: torch.randint(4000, (2, 9)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_model_with_different_inputs(name, engine) -> None:
    make, inputs = MODELS[name]
    model = randomize(make())
    plain = reference(model)
    rounds = [[move(inputs()) for _ in range(12)] for _ in range(3)]
    expected = [[plain(x) for x in xs] for xs in rounds]
    with forebay.attach(model, engine(14), page_size=2 * MIB) as attachment:

        def use(xs: list[torch.Tensor], outs: list[torch.Tensor]) -> Callable[[], None]:
            def call() -> None:
                for x, out in zip(xs, outs, strict=True):
                    assert same(model(x), out)

            return call

        def disturb() -> None:
            for _ in range(30):
                press(attachment.engine)

        together(*map(use, rounds, expected), disturb)
        kinds = {type(p) for p in model.parameters() if p.numel() > 16_384}
        assert kinds == {forebay.ForebayParameter}


def test_detach_while_others_run(engine) -> None:
    model, x = randomize(linears(4, 512)), move(torch.randn(2, 512))
    expected = reference(model)(x)
    attachment = forebay.attach(model, engine(6), page_size=2 * MIB)
    started = threading.Event()

    def use() -> None:
        try:
            for _ in range(300):
                assert same(model(x), expected)
                started.set()
        except forebay.DetachedError:
            return
        except RuntimeError as error:  # the input is elsewhere than the weights, once they are back
            assert "device" in str(error)

    def detach() -> None:
        started.wait()
        attachment.detach()

    together(use, detach)
    assert type(model[0].weight) is nn.Parameter


def test_models_attached_and_detached_side_by_side(engine) -> None:
    held = engine(16)

    def rounds() -> None:
        model, x = randomize(linears(2, 256)), move(torch.randn(1, 256))
        expected = reference(model)(x)
        for _ in range(15):
            with forebay.attach(model, held, page_size=2 * MIB):
                assert same(model(x), expected)

    together(rounds, rounds, rounds)
    held.settle()
    assert held.stats()["models"] == []


def test_a_process_ends_with_models_attached_and_in_use(tmp_path) -> None:
    program = """
import functools, sys, threading
import torch
from torch import nn
import forebay
from safetensors.torch import save_file

device, path = sys.argv[1], sys.argv[2]
save_file({f"{i}.weight": torch.randn(1024, 1024) for i in range(12)}, path)

def load():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12)))
    model.load_state_dict(forebay.load(path), assign=True)
    return model.requires_grad_(False)

models = [load() for _ in range(3)]
target = "cpu" if device == "host" else device
x = torch.randn(1, 1024).to(target)
# One that fits is lent as a whole, the others stream and are being registered.
attached = [forebay.attach(models[0], forebay.Engine(device, budget=256 << 20))]
engine = forebay.Engine(device, budget=24 << 20)
attached += [forebay.attach(model, engine) for model in models[1:]]
forebay.engine(device, budget=64 << 20)
if device == "host":  # as on a GPU: a Python object that goes with the last tensor
    for attachment in attached:
        attachment.models[0].set_stream_source(functools.partial(int, 0))
loop = models[0], models[2]
loop[0].cycle = loop
with torch.no_grad():
    for model in models * 3:
        model(x)
    view = models[0][0].weight[0]
    def use():
        try:
            while True:
                models[1](x)
        except forebay.ForebayError:
            pass
    def keep_the_interpreter():
        while True:
            pass
    for work in (use, use, use, keep_the_interpreter):
        threading.Thread(target=work, daemon=True).start()
    for model in models * 2:
        model(x)
print("end")
"""
    for _ in range(3):
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-c",
            program,
            DEVICE,
            str(tmp_path / "m.safetensors"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "end\n"

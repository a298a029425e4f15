"""An engine for each of several devices: models on all of them at once, and files that they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import DEVICE, MIB, linears, press, randomize, same
from test_threads import together
from torch import nn

import forebay

safetensors = pytest.importorskip("safetensors.torch")

LAYERS = 6
# Where there is one GPU, or none, two engines with a budget each stand for two devices.
DEVICES = (
    [f"cuda:{ordinal}" for ordinal in range(torch.cuda.device_count())]
    if DEVICE.startswith("cuda") and torch.cuda.device_count() > 1
    else [DEVICE] * 2
)


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


@pytest.fixture
def engines() -> list[forebay.Engine]:
    return [forebay.Engine(device, budget=14 * MIB, readers=2) for device in DEVICES]


@pytest.fixture
def path(tmp_path) -> Path:
    made = tmp_path / "model.safetensors"
    safetensors.save_file(randomize(linears(LAYERS)).state_dict(), made)
    return made


def loaded(path: Path) -> nn.Module:
    model = linears(LAYERS).requires_grad_(False).eval()
    model.load_state_dict(forebay.load(path), assign=True)
    return model


def test_models_on_all_devices_with_two_threads_on_each(path, engines) -> None:
    calls: list[Callable[[], None]] = []
    attachments = []
    for device, engine in zip(DEVICES, engines, strict=True):
        model = loaded(path)
        plain = loaded(path).to(place(device))
        inputs = [torch.randn(3, 1024).to(place(device)) for _ in range(10)]
        expected = [plain(x) for x in inputs]
        attachments.append(forebay.attach(model, engine, page_size=2 * MIB))

        def steps(model=model, inputs=inputs, expected=expected) -> None:
            for x, y in zip(inputs, expected, strict=True):
                assert same(model(x), y)

        calls += [steps, steps]
    together(*calls)
    for engine, attachment in zip(engines, attachments, strict=True):
        assert engine.stats()["models"][0]["filled"] > 0
        press(engine)
        attachment.detach()


def test_pressure_on_one_device_leaves_the_others_alone(path, engines) -> None:
    models = [loaded(path) for _ in engines]
    with forebay.attach(models[0], engines[0]), forebay.attach(models[1], engines[1]):
        for model, device in zip(models, DEVICES, strict=False):
            model(torch.randn(1, 1024).to(place(device)))
        before = [engine.stats()["held"] for engine in engines[:2]]
        press(engines[1])
        after = [engine.stats()["held"] for engine in engines[:2]]
        assert after[0] == before[0]
        assert after[1] < before[1]


def test_a_file_that_all_devices_use_is_read_from_disk_once(path, engines) -> None:
    def from_disk() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])

    models = [loaded(path) for _ in engines]
    attachments = [
        forebay.attach(model, engine, page_size=2 * MIB)
        for model, engine in zip(models, engines, strict=True)
    ]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = from_disk()
    x = torch.randn(1, 1024)
    together(
        *(
            lambda model=model, device=device: model(x.to(place(device)))
            for model, device in zip(models, DEVICES, strict=True)
        )
    )
    read = from_disk() - before
    if read == 0:
        pytest.skip(f"nothing is read from a disk for files in {path.parent}")
    assert read <= 1.2 * path.stat().st_size
    for attachment in attachments:
        attachment.detach()

"""Pinned copies of weights, as ComfyUI itself asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if "COMFYUI_ROOT" not in os.environ:
    pytest.skip("needs a checkout of ComfyUI: COMFYUI_ROOT", allow_module_level=True)

import comfy.model_management
import comfy.pinned_memory as pinning
import support
import torch

from forebay.comfyui.aimdo import control, devices, model_vbar
from forebay.comfyui.aimdo.copies import HELD_AHEAD, Copies
from forebay.comfyui.aimdo.host_buffer import HostBuffer, read_file_to_device

_BYTES = 2 << 20
_PADDED = _BYTES + 512
_LAYERS = 12


class _Model:
    """Layers of one size, each a part of a file."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(os.urandom(_BYTES * _LAYERS))
        self.file = path.open("rb")
        self.buffer = HostBuffer(0, HELD_AHEAD, 1 << 30)
        state: list[Any] = [self.buffer, [], [0], [0], [0], {}]
        self.layers = [SimpleNamespace(_pin_state={"weights": state}) for _ in range(_LAYERS)]
        self._target = torch.empty(_BYTES, dtype=torch.uint8, device=support.TORCH_DEVICE)

    def move(self, layers: Sequence[int]) -> None:
        """As ``cast_modules_with_vbar`` of comfy/ops.py moves what is not on the device."""
        for number in layers:
            layer, part = self.layers[number], (self.file, number * _BYTES, _BYTES)
            if pinning.get_pin(layer) is not None:
                continue
            pinning.pin_memory(layer, size=_PADDED)
            pin = pinning.get_pin(layer)
            if pin is None:
                read_file_to_device(*part, 0, self._target.data_ptr(), support.COMFY_DEVICE)
            else:
                self.buffer.read_file_slice(*part, offset=pin.data_ptr() - self.buffer.get_raw_address())

    def copied(self) -> list[int]:
        """The layers that there are copies of."""
        return [n for n, layer in enumerate(self.layers) if pinning.get_pin(layer) is not None]


@pytest.fixture
def models(tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Model]]:
    """Two, on a device whose registering of buffers always succeeds, and that registers no page cache."""
    registers = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: registers)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1 << 40)
    assert control.init() and control.init_devices(iter([support.COMFY_DEVICE]))
    devices.context(support.COMFY_DEVICE).engine.set_registered(0)
    made = [_Model(tmp_path / name) for name in ("first", "second")]
    yield made
    for model in made:
        model.file.close()
        model.buffer.truncate(0, do_unregister=False)
    control.deinit()


def test_a_models_first_step_makes_no_copies_whatever_came_before(models: list[_Model]) -> None:
    streamed = range(2, _LAYERS)
    for model in models:
        model.move(range(_LAYERS))
        assert not model.copied(), "read for the first time"
        for _ in range(4):
            model.move(streamed)
        # A layer that is refused a copy takes that of another.
        assert model.copied() == list(streamed)
        model_vbar.vbars_reset_watermark_limits()  # behind a node

"""When kernels are loaded before a model is to run."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forebay.comfyui import warming
from forebay.comfyui.aimdo import control

HERE = "comfy.model_management"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices for which kernels were loaded, and whether they were ComfyUI's, in a process in which ComfyUI is imported."""
    found: list[Any] = []

    def load(device: torch.device, management: Any, of_comfyui: bool, behind: Any) -> None:
        if behind is not None:
            behind.join()
        found.append((str(device), of_comfyui))

    monkeypatch.setitem(sys.modules, HERE, SimpleNamespace(get_torch_device=lambda: torch.device("cuda:0")))
    monkeypatch.setattr(warming, "_load", load)
    monkeypatch.setattr(warming, "_begun", {})
    monkeypatch.delenv(warming.SWITCH, raising=False)
    return found


def _context(device: str) -> Any:
    """A device as ComfyUI was given it, without the card."""
    return SimpleNamespace(engine=SimpleNamespace(device=device), device=torch.device(device))


def _ended(thread: Any) -> None:
    assert thread is not None and not thread.daemon
    thread.join(10)
    assert not thread.is_alive()


TORCHS, COMFYUIS = ("cuda:0", False), ("cuda:0", True)


def test_once_for_each_card(loaded: list[Any]) -> None:
    for _ in range(2):
        _ended(warming.begin(_context("cuda:0")))
    _ended(warming.begin(_context("cuda:1")))
    warming.wait()
    assert loaded == [TORCHS, COMFYUIS, ("cuda:1", False), ("cuda:1", True)]


def test_torchs_as_soon_as_comfyui_has_chosen_its_device(loaded: list[Any]) -> None:
    assert control.init()
    warming.wait()
    assert loaded == [TORCHS], "ComfyUI is imported"
    assert control.init()
    _ended(warming.begin(_context("cuda:0")))
    assert loaded == [TORCHS, COMFYUIS]


def test_torchs_where_comfyui_is_imported_later(
    loaded: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "comfy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model_management.py").write_text(
        "import torch\n\ndef get_torch_device():\n    return torch.device('cuda:0')\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfy"]:
        monkeypatch.delitem(sys.modules, name)
    assert control.init()
    warming.wait()
    assert loaded == []
    importlib.import_module(HERE)
    for name in ("comfy", HERE):
        monkeypatch.delitem(sys.modules, name)
    warming.wait()
    assert loaded == [TORCHS]


@pytest.mark.parametrize(
    "device", [lambda: torch.device("cpu"), lambda: (_ for _ in ()).throw(RuntimeError("a driver's"))]
)
def test_comfyui_without_a_card_or_with_one_that_fails_is_imported(
    loaded: list[Any], device: Callable[[], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, HERE, SimpleNamespace(get_torch_device=device))
    assert control.init()
    warming.wait()
    assert loaded == []


def test_not_without_a_card_or_comfyui_nor_where_it_is_switched_off(
    loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = SimpleNamespace(engine=SimpleNamespace(device="host"))
    assert warming.begin(host) is None
    monkeypatch.setenv(warming.SWITCH, "0")
    assert warming.begin(_context("cuda:0")) is None
    assert control.init()
    monkeypatch.delenv(warming.SWITCH)
    monkeypatch.delitem(sys.modules, HERE)
    assert warming.begin(_context("cuda:0")) is None
    assert loaded == []


def test_what_fails_there_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Management:
        def should_use_bf16(self, device: torch.device) -> bool:
            raise RuntimeError("a driver's")

    with caplog.at_level(logging.DEBUG, "forebay"):
        warming._load(torch.device("cuda", 0), Management(), of_comfyui=True)
    assert caplog.records and all(record.levelno == logging.DEBUG for record in caplog.records)


def test_kernels_that_cannot_be_used_keep_no_others_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = []

    def broken(device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
        yield lambda: used.append("before")
        raise RuntimeError("none of these here")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (warming._FREE, warming._FREE))
    for name in [name for name in vars(warming) if name.startswith("_of_")]:
        monkeypatch.setattr(warming, name, lambda device, dtype, name=name: iter([lambda: used.append(name)]))
    monkeypatch.setattr(warming, "of_patches", broken)
    with caplog.at_level(logging.DEBUG, "forebay"):
        for chosen in (warming._torchs(), warming._comfyuis()):
            for use in warming._all(chosen, torch.device("cpu"), torch.bfloat16):
                use()
    order = "_of_blocks _of_samplers _of_others _of_attention _of_layers _of_float8 before"
    assert used == order.split()
    assert "none of these here" in caplog.text

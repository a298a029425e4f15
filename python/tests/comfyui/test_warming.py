"""When kernels are loaded before a model is to run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forebay.comfyui import warming

HERE = "comfy.model_management"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices for which kernels were loaded, in a process in which ComfyUI is imported."""
    found: list[Any] = []
    monkeypatch.setitem(sys.modules, HERE, SimpleNamespace())
    monkeypatch.setattr(warming, "_load", lambda device, management: found.append(device))
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


def test_once_for_each_card(loaded: list[Any]) -> None:
    for _ in range(2):
        _ended(warming.begin(_context("cuda:0")))
    _ended(warming.begin(_context("cuda:1")))
    warming.wait()
    assert loaded == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_not_without_a_card_or_comfyui_nor_where_it_is_switched_off(
    loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = SimpleNamespace(engine=SimpleNamespace(device="host"))
    assert warming.begin(host) is None
    monkeypatch.setenv(warming.SWITCH, "0")
    assert warming.begin(_context("cuda:0")) is None
    monkeypatch.delenv(warming.SWITCH)
    monkeypatch.delitem(sys.modules, HERE)
    assert warming.begin(_context("cuda:0")) is None
    assert loaded == []


def test_what_fails_there_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Management:
        def should_use_bf16(self, device: torch.device) -> bool:
            raise RuntimeError("a driver's")

    with caplog.at_level(logging.DEBUG, "forebay"):
        warming._load(torch.device("cuda", 0), Management())
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
        for use in warming._all(torch.device("cpu"), torch.bfloat16):
            use()
    order = "_of_blocks _of_samplers _of_float8 before _of_attention _of_others"
    assert used == order.split()
    assert "none of these here" in caplog.text

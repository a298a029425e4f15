"""Full collections that wait while a model begins to run."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import forebay

_PATH = Path(forebay.__file__).parent / "comfyui" / "native" / "collector.py"


@pytest.fixture
def collector() -> Iterator[ModuleType]:
    """A module of its own."""
    spec = importlib.util.spec_from_file_location("collector_of_a_test", _PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = gc.get_threshold()
    yield module
    gc.set_threshold(*before)


def _wait_for(full: int) -> bool:
    end = time.monotonic() + 10
    while gc.get_threshold()[2] != full and time.monotonic() < end:
        time.sleep(0.005)
    return gc.get_threshold()[2] == full


def test_they_wait_and_come_back(collector: ModuleType) -> None:
    gc.set_threshold(600, 9, 7)
    collector.postpone(0.05)
    assert gc.get_threshold()[:2] == (600, 9)
    assert gc.get_threshold()[2] > 1 << 20
    assert _wait_for(7)


def test_a_second_call_takes_the_place_of_the_first(collector: ModuleType) -> None:
    gc.set_threshold(600, 9, 7)
    collector.postpone(0.05)
    collector.postpone(60)
    time.sleep(0.2)
    assert gc.get_threshold()[2] > 1 << 20
    collector.postpone(0)
    assert _wait_for(7)


def test_what_the_application_sets_meanwhile_stays(collector: ModuleType) -> None:
    gc.set_threshold(600, 9, 7)
    collector.postpone(0.05)
    gc.set_threshold(500, 8, 6)
    time.sleep(0.3)
    assert gc.get_threshold() == (500, 8, 6)
    collector.postpone(0)
    assert _wait_for(6)

"""ComfyUI's own dynamic path on Forebay's device ``host``: what it computes is what its own offloading computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import CHECKOUT, environment

SCRIPT = Path(__file__).with_name("dynamic_on_host.py")
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = environment(tmp_path_factory.mktemp("environment"))
    return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}{os.pathsep}{CHECKOUT}"}


@pytest.fixture(scope="module")
def legacy(folder: Path, settings: dict[str, str]) -> dict[str, Any]:
    return run(folder, 0, settings)


def run(folder: Path, budget: int, settings: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(budget)],
        cwd=CHECKOUT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("budget", [96 * MIB, 1024 * MIB], ids=["96 MiB", "1 GiB"])
def test_two_models_in_turn_compute_what_they_do_under_comfyuis_own_offloading(
    folder: Path, legacy: dict[str, Any], settings: dict[str, str], budget: int
) -> None:
    told = run(folder, budget, settings)
    assert set(told["patchers"]) == {"ModelPatcherDynamic"}
    assert told["hashes"] == legacy["hashes"]
    assert len(set(legacy["hashes"])) == 2
    assert all(0 < held <= budget for held in told["held"])
    # What did not fit went through ComfyUI's cast buffers, and nothing did where all fits.
    weights = sum(path.stat().st_size for path in folder.iterdir())
    assert (told["lent"] > 0) == (weights > budget)
    assert told["refused"] == 0, "a part of a host buffer was registered already when ComfyUI registered it"
    assert told["registered"] > 0
    assert not any(told["pinned"]), "pages stay pinned behind the last node"

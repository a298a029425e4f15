"""The checkout of ComfyUI that is tested, and what its programs run in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(os.environ.get("COMFYUI") or "ComfyUI").resolve()


def environment(folder: Path) -> dict[str, str]:
    """For programs that import torchaudio where none fits the installed torch: a stub of it goes to ``folder``."""
    paths = [] if can_import("torchaudio") else [str(stub_of_torchaudio(folder))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }


def can_import(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def stub_of_torchaudio(folder: Path) -> Path:
    """ComfyUI imports it, and only audio models use it."""
    package = folder / "stubs" / "torchaudio"
    package.mkdir(parents=True)
    for name in ("__init__", "functional", "transforms"):
        (package / f"{name}.py").touch()
    return package.parent

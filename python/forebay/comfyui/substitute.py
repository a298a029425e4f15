"""Puts Forebay's package in the place of ``comfy_aimdo``, for this process and those that it starts. Nothing is written to
disk, and an installed ``comfy_aimdo`` is left alone."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "comfy_aimdo"
REAL = "forebay.comfyui.aimdo"
LATEST = "0.6.0"
"""The latest release whose interface is known here."""

_VERSION = "FOREBAY_COMFY_AIMDO_VERSION"
_CHILDREN = Path(__file__).with_name("children")


def install(version: str | None = None) -> None:
    """From now on ``import comfy_aimdo`` gives Forebay's package, also in processes that this one starts.

    Args:
        version: What ``importlib.metadata.version("comfy-aimdo")`` answers. Default: what the process that started this
            one was told, or the latest known.

    Raises:
        RuntimeError: Where another ``comfy_aimdo`` was imported already.
    """
    imported = sys.modules.get(NAME)
    if imported is not None and imported.__name__ != REAL and not _is_own(imported):
        raise RuntimeError(f"comfy_aimdo was imported before it could be replaced: {imported}")
    if version is not None:
        os.environ[_VERSION] = version
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_CHILDREN) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_CHILDREN), *filter(None, paths)])
    if str(_CHILDREN) not in sys.path:
        sys.path.insert(1, str(_CHILDREN))


def alias() -> None:
    """For a package of this name that only stands for Forebay's: puts it in its own place."""
    install()
    sys.modules[NAME] = importlib.import_module(REAL)


def _is_own(module: ModuleType) -> bool:
    """Whether a package only stands for Forebay's, and is being imported."""
    return hasattr(module, "STANDS_FOR_FOREBAY")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package under its other name, and its distribution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(NAME + "."):
            return None
        real = REAL + fullname.removeprefix(NAME)
        if importlib.util.find_spec(real) is None:
            return None
        return ModuleSpec(fullname, _Loader(real), is_package=fullname == NAME)

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "comfy-aimdo":
            yield _Distribution()


class _Loader(importlib.abc.Loader):
    """Gives the real module, which stays what it is."""

    def __init__(self, real: str) -> None:
        self._real = real
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Distribution(importlib.metadata.Distribution):
    """What tells the version."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        version = os.environ.get(_VERSION, LATEST)
        return f"Metadata-Version: 2.1\nName: comfy-aimdo\nVersion: {version}\nSummary: Forebay's, in its place\n"

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)

"""For programs that import a package of a given name in place of ``comfy_aimdo``: Forebay's, with native mode installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from forebay.comfyui import aimdo, native


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the real package under this one's name: the same modules, not others like them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(__name__ + ".") or importlib.util.find_spec(_real(fullname)) is None:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(_real(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its own name."""


def _real(name: str) -> str:
    return aimdo.__name__ + name.removeprefix(__name__)


sys.meta_path.insert(0, _Finder())
native.install()

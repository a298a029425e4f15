"""For programs that import a package of a given name in place of ``comfy_aimdo``: Forebay's, with native mode."""

from __future__ import annotations

from forebay.comfyui import aimdo, native

__path__ = aimdo.__path__

native.install()

"""What the launcher has to know of a ComfyUI checkout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

OLDEST = (0, 4, 13)
"""The first release of comfy-aimdo whose interface is known here; ComfyUI 0.33 is the first that asks for it."""
NEWEST = (0, 6)


class NotComfyUI(Exception):
    """A folder without a ComfyUI that can run on Forebay. The message says what to do."""


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI that can run on Forebay."""

    script: Path
    version: str
    """Its own."""
    aimdo: str
    """The comfy-aimdo that it asks for."""
    has_fast_disk: bool
    """Whether it has an option that spares it copies of weights in host memory."""

    @property
    def is_newer(self) -> bool:
        """Whether it asks for a release that was not there when this was written."""
        return numbers(self.aimdo)[:2] > NEWEST


def examine(script: Path) -> Checkout:
    """Looks at the checkout that ``main.py`` belongs to. Imports nothing of it.

    Raises:
        NotComfyUI: Where it cannot run on Forebay.
    """
    if not script.is_file():
        raise NotComfyUI(f"there is no such file; give the path of ComfyUI's main.py: {script}")
    folder = script.parent
    missing = [
        name for name in ("folder_paths.py", "comfy/model_management.py") if not (folder / name).is_file()
    ]
    if missing:
        raise NotComfyUI(
            f"this is no folder of ComfyUI, it has no {missing[0]}; give the path of ComfyUI's main.py: {script}"
        )
    version = _found(folder / "comfyui_version.py", r'__version__\s*=\s*"([^"]+)"') or "of unknown version"
    aimdo = _found(folder / "requirements.txt", r"^comfy[-_]aimdo\s*[=~>]=\s*([0-9][0-9.]*)")
    if aimdo is None or numbers(aimdo) < OLDEST:
        raise NotComfyUI(
            "this ComfyUI is too old: its dynamic VRAM is not the one that Forebay replaces; update it to 0.33 or "
            f"later: {version}"
        )
    options = _found(folder / "comfy" / "cli_args.py", r'["\'](--fast-disk)["\']')
    return Checkout(script, version, aimdo, options is not None)


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _found(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, path.read_text(errors="replace"), re.MULTILINE) if path.is_file() else None
    return found[1] if found else None

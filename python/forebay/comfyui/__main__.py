"""Starts ComfyUI on Forebay: ``python -m forebay.comfyui main.py [ComfyUI's arguments]``.

What stands before ``main.py`` is for this launcher, what comes after it is ComfyUI's own; ``main.py --help`` prints that.
ComfyUI is not changed on disk. It imports Forebay's package where it asks for comfy_aimdo, and its models run on Forebay's
weights. Its ``--disable-dynamic-vram`` switches both off.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from forebay import __version__
from forebay.comfyui import checkout, substitute
from forebay.comfyui.aimdo.host_buffer import LIMIT, gib, most
from forebay.comfyui.warming import SWITCH

_OFF = "--disable-dynamic-vram"
_FAST_DISK = "--fast-disk"
"""ComfyUI keeps no copies of what stays on the device then, and asks less often how much memory there is: 22 ms of a step with a
LoRA (bench/results/2026-11-30-h200-eight-bits)."""
_COPIES = _FAST_DISK, "--high-ram", _OFF
"""Where ComfyUI is told one of these, that is so already or not wanted."""


def main(arguments: Sequence[str]) -> int:
    """Runs ComfyUI in this process, as ``python main.py`` would.

    Args:
        arguments: The launcher's own, the path of ``main.py``, ComfyUI's.

    Returns:
        The exit status where ComfyUI was not started, or returned.

    Raises:
        SystemExit: With ComfyUI's own status.
    """
    own, script, rest = _split(arguments)
    chosen = _parser().parse_args(own)
    if script is None:
        print(f"{_parser().format_usage()}which ComfyUI? give the path of its main.py", file=sys.stderr)
        return 2
    if chosen.pinned is not None:
        os.environ[LIMIT] = str(chosen.pinned)
    try:
        found = checkout.examine(Path(script).resolve())
        most()
    except (checkout.NotComfyUI, ValueError) as error:
        print(f"forebay: {error}", file=sys.stderr)
        return 2
    if found.is_newer:
        print(
            f"forebay: this ComfyUI asks for comfy-aimdo {found.aimdo}, known here is {substitute.LATEST}; going on",
            file=sys.stderr,
        )
    substitute.install(found.aimdo)
    if not chosen.warm:
        os.environ[SWITCH] = "0"
    if chosen.native and _OFF not in rest:
        importlib.import_module("forebay.comfyui.native").install()
    is_spared = not chosen.native and found.has_fast_disk and not any(one in rest for one in _COPIES)
    fast_disk = [_FAST_DISK] if is_spared else []
    node = (
        ["--extra-model-paths-config", str(Path(__file__).with_name("extra_paths.yaml"))]
        if chosen.node
        else []
    )
    sys.argv = [str(found.script), *node, *fast_disk, *rest]
    sys.path[0] = str(found.script.parent)
    runpy.run_path(str(found.script), run_name="__main__")
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The launcher's own arguments, the script, and the script's."""
    values = 0
    for place, argument in enumerate(arguments):
        if values:
            values -= 1
        elif argument == "--pinned":
            values = 1
        elif not argument.startswith("-"):
            return list(arguments[:place]), argument, list(arguments[place + 1 :])
    return list(arguments), None, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m forebay.comfyui",
        usage="%(prog)s [options] MAIN.PY [ComfyUI's arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"forebay {__version__}")
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run models on Forebay's own weights instead of ComfyUI's casting (default: yes); without, ComfyUI is told "
        "--fast-disk, unless it is told --high-ram",
    )
    parser.add_argument(
        "--pinned",
        type=_gib,
        metavar="GIB",
        help="let ComfyUI keep copies of so much of its weights in pinned memory where it moves them by itself; what it does "
        "not keep the GPU reads from the page cache at each use (default: of what it reads again and again, where that "
        "makes steps shorter)",
    )
    parser.add_argument(
        "--warm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have the GPU's driver load the usual kernels while ComfyUI starts, not in a model's first step (default: yes)",
    )
    parser.add_argument(
        "--node",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show in ComfyUI's page what Forebay does (default: yes)",
    )
    return parser


def _gib(text: str) -> float:
    """As the environment takes it."""
    try:
        return gib(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What ComfyUI's page shows of Forebay, as plain data, and what it sets.

For the node ``ComfyUI-Forebay``; works for engines that stand behind ``comfy_aimdo``, that run models natively, and that an
application started by itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import forebay
from forebay._forebay import Engine
from forebay.comfyui.aimdo import control, host_buffer, model_vbar
from forebay.comfyui.aimdo.vram_buffer import VRAMBuffer
from forebay.engines import running


def state() -> dict[str, Any]:
    """What is where at this moment.

    Returns:
        ``version``; ``mode`` (``"drop-in"``, ``"native"`` or ``"off"``); ``ram``, bytes: ``anonymous`` and ``file`` memory
        of this process, ``pinned`` (the engines' own), ``registered`` page cache, ``buffers`` of ComfyUI's; ``streamed``,
        bytes copied to devices so far, those that ComfyUI copies by itself left out; ``devices``, a list of dicts: ``name``,
        ``hardware``, ``budget``, ``held``, ``unused``, ``headroom`` (None where the budget is fixed), ``free`` and ``total``
        (None where the device is the host), ``models``, most recently used first: ``name``, ``bytes``, ``page_size``,
        ``resident``, ``pinned``, ``streamed`` (bytes copied so far), ``map`` (one character a page: ``R`` resident, ``S``
        streamed, ``.`` absent).
    """
    engines = [(engine, engine.stats(), engine.page_maps()) for engine in running()]
    own = _memory_of_process()
    return {
        "version": forebay.__version__,
        "mode": _mode(),
        "ram": {
            **own,
            "pinned": sum(stats["pinned_host"] for _, stats, _ in engines),
            "registered": sum(stats["registered"] for _, stats, _ in engines),
            "buffers": host_buffer.total_size(),
        },
        "streamed": VRAMBuffer.lent_bytes
        + sum(model["filled"] for _, stats, _ in engines for model in stats["models"]),
        "devices": [_device(*one) for one in engines],
    }


def set_headroom(device: str, nbytes: float) -> None:
    """Sets how many bytes of a device's memory are left to others, from now on.

    Args:
        device: Its name in :func:`state`.
        nbytes: How many.

    Raises:
        KeyError: Where no engine of this name runs.
        ValueError: For what is no number of bytes.
    """
    engine = next((engine for engine in running() if engine.device == device), None)
    if engine is None:
        raise KeyError(f"no engine runs on {device}")
    if isinstance(nbytes, bool) or not isinstance(nbytes, (int, float)):
        raise ValueError(f"a headroom is a number of bytes: {nbytes!r}")
    engine.set_budget(headroom=nbytes)


def _device(engine: Engine, stats: dict[str, Any], maps: list[tuple[str, str]]) -> dict[str, Any]:
    free, total = _free_and_total(engine)
    allocated = model_vbar.allocated()
    models = []
    # Taken one after the other: what came or went between the two is told the next time.
    for model, (name, pages) in zip(stats["models"], maps, strict=False):
        nbytes = allocated.get(name, model["bytes"])
        if name in allocated or name == VRAMBuffer.NAME:
            # Ranges far larger than what is used of them.
            used = -(-allocated.get(name, 0) // model["page_size"])
            pages = pages[: max(used, len(pages.rstrip(".")))]
            nbytes = nbytes if name in allocated else len(pages) * model["page_size"]
        models.append(
            {
                "name": name,
                "bytes": nbytes,
                "page_size": model["page_size"],
                "resident": model["resident"],
                "pinned": model["pinned"],
                "streamed": model["filled"],
                "map": pages,
            }
        )
    return {
        "name": stats["device"],
        "hardware": stats["device_name"],
        "budget": stats["budget"],
        "held": stats["held"],
        "unused": stats["free_frames"],
        "headroom": engine.headroom,
        "free": free,
        "total": total,
        "models": models,
    }


def _mode() -> str:
    # Installed also where ComfyUI then decides against dynamic VRAM, as it does without a GPU.
    patchers = sys.modules.get("comfy.model_patcher")
    core = getattr(patchers, "CoreModelPatcher", None)
    if getattr(core, "__module__", "").startswith("forebay.comfyui.native."):
        return "native"
    return "drop-in" if control.devctxs else "off"


def _free_and_total(engine: Engine) -> tuple[int | None, int | None]:
    if engine.device == "host":
        return None, None
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(engine.device))
    return int(free), int(total)


def _memory_of_process() -> dict[str, int]:
    text = Path("/proc/self/status").read_text()
    kib = dict(re.findall(r"^Rss(Anon|File):\s+(\d+) kB", text, re.MULTILINE))
    return {"anonymous": 1024 * int(kib["Anon"]), "file": 1024 * int(kib["File"])}

"""What ``comfyui.py`` runs, and the ways in which ComfyUI keeps its weights there."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True)
class System:
    """A way in which ComfyUI keeps its weights."""

    title: str
    comfy: tuple[str, ...] = ()
    distribution: str | None = "forebay"
    native: bool = False
    loads_before: bool = False
    """Loads a model before its first step begins."""
    waits_before: bool = False
    """Begins once the usual kernels are loaded, as where ComfyUI has been running for some seconds."""
    in_turn: bool = False
    """On the cell's card in turn with one that holds everything: see ``in_turn.py``."""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def wheel(self) -> str | None:
        """What is to be installed for it alone."""
        return None if self.distribution == "forebay" else self.distribution


LEGACY = "legacy"
LOADED = "loaded"
AIMDO = "aimdo"
SYSTEMS = {
    LEGACY: System("ComfyUI's own offloading", ("--disable-dynamic-vram",), None),
    LOADED: System("all loaded before", ("--disable-dynamic-vram",), None, loads_before=True),
    AIMDO: System("", distribution="comfy-aimdo"),
    # As Forebay's launcher starts ComfyUI.
    "dropin": System("Forebay in its place", ("--fast-disk",)),
    "slowdisk": System("Forebay in its place, without --fast-disk"),
    "unpinned": System(
        "Forebay in its place, nothing pinned",
        ("--fast-disk",),
        environment=(("FOREBAY_COMFYUI_PINNED_GIB", "0"),),
    ),
    "native": System("Forebay, native", native=True),
    "started": System("Forebay, native, ComfyUI started before", native=True, waits_before=True),
    "turns": System("Forebay, native, in turn with all resident", native=True, in_turn=True),
    "cold": System(
        "Forebay, native, kernels loaded when used", native=True, environment=(("FOREBAY_COMFYUI_WARM", "0"),)
    ),
}


@dataclass(frozen=True)
class Cell:
    """What is run."""

    arch: str
    quant: str = "bf16"
    card: float = 12
    """GiB of device memory that are free at the start; 0: all."""
    size: str = "full"
    instances: int = 1
    rounds: int = 1
    lora: float = 0
    te: bool = False
    vae: bool = False

    @property
    def holds_everything(self) -> bool:
        """Whether nothing is to be offloaded."""
        return self.card == 0 or self.card >= 80

    @property
    def card_bytes(self) -> int:
        """Bytes of device memory that are free at the start; 0: all."""
        return int(self.card * GIB)

    @property
    def model(self) -> tuple[str, ...]:
        """What takes as long to compute wherever its weights are."""
        return self.arch, self.quant, self.size

    @property
    def name(self) -> str:
        """As the command line takes it."""
        parts = [self.arch, self.quant, f"{self.card:g}"]
        parts += [f"lora{self.lora:g}"] if self.lora else []
        parts += [f"x{self.instances}"] if self.instances > 1 else []
        parts += [f"r{self.rounds}"] if self.rounds > 1 else []
        parts += [word for word in ("te", "vae") if getattr(self, word)]
        return "-".join([*parts, *([] if self.size == "full" else [self.size])])

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell of a name.

        Raises:
            argparse.ArgumentTypeError: Where it is none.
        """
        known = re.fullmatch(r"(\w+)-(\w+)-(\d+(?:\.\d+)?)((?:-[\w.]+)*)", text)
        if known is None:
            raise argparse.ArgumentTypeError(f"neither ARCH-QUANT-CARD... nor a group: {text}")
        cell = cls(known[1], known[2], float(known[3]))
        for word in known[4].split("-")[1:]:
            if word in ("te", "vae"):
                cell = replace(cell, **{word: True})
            elif re.fullmatch(r"lora\d+(\.\d+)?", word):
                cell = replace(cell, lora=float(word[4:]))
            elif re.fullmatch(r"x\d+", word):
                cell = replace(cell, instances=int(word[1:]))
            elif re.fullmatch(r"r\d+", word):
                cell = replace(cell, rounds=int(word[1:]))
            elif word in ("tiny", "small", "medium", "full"):
                cell = replace(cell, size=word)
            else:
                raise argparse.ArgumentTypeError(f"no part of a cell's name: {word}, in {text}")
        return cell


def _matrix(arch: str, quant: str, more: str = "") -> list[str]:
    """A model with and without a LoRA on cards of all sizes: first the largest, with what results are compared with, and last
    comfy-aimdo on the smallest.
    """
    compared = {(80, ""): "legacy,", (80, "-lora0.8"): "legacy,aimdo,"}
    cells = [
        f"{arch}-{quant}-{card}{lora}{more}={compared.get((card, lora), '')}dropin,native"
        for card in (80, 8, 24, 12)
        for lora in ("", "-lora0.8")
    ]
    return [*cells, f"{arch}-{quant}-8{more}=aimdo"]


GROUPS = {
    "flux": [
        "flux-bf16-80", "flux-bf16-80-lora0.8", "flux-bf16-12", "flux-bf16-24", "flux-bf16-12-lora0.8", "flux-fp8scaled-8",
    ],
    "wan": ["wan-fp16-80", "wan-fp16-8-x2-r2"],
    "small": [
        "zimage-bf16-80", "zimage-bf16-8", "zimage-fp8scaled-8-lora0.8", "sd15-bf16-80", "sd15-bf16-8-lora0.8",
    ],
    "whole": ["flux-bf16-24-te-vae", "zimage-bf16-12-vae"],
    "tiny": ["flux-bf16-0-tiny", "flux-fp8scaled-0-lora0.8-tiny"],
    "matrix-flux": _matrix("flux", "bf16"),
    "matrix-flux-fp8": _matrix("flux", "fp8scaled"),
    "matrix-wan": _matrix("wan", "fp16", "-x2-r2"),
    "matrix-wan-fp8": _matrix("wan", "fp8scaled", "-x2-r2"),
    "matrix-zimage": _matrix("zimage", "bf16"),
    "matrix-zimage-fp8": _matrix("zimage", "fp8scaled"),
    "matrix-sd15": _matrix("sd15", "bf16"),
}  # fmt: skip

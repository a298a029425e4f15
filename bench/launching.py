"""What a layer of scaled float8 takes of the thread that launches kernels: ComfyUI's own forward, and native mode's.

Layers small enough for a GPU to keep up with the thread, all of them on the device, run in turn in each way: as ComfyUI runs them where
all is loaded, as it runs them on weights that are managed, and as native mode runs them. Microseconds a layer, medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stack import setting

PLAIN, OWN, NATIVE = "ComfyUI, all loaded", "ComfyUI, managed weights", "native"
_BUDGET = 1 << 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--layers", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--width", type=int, default=1024, help="rows and columns of a weight (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


def import_comfyui(root: Path, device: torch.device) -> None:
    """Its modules, with Forebay in the place of comfy-aimdo."""
    from forebay.comfyui import native, substitute

    if device.type == "cpu":
        os.environ.setdefault(native.HOST_BUDGET, str(_BUDGET))
    substitute.install()
    sys.path.insert(0, str(root.resolve()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = device.type == "cpu"
    native.install()
    import comfy.model_patcher


def layers(count: int, width: int) -> torch.nn.Sequential:
    """Linear layers of ComfyUI's with random weights, as they come from a file."""
    import comfy.ops

    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    model = torch.nn.Sequential(*(operations.Linear(width, width, device="cpu") for _ in range(count)))
    generator = torch.Generator().manual_seed(1)
    quant = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    state: dict[str, torch.Tensor] = {}
    for n in range(count):
        weight = torch.randn(width, width, generator=generator)
        state |= {
            f"{n}.weight": weight.to(torch.float8_e4m3fn),
            f"{n}.weight_scale": torch.tensor(width**-0.5),
            f"{n}.bias": torch.randn(width, generator=generator).bfloat16(),
            f"{n}.comfy_quant": quant,
        }
    model.load_state_dict(state)
    return model.requires_grad_(False)


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Microseconds a layer, by the way it runs.

    Raises:
        RuntimeError: Where what layers give is not the same.
    """
    from forebay.comfyui.native.loaded import Loaded

    plain, model = layers(args.layers, args.width).to(device), layers(args.layers, args.width)
    loaded = Loaded(model, device)
    value = (
        torch.randn(1, args.tokens, args.width, generator=torch.Generator().manual_seed(2))
        .bfloat16()
        .to(device)
    )

    def each(run: Callable[[Any], torch.Tensor], of: torch.nn.Module) -> list[torch.Tensor]:
        return [run(layer) for layer in of.children()]

    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        PLAIN: lambda: each(lambda layer: layer(value), plain),
        OWN: lambda: each(lambda layer: type(layer).forward(layer, value), model),
        NATIVE: lambda: each(lambda layer: layer(value), model),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for _ in range(args.rounds + 3):
            results = []
            for way, run in ways.items():
                synchronize(device)
                start = time.perf_counter()
                results.append(run())
                times[way].append((time.perf_counter() - start) / args.layers * 1e6)
            for found in results[1:]:
                if not all(map(torch.equal, found, results[0])):
                    raise RuntimeError("layers give something else than ComfyUI's own")
    finally:
        loaded.unload()
    # The first rounds load kernels and fill pages.
    return {way: statistics.median(took[3:]) for way, took in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    args = parse()
    if not (args.comfyui / "comfy" / "ops.py").is_file():
        sys.exit(f"no checkout of ComfyUI: {args.comfyui}")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    import_comfyui(args.comfyui, device)
    with torch.inference_mode():
        took = measured(args, device)
    for way, microseconds in took.items():
        print(f"{way:26} {microseconds:7.1f} us a layer")
    if args.out:
        row = {"layers": args.layers, "width": args.width, "tokens": args.tokens, "microseconds": took}
        args.out.write_text(json.dumps({**setting(device.type == "cuda"), **row}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

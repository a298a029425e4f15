"""What a layer of scaled float8 takes of the thread that launches kernels: ComfyUI's own forward, and native mode's.

Layers small enough for a GPU to keep up with the thread, all of them on the device, run in turn in each way: as ComfyUI runs them where
all is loaded, as it runs them on weights that are managed, and as native mode runs them; there also with a LoRA, as where a model does
not fit: what was computed once is in the weight's place, as of weights that stay, or it is computed each time, as of those that do not.
Microseconds a layer, medians of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stack import setting

PLAIN, OWN, NATIVE = "ComfyUI, all loaded", "ComfyUI, managed weights", "native"
IN_PLACE, COMPUTED = "native, a LoRA in place", "native, a LoRA each time"
_BUDGET = 1 << 30
_RANK = 16


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


def lora(count: int, width: int) -> dict[str, list[Any]]:
    """ComfyUI's patches for such layers."""
    from comfy.weight_adapter import LoRAAdapter

    generator = torch.Generator().manual_seed(3)

    def adapter() -> LoRAAdapter:
        shapes = (width, _RANK), (_RANK, width)
        up, down = ((torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in shapes)
        return LoRAAdapter(set(), (up, down, float(_RANK), None, None, None))

    return {f"{n}.weight": [(0.8, adapter(), 1.0, None, None)] for n in range(count)}


@contextlib.contextmanager
def little_memory(device: torch.device, nbytes: int) -> Iterator[None]:
    """In which a model of so many bytes does not fit."""
    from forebay.comfyui import native
    from forebay.comfyui.native.loaded import engine_for

    engine, little = engine_for(device), nbytes * 3 // 4
    headroom, budget = engine.headroom, engine.budget
    of_host = {native.HOST_BUDGET: str(little)} if device.type == "cpu" else {}
    engine.set_budget(budget=little)
    try:
        with mock.patch.dict(os.environ, of_host):
            yield
    finally:
        engine.set_budget(**({"budget": budget} if headroom is None else {"headroom": headroom}))


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Microseconds a layer, by the way it runs.

    Raises:
        RuntimeError: Where what layers give is not the same.
    """
    from forebay.comfyui.native.loaded import Loaded
    from forebay.comfyui.native.patches import Patches

    plain = layers(args.layers, args.width).to(device)
    model, in_place, computed = (layers(args.layers, args.width) for _ in range(3))
    loaded, patches = [Loaded(model, device)], lora(args.layers, args.width)
    with little_memory(device, args.layers * args.width**2):
        loaded += [Loaded(patched, device, patches) for patched in (in_place, computed)]
        loaded[1].patch(patches)
        # There is no place to put what is computed of the other's.
        with mock.patch.object(Patches, "_own_memory", return_value=None):
            loaded[2].patch(patches)
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
        IN_PLACE: lambda: each(lambda layer: layer(value), in_place),
        COMPUTED: lambda: each(lambda layer: layer(value), computed),
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
            for found, expected in ((1, 0), (2, 0), (4, 3)):
                if not all(map(torch.equal, results[found], results[expected])):
                    raise RuntimeError(f"layers give something else: {[*ways][found]}, {[*ways][expected]}")
    finally:
        for one in loaded:
            one.unload()
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

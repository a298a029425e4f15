"""How much of a file is read in comfy-aimdo's place for what ComfyUI asks for, pass by pass: needs no GPU.

Writes a safetensors file with the tensors of a Flux of a smaller width, and asks for those that ComfyUI reads, in the order in which
Flux uses them, on the ``host`` device with memory in proportion. What the process has read is what Linux says of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from stack import process_io
from tensor_file import data_offsets, write_tensors

import forebay
from forebay import _forebay

FULL_WIDTH = 3072
FULL_MEMORY = 8 << 30
"""Of which the ring that is read ahead into takes a 32nd: 256 MiB, the most."""
RATE = 8e9
"""Bytes a second that the model computes with."""
DOUBLE, SINGLE = 19, 38
USED = "img_mod.lin", "txt_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"
USED_LAST = "txt_attn.proj", "txt_mlp.0", "txt_mlp.2"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1536, help="a whole Flux has 3072; default: %(default)s")
    parser.add_argument("--passes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


def double_block(width: int) -> Iterator[tuple[str, int, int]]:
    """Its layers as they are made: their names, outputs and inputs. Norms have no inputs."""
    for stream in ("img", "txt"):
        yield f"{stream}_mod.lin", 6 * width, width
        yield f"{stream}_attn.qkv", 3 * width, width
        yield f"{stream}_attn.norm.query_norm", 128, 0
        yield f"{stream}_attn.norm.key_norm", 128, 0
        yield f"{stream}_attn.proj", width, width
        yield f"{stream}_mlp.0", 4 * width, width
        yield f"{stream}_mlp.2", width, 4 * width


def single_block(width: int) -> Iterator[tuple[str, int, int]]:
    yield "linear1", 7 * width, width
    yield "linear2", width, 5 * width
    yield "norm.query_norm", 128, 0
    yield "norm.key_norm", 128, 0
    yield "modulation.lin", 3 * width, width


def tensors(width: int, quantized: bool) -> dict[str, int]:
    """The bytes of each tensor, in the order in which the model is made."""
    found: dict[str, int] = {}
    blocks = [(f"double_blocks.{n}.", double_block) for n in range(DOUBLE)]
    blocks += [(f"single_blocks.{n}.", single_block) for n in range(SINGLE)]
    for prefix, layers in blocks:
        for name, outputs, inputs in layers(width):
            found[f"{prefix}{name}.weight"] = outputs * (inputs * (1 if quantized else 2) or 2)
            if inputs:
                found[f"{prefix}{name}.bias"] = outputs * 2
            if inputs and quantized:
                found[f"{prefix}{name}.weight_scale"] = 4
                found[f"{prefix}{name}.comfy_quant"] = len('{"format": "float8_e4m3fn"}')
    return found


def uses() -> Iterator[str]:
    """The tensors that ComfyUI reads, as Flux uses them: no scales, no formats, and no norms, for layers of up to 16 KiB are
    loaded in another way."""
    layers = [f"double_blocks.{n}.{name}" for n in range(DOUBLE) for name in (*USED, *USED_LAST)]
    layers += [
        f"single_blocks.{n}.{name}"
        for n in range(SINGLE)
        for name in ("modulation.lin", "linear1", "linear2")
    ]
    for layer in layers:
        yield from (f"{layer}.weight", f"{layer}.bias")


def measured(path: Path, memory: int, passes: int) -> list[dict[str, float]]:
    engine, places = forebay.Engine("host", budget=memory // 4, capacity=memory), data_offsets(path)
    wanted = [(begin, end - begin) for begin, end in map(places.__getitem__, uses())]
    asked = sum(size for _, size in wanted)
    target = torch.empty(max(size for _, size in wanted), dtype=torch.uint8)
    rows = []
    with path.open("rb") as file:
        for _ in range(passes):
            before, began = process_io("rchar"), time.perf_counter()
            for offset, size in wanted:
                _forebay.read_to_device(engine, file.fileno(), offset, size, target.data_ptr(), 0)
                time.sleep(size / RATE)
            took, read = time.perf_counter() - began, process_io("rchar") - before
            rows.append({"asked_bytes": asked, "read": round(read / asked, 3), "s": round(took, 2)})
    return rows


def main() -> None:
    chosen = parse()
    if not Path("/proc/self/io").exists():
        sys.exit("reading.py: needs Linux, which says what a process has read")
    memory = FULL_MEMORY * chosen.width**2 // FULL_WIDTH**2
    result: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.safetensors"
        for quantized in (False, True):
            sizes = tensors(chosen.width, quantized)
            for order, laid_out in (("as made", sizes), ("sorted by name", dict(sorted(sizes.items())))):
                name = f"{'scaled float8' if quantized else 'bfloat16'}, {order}"
                write_tensors(path, laid_out)
                result[name] = measured(path, memory, chosen.passes)
                told = ", ".join(f"{row['read']:.2f} in {row['s']:.2f} s" for row in result[name])
                print(f"{name:30} bytes read of those asked for, by pass: {told}", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps({"width": chosen.width, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()

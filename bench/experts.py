"""Two experts of a video model: each larger than the device's free memory, both together larger than the machine's.

Writes a file of random blocks for each and uses the two in turn, several steps each, for some rounds. Run it in a memory
cgroup, as a container would:

    mkdir /sys/fs/cgroup/small && echo 32G > /sys/fs/cgroup/small/memory.max
    sh -c 'echo $$ > /sys/fs/cgroup/small/cgroup.procs; exec python bench/experts.py'

The limit of a step is max(compute, bytes moved / link, bytes read from disk / disk), the bytes counted in that step, the
rates measured in the same run: the disk's past the page cache. Compute is a step's time with the blocks' layers resident,
one block after the other. Every output is compared bit for bit with plain torch's, run block by block.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from little_ram import limit
from loaders import disk_rate
from stack import (
    GIB,
    Stack,
    add_device,
    anonymous_mib,
    ballast,
    disk_bytes,
    inputs,
    last_of,
    link_rate,
    load,
    setting,
    timed_step,
    torch_device,
    write_weights,
)

import forebay

TARGET = 1.25
EXPERTS = ("high noise", "low noise")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device(parser)
    parser.add_argument("--blocks", type=int, default=45, help="blocks of each expert (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 28 GB each)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step (default: %(default)s)")
    parser.add_argument(
        "--free", type=float, default=8.0, help="GiB of device memory left free (default: %(default)s)"
    )
    parser.add_argument(
        "--headroom", type=float, default=1.5, help="GiB of them kept free (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of each before the other (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--disk-gib", type=float, default=4, help="GiB read to time the disk (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=8, help="that read it (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the weights go")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


def compute_time(stack: Stack, x: torch.Tensor) -> float:
    """A step's seconds with its weights on the device: a block's, times their number."""
    block = Stack(copy.deepcopy(stack[0])).to(x.device)
    timed_step(block, x)
    return len(stack) * statistics.median(timed_step(block, x)[1] for _ in range(5))


def main() -> int:
    chosen = parse()
    device = torch_device(chosen.device)
    is_cuda = device.type == "cuda"
    paths = {
        name: chosen.folder / f"forebay-expert-{number}.safetensors"
        for number, name in enumerate(EXPERTS, start=1)
    }
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for seed, path in enumerate(paths.values(), start=1):
            nbytes = write_weights(path, chosen.blocks, chosen.width, device, seed=seed)
        x = inputs(chosen.tokens, chosen.width, device)
        link = link_rate(device=device)
        models = {name: load(path, chosen.blocks, chosen.width) for name, path in paths.items()}
        compute = compute_time(models[EXPERTS[0]], x)
        expected = {name: last_of(model, x) for name, model in models.items()}
        disk = min(disk_rate(path, chosen.disk_gib, chosen.threads) for path in paths.values())
        print(
            f"two of {nbytes / 1e9:.1f} GB, {chosen.free:g} GiB free, {(limit() or 0) / GIB:.1f} GiB of memory allowed (0: no limit); "
            f"compute {compute * 1e3:.0f} ms, link {link / 1e9:.1f} GB/s, disk {disk / 1e9:.2f} GB/s",
            flush=True,
        )
        if is_cuda:
            torch.cuda.empty_cache()
            rest = ballast(chosen.free, device)
            engine = forebay.Engine(chosen.device, headroom=chosen.headroom * GIB)
        else:
            engine = forebay.Engine("host", budget=int((chosen.free - chosen.headroom) * GIB))
        before = anonymous_mib()
        attached = {name: forebay.attach(model, engine, name=name) for name, model in models.items()}
        for number in range(chosen.rounds):
            for name, model in models.items():
                row = turn(chosen.steps, model, attached[name], x, expected[name], (compute, link, disk))
                rows.append({"round": number + 1, "expert": name, **row})
                print(table_row(rows[-1]), flush=True)
        anonymous = anonymous_mib() - before
        for attachment in attached.values():
            attachment.detach()
        engine.settle()
        if is_cuda:
            del rest
    same = all(row["same"] for row in rows)
    total, limits = (sum(sum(row[kind]) for row in rows) for kind in ("steps_s", "limits_s"))
    result = {
        **setting(is_cuda), "weights_bytes": nbytes, "free_gib": chosen.free, "limit_bytes": limit(), "tokens": chosen.tokens,
        "compute_s": compute, "link_bytes_s": link, "disk_bytes_s": disk, "total_s": total, "limit_s": limits,
        "ratio": total / limits, "anonymous_mib": anonymous, "same": same, "rows": rows,
    }  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"all {total:.1f} s, {total / limits:.2f} of the limits' {limits:.1f} s (at most {TARGET} wanted); "
        f"anonymous {anonymous:.0f} MiB; same: {same}"
    )
    return 0 if same and total <= TARGET * limits else 1


def turn(
    steps: int,
    model: Stack,
    attachment: forebay.Attachment,
    x: torch.Tensor,
    expected: torch.Tensor,
    rates: tuple[float, float, float],
) -> dict[str, Any]:
    """Some steps of one expert: seconds of each, their limits, and what they moved and read."""
    compute, link, disk = rates
    seconds, limits, moved, read, past, same = [], [], [], [], [], True
    for _ in range(steps):
        before, from_disk = attachment.stats()[0], disk_bytes()
        y, took = timed_step(model, x)
        seconds.append(took)
        after = attachment.stats()[0]
        moved.append(after["filled"] - before["filled"])
        past.append(after["past_cache"] - before["past_cache"])
        read.append(disk_bytes() - from_disk)
        limits.append(max(compute, moved[-1] / link, read[-1] / disk))
        same = same and torch.equal(y, expected)
    return {
        "steps_s": seconds, "limits_s": limits, "moved_bytes": moved, "disk_bytes": read,
        "past_cache_bytes": past,
        "resident_bytes": attachment.stats()[0]["resident"], "same": same,
    }  # fmt: skip


def table_row(row: dict[str, Any]) -> str:
    first, *later = row["steps_s"]
    after = f"later {statistics.median(later):6.2f} s, " if later else ""
    return (
        f"{row['round']} {row['expert']:<11} first {first:6.2f} s, {after}{sum(row['steps_s']) / sum(row['limits_s']):.2f} of "
        f"the limits, moved {sum(row['moved_bytes']) / 1e9:.1f} GB, read {sum(row['disk_bytes']) / 1e9:.1f} GB, same {row['same']}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""What lies between copies: many small ones from pinned slots, as the ring makes them, beside one large copy.

An event behind each copy lets a reader know when its slot is free again, and costs the copy engine a moment in which nothing
is copied. Copies of each size are enqueued with an event behind every copy, behind every second one, with none but the
last, and with an event behind each in two streams, a page of 32 MiB to each in turn. Rates are of the same bytes, the
medians of some rounds, each kind in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from stack import link_rate, setting

MIB = 1 << 20
PAGE = 32 * MIB


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mib", type=float, nargs="+", default=[1, 2, 2.5, 4, 5, 8], help="MiB a copy (default: %(default)s)"
    )
    parser.add_argument("--total", type=float, default=4, help="GiB copied each time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=24, help="pinned slots (default: %(default)s)")
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the full result as JSON here")
    return parser.parse_args()


class Copies:
    """Copies from a ring of slots to a place on the device, page by page."""

    def __init__(self, nbytes: int, slots: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.slots = torch.empty(slots, nbytes, dtype=torch.uint8, pin_memory=True).random_(1, 255)
        self.place = torch.empty(4 * PAGE, dtype=torch.uint8, device=device)
        self.streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        self.events = [torch.cuda.Event() for _ in range(slots)]

    def run(self, total: int, marked: Callable[[int], bool], streams: int) -> None:
        """Enqueues as many copies as that takes; a slot is used again once its own mark has passed, as by readers."""
        at, slots = 0, len(self.events)
        for number in range(total // self.nbytes):
            stream = self.streams[at // PAGE % streams]
            slot = number % slots
            if number >= slots and marked(number - slots):
                self.events[slot].synchronize()
            start = at % (4 * PAGE - self.nbytes)
            with torch.cuda.stream(stream):
                self.place[start : start + self.nbytes].copy_(self.slots[slot], non_blocking=True)
            if marked(number):
                self.events[slot].record(stream)
            at += self.nbytes
        for stream in self.streams:
            stream.synchronize()


WAYS: dict[str, tuple[Callable[[int], bool], int]] = {
    "an event each": (lambda _: True, 1),
    "every second": (lambda number: number % 2 == 1, 1),
    "none": (lambda _: False, 1),
    "an event each, two streams": (lambda _: True, 2),
}


def main() -> None:
    chosen = parse()
    device = torch.device(chosen.device)
    torch.cuda.set_device(device)
    link = link_rate()
    total = int(chosen.total * (1 << 30))
    rows = []
    print(f"{torch.cuda.get_device_name()}, link {link / 1e9:.1f} GB/s, GB/s by MiB a copy")
    print(f"{'':28}" + "".join(f"{size:8g}" for size in chosen.mib))
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for size in chosen.mib:
        copies = Copies(int(size * MIB), chosen.slots, device)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(chosen.rounds):
            for way, (marked, streams) in WAYS.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                copies.run(total, marked, streams)
                seconds[way].append(time.perf_counter() - start)
        for way in WAYS:
            rate = total // copies.nbytes * copies.nbytes / statistics.median(seconds[way])
            rates[way].append(rate)
            rows.append({"way": way, "nbytes": copies.nbytes, "bytes_s": rate, "of_link": rate / link})
        del copies
    for way, found in rates.items():
        print(f"{way:28}" + "".join(f"{rate / 1e9:8.1f}" for rate in found))
    if chosen.out:
        result = {**setting(), "link_bytes_s": link, "slots": chosen.slots, "rows": rows}
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Loading a whole file to the GPU, where everything fits: Forebay and its peers side by side.

Each loader runs in a process of its own, once with the file in the page cache and once with the file dropped from it. The
clock starts with libraries imported and the device ready, and stops when every tensor is on the device. Forebay loads a state
dict, as the others do, and in a row of its own builds and attaches a model and uses every weight once. A sample of tensors
is compared bit for bit. Beside the loaders stand what they run into: the pinned link and the disk's own rate with O_DIRECT.
A loader that cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import children
import plot
from children import Outcome, Row

MIB = 1 << 20
BLOCK = 16 * MIB
STATES = ("warm", "cold")
SAMPLE = 12

Load = Callable[[], Mapping[str, Any]]


def forebay_load(chosen: argparse.Namespace) -> Load:
    from forebay import load

    return lambda: load(chosen.file, chosen.device)


def forebay_attach(chosen: argparse.Namespace) -> Load:
    import runners
    import torch

    import forebay

    kept: list[forebay.Attachment] = []

    def load() -> Mapping[str, Any]:
        model = runners.load(chosen)
        kept.append(forebay.attach(model, chosen.device))
        with forebay.lend(model.blocks):
            torch.cuda.synchronize()
        return dict(model.blocks.named_parameters())

    return load


def torch_to(chosen: argparse.Namespace) -> Load:
    from safetensors.torch import load_file

    return lambda: {name: tensor.to(chosen.device) for name, tensor in load_file(chosen.file).items()}


def safetensors_load(chosen: argparse.Namespace) -> Load:
    from safetensors.torch import load_file

    return lambda: load_file(chosen.file, device=chosen.device)


def fastsafetensors_load(chosen: argparse.Namespace) -> Load:
    from fastsafetensors import fastsafe_open

    def load() -> Mapping[str, Any]:
        # GPUDirect Storage needs a driver of its own; without it this is the documented way.
        with fastsafe_open([str(chosen.file)], device=chosen.device, nogds=True) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    return load


def instanttensor_load(chosen: argparse.Namespace) -> Load:
    from instanttensor import BackendPolicy, safe_open

    # What its documentation recommends for a file that is loaded again, and its default for one that is not.
    backend = BackendPolicy.BUFFERED if chosen.state == "warm" else None

    def load() -> Mapping[str, Any]:
        with safe_open(str(chosen.file), framework="pt", device=chosen.device, backend=backend) as file:
            return dict(file.tensors())

    return load


def runai_load(chosen: argparse.Namespace) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Mapping[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(chosen.file), owned=False)
            return {name: tensor.to(chosen.device) for name, tensor in streamer.get_tensors()}

    return load


@dataclass(frozen=True)
class Loader:
    title: str
    load: Callable[[argparse.Namespace], Load]
    package: str | None = None
    needs: tuple[str, ...] = ()


OURS = "forebay"
ATTACHED = "forebay-attach"
LOADERS = {
    OURS: Loader("Forebay", forebay_load, "forebay"),
    ATTACHED: Loader("Forebay, a model attached and used", forebay_attach, "forebay"),
    "to": Loader("torch `.to()`", torch_to, "torch"),
    "safetensors": Loader("safetensors `load_file`", safetensors_load, "safetensors"),
    "fastsafetensors": Loader("fastsafetensors", fastsafetensors_load, "fastsafetensors"),
    "instanttensor": Loader("InstantTensor", instanttensor_load, "instanttensor"),
    "runai": Loader("run:ai streamer", runai_load, "runai-model-streamer", ("humanize",)),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the stack (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=5120, help="width of a block (default: %(default)s: 25 GB)"
    )
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), help="default: all")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="default: both")
    parser.add_argument(
        "--disk-gib", type=float, default=8, help="GiB read to time the disk (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=8, help="that read it (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="processes a loader has with a warm page cache; the median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=90, help="seconds a process may take (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels")
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--file", type=Path, default=Path("/tmp/forebay-stack.safetensors"), help="where the weights go"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("target/loaders"),
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument("--child", choices=[*LOADERS, "machine"], help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=STATES, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = parse()
    if chosen.child:
        return child(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    children.end_with_their_parent()
    wheels = children.Wheels(chosen.wheels)
    found = run(chosen, "machine", None, wheels, 300)
    if found.reason:
        raise SystemExit(f"the weights were not written or the link not timed: {found.reason}")
    rows: list[Row] = []
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        **found.rows[0],
        "disk_bytes_s": disk_rate(chosen.file, chosen.disk_gib, chosen.threads),
        "rows": rows,
    }
    for state in chosen.states:
        for name in chosen.loaders:
            rounds = chosen.rounds if state == "warm" else 1
            outcomes = [run(chosen, name, state, wheels, chosen.timeout) for _ in range(rounds)]
            outcome = median(outcomes)
            row = outcome.rows[0] if outcome.rows else {"same": False, "reason": outcome.reason}
            row["rounds_s"] = [of.rows[0]["seconds"] for of in outcomes if of.rows]
            row["same"] = row["same"] and all(of.rows and of.rows[0]["same"] for of in outcomes)
            memory = {"anonymous_bytes": outcome.anonymous_bytes, "taken_bytes": outcome.taken_bytes}
            rows.append({"loader": name, "state": state, "versions": outcome.versions, **memory, **row})
            # After each, so that a run that is stopped leaves what it has.
            (chosen.out / "loaders.json").write_text(json.dumps(result, indent=1))
            (chosen.out / "loaders.md").write_text(markdown(result) + "\n")
            (chosen.out / "loaders.svg").write_text(picture(result))
    print(markdown(result))
    return 0 if all(row["same"] for row in rows if row["loader"] in (OURS, ATTACHED)) else 1


def median(outcomes: list[Outcome]) -> Outcome:
    """The one of the middle time; one that did not finish stands for all."""
    failed = [outcome for outcome in outcomes if not outcome.rows]
    return failed[0] if failed else sorted(outcomes, key=lambda of: of.rows[0]["seconds"])[len(outcomes) // 2]


def run(
    chosen: argparse.Namespace, name: str, state: str | None, wheels: children.Wheels, timeout: float
) -> Outcome:
    loader = LOADERS.get(name)
    log = chosen.out / f"loaders-{name}{f'-{state}' if state else ''}.log"
    arguments: list[object] = ["--child", name, *(["--state", state] if state else [])]
    for setting in ("blocks", "width", "device", "file", "threads"):
        arguments += [f"--{setting}", getattr(chosen, setting)]
    try:
        fetched = loader is not None and loader.package not in (None, "torch", "forebay")
        site = wheels.site([loader.package, *loader.needs]) if loader and fetched else None
        with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
            environment = (
                fastsafetensors_environment(Path(folder), state) if name == "fastsafetensors" else {}
            )
            outcome = children.run_child(
                Path(__file__), arguments, site=site, log=log, timeout=timeout, environment=environment
            )
    except RuntimeError as error:
        outcome = Outcome(reason=str(error))
    print(f"{name:16} {state or '':5} {outcome.reason or 'ok'}", flush=True)
    return outcome


def fastsafetensors_environment(folder: Path, state: str | None) -> dict[str, str]:
    """It opens ``libcudart.so``, which torch's wheels have under another name; it reads past the page cache by default."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (nvidia.submodule_search_locations or [])] if nvidia else []
    found = sorted(path for root in roots for path in root.rglob("libcudart.so.*"))
    if found:
        (folder / "libcudart.so").symlink_to(found[-1])
    path = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), str(folder)]))
    return {"LD_LIBRARY_PATH": path, "FASTSAFETENSORS_ODIRECT": "0" if state == "warm" else "1"}


def child(chosen: argparse.Namespace) -> int:
    package = LOADERS[chosen.child].package if chosen.child in LOADERS else None
    with children.reporting(chosen.report, [package] if package else []) as report:
        import torch

        torch.cuda.set_device(chosen.device)
        if chosen.child == "machine":
            import runners

            with torch.no_grad():
                report(runners.machine(chosen))
            return 0
        load = LOADERS[chosen.child].load(chosen)
        torch.zeros(1, device=chosen.device).add(1)
        if chosen.state == "warm":
            read_through(chosen.file, chosen.file.stat().st_size, chosen.threads, os.O_RDONLY)
        else:
            drop(chosen.file)
        cached = cached_share(chosen.file)
        with torch.no_grad():
            torch.cuda.synchronize()
            start = time.perf_counter()
            tensors = load()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            pinned = int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
            if chosen.child in (OURS, ATTACHED):
                import forebay

                pinned = forebay.stats(chosen.device)["pinned_host"]
            same = compare(chosen, tensors)
        report({"seconds": seconds, "cached": cached, "pinned_bytes": pinned, "same": same})
    return 0


def compare(chosen: argparse.Namespace, tensors: Mapping[str, Any]) -> bool:
    """A sample of the tensors against what safetensors reads, and all of their names."""
    import torch
    from safetensors import safe_open

    with safe_open(chosen.file, framework="pt") as file:
        names = sorted(file.keys())
        if sorted(tensors) != names:
            return False
        sample = random.Random(1).sample(names, min(SAMPLE, len(names)))
        return all(torch.equal(tensors[name], file.get_tensor(name).to(chosen.device)) for name in sample)


def read_through(path: Path, nbytes: int, threads: int, flags: int) -> float:
    """Reads the beginning of a file in blocks; seconds."""

    def read(first: int) -> None:
        with mmap.mmap(-1, BLOCK) as buffer:
            for at in range(first * BLOCK, nbytes, threads * BLOCK):
                os.preadv(file, [buffer], at)

    file = os.open(path, flags)
    try:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
        return time.perf_counter() - start
    finally:
        os.close(file)


def disk_rate(path: Path, gib: float, threads: int) -> float:
    """Bytes a second past the page cache, which has nothing of the file then; of so much of it at most."""
    nbytes = min(path.stat().st_size, int(gib * (1 << 30)))
    drop(path)
    return nbytes / read_through(path, nbytes, threads, os.O_RDONLY | os.O_DIRECT)


def drop(path: Path) -> None:
    """A file out of the page cache; its pages have to be clean for that."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def cached_share(path: Path) -> float:
    """How much of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    file = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file, ctypes.c_long(0)
        )
        code = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    finally:
        os.close(file)
    if code != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(pages).translate(bytes(i & 1 for i in range(256))).count(1) / len(pages)


def markdown(result: dict[str, Any]) -> str:
    link, disk, nbytes = result["link_bytes_s"], result["disk_bytes_s"], result["weights_bytes"]
    head = (
        f"{result['gpu']}, {result['cores']} cores, torch {result['torch']}, {nbytes / 1e9:.1f} GB to the device, link "
        f"{link / 1e9:.1f} GB/s, disk {disk / 1e9:.2f} GB/s, {result['date']}. `{result['command'].split(' --out')[0]}`"
    )
    lines = [
        "| page cache | loader | seconds | GB/s | of the link | of the disk | same | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        title = " ".join([LOADERS[row["loader"]].title, *row["versions"].values()])
        state = f"{row['state']} ({row['cached']:.0%})" if "cached" in row else row["state"]
        if "seconds" not in row:
            cells = [row["reason"].replace("|", "/"), "", "", "", "", ""]
        else:
            rate = nbytes / row["seconds"]
            of_disk = f"{rate / disk:.0%}" if row["state"] == "cold" else ""
            memory = f"{row['taken_bytes'] / 2**30:.1f} GiB ({row['pinned_bytes'] / 2**30:.1f})"
            cells = [f"{row['seconds']:.2f}", f"{rate / 1e9:.1f}", f"{rate / link:.0%}", of_disk]
            cells += ["yes" if row["same"] else "NO", memory]
        lines.append("| " + " | ".join([state, title, *cells]) + " |")
    note = (
        "Memory is the peak of what the process took of the machine's available memory, page cache not counted, and of "
        "it pinned through torch, or Forebay itself."
    )
    return "\n\n".join([head, note, "\n".join(lines)])


def picture(result: dict[str, Any]) -> str:
    rates: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for row in result["rows"]:
        of_loader = rates.setdefault(row["loader"], {})
        if "seconds" in row:
            of_loader[row["state"]] = result["weights_bytes"] / row["seconds"] / 1e9
        else:
            reasons[row["loader"]] = row["reason"][:60]
    states = [state for state in STATES if any(row["state"] == state for row in result["rows"])]
    rows = [
        plot.Bar(
            LOADERS[name].title.replace("`", ""),
            tuple(found.get(state) for state in states),
            reasons.get(name, ""),
        )
        for name, found in rates.items()
    ]
    kinds = {"warm": ("in the page cache; dashed: the pinned link", "link_bytes_s")}
    kinds["cold"] = ("from the disk; dashed: O_DIRECT reads", "disk_bytes_s")
    return plot.bars(
        "Loading a file to the GPU, GB/s",
        f"{result['gpu']}, {result['weights_bytes'] / 1e9:.1f} GB of bf16 weights",
        [kinds[state][0] for state in states],
        rows,
        [result[kinds[state][1]] / 1e9 for state in states],
    )


if __name__ == "__main__":
    sys.exit(main())

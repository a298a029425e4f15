"""ComfyUI with random weights of the real shapes: its own offloading, comfy-aimdo, Forebay in place of it, and native.

A cell is a model, a format, with or without a LoRA, text encoders and decoder, on a card of so many GiB: another process
holds the rest of the device's memory. Every system runs every cell in a process of its own, one after the other, with the
same seed. Processes are started together (``--together``) and import what needs no device; each is measured from its
release, which is when the one before it has ended.

Results are compared by hash with those of ComfyUI's own offloading (``--disable-dynamic-vram``) in the same cell, or where
that was not run on a card that holds everything. With a LoRA ComfyUI rounds patched weights in one way where they are loaded
and in another where they are patched as they are used: what stands in for comfy-aimdo is compared with it, on the same card or
where that was not run on any, and native, which gives the former everywhere, with ComfyUI's own offloading on a card that holds
everything. The groups ``matrix-...`` run a model on cards of all sizes, with and without a LoRA, for the results.

Later steps are the median of all but the first; their limit is the larger of two: the fastest median on a card that holds
everything, and the bytes that were not resident over the link's rate, for these are streamed while a step computes. A first step
counts from the call that samples; its limit is that of a later step and the time in which the driver loads kernels, at least all
the model's bytes over the link's rate. How long kernels take is by how much the first step of a model that was loaded before, in a
process of its own (``loaded``, the fastest of several, since the first finds libraries on disk), is longer than its later ones;
where they are loaded before the first step begins (``started``), no time.

Where the thread that launches kernels is the limit, a step takes as long as the processor's speed makes it, which on shared machines
changes from one step to the next. What it waits for others does not: how long it slept is told beside. For the GPU it waits awake.
The tool waits for the device after each step, so that in the next one's beginning the device waits for the thread. ComfyUI does not
(``--asynchronous``): steps are then told apart by events on the device.

One system (``turns``) runs seven steps on the cell's card and seven with all of it resident, in turn in one process, for which the
device has to be free: its limit is what its own steps take with all resident, or the link.

What runs is a tool that starts ComfyUI without a server (``--tool``), over a checkout (``--comfyui``, a folder or a tar.gz
of one). ``bench/comfyui_wheels.sh`` gathers both and what ComfyUI imports, for a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import itertools
import json
import os
import platform
import runpy
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import children
from card import Card
from children import Child, Outcome, Row
from comfyui_cells import GIB, GROUPS, SYSTEMS, Cell
from comfyui_rows import gathered, markdown, row_of, told, verdict
from in_turn import Cards
from touch import touch

if TYPE_CHECKING:
    import torch

PACKAGE = "forebay.comfyui.aimdo"
NEEDS = ("torchsde", "trampoline", "comfy-kitchen")
"""What ComfyUI imports and the machine may lack."""
SAMPLING = "comfy.sample"
"""The module of ComfyUI's whose ``sample`` samples."""
GATE = "comfy.model_management"
"""The module of ComfyUI's that is the first to use the device."""
EARLY = (
    "scipy.integrate",
    "scipy.stats",
    "scipy.ndimage",
    "torchsde",
    "torchvision",
    "transformers.models.clip.tokenization_clip",
)
"""What ComfyUI imports behind the gate though it needs no device, and takes long."""
MACHINE = "machine"
"""The child that measures the machine."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout, or a tar.gz of one")
    parser.add_argument("--tool", type=Path, required=True, help="what starts ComfyUI without a server")
    parser.add_argument("--wheels", type=Path, help="folder of wheels; default: what is installed")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["flux"],
        help="ARCH-QUANT-CARD[-loraN][-xINSTANCES][-rROUNDS][-te][-vae][-SIZE], with =SYSTEM,... for it alone, or a group: "
        + ", ".join(GROUPS)
        + "; runs as often as it is given",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["legacy", "aimdo", "dropin"])
    parser.add_argument(
        "--asynchronous",
        action="store_true",
        help="do not wait for the device after each step: as in ComfyUI, whose samplers do not where no preview is shown",
    )
    parser.add_argument("--steps", type=int, default=4, help="steps a sampling (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=240,
        help="seconds a process, from its release (default: %(default)s)",
    )
    parser.add_argument(
        "--together", type=int, default=8, help="processes that are started at once (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-gib",
        type=float,
        default=0,
        help="GiB of memory that are used and freed before each release, on a GPU: as much as the largest system uses "
        "(default: none)",
    )
    parser.add_argument(
        "--until", type=float, default=540, help="begin no other after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/forebay-comfyui"), help="where weights go")
    parser.add_argument("--out", type=Path, default=Path("target/comfyui"), help="folder for the results")
    parser.add_argument("--child", choices=[*SYSTEMS, MACHINE], help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.together < 1:
        parser.error("--together: at least one")
    for setting in ("comfyui", "tool"):
        if not getattr(chosen, setting).exists():
            parser.error(f"--{setting}: is not there: {getattr(chosen, setting)}")
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"--out: is no folder: {chosen.out}")
    if chosen.asynchronous and chosen.device != "cuda":
        parser.error("--asynchronous: for --device cuda, since nothing else runs behind the thread")
    return chosen


def main() -> int:
    chosen = parse()
    if chosen.child:
        return child(chosen)
    end = time.monotonic() + chosen.until
    names = [name for cell in chosen.cells for name in GROUPS.get(cell, [cell])]
    chosen.out.mkdir(parents=True, exist_ok=True)
    children.end_with_their_parent()
    try:
        jobs = [job for name in names for job in jobs_of(name, chosen.systems)]
    except argparse.ArgumentTypeError as error:
        sys.exit(f"--cells: {error}")
    rows: list[Row] = []
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="forebay-comfyui-"))
        card = opened.enter_context(Card())
        runs = Runs(chosen, unpacked(chosen.comfyui, Path(folder)), card, end)
        outcomes = opened.enter_context(contextlib.closing(runs.outcomes(jobs)))
        for job, outcome in outcomes:
            rows.append(row_of(job.cell, job.system, outcome, chosen.steps))
            print(f"{job.cell.name:28} {job.system:8} {told(rows[-1])}", flush=True)
            result = gathered(runs.machine, rows)
            (chosen.out / "comfyui.json").write_text(json.dumps(result, indent=1))
            (chosen.out / "comfyui.md").write_text(markdown(result) + "\n")
    print(f"{markdown(result)}\n\n{verdict(result)}")
    return 0 if all(row.get("same", True) for row in result["rows"]) else 1


def unpacked(checkout: Path, folder: Path) -> Path:
    """The folder of a checkout."""
    if checkout.is_dir():
        return checkout.resolve()
    with tarfile.open(checkout) as archive:
        archive.extractall(folder, filter="data")
    return folder


@dataclass(frozen=True)
class Job:
    """One cell on one system, which a child runs."""

    system: str
    cell: Cell


def jobs_of(name: str, systems: Sequence[str]) -> list[Job]:
    """What a cell as the command line takes it comes to.

    Raises:
        argparse.ArgumentTypeError: For a name that is none.
    """
    cell, _, own = name.partition("=")
    wanted = own.split(",") if own else systems
    for system in wanted:
        if system not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"no system: {system}, in {name}")
    return [Job(system, Cell.parse(cell)) for system in SYSTEMS if system in wanted]


class Runs:
    """Runs children, some of which are started together."""

    def __init__(self, chosen: argparse.Namespace, root: Path, card: Card, end: float) -> None:
        self.machine: Row = {"gpu": "none", "memory_bytes": 0, "link_gb_s": 0}
        self._chosen = chosen
        self._root = root
        self._card = card
        self._wheels = children.Wheels(chosen.wheels)
        self._end = end
        self._begun: Counter[str] = Counter()
        """How often each was started, by the name of its log."""

    def outcomes(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Each job's outcome, in their order; ``machine`` is known with the first."""
        for at in range(0, len(jobs), self._chosen.together):
            with contextlib.ExitStack() as opened:
                measuring = self._start(MACHINE, None, opened) if at == 0 else None
                batch = [
                    (job, Outcome() if self._is_late() else self._start(job.system, job.cell, opened))
                    for job in jobs[at : at + self._chosen.together]
                ]
                started = [measuring, *(child for _, child in batch)]
                children.wait_until_ready(
                    [child for child in started if isinstance(child, Child)], self._chosen.timeout
                )
                if measuring is not None:
                    outcome = self._released(measuring, 0)
                    if outcome.rows:
                        self.machine = outcome.rows[0]
                    else:
                        print(f"the machine is not known: {outcome.reason}", flush=True)
                for job, child in batch:
                    if self._is_late():
                        yield job, Outcome(reason=f"not begun: {self._chosen.until:.0f} s are over")
                    else:
                        yield job, self._released(child, self._bytes_of(job))

    def _is_late(self) -> bool:
        return time.monotonic() > self._end

    def _start(self, name: str, cell: Cell | None, opened: contextlib.ExitStack) -> Child | Outcome:
        """A child on its way to its gate."""
        system = SYSTEMS.get(name)
        try:
            # The first name is the folder's: a system with a wheel of its own has one of its own.
            site = self._wheels.site([*filter(None, [system and system.wheel]), *NEEDS])
        except RuntimeError as error:
            return Outcome(reason=str(error))
        chosen = self._chosen
        arguments: list[object] = ["--child", name, "--comfyui", self._root, "--tool", chosen.tool.resolve()]
        arguments += ["--device", chosen.device, "--steps", chosen.steps, "--work", chosen.work]
        arguments += ["--cells", cell.name] if cell else []
        arguments += ["--asynchronous"] if chosen.asynchronous else []
        title = f"{cell.name}-{name}" if cell else name
        self._begun[title] += 1
        number = f"-{self._begun[title]}" if self._begun[title] > 1 else ""
        log = chosen.out / f"{title}{number}.log"
        environment = dict(system.environment) if system else {}
        child = Child(Path(__file__), arguments, site=site, log=log, environment=environment, waits=True)
        return opened.enter_context(child)

    def _released(self, child: Child | Outcome, card: int) -> Outcome:
        """What becomes of a child on a card of so many bytes; 0: all there are."""
        if isinstance(child, Outcome):
            return child
        if not child.has_ended:
            try:
                if self._chosen.device == "cuda":
                    self._card.leave(card)
                    touch(int(self._chosen.warm_gib * GIB))
            except (OSError, RuntimeError) as error:
                return Outcome(reason=children.reason_of(error))
            child.release()
        return child.watch(self._chosen.timeout)

    def _bytes_of(self, job: Job) -> int:
        """Of its card; 0 where that is all there are, or it makes the card small by itself."""
        nbytes = job.cell.card_bytes
        is_all = SYSTEMS[job.system].in_turn or nbytes >= self.machine["memory_bytes"]
        return 0 if is_all else nbytes


def child(chosen: argparse.Namespace) -> int:
    if chosen.child == MACHINE:
        with children.reporting(chosen.report) as report:
            importlib.import_module("stack")
            children.wait_for_release()
            report(measured())
        return 0
    system = SYSTEMS[chosen.child]
    cell = Cell.parse(chosen.cells[0])
    with (
        children.reporting(chosen.report, [system.distribution] if system.distribution else []) as report,
        tempfile.NamedTemporaryFile(suffix=".json") as out,
    ):
        arguments: list[object] = ["--comfy-root", chosen.comfyui, "--work", chosen.work, "--out", out.name]
        arguments += ["--device", chosen.device, "--steps", chosen.steps]
        for setting in ("arch", "size", "quant", "instances", "rounds", "lora"):
            arguments += [f"--{setting}", getattr(cell, setting)]
        arguments += [f"--{word}" for word in ("te", "vae") if getattr(cell, word)]
        if system.wheel is None:
            arguments += ["--aimdo-package", PACKAGE]
        if system.native:
            importlib.import_module("forebay.comfyui.native").install()
        sys.meta_path.insert(0, Gate())
        action = load_whole if system.loads_before else wait_for_kernels if system.waits_before else None
        card_bytes = cell.card_bytes if system.in_turn else None
        # Importing Forebay would change the order in which the others start; where steps are asynchronous it does for all.
        is_watched = system.native or action or chosen.asynchronous
        samplings = watch_sampling(action, card_bytes, chosen.asynchronous) if is_watched else []
        sys.argv = [str(chosen.tool), *map(str, arguments), "--", *system.comfy]
        try:
            runpy.run_path(str(chosen.tool), run_name="__main__")
        finally:
            text = Path(out.name).read_text()
            if text:
                report(completed(json.loads(text), samplings))
    return 0


@dataclass
class Sampled:
    """What was seen of one sampling."""

    before_s: float = 0.0
    """What was done before it."""
    ran_s: list[float] = field(default_factory=list)
    """For each step, how long its thread ran: whoever launches kernels waits for the GPU awake, and for a lock asleep."""
    cards: Cards | None = None
    """Those on which it ran in turn."""
    ends: list[torch.cuda.Event] = field(default_factory=list)
    """On the device, its beginning and the end of each step, where nothing waits for those."""

    def end_of_step(self) -> None:
        """Marks one on the device's current stream."""
        import torch

        self.ends.append(torch.cuda.Event(enable_timing=True))
        self.ends[-1].record()

    @property
    def step_s(self) -> list[float]:
        """How long each step took on the device. Waits for it."""
        if self.ends:
            self.ends[-1].synchronize()
        return [round(begin.elapsed_time(end) / 1e3, 4) for begin, end in itertools.pairwise(self.ends)]


def watch_sampling(
    action: Callable[[object], None] | None, card_bytes: int | None, is_asynchronous: bool
) -> list[Sampled]:
    """Has something done with each model before it samples, and its steps watched; those on a card of so many bytes in turn with
    others on all of the device; without waiting for the device after each. Filled as they are.
    """
    from forebay.comfyui.arrival import on_import

    samplings: list[Sampled] = []

    def wrap() -> None:
        module = sys.modules[SAMPLING]
        sample = module.sample

        def watched(
            model: object, *args: object, callback: Callable[..., object], **kwargs: object
        ) -> object:
            samplings.append(sampled := Sampled())
            if action is not None:
                began = time.perf_counter()
                action(model)
                sampled.before_s = time.perf_counter() - began
            sampled.cards = cards = Cards(card_bytes) if card_bytes is not None else None
            last = time.thread_time()
            if is_asynchronous:
                sampled.end_of_step()

            def after_step(*of_step: object) -> object:
                nonlocal last
                before, last = last, time.thread_time()
                sampled.ran_s.append(last - before)
                if is_asynchronous:
                    sampled.end_of_step()
                with unwaited() if is_asynchronous else contextlib.nullcontext():
                    found = callback(*of_step)
                if cards is not None:
                    cards.after_step()
                return found

            with contextlib.closing(cards) if cards is not None else contextlib.nullcontext():
                return sample(model, *args, callback=after_step, **kwargs)

        module.sample = watched

    on_import(SAMPLING, wrap)
    return samplings


def unwaited() -> contextlib.AbstractContextManager[object]:
    """Nobody waits for the device in it."""
    import torch

    return mock.patch.object(torch.cuda, "synchronize")


def load_whole(model: object) -> None:
    """Has ComfyUI load a model as a whole."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wait_for_kernels(_model: object) -> None:
    """Waits until kernels are loaded that are loaded while ComfyUI starts."""
    from forebay.comfyui import warming

    warming.wait()


def completed(report: Row, samplings: list[Sampled]) -> Row:
    """A report whose first steps begin after what was done before them, and that tells how long steps ran."""
    phases = [phase for phase in report["phases"] if phase["phase"].startswith("sample")]
    for phase, sampled in zip(phases, samplings, strict=False):
        if sampled.ends:
            phase["step_s"] = sampled.step_s
        else:
            phase["step_s"][0] -= sampled.before_s
        phase["ran_s"] = sampled.ran_s
        if sampled.cards is not None:
            phase["turns"] = {"resident_bytes": sampled.cards.resident_bytes}
    return report


class Gate(importlib.abc.MetaPathFinder):
    """Finds nothing. Whoever imports the first module that uses the device waits here for the release."""

    def __init__(self) -> None:
        self._is_passed = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == GATE and not self._is_passed:
            self._is_passed = True
            for early in EARLY:
                with contextlib.suppress(Exception):  # ComfyUI's to say
                    importlib.import_module(early)
            children.wait_for_release()


def measured() -> Row:
    """The GPU, its memory, and the link's rate."""
    import torch

    row = {"torch": torch.__version__, "cores": os.cpu_count(), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {**row, "gpu": "none", "memory_bytes": 0, "link_gb_s": 0}
    from stack import link_rate

    rate = link_rate()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    gpu = torch.cuda.get_device_name()
    return {**row, "gpu": gpu, "memory_bytes": free, "link_gb_s": rate / 1e9}


if __name__ == "__main__":
    sys.exit(main())

"""What ``pressure.py`` runs in a process of its own: the cells of one system, one allocator and one size of weights."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stack
import torch
from children import Row, reason_of
from others import OtherProcess, Others
from pressure import SETUP, patience
from runners import RUNNERS, Layers, Runner
from safetensors.torch import load_file
from stack import GIB, Block

import forebay

VIDEO_FRAMES, VIDEO_TOKENS = 21, 4736
"""Wan 2.2's 1280x1280x81: 21 latent frames of 80 x 80 patches, of which so many as make this block's activations as large as
Wan's, whose feed-forward is 2.7 times as wide as the model where this one's is 4 times (10 widths a token at the peak, not
7.4). Attention stays within a frame, as memory is at stake, not time."""
VIDEO_WEIGHTS = 28 / 16
"""Its weights over its card."""
CALM_S = 5.0
"""How long memory may take to come back."""

Report = Callable[[Row], None]


def reference(chosen: argparse.Namespace, sizes: list[float], video: bool, report: Report) -> None:
    """Writes the weights, and the output of plain torch for each size: block by block, each alone on the device."""
    on_gpu = chosen.device != "host"
    if on_gpu:
        torch.cuda.set_device(chosen.device)
    device = torch_device(chosen)
    nbytes = stack.write_weights(chosen.file, blocks_of(chosen, 1.0), chosen.width, device=device)
    report({"machine": {**stack.machine(on_gpu), "file_bytes": nbytes}})
    runs = [(inputs(chosen, False), {blocks_of(chosen, times): f"{times:g}" for times in sizes})]
    if video:
        runs.append((inputs(chosen, True), {video_blocks(chosen): "video"}))
    with torch.no_grad():
        for x, names in runs:
            model = stack.load(chosen.file, max(names), chosen.width)
            for number, y in enumerate(stack.block_by_block(model, x), start=1):
                if number in names:
                    torch.save(y.cpu(), reference_file(chosen, names[number]))


def measure(chosen: argparse.Namespace, setting: dict[str, Any], report: Report) -> None:
    """Reports a row for each cell of a group."""
    cells = setting["cells"]
    is_video = cells[0]["kind"] == "video"
    if chosen.device != "host":
        torch.cuda.set_device(chosen.device)
    if setting["system"] == "aimdo":
        from comfy_aimdo import control

        if not control.init_devices([torch.cuda.current_device()]):
            raise RuntimeError("comfy_aimdo.control.init_devices() returned False")
    with torch.no_grad(), contextlib.ExitStack() as opened:
        warm_up(chosen)
        card = int((chosen.video_card if is_video else chosen.card) * GIB)
        blocks = video_blocks(chosen) if is_video else blocks_of(chosen, setting["times"])
        others: Others | None = None
        if chosen.device != "host":
            if any(cell["kind"] == "process" for cell in cells):
                others = opened.enter_context(OtherProcess(torch.cuda.current_device()))
            ballast(card)
        with watched(chosen.timeout * SETUP, report):
            name = "video" if is_video else f"{setting['times']:g}"
            world = World(chosen, setting["system"], card, blocks, name, others)
            world.x = inputs(chosen, is_video)
        for cell in cells:
            with watched(chosen.timeout * patience(cell["kind"]), report):
                row = world.run(cell)
            report({"cell": cell["kind"], **row})
            if "reason" in row and setting["system"] != "forebay":
                return  # whatever it left behind is not the next cell's
        world.runner.detach()


class World:
    """One system with a model in a card, and what wants memory beside it."""

    def __init__(
        self,
        chosen: argparse.Namespace,
        system: str,
        card: int,
        blocks: int,
        name: str,
        others: Others | None,
    ) -> None:
        self.chosen = chosen
        self.card = card
        # Not on the card, where it would take room.
        self.expected = torch.load(reference_file(chosen, name))
        with torch.device("meta"):
            self.model = Layers(blocks, chosen.width).to(torch.bfloat16)
        loader = forebay.load if system == "forebay" else load_file
        self.model.blocks.load_state_dict(stack.state_of(chosen.file, blocks, loader), assign=True)
        self.model.eval().requires_grad_(False)
        settings = argparse.Namespace(**vars(chosen), room=1.5)
        if system == "forebay":
            self.runner: Runner = Ours(self.model, settings, card)
        else:
            self.runner = RUNNERS[system](self.model, settings, card)
        self.activation = Activation(self.runner, torch_device(chosen))
        self.model.blocks[blocks // 2].register_forward_hook(self.activation)
        self.others = others
        if chosen.device == "host" and isinstance(self.runner, Ours):
            self.others = OtherThread(self.runner.engine, card // 64)
        self.x = torch.empty(0)
        self.runner.attach()

    def run(self, cell: dict[str, Any]) -> Row:
        """The row of a cell."""
        self.activation.reset()
        row: Row = {"same": True, "steps_s": []}
        try:
            if cell["kind"] == "spikes":
                self._spikes(row, int(cell["share"] * self.card))
            elif cell["kind"] == "process":
                self._process(row, int(cell["share"] * self.card))
            else:
                pressed = {"once": [True, False, False], "every": [True] * 3, "video": [False] * 2}[
                    cell["kind"]
                ]
                for is_pressed in pressed:
                    self.activation.nbytes = int(cell["share"] * self.card) if is_pressed else 0
                    self._step(row)
        except (torch.OutOfMemoryError, forebay.ForebayError, RuntimeError) as error:
            row |= {"same": False, "reason": " ".join([reason_of(error), *getattr(error, "__notes__", ())])}
            error.__traceback__ = None
        self.activation.nbytes = 0
        if self.others is not None:
            self.others.give()
        row["again"] = self.activation.again
        row["told"] = self.runner.told() if isinstance(self.runner, Ours) else ""
        gc.collect()
        self._empty_cache()
        return row

    def _empty_cache(self) -> None:
        if self.chosen.device != "host":
            torch.cuda.empty_cache()

    def _step(self, row: Row) -> None:
        calls = self.activation.calls
        seconds, y = timed(self.chosen, lambda: self.runner(self.x))
        self.activation.again += self.activation.calls - calls - 1
        row["steps_s"].append(seconds)
        row["same"] = row["same"] and torch.equal(y.cpu(), self.expected)

    def _process(self, row: Row, nbytes: int) -> None:
        """Half of the card goes in the middle of the second step and comes back in the middle of the fourth."""
        assert self.others is not None, "there is no other process"
        others = self.others
        for action in [None, lambda: others.take(nbytes), None, others.give_later, None, None]:
            self.activation.action = action
            self._step(row)
            self.activation.action = None
            if action is not None and action != others.give_later:
                held, row["took_s"] = others.wait_until_taken()
                if held < nbytes:
                    row |= {"same": False, "reason": f"it got {held} of {nbytes} bytes"}

    def _spikes(self, row: Row, nbytes: int) -> None:
        count = self.chosen.spikes
        before = self._calm(row, None)
        filled = self.runner.moved_bytes()
        for _ in range(count):
            self.activation.nbytes = nbytes
            self._step(row)
            self._empty_cache()  # what torch keeps is no spike the next time
        refilled = (self.runner.moved_bytes() - filled) / count
        self.activation.nbytes = 0
        page = self.runner.stats()["page_size"]
        after = self._calm(row, before["resident"] - page)
        keys = ("resident", "step_s", "moved")
        row["spikes"] = {
            "count": count, "page": page, "refilled": refilled, **{key: [before[key], after[key]] for key in keys},
            "back": after["resident"] >= before["resident"] - page and after["moved"] <= before["moved"] + page,
        }  # fmt: skip

    def _calm(self, row: Row, least: int | None) -> dict[str, Any]:
        """Runs steps until what is resident grows no more, or is at least that much, then tells of ten more."""
        end = time.monotonic() + CALM_S
        resident = -1
        unchanged = 0
        while time.monotonic() < end and (unchanged < 5 if least is None else resident < least):
            self._step(row)
            now = self.runner.stats()["resident"]
            unchanged = unchanged + 1 if now == resident else 0
            resident = now
            time.sleep(0.02)
        seconds, moved = [], []
        for _ in range(10):
            filled = self.runner.moved_bytes()
            self._step(row)
            seconds.append(row["steps_s"][-1])
            moved.append(self.runner.moved_bytes() - filled)
        return {
            "resident": self.runner.stats()["resident"],
            "step_s": statistics.median(seconds),
            "moved": statistics.median(moved),
        }


class Ours(Runner):
    """Forebay with nothing set: no budget, no headroom but the default."""

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        super().__init__(model, chosen, free)
        if chosen.device == "host":
            self.engine = forebay.Engine("host", headroom=free / 24, capacity=free)
        else:
            self.engine = forebay.engine(chosen.device)

    def attach(self) -> None:
        self.attachment = forebay.attach(self.model, self.engine)

    def detach(self) -> None:
        self.attachment.detach()

    def stats(self) -> dict[str, Any]:
        """Of the model."""
        return self.attachment.stats()[0]

    def moved_bytes(self) -> int:
        return self.stats()["filled"]

    def told(self) -> str:
        """What is where, in short."""
        stats = self.stats()
        return f"resident {stats['resident'] / 1e9:.2f} of {stats['bytes'] / 1e9:.2f} GB"


class Activation:
    """A forward hook of the block in the middle: memory of this size is needed for a moment. Its output is unchanged."""

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner = runner
        self._device = device
        self.nbytes = 0
        self.action: Callable[[], None] | None = None
        self.calls = 0
        self.again = 0

    def reset(self) -> None:
        """Before a cell."""
        self.nbytes = self.calls = self.again = 0

    def __call__(self, module: object, args: object, output: torch.Tensor) -> torch.Tensor | None:
        self.calls += 1
        if self.action is not None:
            action, self.action = self.action, None
            action()
        if not self.nbytes:
            return None
        if self._device.type == "cpu":
            assert isinstance(self._runner, Ours)
            # The host's memory is the engine's to give only in name: what torch's allocator does on a GPU by itself.
            self._runner.engine.make_room(self.nbytes)
            with self._runner.engine.ballast(self.nbytes):
                return output * 1
        # One everywhere, so that the result is what it would be without.
        ones = torch.full((self.nbytes,), 1, dtype=torch.uint8, device=self._device)
        return output * ones[-1].to(output.dtype)


class OtherThread(Others):
    """In place of another process, for the host device, which is this process's own."""

    def __init__(self, engine: forebay.Engine, piece: int) -> None:
        self._engine = engine
        self._piece = piece
        self._held: list[Any] = []
        self._seconds = 0.0
        self._thread: threading.Thread | None = None

    def take(self, nbytes: int) -> None:
        self._thread = threading.Thread(target=self._take, args=[nbytes], daemon=True)
        self._thread.start()

    def _take(self, nbytes: int) -> None:
        start = time.monotonic()
        while self._sum() < nbytes and time.monotonic() - start < 30:
            try:
                self._held.append(self._engine.ballast(self._piece))
            except forebay.ForebayError:
                time.sleep(0.001)
        self._seconds = time.monotonic() - start

    def _sum(self) -> int:
        return sum(ballast.nbytes for ballast in self._held)

    def wait_until_taken(self) -> tuple[int, float]:
        assert self._thread is not None
        self._thread.join()
        return self._sum(), self._seconds

    def give_later(self) -> None:
        self.give()

    def give(self) -> None:
        if self._thread is not None:
            self._thread.join()
        while self._held:
            self._held.pop().close()


@contextlib.contextmanager
def watched(seconds: float, report: Report) -> Iterator[None]:
    """Ends the process when what is inside takes too long, also where it holds the interpreter."""

    def end() -> None:
        report({"reason": f"no end after {seconds:.0f} s"})
        faulthandler.dump_traceback()
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def ballast(card: int) -> None:
    """Leaves a card of the GPU, and the rest to nobody, until the process ends."""
    free, _ = torch.cuda.mem_get_info()
    if free < card:
        raise RuntimeError(
            f"a card of {card / GIB:.1f} GiB does not fit into the {free / GIB:.1f} GiB that are free"
        )
    address = ctypes.c_uint64()
    size = ctypes.c_size_t(free - card)
    code = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(address), size)
    if code != 0:
        raise RuntimeError(f"cuMemAlloc of {size.value} bytes: error {code}")


def warm_up(chosen: argparse.Namespace) -> None:
    """Loads the kernels, which is no system's work, and gives the memory back."""
    device = torch_device(chosen)
    with torch.device(device):
        block = Block(chosen.width, 40).to(torch.bfloat16)
    y = block(inputs(chosen, False))
    (y * torch.full((1,), 1, dtype=torch.uint8, device=device)[-1].to(y.dtype)).equal(y)
    del block, y
    if chosen.device != "host":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def blocks_of(chosen: argparse.Namespace, times: float) -> int:
    """Blocks of so many cards."""
    return max(2, round(times * chosen.card * GIB / block_bytes(chosen)))


def video_blocks(chosen: argparse.Namespace) -> int:
    return round(VIDEO_WEIGHTS * chosen.video_card * GIB / block_bytes(chosen))


def block_bytes(chosen: argparse.Namespace) -> int:
    return 2 * 12 * chosen.width**2


def inputs(chosen: argparse.Namespace, video: bool) -> torch.Tensor:
    shape = (1, chosen.tokens, chosen.width)
    if video:
        full = chosen.width == 5120
        shape = (VIDEO_FRAMES if full else 3, VIDEO_TOKENS if full else 16, chosen.width)
    device = torch_device(chosen)
    generator = torch.Generator(device).manual_seed(chosen.tokens)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def torch_device(chosen: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if chosen.device == "host" else chosen.device)


def reference_file(chosen: argparse.Namespace, name: str) -> Path:
    return chosen.file.with_suffix(f".{name}.pt")


def timed(chosen: argparse.Namespace, action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds from an idle device to an idle device, and the result."""
    wait = torch.cuda.synchronize if chosen.device != "host" else lambda: None
    wait()
    start = time.perf_counter()
    result = action()
    wait()
    return time.perf_counter() - start, result

"""The systems of ``peers.py``, each set up as its documentation recommends for speed, and how one is measured."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stack
import torch
from children import Row, reason_of
from safetensors.torch import load_file
from stack import GIB, Block
from tensor_file import data_offsets
from torch import nn

import forebay


class Layers(nn.Module):
    """The stack as models are written: a list of blocks under a name, which offloading systems look for."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, 40) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Runner:
    """One system around a model that is mapped on the CPU.

    Constructing it is what has to be done once a process (pinning). ``attach`` and ``detach`` enclose each number of
    tokens, so that a system that keeps weights on the device begins with none there.
    """

    imports: tuple[str, ...] = ()
    """Modules that are imported before anything is timed."""
    stateless = False
    """Keeps and learns nothing and is slow: at further numbers of tokens one step is both its first and a later one."""

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        self.model = model
        self.room = int(chosen.room * GIB)

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def moved_bytes(self) -> int:
        """Moved to the device since it was attached, where the system counts."""
        return 0

    def pinned_bytes(self) -> int:
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


class Plain(Runner):
    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        super().__init__(model.to(chosen.device), chosen, free)

    def pinned_bytes(self) -> int:
        return 0  # what timed the link is not part of it


class Forebay(Runner):
    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        super().__init__(model, chosen, free)
        self.device = chosen.device

    def attach(self) -> None:
        self.attachment = forebay.attach(self.model, self.device, headroom=self.room)

    def detach(self) -> None:
        self.attachment.detach()
        # The engine would keep its frames for the next model, beside what the next ballast leaves free.
        forebay.make_room(torch.cuda.mem_get_info()[1], self.device)

    def moved_bytes(self) -> int:
        return self.attachment.stats()[0]["filled"]

    def pinned_bytes(self) -> int:
        return forebay.stats(self.device)["pinned_host"]


class To(Runner):
    """Each layer's weights go to the device before it runs and are dropped after: they are read-only."""

    stateless = True

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        super().__init__(model, chosen, free)
        for module in model.modules():
            own = dict(module._parameters)
            if own:
                module.register_forward_pre_hook(functools.partial(self._bring, own, chosen.device))
                module.register_forward_hook(functools.partial(self._drop, own))

    @staticmethod
    def _bring(own: dict[str, Any], device: str, module: nn.Module, inputs: object) -> None:
        for name, weight in own.items():
            module._parameters[name] = nn.Parameter(weight.to(device), requires_grad=False)

    @staticmethod
    def _drop(own: dict[str, Any], module: nn.Module, inputs: object, output: object) -> None:
        module._parameters.update(own)


class Accelerate(Runner):
    imports = ("accelerate",)
    stateless = True

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        from accelerate import cpu_offload

        super().__init__(cpu_offload(model, execution_device=torch.device(chosen.device)), chosen, free)


class Diffusers(Runner):
    """Blocks, prefetched on a stream from memory that is pinned beforehand: the fastest of the documented choices."""

    imports = ("diffusers.hooks",)

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        from diffusers.hooks import apply_group_offloading

        super().__init__(model, chosen, free)
        apply_group_offloading(
            model,
            onload_device=torch.device(chosen.device),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            non_blocking=True,
            use_stream=True,
            record_stream=True,
            low_cpu_mem_usage=False,
        )


class Mmgp(Runner):
    """Everything pinned, asynchronous transfers, and the whole of the free memory as its budget."""

    imports = ("mmgp.offload",)

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        from mmgp import offload

        super().__init__(model, chosen, free)
        self.manager = offload.all(
            {"transformer": model},
            pinnedMemory=True,
            quantizeTransformer=False,
            budgets={"transformer": (free - self.room) >> 20},
            asyncTransfers=True,
        )
        torch.set_default_device(None)


class Aimdo(Runner):
    """The fault, copy, unpin loop over one allocation a layer, one block ahead on a stream of its own.

    A weight that is refused a place goes into an ordinary buffer for this use.
    """

    imports = ("comfy_aimdo.model_vbar", "comfy_aimdo.torch", "comfy_aimdo.host_buffer")
    pinned = False

    def __init__(self, model: Layers, chosen: argparse.Namespace, free: int) -> None:
        super().__init__(model, chosen, free)
        self.index = torch.cuda.current_device()
        self.device = torch.device(chosen.device)
        self.file = chosen.file.open("rb", buffering=0)
        self.stream = torch.cuda.Stream(self.device)
        offsets = data_offsets(chosen.file)
        in_file = 1 + max(int(name.split(".", 1)[0]) for name in offsets)
        self.layers = [
            [
                AimdoLayer(module, f"{i % in_file}.{name}", offsets)
                for name, module in block.named_modules()
                if module._parameters
            ]
            for i, block in enumerate(model.blocks)
        ]
        self.host = pinned_file(chosen.file) if self.pinned else None

    def attach(self) -> None:
        from comfy_aimdo.model_vbar import ModelVBAR

        layers = [layer for block in self.layers for layer in block]
        self.vbar = ModelVBAR(2 * sum(layer.nbytes for layer in layers), self.index)  # addresses cost nothing
        for layer in layers:
            layer.place, layer.signature, layer.kept = self.vbar.alloc(layer.nbytes), None, None
        self.vbar.prioritize()

    def detach(self) -> None:
        for block in self.layers:
            for layer in block:
                layer.drop()
                layer.kept = None
        self.vbar.close()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from comfy_aimdo.model_vbar import vbar_unpin, vbars_reset_watermark_limits

        ready = self._stage(0)
        for i, block in enumerate(self.model.blocks):
            torch.cuda.current_stream().wait_event(ready)
            x = block(x)
            for layer in self.layers[i]:
                layer.drop()
                if layer.pinned:
                    vbar_unpin(layer.place)
            if i + 1 < len(self.layers):
                ready = self._stage(i + 1)
        torch.cuda.synchronize()
        vbars_reset_watermark_limits()
        return x

    def _stage(self, index: int) -> torch.cuda.Event:
        """Block ``index``'s weights onto the device; an event behind the last copy."""
        from comfy_aimdo.model_vbar import vbar_fault, vbar_signature_compare
        from comfy_aimdo.torch import aimdo_to_tensor

        consumer = torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            for layer in self.layers[index]:
                signature = vbar_fault(layer.place)
                layer.pinned = signature is not None
                if signature is None:
                    data = torch.empty(layer.nbytes, dtype=torch.uint8, device=self.device)
                    data.record_stream(consumer)
                    self._fill(data, layer)
                else:
                    if layer.kept is None:
                        layer.kept = aimdo_to_tensor(layer.place, self.device)[: layer.nbytes]
                    data = layer.kept
                    if not vbar_signature_compare(signature, layer.signature):
                        self._fill(data, layer)
                layer.signature = signature
                layer.bring(data)
            return self.stream.record_event()

    def _fill(self, data: torch.Tensor, layer: AimdoLayer) -> None:
        if self.host is not None:
            data.copy_(self.host[layer.offset : layer.offset + layer.nbytes], non_blocking=True)
            return
        from comfy_aimdo.host_buffer import read_file_to_device

        stream, index = self.stream.cuda_stream, self.index
        read_file_to_device(
            self.file.fileno(), layer.offset, layer.nbytes, stream, data.data_ptr(), index, mark_cold=False
        )

    def pinned_bytes(self) -> int:
        return self.host.nbytes if self.host is not None else 0


class AimdoPinned(Aimdo):
    pinned = True


class AimdoLayer:
    """A layer's weights, which follow one another in the file."""

    def __init__(self, module: nn.Module, name: str, offsets: dict[str, tuple[int, int]]) -> None:
        self.module = module
        self.own = dict(module._parameters)
        places = {key: offsets[f"{name}.{key}"] for key in self.own}
        self.offset = min(begin for begin, _ in places.values())
        self.nbytes = max(end for _, end in places.values()) - self.offset
        if self.nbytes != sum(end - begin for begin, end in places.values()):
            raise ValueError(f"the weights of {name} do not lie together")
        self.within = {key: begin - self.offset for key, (begin, _) in places.items()}
        self.place: Any = None
        self.signature: Any = None
        self.kept: torch.Tensor | None = None
        self.pinned = False

    def bring(self, data: torch.Tensor) -> None:
        for name, weight in self.own.items():
            part = (
                data[self.within[name] : self.within[name] + weight.nbytes]
                .view(weight.dtype)
                .view(weight.shape)
            )
            self.module._parameters[name] = nn.Parameter(part, requires_grad=False)

    def drop(self) -> None:
        self.module._parameters.update(self.own)


RUNNERS: dict[str, type[Runner]] = {
    "plain": Plain,
    "forebay": Forebay,
    "to": To,
    "accelerate": Accelerate,
    "diffusers": Diffusers,
    "mmgp": Mmgp,
    "aimdo": Aimdo,
    "aimdo-pinned": AimdoPinned,
}


def measure(chosen: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Reports a row for each amount of free memory and number of tokens."""
    torch.cuda.set_device(chosen.device)
    kind, plain = RUNNERS[chosen.child], chosen.child == "plain"
    if issubclass(kind, Aimdo):
        from comfy_aimdo import control

        if not control.init_devices([torch.cuda.current_device()]):
            raise RuntimeError("comfy_aimdo.control.init_devices() returned False")
    for name in kind.imports:
        importlib.import_module(name)
    with torch.no_grad():
        if plain:
            report({"machine": machine(chosen)})
        warm_up(chosen)
        runner: Runner | None = None
        for free in [None] if plain else chosen.free:
            available = torch.cuda.mem_get_info()[0]
            ballast = torch.empty(
                0 if free is None else max(0, available - int(free * GIB)), dtype=torch.uint8, device="cuda"
            )
            left = torch.cuda.mem_get_info()[0]
            if runner is None:
                model = load(chosen)
                prepare, runner = timed(lambda model=model, left=left: kind(model, chosen, left))
            for number, tokens in enumerate(chosen.tokens):
                row: Row = {"free_gib": free, "tokens": tokens, "prepare_s": prepare}
                try:
                    row |= point(chosen, runner, tokens, left, once=runner.stateless and number > 0)
                    row["setup_s"] = prepare + row["attach_s"]
                    row["first_s"] += row["setup_s"]
                except torch.OutOfMemoryError as error:
                    row |= {"same": False, "reason": reason_of(error)}
                report(row)
            del ballast
            gc.collect()
            torch.cuda.empty_cache()


def largest_difference(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the elements, over the largest of those that are expected. Not on the device, where it would take weights' memory."""
    y = y.cpu()
    if torch.equal(y, expected):
        return 0.0
    difference = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(difference.nan_to_num(nan=torch.inf))


def point(chosen: argparse.Namespace, runner: Runner, tokens: int, left: int, once: bool) -> Row:
    """One number of tokens: a first step, then later ones; none of these ``once`` any step is like another."""
    x = stack.inputs(tokens, chosen.width)
    attach, _ = timed(runner.attach)
    try:
        first, y = timed(lambda: runner(x))
        reference = chosen.file.with_suffix(f".{tokens}.pt")
        if chosen.child == "plain":
            torch.save(y.cpu(), reference)
        expected = torch.load(reference, mmap=True)
        difference = largest_difference(y, expected)
        if not once:
            time.sleep(chosen.pause)
        seconds, moved = [], [runner.moved_bytes()]
        while not once and (not seconds or (len(seconds) < chosen.steps and sum(seconds) < chosen.seconds)):
            took, y = timed(lambda: runner(x))
            seconds.append(took)
            moved.append(runner.moved_bytes())
            difference = max(difference, largest_difference(y, expected))
        return {
            "same": difference == 0,
            "difference": difference,
            "attach_s": attach,
            "first_s": first,
            "steps_s": seconds,
            # Systems that learn or prepare while they run are given half of the steps for it.
            "later_s": statistics.median(seconds[len(seconds) // 2 :] or [first]),
            "moved_bytes": moved[-1] - moved[-2] if seconds else 0,
            "pinned_bytes": runner.pinned_bytes(),
            "vram_bytes": left - torch.cuda.mem_get_info()[0],
        }
    finally:
        torch.cuda.synchronize()
        runner.detach()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds from an idle device to an idle device, and the result."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def load(chosen: argparse.Namespace) -> Layers:
    """The model mapped on the CPU: by Forebay's loader for Forebay, by safetensors' for the others."""
    with torch.device("meta"):
        model = Layers(chosen.blocks, chosen.width).to(torch.bfloat16)
    state = forebay.load(chosen.file) if chosen.child.startswith("forebay") else load_file(chosen.file)
    model.blocks.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def warm_up(chosen: argparse.Namespace) -> None:
    """Loads the kernels, which is no system's work, and gives the memory back."""
    with torch.device(chosen.device):
        block = Block(chosen.width, 40).to(torch.bfloat16)
    for tokens in chosen.tokens:
        block(stack.inputs(tokens, chosen.width))
    del block
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def machine(chosen: argparse.Namespace) -> Row:
    """Writes the weights if they are not there, and tells where this runs."""
    return {
        "weights_bytes": stack.write_weights(chosen.file, chosen.blocks, chosen.width),
        "link_bytes_s": stack.link_rate(),
        **stack.machine(),
    }


def pinned_file(path: Path) -> torch.Tensor:
    """A file in pinned memory of exactly its size, which torch's own pinned allocator would round up."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    with path.open("rb", buffering=0) as file:
        while done < len(view):
            done += file.readinto(view[done : done + GIB])
    code = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of {data.nbytes} bytes: {code}")
    return data

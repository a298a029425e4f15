"""Device buffers, host buffers, mapped files, and what moves between them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import time
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import save_file
from support import MIB

from forebay.comfyui.aimdo import devices, host_buffer, model_vbar
from forebay.comfyui.aimdo.copies import Copies
from forebay.comfyui.aimdo.host_buffer import HostBuffer, read_file_to_device
from forebay.comfyui.aimdo.model_mmap import ModelMMAP
from forebay.comfyui.aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_unpin
from forebay.comfyui.aimdo.torch import (
    aimdo_to_tensor,
    get_tensor_from_raw_ptr,
    get_torch_allocator,
    hostbuf_to_tensor,
)
from forebay.comfyui.aimdo.vram_buffer import VRAMBuffer

PAGE = 32 * MIB


@pytest.fixture
def file(tmp_path: Path):
    """A file of random bytes, longer than several readers' chunks, and its contents."""
    contents = torch.randint(0, 256, (11 * MIB + 12345,), dtype=torch.uint8)
    path = tmp_path / "weights"
    path.write_bytes(contents.numpy().tobytes())
    with path.open("r+b") as opened:
        yield opened, contents


def stream() -> int:
    return 0 if support.DEVICE == "host" else torch.cuda.Stream(support.TORCH_DEVICE).cuda_stream


def synchronize() -> None:
    if support.DEVICE != "host":
        torch.cuda.synchronize()


def test_device_buffers_grow_on_demand(comfy) -> None:
    made = comfy(128)
    buffer = VRAMBuffer(16 << 30, made.id)
    assert buffer.size() == 0
    owner, address, size = buffer.get(3 * MIB)
    assert owner is buffer and size == 3 * MIB and buffer.size() == PAGE
    tensor = aimdo_to_tensor((owner, address, size), made.device)
    tensor.fill_(7)
    second = buffer.get(40 * MIB, offset=size)
    assert second[1] == address + size and buffer.size() == 2 * PAGE
    assert buffer.get(1)[1] == address
    assert (tensor == 7).all()
    aimdo_to_tensor(second, made.device).fill_(8)
    assert (tensor == 7).all()
    with pytest.raises(RuntimeError, match="out of memory"):
        buffer.get(5 * PAGE)
    with pytest.raises(RuntimeError, match="has no"):
        buffer.get(1, offset=16 << 30)
    for wrong in (-1, 1 << 63):
        with pytest.raises(ValueError):
            buffer.get(wrong)
        with pytest.raises(ValueError):
            buffer.get(1, wrong)
        with pytest.raises(ValueError):
            VRAMBuffer(wrong, made.id)
    with pytest.raises(ValueError):
        VRAMBuffer(0, made.id)
    with pytest.raises(RuntimeError, match="no such device"):
        VRAMBuffer(PAGE, 99)
    del tensor, owner, second
    assert buffer.size() == 2 * PAGE


def test_device_buffers_take_from_models_and_give_back(comfy) -> None:
    made = comfy(128)
    vbar = ModelVBAR(4 * PAGE, made.id)
    vbar.prioritize()
    whole = (vbar, vbar.base_addr, 4 * PAGE)
    assert vbar_fault(whole)
    vbar_unpin(whole)
    buffer = VRAMBuffer(1 << 30, made.id)
    place = buffer.get(2 * PAGE)
    tensor = aimdo_to_tensor(place, made.device)
    assert vbar.get_residency() == [1, 1, 0, 0]
    assert vbar_fault((vbar, vbar.base_addr + 2 * PAGE, 1)) is None
    vbar.set_watermark_limit(4 * PAGE)
    buffer.get(2 * PAGE, 2 * PAGE)
    assert vbar.get_residency() == [0, 0, 0, 0]
    del buffer, place
    tensor.fill_(3)
    assert (tensor == 3).all()
    del tensor
    gc.collect()
    vbar.prioritize()
    assert vbar_fault(whole)


def test_host_buffers_grow_at_one_address(comfy) -> None:
    comfy(64)
    buffer = HostBuffer(0, 8 * MIB, 1 << 30)
    assert buffer.size == 0
    address = buffer.get_raw_address()
    parts = []
    for number in range(40):
        assert buffer.extend(5 * MIB // 2 + number, register=number % 3 == 0) == address
        whole = hostbuf_to_tensor(buffer)
        assert whole.numel() == buffer.size and whole.data_ptr() == address and whole.device.type == "cpu"
        part = whole[-(5 * MIB // 2 + number) :]
        part.fill_(number)
        parts.append(part)
    for number, part in enumerate(parts):
        assert (part == number).all()
    sizes = [part.numel() for part in parts]
    for number in range(39, 20, -1):
        buffer.truncate(sum(sizes[:number]), do_unregister=number % 2 == 0)
    assert buffer.size == sum(sizes[:21])
    for number, part in enumerate(parts[:21]):
        assert (part == number).all()
    del parts, part, whole
    assert buffer.extend(size=100, register=False) == address
    assert buffer.size == sum(sizes[:21]) + 100


def test_memory_of_host_buffers_lives_as_long_as_its_tensors(comfy) -> None:
    comfy(64)
    buffer = HostBuffer(MIB)
    tensor = hostbuf_to_tensor(buffer)
    tensor.fill_(9)
    del buffer
    gc.collect()
    assert (tensor == 9).all()


def test_a_host_buffer_that_may_move_takes_its_contents_along(comfy) -> None:
    comfy(64)
    buffer = HostBuffer(0, 0, 4 * MIB)
    buffer.extend(4 * MIB)
    old = hostbuf_to_tensor(buffer)
    old.copy_(torch.randint(0, 256, old.shape, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="grows up to"):
        buffer.extend(MIB)
    assert buffer.extend(MIB, reallocate=True) == buffer.get_raw_address() != old.data_ptr()
    assert torch.equal(hostbuf_to_tensor(buffer)[: 4 * MIB], old)


def test_registering_parts(comfy) -> None:
    comfy(64)
    buffer = HostBuffer(0)
    buffer.extend(10 * MIB, register=False)
    buffer.register(0, MIB)
    buffer.register(4 * MIB, MIB)
    if support.DEVICE != "host":  # a device that reads any memory needs no registration
        with pytest.raises(ValueError, match="registered"):
            buffer.register(4 * MIB + 1, 1)
    with pytest.raises(ValueError):
        buffer.register(10 * MIB, 1)
    with pytest.raises(ValueError):
        buffer.register(0, 0)
    buffer.unregister(0)
    buffer.register(0, 2 * MIB)
    with pytest.raises(ValueError, match="nothing is registered"):
        buffer.unregister(3)
    buffer.truncate(0)
    assert buffer.size == 0


def test_host_buffers_that_make_no_sense(fresh: None) -> None:
    for wrong in ((-1,), (0, -1), (0, 0, -1), (1 << 63,)):
        with pytest.raises(ValueError):
            HostBuffer(*wrong)
    with pytest.raises(RuntimeError):
        HostBuffer(1 << 60)
    buffer = HostBuffer(0, 0, MIB)
    with pytest.raises(ValueError):
        buffer.extend(-1)
    with pytest.raises(RuntimeError):
        buffer.extend(1 << 62)
    with pytest.raises(ValueError):
        buffer.truncate(1)
    assert buffer.size == 0 and hostbuf_to_tensor(buffer).numel() == 0


def test_host_buffers_together_grow_no_further_than_their_limit(
    comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfy(64)
    monkeypatch.setenv(host_buffer.LIMIT, str(host_buffer.total_size() / 2**30 + 3 / 1024))
    first, second = HostBuffer(2 * MIB), HostBuffer(0)
    second.extend(MIB, register=False)
    with pytest.raises(RuntimeError, match="together"):
        second.extend(MIB, register=False)
    assert second.size == MIB
    first.truncate(0)
    second.extend(2 * MIB, register=False)
    monkeypatch.setenv(host_buffer.LIMIT, "0")
    with pytest.raises(RuntimeError, match="together"):
        HostBuffer(1)
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(host_buffer.LIMIT, wrong)
        with pytest.raises(ValueError, match=f"{host_buffer.LIMIT}.*'{wrong}'"):
            second.extend(1)
    assert second.size == 3 * MIB


def test_copies_are_kept_of_what_is_read_again_within_a_node(comfy, file, copies) -> None:
    opened, contents = file
    made = comfy(64)
    made.engine.set_registered(0)
    weights, patches = HostBuffer(0, 64 * MIB, 1 << 30), HostBuffer(0, 8 * MIB, 1 << 30)
    target = torch.zeros(contents.numel(), dtype=torch.uint8, device=made.device)
    kept: set[int] = set()

    def step() -> None:  # what ComfyUI does with each of three weights that do not stay on the device
        for weight in set(range(3)) - kept:
            try:
                weights.extend(3 * MIB + 1024, register=False)
            except RuntimeError as error:
                assert "no copy of 3146752 bytes" in str(error)
                part = (opened, 3 * MIB * weight, 3 * MIB)
                read_file_to_device(*part, stream(), target.data_ptr(), made.id, mark_cold=False)
            else:
                kept.add(weight)
                weights.read_file_slice(opened, 3 * MIB * weight, 3 * MIB, weights.size - 3 * MIB - 1024)

    for _ in range(3):
        step()
        model_vbar.vbars_reset_watermark_limits()  # a node each
    assert not kept
    step()
    assert not kept
    step()
    assert len(kept) == 1, "two were read again, and another is copied for them"
    step()
    assert len(kept) == 3, "what is read into a copy counts as well"
    patches.extend(MIB, register=False)
    assert patches.size == MIB


def test_what_is_read_again_is_worth_no_copies_of_the_next_nodes_weights(comfy, file, copies) -> None:
    opened, contents = file
    made = comfy(64)
    made.engine.set_registered(0)
    weights = HostBuffer(0, 64 * MIB, 1 << 30)
    target = torch.zeros(contents.numel(), dtype=torch.uint8, device=made.device)
    for offset, ends_node in ((0, False), (0, True), (3 * MIB, True), (3 * MIB, False)):
        with pytest.raises(RuntimeError, match="no copy"):
            weights.extend(3 * MIB, register=False)
        read_file_to_device(opened, offset, 3 * MIB, stream(), target.data_ptr(), made.id)
        if ends_node:
            model_vbar.vbars_reset_watermark_limits()


def test_what_takes_another_weights_copy_has_a_file(
    comfy, file, copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = file
    comfy(64)
    weights = HostBuffer(0, 64 * MIB, 1 << 30)
    monkeypatch.setenv(host_buffer.LIMIT, "1")
    weights.extend(3 * MIB, register=False)
    monkeypatch.delenv(host_buffer.LIMIT)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            weights.extend(3 * MIB, register=False)
        weights.read_file_slice(opened, 0, 3 * MIB)  # where that of another weight is
        model_vbar.vbars_reset_watermark_limits()


def test_copies_of_patches_are_kept_from_the_second_step_on(comfy, file, copies) -> None:
    opened, contents = file
    made = comfy(64)
    patches, other = HostBuffer(0, 8 * MIB, 1 << 30), HostBuffer(0, 0, 1 << 30)
    target = torch.zeros(contents.numel(), dtype=torch.uint8, device=made.device)
    patches.extend(MIB, register=False)  # of a model that stays on the device
    for _ in range(2):
        for kept in (False, True):
            read_file_to_device(opened, 0, 3 * MIB, stream(), target.data_ptr(), made.id)
            before = patches.size
            with contextlib.nullcontext() if kept else pytest.raises(RuntimeError, match="not used again"):
                patches.extend(MIB, register=False)
            assert patches.size == before + (MIB if kept else 0)
            other.extend(MIB, register=False)
        model_vbar.vbars_reset_watermark_limits()


@pytest.mark.parametrize(
    ("step_s", "reads", "copied"),
    [
        pytest.param(0.3, 340, 0, id="the link takes the time"),
        pytest.param(0.25, 340, 340, id="ComfyUI's thread does"),
        pytest.param(10.0, 340, 0, id="the GPU does"),
        pytest.param(0.25, 60, 0, id="what it does besides does"),
    ],
)
def test_copies_are_kept_of_what_is_registered_where_that_makes_steps_shorter(
    monkeypatch: pytest.MonkeyPatch, step_s: float, reads: int, copied: int
) -> None:
    made, now = Copies(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    # Some 13 GB a step where the link is busy, 5 where it is not.
    nbytes = 13_000_000_000 // 340 if step_s == 0.3 else 5_000_000_000 // 340
    kept: set[int] = set()

    def step(is_registered: bool) -> None:
        nonlocal now
        for number in set(range(reads)) - kept:
            if made.is_needed(nbytes):
                kept.add(number)
            else:
                made.note_read((5, number), nbytes, is_registered=is_registered, registers=True)
            now += step_s / reads

    for is_registered in (False, True, True):
        step(is_registered)
        assert not kept
    for _ in range(20):
        step(True)
    assert len(kept) == copied
    made.end_node()
    kept.clear()
    step(True)
    assert not kept, "the next node's"


def test_copies_are_kept_of_weights_that_no_file_has(comfy, file, copies) -> None:
    opened, contents = file
    made = comfy(64)
    weights = HostBuffer(0, 64 * MIB, 1 << 30)
    target = torch.zeros(contents.numel(), dtype=torch.uint8, device=made.device)
    for kept in (False, True, True):
        before = weights.size
        with contextlib.nullcontext() if kept else pytest.raises(RuntimeError):
            weights.extend(2 * MIB, register=False)  # one that was copied from memory
        assert weights.size == before + (2 * MIB if kept else 0)
        with pytest.raises(RuntimeError):
            weights.extend(3 * MIB, register=False)
        read_file_to_device(opened, 0, 3 * MIB, stream(), target.data_ptr(), made.id, mark_cold=False)
        model_vbar.vbars_reset_watermark_limits()


def test_as_many_copies_are_kept_as_the_user_says(comfy, copies, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy(64)
    monkeypatch.setenv(host_buffer.LIMIT, "1")
    weights = HostBuffer(0, 64 * MIB, 1 << 30)
    weights.extend(3 * MIB, register=False)
    assert weights.size == 3 * MIB


def test_no_copies_are_kept_where_there_is_no_memory_to_register_more() -> None:
    made = Copies()
    for _ in range(5):
        for number in range(3):
            assert not made.is_needed(MIB)
            made.note_read((5, number), MIB, registers=True)


@pytest.mark.parametrize("size", [1, 4096, 3 * MIB + 1, None])
def test_files_into_host_buffers(comfy, file, size: int | None) -> None:
    opened, contents = file
    size = contents.numel() - 100 if size is None else size
    for initialised in (False, True):
        if initialised:
            comfy(64)
        buffer = HostBuffer(0, 0, 64 * MIB)
        buffer.extend(size + 1024, register=False)
        buffer.read_file_slice(opened, 100, size, offset=1024)
        assert torch.equal(hostbuf_to_tensor(buffer)[1024:], contents[100 : 100 + size])


@pytest.mark.parametrize("register", [False, True])
def test_files_into_host_buffers_and_to_the_device(comfy, file, register: bool) -> None:
    opened, contents = file
    made = comfy(64)
    for _ in range(3):
        buffer = HostBuffer(0, 0, 64 * MIB)
        buffer.extend(12 * MIB, register=register)
        target = torch.zeros(contents.numel(), dtype=torch.uint8, device=made.device)
        synchronize()
        arguments = {"stream": stream(), "device_ptr": target.data_ptr(), "device": made.id}
        buffer.read_file_slice(opened.fileno(), 0, contents.numel(), **arguments)
        assert torch.equal(hostbuf_to_tensor(buffer)[: contents.numel()], contents)
        buffer.truncate(0)
        buffer.extend(12 * MIB, register=register)
        hostbuf_to_tensor(buffer).fill_(0)  # behind the copy
        del buffer
        synchronize()
        assert torch.equal(target.cpu(), contents)


def test_tensors_of_files_are_read_ahead(comfy, tmp_path: Path) -> None:
    made = comfy(64)
    sizes = [3 * MIB, 0, 100, 5 * MIB + 3, MIB, 7]
    tensors = {str(n): torch.randint(0, 256, (size,), dtype=torch.uint8) for n, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "weights.safetensors")
    with (tmp_path / "weights.safetensors").open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        places = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name in tensors
        }
        for _ in range(3):
            for name, tensor in tensors.items():
                target = torch.zeros(tensor.numel() or 1, dtype=torch.uint8, device=made.device)
                synchronize()
                read_file_to_device(
                    opened, places[name], tensor.numel(), stream(), target.data_ptr(), made.id
                )
                synchronize()
                assert torch.equal(target.cpu()[: tensor.numel()], tensor)
            host_buffer.cleanup_file_reader()


def test_files_to_the_device(comfy, file) -> None:
    opened, contents = file
    made = comfy(64)
    vbar = ModelVBAR(PAGE, made.id)
    place = vbar.alloc(contents.numel())
    assert vbar_fault(place)
    used = stream()
    read_file_to_device(opened, 5, contents.numel() - 5, used, place[1], made.id, mark_cold=False)
    read_file_to_device(opened.fileno(), 0, 5, used, place[1] + contents.numel() - 5, made.id)
    read_file_to_device(opened, 0, 0, used, place[1], made.id)
    synchronize()
    tensor = aimdo_to_tensor(place, made.device).cpu()
    assert torch.equal(tensor[:-5], contents[5:]) and torch.equal(tensor[-5:], contents[:5])


@pytest.mark.skipif(support.DEVICE == "host", reason="the host registers nothing by itself")
def test_what_is_read_again_the_device_reads_by_itself_until_nobody_has_the_file(comfy, file) -> None:
    opened, contents = file
    made = comfy(64)
    mapping = ModelMMAP(opened.name)
    size = contents.numel()

    def registered() -> int:
        return int(made.engine.stats()["registered"])

    deadline = time.monotonic() + 20
    while registered() < size:
        target = torch.zeros(size, dtype=torch.uint8, device=made.device)
        read_file_to_device(mapping.get_file_handle(), 0, size, stream(), target.data_ptr(), made.id)
        synchronize()
        assert torch.equal(target.cpu(), contents)
        assert time.monotonic() < deadline, made.engine.stats()
    del mapping
    while registered():
        assert time.monotonic() < deadline, made.engine.stats()
        time.sleep(0.01)


def test_the_device_and_the_host_to_files(comfy, file) -> None:
    opened, contents = file
    made = comfy(64)
    changed = torch.randint(0, 256, (8 * MIB + 3,), dtype=torch.uint8)
    on_device = changed.to(made.device)
    used = 0 if support.DEVICE == "host" else torch.cuda.current_stream().cuda_stream
    host_buffer.write_device_to_file(opened, 77, changed.numel(), used, on_device.data_ptr(), made.id)
    host_buffer.write_host_to_file(opened.fileno(), 3, 10, changed.data_ptr())
    host_buffer.cleanup_file_reader()
    expected = contents.clone()
    expected[77 : 77 + changed.numel()] = changed
    expected[3:13] = changed[:10]
    written = torch.frombuffer(bytearray(Path(opened.name).read_bytes()), dtype=torch.uint8)
    assert torch.equal(written, expected)


def test_files_that_make_no_sense(comfy, file, tmp_path: Path) -> None:
    opened, contents = file
    made = comfy(64)
    size = contents.numel()
    memory = torch.zeros(size + 1, dtype=torch.uint8, device=made.device)
    target = memory.data_ptr()
    buffer = HostBuffer(size)
    closed = 1 << 30  # the number of a file that was closed could be another thread's by now
    with pytest.raises(OSError):
        read_file_to_device(closed, 0, 1, 0, target, made.id)
    with pytest.raises(OSError):
        buffer.read_file_slice(closed, 0, 1)
    for call in (
        lambda file, offset, size: read_file_to_device(file, offset, size, 0, target, made.id),
        lambda file, offset, size: buffer.read_file_slice(file, offset, size),
        lambda file, offset, size: host_buffer.write_host_to_file(file, offset, size, target),
        lambda file, offset, size: host_buffer.write_device_to_file(file, offset, size, 0, target, made.id),
    ):
        for wrong in ((-1, 0, 1), (opened, -1, 1), (opened, 0, -1), (opened, 1 << 63, 1), (True, 0, 1)):
            with pytest.raises(ValueError):
                call(*wrong)
        with pytest.raises(TypeError):
            call("file", 0, 1)
        with pytest.raises(RuntimeError, match="regular"):
            read, write = os.pipe()
            try:
                call(read, 0, 1)
            finally:
                os.close(read)
                os.close(write)
    with pytest.raises(RuntimeError, match=r"ends|shorter|truncated"):
        read_file_to_device(opened, 1, size, 0, target, made.id)
    with pytest.raises(RuntimeError, match=r"ends|shorter|truncated"):
        buffer.read_file_slice(opened, 1, size)
    with pytest.raises(ValueError, match="has no"):
        buffer.read_file_slice(opened, 0, size, offset=1)
    for call in (read_file_to_device, host_buffer.write_device_to_file):
        with pytest.raises(ValueError, match="address"):
            call(opened, 0, 1, 0, 0, made.id)
        with pytest.raises(RuntimeError, match="no such device"):
            call(opened, 0, 1, 0, target, 99)
    with pytest.raises(RuntimeError, match="no such device"):
        buffer.read_file_slice(opened, 0, 1, device_ptr=target, device=99)
    with pytest.raises(ValueError, match="address"):
        host_buffer.write_host_to_file(opened, 0, 1, 0)
    with (tmp_path / "weights").open("rb") as read_only, pytest.raises(RuntimeError, match="write"):
        host_buffer.write_host_to_file(read_only, 0, 1, contents.data_ptr())


def test_a_file_that_nobody_has_any_more_is_forgotten(
    file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[object] = []
    monkeypatch.setattr(devices, "forget_file", forgotten.append)
    opened, _ = file
    (tmp_path / "other").write_bytes(b"other")
    mapping, other = ModelMMAP(opened.name), ModelMMAP(tmp_path / "other")
    stat = os.stat(opened.name)
    assert not forgotten
    del mapping
    gc.collect()
    assert forgotten == [(stat.st_dev, stat.st_ino)] and other.get()


def test_mapped_files(file, tmp_path: Path) -> None:
    opened, contents = file
    path = Path(opened.name)
    for name in (str(path), os.fsencode(path), path):
        mapping = ModelMMAP(name)
        mapped = torch.frombuffer(
            (ctypes.c_uint8 * contents.numel()).from_address(mapping.get()), dtype=torch.uint8
        )
        assert torch.equal(mapped, contents)
        assert os.pread(mapping.get_file_handle(), 10, 5) == contents[5:15].numpy().tobytes()
        assert {mapping: 1}[mapping] == 1
        mapping.bounce()
        assert torch.equal(mapped, contents)
    with pytest.raises(FileNotFoundError):
        ModelMMAP(tmp_path / "none")
    with pytest.raises(RuntimeError, match="directory"):
        ModelMMAP(tmp_path)
    (tmp_path / "empty").touch()
    assert ModelMMAP(tmp_path / "empty").get() != 0


def test_bounce_gives_the_pages_back(file) -> None:
    opened, contents = file

    def resident(address: int) -> int:
        text = Path("/proc/self/smaps").read_text()
        _, found, rest = text.partition(f"\n{address:x}-")
        assert found
        return int(rest.partition("Rss:")[2].split()[0])

    mapping = ModelMMAP(opened.name)
    mapped = torch.frombuffer(
        (ctypes.c_uint8 * contents.numel()).from_address(mapping.get()), dtype=torch.uint8
    )
    assert mapped.sum() > 0 and resident(mapping.get()) > 8 << 10
    mapping.bounce()
    assert resident(mapping.get()) == 0


def test_tensors_over_raw_memory(comfy) -> None:
    made = comfy(64)
    source = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    for tensor, device in (
        (source, None),
        (source, "cpu"),
        (source, torch.device("cpu")),
        (source.to(made.device), made.device),
    ):
        seen = get_tensor_from_raw_ptr(tensor.data_ptr() + 10, 900, device)
        assert torch.equal(seen.cpu(), source[10:910]) and seen.device == tensor.device
    for wrong in ((0, 1), (-1, 1), (1, -1)):
        with pytest.raises(ValueError):
            get_tensor_from_raw_ptr(*wrong, None)
    assert get_torch_allocator() is None

"""Initialisation, headroom and logging, as ComfyUI calls them."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import support
import torch

from forebay.comfyui.aimdo import control, malloc_graph, storage

MODULES = [
    "control",
    "host_buffer",
    "malloc_graph",
    "model_mmap",
    "model_vbar",
    "storage",
    "torch",
    "vram_buffer",
]


@pytest.mark.parametrize("first", MODULES)
def test_any_module_can_be_imported_first_and_none_imports_torch(first: str) -> None:
    rest = [name for name in MODULES if name != first]
    code = f"import sys, forebay.comfyui.aimdo.{first}\n"
    code += "".join(f"import forebay.comfyui.aimdo.{name}\n" for name in rest)
    code += "from forebay.comfyui.aimdo import control\nassert control.lib is None\n"
    code += "assert control.init(simple_vram_headroom=1 << 30, nvml_pressure=True) and control.lib\n"
    code += "assert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_init(fresh: None) -> None:
    assert control.lib is None
    with pytest.raises(TypeError):
        control.init(a_keyword_of_tomorrow=1)
    assert control.lib is None
    assert control.init() and control.init(implementation=None)
    assert control.lib
    control.deinit()
    assert control.lib is None


def test_devices_without_init_or_without_a_gpu(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "forebay"):
        assert control.init_devices([0]) is False
        assert control.init()
        assert control.init_devices([]) is False
        assert control.init_devices([None]) is False
        assert control.init_devices([torch.cuda.device_count()]) is False
    assert len(caplog.records) == 4
    assert not control.devctxs


def test_init_devices(comfy, caplog: pytest.LogCaptureFixture) -> None:
    made = comfy(64)
    assert list(control.devctxs) == [made.id]
    assert control.get_devctx(made.id).engine is made.engine
    assert control.get_devctx(made.device).engine is made.engine
    with caplog.at_level(logging.WARNING, "forebay"):
        assert control.init_devices([made.id]) is False
    assert "initialised already" in caplog.text
    assert control.init_device(made.id)
    for unknown in (77, "cuda:77", None if len(control.devctxs) > 1 else 78):
        with pytest.raises(RuntimeError, match="no such device was initialised"):
            control.get_devctx(unknown)


def test_headroom(comfy) -> None:
    with pytest.raises(RuntimeError, match="not initialised"):
        control.get_simple_vram_headroom()
    with pytest.raises(RuntimeError, match="not initialised"):
        control.set_simple_vram_headroom(0)
    made = comfy(64)
    default = control.get_simple_vram_headroom()
    assert default > 0
    for wrong in (-1, (1 << 60) + 1):
        with pytest.raises(ValueError, match="headroom"):
            control.set_simple_vram_headroom(wrong)
        with pytest.raises(ValueError, match="headroom"):
            control.init(simple_vram_headroom=wrong)
    assert control.get_simple_vram_headroom() == default
    control.set_simple_vram_headroom(1 << 60)
    assert control.get_simple_vram_headroom() == 1 << 60
    assert made.engine.budget == 0
    control.set_simple_vram_headroom(0)
    assert made.engine.budget > 64 << 20


def test_headroom_of_one_device(fresh: None, comfy) -> None:
    assert control.init(simple_vram_headroom=1 << 59)
    made = comfy(64)
    control.deinit()
    assert control.init()
    with pytest.raises(ValueError, match="headroom"):
        control.init_devices([(made.id, -1)])
    with pytest.raises(ValueError, match="headroom"):
        control.init_device(made.id, -1)
    assert not control.devctxs
    assert control.init_devices((device, extra) for device, extra in [(made.id, 1 << 59)])
    assert made.engine.budget == 0


def test_usage_and_analysis(comfy, caplog: pytest.LogCaptureFixture) -> None:
    from forebay.comfyui.aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_unpin

    made = comfy(64)
    assert control.get_total_vram_usage() == 0
    vbar = ModelVBAR(1 << 30, made.id)
    place = vbar.alloc(1000)
    assert vbar_fault(place)
    assert control.get_total_vram_usage() == 32 * support.MIB
    vbar_unpin(place)
    with caplog.at_level(logging.INFO, "forebay"):
        control.analyze()
    assert "ComfyUI model" in caplog.text


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("critical", 50),
        ("error", 40),
        ("warning", 30),
        ("info", 20),
        ("debug", 10),
        ("verbose", 1),
        ("vverbose", 1),
    ],
)
def test_logging(name: str, level: int) -> None:
    logger = logging.getLogger("forebay")
    before = logger.level
    try:
        getattr(control, f"set_log_{name}")()
        assert logger.level == level
        control.set_log_none()
        assert not logger.isEnabledFor(logging.CRITICAL)
    finally:
        logger.setLevel(before)


@pytest.mark.usefixtures("current_device")
def test_recording_leaves_allocation_to_torch() -> None:
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    recorder = malloc_graph.record(stream, assert_graph_breaks=True)
    recorder.something_of_the_callers = 1
    recorder.push("step")
    recorder.push()
    held = torch.empty(1 << 20, device=support.TORCH_DEVICE)
    assert recorder.iterate("again") is False
    recorder.pause(sync=True)
    recorder.resume(sync=True)
    with recorder.use_stream("other"):
        assert recorder.stream == "other"
    assert recorder.stream is stream
    assert recorder.pop() is False
    assert (recorder.peak_used >= held.nbytes) == torch.cuda.is_available()
    assert recorder.virtual_bytes == recorder.physical_bytes == recorder.rogue_count == 0
    recorder.abort()
    with pytest.raises(RuntimeError, match="push"):
        recorder.pop()
    assert control.record(None).pop.__self__.rogue_count == 0


def test_disks() -> None:
    assert storage.fast_disk("/") is None

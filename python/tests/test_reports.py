"""What people and programs read: doctor, summaries, stats, page maps, pictures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from support import DEVICE, MIB, linears, move, randomize

import forebay
from forebay import picture
from forebay.examination import doctor, main

KEYS = {
    "name", "bytes", "page_size", "pages", "watermark", "resident", "streamed", "absent", "filled", "filled_pages",
    "looked_up", "waits", "wait_s", "mispredicted", "pinned", "lent",
    "direct", "past_cache", "cached", "longest_wait_s", "parked",
}  # fmt: skip


def test_doctor() -> None:
    checks = doctor()
    assert any(check.name == "torch" for check in checks)
    for check in checks:
        assert check.status in ("works", "limited", "missing")
        assert check.detail
        assert check.status == "works" or check.remedy, check


def test_doctor_on_the_command_line() -> None:
    for arguments in ([], ["--json"]):
        done = subprocess.run([sys.executable, "-m", "forebay", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
    assert {check["name"] for check in json.loads(done.stdout)} == {check.name for check in doctor()}


def test_doctor_refuses_what_it_does_not_know(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--yaml"])
    with pytest.raises(SystemExit):
        main(["--version"])
    assert forebay.__version__ in capsys.readouterr().out


def test_stats_and_summary(engine) -> None:
    model = randomize(linears(4, 768))
    with forebay.attach(model, engine(10), page_size=2 * MIB, name="a model") as attachment:
        for _ in range(2):
            model(move(torch.randn(1, 768)))
        attachment.engine.settle()
        stats = forebay.stats(attachment.engine)
        assert stats.keys() == {
            "device",
            "device_name",
            "budget",
            "held",
            "free_frames",
            "pinned_host",
            "registered",
            "operations",
            "views",
            "reserved",
            "models",
        }
        assert stats["device"] == DEVICE
        (one,) = stats["models"]
        assert one.keys() == KEYS
        assert one["bytes"] == sum(p.numel() * 4 for p in model.parameters())
        assert one["resident"] + one["streamed"] + one["absent"] == one["pages"] * one["page_size"]
        assert one["resident"] + one["streamed"] <= stats["held"] <= stats["budget"] == 10 * MIB
        assert one["filled"] > one["bytes"] and one["waits"] > 0 and one["wait_s"] > 0
        table = forebay.memory_summary(attachment.engine)
        assert table == attachment.memory_summary()
        assert "a model" in table and DEVICE in table
        (pages,) = attachment.page_map().values()
        assert len(pages) == one["pages"] and set(pages) <= set("RS.")


def test_the_engine_of_a_device() -> None:
    engine = forebay.engine(DEVICE)
    assert forebay.engine(DEVICE) is engine is forebay.engine(engine)
    assert engine.budget > 0
    assert DEVICE in repr(engine)
    assert forebay.make_room(0, DEVICE) == 0
    forebay.set_headroom(64 * MIB, DEVICE)
    assert "headroom=64 MiB" in repr(engine)
    forebay.set_budget(32 * MIB, DEVICE)
    assert engine.budget == 32 * MIB and "budget=32 MiB" in repr(engine)


def test_pictures_as_text() -> None:
    drawn = picture.text("RRS..." * 3, width=10)
    assert drawn.splitlines()[:2] == ["██▒···██▒·", "··██▒···"]
    assert "resident 6" in drawn and "streamed 3" in drawn and "absent 9" in drawn
    assert "\x1b[" in picture.text("RS.", colour=True)
    assert "resident 0" in picture.text("")


def test_pictures_as_svg() -> None:
    drawn = picture.svg([("first <pass>", "R.S"), ("first <pass>", "RRS"), ("second", "...")], title="a & b")
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("first <pass>") == 1 and "a & b" in texts
    for wrong in ([], [("a", "R"), ("b", "RR")]):
        with pytest.raises(ValueError, match="page maps have one length"):
            picture.svg(wrong, title="")
    ElementTree.fromstring(picture.svg([("none", "")], title=""))


def test_the_log_reaches_logging(engine, tmp_path, caplog) -> None:
    import os
    import time

    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "m.safetensors"
    safetensors.save_file(linears(1, 768).state_dict(), path)
    model = linears(1, 768)
    model.load_state_dict(forebay.load(path), assign=True)
    with caplog.at_level(logging.WARNING, "forebay"), forebay.attach(model, engine(8)):
        os.truncate(path, 10_000)
        with pytest.raises(forebay.SourceError):
            model[0].weight.sum()
        deadline = time.monotonic() + 10
        while "could not be filled" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "could not be filled" in caplog.text

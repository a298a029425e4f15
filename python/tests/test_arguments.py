"""Arguments that make no sense: a clear error that names the value."""

from __future__ import annotations

import math

import pytest
import torch
from support import DEVICE, MIB, linears

import forebay


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, 1 << 70, 1e300, "1GB", [], b"1"])
@pytest.mark.parametrize("name", ["budget", "headroom"])
def test_sizes_that_are_none(name, value, engine) -> None:
    message = rf"^{name} is a number of bytes between 0 and 2\*\*64: "
    with pytest.raises(ValueError, match=message) as error:
        forebay.Engine(DEVICE, **{name: value})
    assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=message):
        forebay.attach(linears(1, 8), engine(8), **{name: value})


@pytest.mark.parametrize("value", [0, 1, 2 * MIB - 1])
def test_a_budget_below_one_page(value, engine) -> None:
    with pytest.raises(ValueError, match=r"a budget holds at least one page of 2 MiB: "):
        forebay.Engine(DEVICE, budget=value)
    held = engine(8)
    with pytest.raises(ValueError, match="at least one page"):
        held.set_budget(budget=value)
    assert held.budget == 8 * MIB


def test_budget_and_headroom(engine) -> None:
    for both in (
        lambda: forebay.Engine(DEVICE, budget=MIB << 3, headroom=0),
        lambda: engine(8).set_budget(budget=MIB << 3, headroom=1),
        lambda: forebay.attach(linears(1, 8), engine(8), budget=MIB << 3, headroom=1),
    ):
        with pytest.raises(ValueError, match="budget and headroom exclude each other"):
            both()


@pytest.mark.parametrize("value", [1, 4096, MIB, 3 * MIB, 2 * MIB + 1])
def test_page_sizes(value, engine) -> None:
    module = linears(1, 8)
    with pytest.raises(ValueError, match="a page is a power of two of at least 2 MiB: "):
        forebay.attach(module, engine(8), page_size=value)
    assert type(module[0].weight) is torch.nn.Parameter


@pytest.mark.parametrize("name", ["page_size", "small"])
def test_sizes_at_attach(name, engine) -> None:
    with pytest.raises(ValueError, match=rf"{name} is a number of bytes.*nan"):
        forebay.attach(linears(1, 8), engine(8), **{name: math.nan})


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "host:1", "", "meta", "cuda:-1"])
def test_devices_that_are_none(device) -> None:
    with pytest.raises((ValueError, forebay.DeviceError)) as error:
        forebay.attach(linears(1, 8), device)
    assert str(error.value).rstrip("\"'").endswith(device)


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda", 99)])
def test_a_device_that_is_missing(device) -> None:
    module = linears(1, 8)
    with pytest.raises(forebay.DeviceError, match="cuda:99"):
        forebay.attach(module, device)
    with pytest.raises(forebay.DeviceError):
        forebay.Engine("cuda:99")
    assert type(module[0].weight) is torch.nn.Parameter


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(forebay.DeviceError, match="use device='host': cuda"):
        forebay.attach(linears(1, 8), "cuda")
    with pytest.raises(forebay.DeviceError):
        forebay.Engine("cuda:0")


def test_room_to_make(engine) -> None:
    with pytest.raises(ValueError, match=r"nbytes is a number of bytes.*nan"):
        engine(8).make_room(math.nan)
    assert engine(8).make_room(1e9) == 0


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'attache'"):
        forebay.attache  # noqa: B018
    assert set(dir(forebay)) == set(forebay.__all__)
    assert all(getattr(forebay, name) is not None for name in forebay.__all__)

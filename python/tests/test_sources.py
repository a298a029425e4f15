"""Files as sources: what is read from them, and what happens when they change under us."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from support import MIB, linears, move, press, randomize, reference, same
from torch import nn

import forebay

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of `linears(4, 768)` with random weights."""
    made = tmp_path / "model.safetensors"
    safetensors.save_file(randomize(linears(4, 768)).state_dict(), made)
    return made


def loaded(state: dict[str, torch.Tensor]) -> nn.Module:
    model = linears(4, 768).requires_grad_(False).eval()
    model.load_state_dict(state, assign=True)
    return model


def sources(model: nn.Module) -> set[str]:
    """Where each large weight comes from, without the offset."""
    managed = (p for p in model.parameters() if isinstance(p, forebay.ForebayParameter))
    return {parameter._weight.source.rpartition("@")[0] or parameter._weight.source for parameter in managed}


def test_loaded_tensors_are_read_from_the_file(path, engine) -> None:
    state = forebay.load(path)
    model = loaded(state)
    x = move(torch.randn(2, 768))
    expected = reference(loaded(safetensors.load_file(path)))(x)
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert sources(model) == {str(path)}
        for _ in range(2):
            assert same(model(x), expected)
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
            name: tensor.data_ptr() for name, tensor in state.items()
        }


def test_tensors_of_other_loaders(path, engine) -> None:
    """They are right in any case. safetensors maps the file as well."""
    x = move(torch.randn(2, 768))
    model = loaded(safetensors.load_file(path))
    expected = reference(model)(x)
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert sources(model) == {str(path)}
        assert same(model(x), expected)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    model = loaded(torch.load(path.with_suffix(".pt"), mmap=True, weights_only=True))
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert sources(model) == {str(path.with_suffix(".pt"))}
        assert same(model(x), expected)
    with torch.no_grad():
        model[0].weight.add_(1)  # in the private mapping, not in the file
    expected = reference(model)(x)
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert sources(model) == {"CPU memory", str(path.with_suffix(".pt"))}
        assert same(model(x), expected)


@pytest.mark.parametrize("loader", [forebay.load, safetensors.load_file])
def test_what_was_looked_at_before_is_not_kept_mapped(loader, path, engine) -> None:
    """Mapped pages count as in use, where the page cache is too small for all."""
    model = loaded(loader(path))
    x = torch.randn(2, 768)
    with torch.no_grad():
        expected = model(x)
    weights = 4 * 768 * 768 * 4
    assert mapped(path) > 0.9 * weights
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert mapped(path) < 0.1 * weights
    with torch.no_grad():
        assert same(model(x), expected)


def mapped(path: Path) -> int:
    """Bytes of a file that are mapped and in the process's memory."""
    areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
    of_file = (area for area in areas if str(path) in area)
    return sum(
        int(line.split()[1]) << 10
        for area in of_file
        for line in area.splitlines()
        if line.startswith("Rss:")
    )


def test_a_model_of_transformers(tmp_path, engine) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokens = move(torch.randint(0, 500, (1, 7)))
    model = transformers.BertModel.from_pretrained(tmp_path).eval()
    expected = reference(model)(tokens)[0]
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert same(model(tokens)[0], expected)
    model = transformers.BertModel(config).eval()
    model.load_state_dict(forebay.load(tmp_path), assign=True)
    with forebay.attach(model, engine(6), page_size=2 * MIB):
        assert sources(model) == {str(tmp_path / "model.safetensors")}
        assert same(model(tokens)[0], expected)


def test_a_file_that_is_cut_after_attach(path, engine) -> None:
    """The model that reads it says which file; other models go on, and so does the process."""
    held = engine(8)
    model, other = loaded(forebay.load(path)), randomize(linears(2, 512))
    x, y = move(torch.randn(2, 768)), move(torch.randn(2, 512))
    expected = reference(other)(y)
    with forebay.attach(model, held, page_size=2 * MIB), forebay.attach(other, held, page_size=2 * MIB):
        model(x)
        os.truncate(path, path.stat().st_size // 2)
        held.set_budget(budget=8 * MIB)
        press(held)
        for _ in range(3):
            with pytest.raises(forebay.SourceError, match=rf'"[0-3]\.weight".*{path.name}'):
                for _ in range(3):
                    model(x)
            for _ in range(2):
                assert same(other(y), expected)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_goes_after_attach_is_still_read(path, how, engine) -> None:
    model, x = loaded(forebay.load(path)), move(torch.randn(2, 768))
    expected = reference(model)(x)
    with forebay.attach(model, engine(6), page_size=2 * MIB) as attachment:
        assert same(model(x), expected)
        if how == "deleted":
            path.unlink()
        else:
            new = path.with_name("new")
            new.write_bytes(os.urandom(path.stat().st_size))
            new.rename(path)
        for _ in range(2):
            press(attachment.engine)
            assert same(model(x), expected)


def test_rows_of_a_file_that_is_cut(tmp_path, engine) -> None:
    path = tmp_path / "table.safetensors"
    safetensors.save_file({"0.weight": torch.randn(8000, 256), "1.weight": torch.randn(512, 512)}, path)
    model = nn.Sequential(nn.Embedding(8000, 256), nn.Linear(512, 512, bias=False))
    model.load_state_dict(forebay.load(path), assign=True)
    rows = move(torch.tensor([1, 7999]))
    with forebay.attach(model, engine(4), page_size=2 * MIB):
        model[0](rows)
        os.truncate(path, 100_000)
        with pytest.raises(forebay.SourceError, match=r"0\.weight.*table\.safetensors"):
            model[0](rows)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MALFORMED = {
    "empty": b"",
    "short": b"\x10",
    "huge-header": struct.pack("<Q", 1 << 60) + b"{}",
    "truncated-header": struct.pack("<Q", 100) + b'{"w":',
    "no-json": struct.pack("<Q", 8) + b"********",
    "truncated-data": header({"w": ENTRY}) + b"\0" * 8,
    "beyond": header({"w": {**ENTRY, "data_offsets": [16, 32]}}) + b"\0" * 16,
    "wrong-size": header({"w": {**ENTRY, "shape": [5]}}) + b"\0" * 16,
    "overflow": header({"w": {**ENTRY, "shape": [1 << 62, 1 << 62]}}) + b"\0" * 16,
    "overlap": header({"v": ENTRY, "w": ENTRY}) + b"\0" * 16,
    "unknown-dtype": header({"w": {**ENTRY, "dtype": "F31"}}) + b"\0" * 16,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_files_are_named(kind, tmp_path) -> None:
    path = tmp_path / f"{kind}.safetensors"
    path.write_bytes(MALFORMED[kind])
    with pytest.raises((forebay.SourceError, ValueError), match=kind):
        forebay.load(path)


def test_missing_files_are_named(tmp_path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path / "no", tmp_path):
        with pytest.raises(forebay.SourceError, match=str(path)):
            forebay.load(path)
    with pytest.raises(TypeError):
        forebay.load(None)


def test_every_dtype(tmp_path) -> None:
    names = (
        "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
    state = {name: torch.randint(0, 2, (3, 64)).to(torch.uint8).view(torch.bool) if name == "bool"
             else torch.randint(0, 256, (3, 64), dtype=torch.uint8).view(getattr(torch, name)) for name in names}  # fmt: skip
    state["empty"] = torch.empty(0, 3)
    state["scalar"] = torch.tensor(2.5)
    safetensors.save_file(state, tmp_path / "m.safetensors")
    assert same(forebay.load(tmp_path / "m.safetensors"), state)


def test_a_header_that_leaves_elements_unaligned(tmp_path) -> None:
    path = tmp_path / "odd.safetensors"
    values = torch.randn(4)
    text = json.dumps({"w": ENTRY}).encode()
    text += b" " * ((3 - len(text)) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
    assert same(forebay.load(path), {"w": values})


def test_shards_with_an_index(tmp_path) -> None:
    state = randomize(linears(2, 64)).state_dict()
    for number in range(2):
        part = {name: tensor for name, tensor in state.items() if name.startswith(str(number))}
        safetensors.save_file(part, tmp_path / f"part{number}.safetensors")
    index = {"weight_map": {name: f"part{name[0]}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert same(dict(forebay.load(path)), dict(state))
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(forebay.SourceError, match=r"part1\.safetensors"):
        forebay.load(tmp_path)


def test_a_file_is_loaded_to_the_device(path, engine) -> None:
    chosen = engine(64)
    expected = safetensors.load_file(path)
    loaded_to = forebay.load(path, chosen)
    assert list(loaded_to) == list(forebay.load(path))
    for name, tensor in loaded_to.items():
        assert tensor.device.type == move(torch.empty(0)).device.type
        assert not isinstance(tensor, forebay.ForebayTensor)
        assert same(tensor, move(expected[name]))
    held = chosen.stats()["held"]
    # They are the caller's: memory that others need is not taken from them, and writing is allowed.
    chosen.make_room(1 << 40)
    assert all(same(tensor, move(expected[name])) for name, tensor in loaded_to.items())
    with torch.no_grad():
        next(iter(loaded_to.values())).add_(1)
    del tensor, loaded_to
    chosen.make_room(1 << 40)
    assert chosen.stats()["held"] < held


def test_a_file_that_does_not_fit_is_not_loaded(path, engine) -> None:
    with pytest.raises(forebay.OutOfMemoryError, match=r"model\.safetensors has \d+ bytes"):
        forebay.load(path, engine(2))


def test_tensors_without_bytes_are_loaded_as_well(tmp_path, engine) -> None:
    made = tmp_path / "empty.safetensors"
    safetensors.save_file({"none": torch.empty(0, 3), "some": torch.randn(5)}, made)
    loaded_to = forebay.load(made, engine(16))
    assert loaded_to["none"].shape == (0, 3)
    assert same(loaded_to["some"], move(safetensors.load_file(made)["some"]))

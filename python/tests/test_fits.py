"""A model that fits runs on plain tensors, and gives its memory back the moment somebody needs it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, reference, same
from test_threads import together
from torch import nn

import forebay


def nothing() -> None:
    """What a probe does unless told otherwise."""


class Probed(nn.Module):
    """Two halves, and something to do between them."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.before, self.after = linears(3, width), linears(3, width)
        self.probe: Callable[[], Any] = nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        self.__dict__["seen"] = self.probe()  # also a parameter, without becoming the module's own
        return self.after(x)


@pytest.fixture
def model() -> Probed:
    return randomize(Probed())


X = torch.randn(3, 768)


def settled(attachment: forebay.Attachment, call: Callable[[], Any]) -> None:
    """Calls until the model is lent."""
    for _ in range(400):
        call()
        if attachment.stats()[0]["lent"]:
            return
    raise AssertionError(f"the model is not lent: {attachment.stats()}")


def is_plain(parameter: object) -> bool:
    return type(parameter) is nn.Parameter


def is_stand_in(parameter: object) -> bool:
    return type(parameter) is forebay.ForebayParameter


def pinned(attachment: forebay.Attachment) -> int:
    return attachment.stats()[0]["pinned"]


def check_given_back(attachment: forebay.Attachment) -> None:
    """Nothing but small weights stays when all is pressed out."""
    gc.collect()
    for _ in range(50):
        press(attachment.engine)
        stats = attachment.stats()[0]
        # After 200 ms the engine may read ahead again, which a slow machine sees here.
        if stats["resident"] + stats["streamed"] == stats["pinned"]:
            break
    assert not stats["lent"]
    assert stats["resident"] + stats["streamed"] == stats["pinned"] <= 2 * MIB, stats


def test_a_forward_sees_plain_tensors_and_everybody_else_stand_ins(model, engine) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        outside = model.after[0].weight

        def probe() -> dict[str, Any]:
            return {
                "attribute": model.after[0].weight,
                "parameters": list(model.parameters()),
                "registered": model.after[0]._parameters["weight"],
                "state": model.state_dict(),
                "bias": model.after[0].bias,
            }

        model.probe = probe
        assert same(model(x), expected)
        seen = model.seen
        assert is_plain(seen["attribute"]) and seen["attribute"].device == TORCH_DEVICE
        assert is_stand_in(outside) and seen["registered"] is outside
        assert [type(p) for p in seen["parameters"]] == [type(p) for p in model.parameters()]
        assert seen["state"]["after.0.weight"].data_ptr() == outside._source.data_ptr()
        assert is_stand_in(model.after[0].weight) and "weight" not in model.after[0].__dict__
        model.seen = seen = None
        check_given_back(attachment)


def test_gradients_and_functions_of_inputs(model, engine) -> None:
    plain = reference(model)
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(move(X)))
        with torch.enable_grad():
            ours, theirs = (move(X).requires_grad_() for _ in range(2))
            for one, x in ((model, ours), (plain, theirs)):
                one(x).square().sum().backward()
        assert same(ours.grad, theirs.grad)
        batch = move(torch.randn(4, 3, 768))
        assert same(torch.func.vmap(model)(batch), torch.func.vmap(plain)(batch))
        check_given_back(attachment)


@pytest.mark.parametrize("press_by", ["room", "budget", "model", "detach"])
def test_recalled_in_the_middle_of_a_forward(model, engine, press_by) -> None:
    x, expected = move(X), reference(model)(move(X))
    other = randomize(linears(4, 768))
    y = move(torch.randn(2, 768))
    expected_of_other = reference(other)(y)
    held = engine(20)
    others: list[forebay.Attachment] = []

    def recall() -> None:
        assert is_plain(model.after[0].weight)
        if press_by == "room":
            assert held.make_room(4 * MIB) >= 4 * MIB
        elif press_by == "budget":
            held.set_budget(budget=6 * MIB)
        elif press_by == "model":
            others.append(forebay.attach(other, held, page_size=2 * MIB))
            assert same(other(y), expected_of_other)
        else:
            attachment.detach()

    def probe() -> tuple[Any, Any]:
        thread = threading.Thread(target=torch.no_grad()(recall))
        thread.start()
        thread.join()
        if press_by != "detach":
            # The recall takes the interpreter lock, which a call of the engine lets it have.
            deadline = time.monotonic() + 30
            while is_plain(model.after[0].weight) and time.monotonic() < deadline:
                held.settle()
        return model.after[0].weight, model.before[0].weight

    with forebay.attach(model, held, page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        model.probe = probe
        if press_by == "detach":
            if TORCH_DEVICE.type == "cpu":  # elsewhere the second half is not where its input is
                assert same(model(x), expected)
                assert all(type(weight) is nn.Parameter for weight in model.seen)
        else:
            assert same(model(x), expected)
            assert all(map(is_stand_in, model.seen)), "the memory was needed"
        model.probe = nothing
        for _ in range(3):
            if press_by != "detach":
                assert same(model(x), expected)
        for attached in others:
            assert same(other(y), expected_of_other)
            attached.detach()
        if press_by != "detach":
            held.set_budget(budget=64 * MIB)
            settled(attachment, lambda: model(x))
            assert same(model(x), expected)
            check_given_back(attachment)


def test_an_idle_model_gives_way_to_another(model, engine) -> None:
    held, x = engine(20), move(X)
    other = randomize(linears(6, 768))
    pairs = [(one, reference(one)(x)) for one in (model, other)]
    with (
        forebay.attach(model, held, page_size=2 * MIB) as first,
        forebay.attach(other, held, page_size=2 * MIB) as second,
    ):
        for _ in range(4):
            for (one, expected), attachment in zip(pairs, (first, second), strict=True):
                for _ in range(30):
                    assert same(one(x), expected)
                assert attachment.stats()[0]["resident"] > 0
        press(held)
        check_given_back(first)
        check_given_back(second)


def test_a_tensor_that_somebody_holds_stays_readable(model, engine) -> None:
    x, weight = move(X), move(model.after[0].weight.clone())
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        model.probe = lambda: model.after[0].weight
        model(x)
        held, model.probe, model.seen = model.seen, nothing, None
        press(attachment.engine)
        assert same(held.data, weight) and pinned(attachment) > 2 * MIB
        attachment.detach()
        assert same(held.data, weight)
        del held
        attachment.engine.settle()
        assert attachment.engine.stats()["models"] == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_the_plain_tensors(model, engine, error) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))

        def fail() -> None:
            assert is_plain(model.after[0].weight)
            raise error

        model.probe = fail
        for _ in range(3):
            with pytest.raises(error):
                model(x)
            assert is_stand_in(model.after[0].weight)
        model.probe = nothing
        assert same(model(x), expected)
        check_given_back(attachment)


def test_threads_and_pressure(model, engine) -> None:
    plain = reference(model)
    inputs = [move(torch.randn(2, 768)) for _ in range(10)]
    expected = [plain(x) for x in inputs]
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(inputs[0]))

        def use() -> None:
            for _ in range(5):
                for x, out in zip(inputs, expected, strict=True):
                    assert same(model(x), out)

        def disturb() -> None:
            for _ in range(25):
                press(attachment.engine)

        together(use, use, use, disturb)
        assert is_stand_in(model.after[0].weight) and "weight" not in model.after[0].__dict__
        check_given_back(attachment)


def test_a_forward_inside_of_a_forward(model, engine) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))

        def again() -> torch.Tensor:
            model.probe = nothing
            return model(x)

        model.probe = again
        assert same(model(x), expected)
        assert same(model.seen, expected) and is_stand_in(model.after[0].weight)
        check_given_back(attachment)


def test_a_part_that_is_called_by_itself(model, engine) -> None:
    x, expected = move(X), reference(model).after(move(X))
    seen: list[Any] = []
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        hook = model.after[1].register_forward_pre_hook(
            lambda *_: seen.append((is_plain(model.after[0].weight), is_plain(model.before[0].weight)))
        )
        assert same(model.after(x), expected) and seen == [(True, False)]
        hook.remove()
        check_given_back(attachment)


def test_an_assignment_is_seen_at_once_and_undone_ones_too(model, engine) -> None:
    x, plain = move(X), reference(model)
    new = nn.Parameter(move(torch.randn(768, 768)), requires_grad=False)
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        stand_in = model.after[0].weight

        def assign() -> None:
            model.after[0].weight = new

        model.probe = assign
        out = model(x)
        plain.after[0].weight = new
        assert same(out, plain(x)) and model.after[0].weight is new
        model.probe = nothing
        assert same(model(x), plain(x))
        model.after[0].weight = stand_in

        def delete() -> bool:
            layer = model.after[0]
            del layer.weight
            found = hasattr(layer, "weight")
            layer.weight = stand_in
            return found

        model.probe = delete
        model(x)
        assert model.seen is False
        check_given_back(attachment)


def test_functional_call_inside_of_a_forward(model, engine) -> None:
    x, plain = move(X), reference(model)
    new = {"weight": move(torch.randn(768, 768)), "bias": move(torch.randn(768))}
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        model.probe = lambda: torch.func.functional_call(model.after[0], new, (x,))
        plain.probe = lambda: torch.func.functional_call(plain.after[0], new, (x,))
        assert same(model(x), plain(x)) and same(model.seen, plain.seen)
        whole = {f"after.0.{name}": value for name, value in new.items()}
        model.probe = plain.probe = nothing
        ours, theirs = (torch.func.functional_call(one, whole, (x,)) for one in (model, plain))
        assert same(ours, theirs) and same(model(x), plain(x))
        check_given_back(attachment)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_made_inside_of_a_forward_is_plain(model, engine, way) -> None:
    def copied() -> nn.Module:
        if way == "deepcopy":
            return copy.deepcopy(model.after)
        if way == "pickle":
            return pickle.loads(pickle.dumps(model.after))
        file = io.BytesIO()
        torch.save(model.after, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    x, plain = move(X), copy.deepcopy(model)
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        model.probe = copied
        model(x)
        made, model.seen, model.probe = model.seen, None, nothing
        for name, module in made.named_modules():
            assert "weight" not in module.__dict__, name
            assert type(module._parameters) is type(nn.Linear(1, 1)._parameters)
        assert all(is_plain(parameter) and parameter.device.type == "cpu" for parameter in made.parameters())
        for ours, theirs in zip(made.parameters(), plain.after.parameters(), strict=True):
            assert same(ours.data, theirs.data)
        check_given_back(attachment)


@pytest.mark.parametrize("is_recalled", [False, True])
def test_a_write_is_an_error_and_is_discarded(model, engine, is_recalled) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))

        def write() -> None:
            model.before[1].weight.add_(1)
            if is_recalled:
                press(attachment.engine)

        model.probe = write
        with pytest.raises(forebay.ForebayError, match=r"read-only.*: before\.1\.weight"):
            model(x)
        model.probe = nothing
        for _ in range(3):
            assert same(model(x), expected)
        settled(attachment, lambda: model(x))
        assert same(model(x), expected)
        check_given_back(attachment)


class Mixed(nn.Module):
    """Modules that keep lists of their weights, that are lent to in their own way, and that share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 256)
        self.lstm = nn.LSTM(256, 256, batch_first=True)
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(256, 256))
        self.items = nn.ParameterList(nn.Parameter(torch.randn(256, 256)) for _ in range(2))
        self.named = nn.ParameterDict({"one": nn.Parameter(torch.randn(256, 256))})
        self.head = nn.Linear(256, 600, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.lstm(self.table(tokens))[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.normed(self.encoder(x))
        for weight in [*self.items, self.named["one"]]:
            x = F.linear(x, weight)
        for parameter in self.items.parameters():
            x = x + parameter.sum() * 1e-3
        self.seen = (type(self.table.weight), self.table.weight is self.head.weight)
        return self.head(x)


def test_modules_with_ways_of_their_own(engine) -> None:
    model = randomize(Mixed())
    plain = reference(model)
    batches = [move(torch.randint(600, (2, 7))) for _ in range(4)]
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(batches[0]))
        for tokens in batches:
            assert same(model(tokens), plain(tokens))
            assert model.seen == (nn.Parameter, True)
        press(attachment.engine)
        for tokens in batches:
            assert same(model(tokens), plain(tokens))
        check_given_back(attachment)
    assert same(model(batches[0].cpu()), copy.deepcopy(model)(batches[0].cpu()))


def test_weights_that_are_never_used_do_not_matter(engine) -> None:
    model = randomize(nn.ModuleDict({"used": linears(3, 512), "unused": linears(12, 512)}))
    model.forward = model["used"].forward  # type: ignore[method-assign]
    x = move(torch.randn(2, 512))
    expected = reference(model["used"])(x)
    with forebay.attach(model, engine(64), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        assert same(model(x), expected)
        check_given_back(attachment)


def test_a_model_that_does_not_fit_is_not_lent(engine) -> None:
    model, x = randomize(linears(8, 768)), move(X)
    expected = reference(model)(x)
    with forebay.attach(model, engine(12), page_size=2 * MIB) as attachment:
        for _ in range(10):
            assert same(model(x), expected)
            assert not attachment.stats()[0]["lent"]


def test_lending_to_a_kernel_inside_of_a_forward(model, engine) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))

        def lend() -> int:
            with forebay.lend(model.after[0]):
                press(attachment.engine)
                return model.after[0].weight.data_ptr()

        model.probe = lend
        address = model.after[0].weight._weight.address
        assert same(model(x), expected) and model.seen == address
        assert is_stand_in(model.after[0].weight)
        check_given_back(attachment)


def test_what_applications_note_on_parameters(model, engine) -> None:
    model.after[0].weight.noted = "something"
    x = move(X)
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        model.probe = lambda: model.after[0].weight.noted
        model(x)
        assert model.seen == "something"


def test_a_trace_is_refused_as_before(model, engine) -> None:
    x = move(X)
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        with pytest.raises(forebay.ForebayError, match="trace"):
            torch.jit.trace(model, x, check_trace=False)
        check_given_back(attachment)


def test_compiled(model, engine) -> None:
    x, expected = move(X), reference(model)(move(X))
    with forebay.attach(model, engine(), page_size=2 * MIB) as attachment:
        settled(attachment, lambda: model(x))
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            assert same(compiled(x), expected)
        press(attachment.engine)
        for _ in range(3):
            assert same(compiled(x), expected)
        torch.compiler.reset()


def test_a_lent_model_that_nobody_holds_goes_with_its_memory(engine) -> None:
    held, x = engine(), move(X)
    model = randomize(Probed())
    gone = weakref.ref(model)
    attachment = forebay.attach(model, held, page_size=2 * MIB)
    settled(attachment, functools.partial(model, x))
    del model, attachment
    gc.collect()
    assert gone() is None
    held.settle()
    assert held.stats()["models"] == []


def test_detach_leaves_no_trace(model, engine) -> None:
    before = {name: (set(module.__dict__), id(module._parameters)) for name, module in model.named_modules()}
    x = move(X)
    attachment = forebay.attach(model, engine(), page_size=2 * MIB)
    settled(attachment, lambda: model(x))
    attachment.detach()
    for name, module in model.named_modules():
        assert (set(module.__dict__) - {"seen"}, id(module._parameters)) == before[name]
    attachment.engine.settle()
    assert attachment.engine.stats()["models"] == []

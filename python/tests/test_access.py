"""However a weight is reached, no unmapped address is touched and the bytes are right."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, reference, same
from torch import nn

import forebay
from forebay._forebay import hold


@pytest.fixture
def model() -> nn.Sequential:
    return randomize(linears(6, 768))


@pytest.fixture
def plain(model) -> nn.Sequential:
    return reference(model)


@pytest.fixture
def attachment(model, plain, engine):
    """Room for two layers of six, so everything streams by."""
    with forebay.attach(model, engine(10), page_size=2 * MIB) as attached:
        yield attached


def stream_by(model: nn.Sequential, plain: nn.Sequential) -> None:
    """Uses every weight."""
    x = move(torch.randn(2, 768))
    for layer, other in zip(model, plain, strict=True):
        assert same(layer(x), other(x))


Pair = namedtuple("Pair", "first second")

CALLS = {
    "functional": lambda x, w, v: F.linear(x, w),
    "keyword": lambda x, w, v: F.linear(input=x, weight=w),
    "matmul": lambda x, w, v: w @ x.t(),
    "matmul-right": lambda x, w, v: x @ w.t(),
    "list": lambda x, w, v: torch.cat([w, v]),
    "tuple": lambda x, w, v: torch.stack((w, v)).sum(),
    "named-tuple": lambda x, w, v: torch.cat(Pair(w, v)),
    "list-subclass": lambda x, w, v: torch.cat(type("Items", (list,), {})([w, v])),
    "twice": lambda x, w, v: torch.addmm(w, w, w),
    "both": lambda x, w, v: w @ v,
    "einsum": lambda x, w, v: torch.einsum("bi,oi->bo", x, w),
    "reflected": lambda x, w, v: 2 - w,
    "comparison": lambda x, w, v: w == v,
    "reduction": lambda x, w, v: (w.sum(), w.max(dim=0), torch.linalg.vector_norm(w)),
    "conversion": lambda x, w, v: (w.half(), w.to(torch.bfloat16), w.double()),
    "copy": lambda x, w, v: torch.empty_like(w).copy_(w),
    "assigned-into": lambda x, w, v: torch.zeros_like(w).add_(w),
    "indexed": lambda x, w, v: w[torch.tensor([3, 1, 2], device=w.device)],
    "iterated": lambda x, w, v: torch.stack(list(w)),
    "vmap": lambda x, w, v: torch.vmap(lambda row: F.linear(row, w))(x),
    "vmap-over-weight": lambda x, w, v: torch.vmap(lambda row: row * 2)(w),
    "broadcast": lambda x, w, v: torch.broadcast_tensors(w, x[0]),
    "sparse": lambda x, w, v: w.to_sparse().to_dense(),
    "contiguous": lambda x, w, v: w.t().contiguous(),
    "out": lambda x, w, v: torch.mul(w, 2, out=torch.empty(768, 768, device=w.device)),
    "where": lambda x, w, v: torch.where(w > 0, w, v),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call, model, plain, attachment) -> None:
    x = move(torch.randn(2, 768))
    for _ in range(2):
        attached = CALLS[call](x, model[0].weight, model[5].weight)
        expected = CALLS[call](x, plain[0].weight, plain[5].weight)
        assert same(attached, expected)
        press(attachment.engine)
        assert same(attached, expected)


ALIASES = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "view": lambda w: w.view(-1),
    "reshape": lambda w: w.reshape(384, 1536),
    "index": lambda w: w[17:33],
    "ellipsis": lambda w: w[..., None],
    "expand": lambda w: w.expand(2, 768, 768),
    "as_strided": lambda w: w.as_strided((3, 3), (5, 7), 11),
    "detach-index": lambda w: w.detach()[3],
    "data-view": lambda w: w.data.view(-1),
    "chunk": lambda w: w.chunk(3),
    "unbind": lambda w: w.unbind(0)[:4],
    "split": lambda w: torch.split(w, 300),
    "same-dtype": lambda w: w.to(w.dtype).t(),
    "bytes": lambda w: w.view(torch.int32),
    "einsum": lambda w: torch.einsum("ij->ji", w),
    "einsum-diagonal": lambda w: torch.einsum("ii->i", w),
    "pad-nothing": lambda w: F.pad(w, (0, 0)),
    "dropout": lambda w: F.dropout(w, 0.5, training=False),
    "atleast": lambda w: torch.atleast_3d(w),
    "ravel": lambda w: torch.ravel(w),
    "broadcast": lambda w: torch.broadcast_to(w, (2, 768, 768)),
    "positive": lambda w: +w,
    "real": lambda w: w.real,
    "subclass": lambda w: w.as_subclass(torch.Tensor),
    "dlpack": lambda w: torch.from_dlpack(w),
    "set": lambda w: torch.empty(0, device=w.device).set_(w),
    "type-as": lambda w: w.type_as(w),
    "movedim": lambda w: torch.movedim(w, 0, 1),
    "narrow": lambda w: torch.narrow(w, 0, 5, 9),
}


@pytest.mark.usefixtures("current_device")
@pytest.mark.parametrize("alias", ALIASES)
def test_results_that_share_memory_keep_it(alias, model, plain, attachment) -> None:
    if alias == "subclass" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no as_subclass of any tensor with __torch_dispatch__")
    kept, expected = ALIASES[alias](model[2].weight), ALIASES[alias](plain[2].weight)
    for _ in range(2):
        stream_by(model, plain)
        press(attachment.engine)
        assert same(kept, expected)
    attachment.detach()
    assert same(kept, expected)


def test_memory_comes_back_with_the_last_view(model, plain, attachment) -> None:
    kept = [layer.weight.t() for layer in model[:3]]
    with pytest.raises(
        forebay.OutOfMemoryError, match=r"are pinned by 0 running operations and \d+ live views"
    ):
        model[5](move(torch.randn(1, 768)))
    del kept[1:]
    stream_by(model, plain)


def test_one_parameter_of_two_modules(engine) -> None:
    first, second = nn.Linear(768, 768), nn.Linear(768, 768)
    second.weight = first.weight
    model = randomize(nn.ModuleList([first, second, nn.Linear(768, 768)]))
    plain, x = reference(model), move(torch.randn(2, 768))
    with forebay.attach(model, engine(10)) as attachment:
        assert model[0].weight is model[1].weight
        assert attachment.stats()[0]["bytes"] == 2 * 768 * 768 * 4 + 3 * 768 * 4
        for layer, other in zip(model, plain, strict=True):
            assert same(layer(x), other(x))
    assert model[0].weight is model[1].weight


def test_a_parameter_of_two_models(engine) -> None:
    model, other = randomize(linears(3, 768)), linears(2, 768)
    other[0].weight = model[0].weight
    randomize(other)
    plain, plain_other, x = reference(model), reference(other), move(torch.randn(2, 768))
    with forebay.attach(model, engine(14)) as attachment, forebay.attach(other, attachment.engine):
        for _ in range(2):
            assert same(model(x), plain(x))
            assert same(other(x), plain_other(x))


def test_a_module_that_reads_another_ones_weight(engine) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(768, 768)
            self.own = nn.Linear(768, 768)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x) @ (self.other.weight + self.own.weight)

    model, x = randomize(Reader()), move(torch.randn(2, 768))
    expected = reference(model)(x)
    with forebay.attach(model, engine(10)):
        assert same(model(x), expected)


def test_functional_call(model, plain, attachment) -> None:
    x = move(torch.randn(2, 768))
    call = torch.func.functional_call
    mixed, plain_mixed = {"1.weight": model[1].weight * 2}, {"1.weight": plain[1].weight * 2}
    assert same(call(model, mixed, (x,)), call(plain, plain_mixed, (x,)))
    everything = dict(plain.named_parameters())
    assert same(call(model, everything, (x,)), call(plain, everything, (x,)))
    assert same(model(x), plain(x))


def test_calls_that_torch_function_does_not_see(model, plain, attachment) -> None:
    x, w, p = move(torch.randn(2, 768)), model[0].weight, plain[0].weight
    with torch._C.DisableTorchFunctionSubclass():
        assert same(F.linear(x, w), F.linear(x, p))
        assert same(torch.cat([w, w]), torch.cat([p, p]))
        kept = w.t()
    stream_by(model, plain)
    press(attachment.engine)
    assert same(kept, p.t())


def test_numpy_and_numbers(model, plain, attachment) -> None:
    weight, expected = model[0].weight, plain[0].weight.cpu()
    assert (weight.detach().cpu().numpy() == expected.numpy()).all()
    assert weight[0].tolist() == expected[0].tolist()
    assert weight[0, 0].item() == expected[0, 0].item()
    array = weight.numpy()
    assert (array == expected.numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


@pytest.mark.parametrize("read", ["data_ptr", "untyped_storage", "storage", "share_memory_"])
def test_no_address_is_given(read, model, attachment) -> None:
    with pytest.raises(forebay.ForebayError, match=r"has no address.*forebay\.lend\(module\).*0\.weight"):
        getattr(model[0].weight, read)()


def test_lent_weights_have_an_address(model, plain, attachment) -> None:
    with forebay.lend(model[1]):
        assert model[1].weight.data_ptr() % 512 == 0
        assert type(model[1].weight) is torch.Tensor
        assert same(model[1].weight, plain[1].weight.data)
    assert isinstance(model[1].weight, forebay.ForebayParameter)


def test_transforms_that_record_keep_what_they_record(model, plain, attachment) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = move(torch.randn(2, 768))
    recorded = make_fx(lambda x: model[0](x))(x)
    stream_by(model, plain)
    press(attachment.engine)
    assert same(recorded(x), plain[0](x))


def test_tracing_is_refused(model, attachment) -> None:
    with pytest.raises(forebay.ForebayError, match="trace the model before attach"):
        torch.jit.trace(model, move(torch.randn(2, 768)), check_trace=False)


def test_symbolic_tracing(model, plain, attachment) -> None:
    x = move(torch.randn(2, 768))
    traced = torch.fx.symbolic_trace(model)
    press(attachment.engine)
    assert same(traced(x), plain(x))


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_graph_breaks(model, plain, attachment) -> None:
    x = move(torch.randn(2, 768))
    torch._dynamo.reset()
    compiled = torch.compile(model[:3], backend="eager")
    for _ in range(2):
        assert same(compiled(x), plain[:3](x))
        press(attachment.engine)
    torch._dynamo.reset()


def test_device_of_everything(model, attachment) -> None:
    assert {parameter.device for parameter in model.parameters()} == {TORCH_DEVICE}


def test_what_is_held_stays_while_other_weights_stream_by(model, plain, attachment) -> None:
    weight = model[0].weight._weight

    def taken() -> tuple[int, int]:
        press(attachment.engine)
        (stats,) = attachment.stats()
        return stats["resident"] + stats["streamed"], stats["pinned"]

    before = taken()
    for _ in range(2):
        holding = hold([weight, weight])
        stream_by(model[1:], plain[1:])
        press(attachment.engine)
        assert same(weight.unpinned, plain[0].weight.data)
        assert forebay.stats(attachment.engine)["operations"] == 1
        del holding
        assert taken() == before


def test_what_does_not_fit_together_is_not_held(model, plain, attachment) -> None:
    with pytest.raises(forebay.OutOfMemoryError):
        hold([layer.weight._weight for layer in model])
    assert forebay.stats(attachment.engine)["operations"] == 0
    stream_by(model, plain)

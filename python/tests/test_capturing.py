"""CUDA graphs of attached models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import DEVICE, TORCH_DEVICE, linears, press, randomize, reference, same

import forebay
from forebay.capturing import refuse_capture

Engines = Callable[..., forebay.Engine]


def test_a_capture_is_refused_unless_the_weights_are_lent(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(linears(2))
    attachment = forebay.attach(model, engine(64))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    refuse_capture(model)
    capturing = True
    with pytest.raises(forebay.ForebayError, match=r"CUDA graph .* forebay\.lend\(model\).* detach\(\)"):
        refuse_capture(model)
    with forebay.lend(model[0]):
        refuse_capture(model[0])
        with pytest.raises(forebay.ForebayError):
            refuse_capture(model)
    attachment.detach()
    refuse_capture(model)


@pytest.mark.skipif(DEVICE == "host", reason="needs a GPU")
@pytest.mark.usefixtures("current_device")
@pytest.mark.parametrize("rerun", [True, False])
def test_a_graph_of_lent_weights_can_be_replayed(engine: Engines, rerun: bool) -> None:
    model = randomize(linears(8))
    plain = reference(model)
    on_gpu = engine(64)
    x = torch.randn(3, 1024, device=TORCH_DEVICE)
    with forebay.attach(model, on_gpu, rerun=rerun):
        for run in (model, plain):  # whatever libraries make at their first call
            run(x)
        with (
            pytest.raises(forebay.ForebayError, match="CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x)
        with forebay.lend(model):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            for _ in range(3):
                press(on_gpu)
                x.copy_(torch.randn(3, 1024))
                graph.replay()
                assert same(y, plain(x))
        assert same(model(x), plain(x)), "after both"

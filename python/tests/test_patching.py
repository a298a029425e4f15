"""Weights that a callable computes from what is stored."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch
from support import MIB, TORCH_DEVICE, linears, move, press, randomize, reference, same
from torch import nn

import forebay

EngineMaker = Callable[..., forebay.Engine]


def loha(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An adapter that is no product of low rank: the elementwise product of two."""
    parts = [torch.randn(shape) * 0.3 for shape in ((weight.shape[0], 4), (4, weight.shape[1])) * 2]
    delta = (parts[0] @ parts[1]) * (parts[2] @ parts[3])

    def patch(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == TORCH_DEVICE and not torch.is_grad_enabled()
        return (tensor.float() + delta.to(tensor.device)).to(tensor.dtype)

    return patch


def computed(weight: torch.Tensor, patch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return patch(weight.detach().clone().to(TORCH_DEVICE)).cpu()


def test_a_callable_gives_the_weight_whatever_is_resident(engine: EngineMaker) -> None:
    module = randomize(linears(6)).to(torch.bfloat16)
    plain = reference(module)
    patches = {f"{i}.weight": loha(module[i].weight) for i in (1, 4)} | {"2.bias": lambda bias: bias * 2}
    for name, patch in patches.items():
        parameter = plain.get_parameter(name)
        parameter.copy_(computed(module.get_parameter(name), patch))
    x = move(torch.randn(4, 1024, dtype=torch.bfloat16))
    before = reference(module)(x)
    for budget in (64, 10, 6):
        with forebay.attach(module, engine(budget)) as attachment:
            assert same(module(x), before)
            attachment.set_patch(patches)
            for _ in range(3):
                assert same(module(x), plain(x))
            press(attachment.engine)
            assert same(module(x), plain(x))
            attachment.set_patch("1.weight", None)
            assert same(module[1].weight.clone().cpu(), module[1].weight._source)
            attachment.set_patch(dict.fromkeys(patches))
            assert same(module(x), before)


def test_one_call_serves_all_pages_of_a_weight(engine: EngineMaker) -> None:
    module = randomize(nn.Sequential(nn.Linear(2048, 4096), nn.Linear(4096, 8)))
    calls: list[float] = []

    def patch(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(time.monotonic())
        return tensor.neg_()

    expected = -module[0].weight
    with forebay.attach(module, engine(), page_size=2 * MIB) as attachment:
        attachment.set_patch("0.weight", patch)
        attachment.set_patch("1.weight", torch.Tensor.neg_)
        assert same(module[0].weight.clone().cpu(), expected)
        # A slow machine may take longer from page to page than a result is kept.
        assert len(calls) < 4, "the weight has 16 pages"
        calls_so_far = len(calls)
        assert same(module[0].weight.clone().cpu(), expected) and len(calls) == calls_so_far
        press(attachment.engine)
        time.sleep(1)  # nothing is kept any more
        assert same(module[0].weight.clone().cpu(), expected)
        assert len(calls) > calls_so_far
    assert same(module[0].weight.detach(), -expected), "what is stored was not written to"


def test_adapters_are_added_to_what_a_callable_gives(engine: EngineMaker) -> None:
    module = randomize(linears(2))
    up, down = torch.randn(1024, 4) * 0.1, torch.randn(4, 1024) * 0.1
    state = {"0.lora_up.weight": up, "0.lora_down.weight": down}
    with forebay.attach(module, engine()) as attachment:
        weight = module[0].weight._source
        attachment.set_patch("0.weight", lambda tensor: tensor * 3)
        attachment.set_loras([(state, 1.0)])
        got = module[0].weight.clone().cpu()
        assert (got - (weight * 3 + up @ down)).abs().max() < 1e-6
        attachment.set_loras([])
        assert same(module[0].weight.clone().cpu(), weight * 3)


def test_converted_weights_are_computed_from_what_they_are_used_as(engine: EngineMaker) -> None:
    module = nn.Module()
    stored = (torch.randn(1024, 1024) * 9).to(torch.float8_e4m3fn)
    module.weight = nn.Parameter(stored, requires_grad=False)
    with forebay.attach(module, engine(), dtype=torch.float16) as attachment:
        attachment.set_patch("weight", lambda tensor: tensor + 1)
        assert same(module.weight.clone().cpu(), stored.float().half() + 1)


def test_an_exception_is_the_error_of_its_weight(engine: EngineMaker) -> None:
    module = randomize(linears(6))
    x = move(torch.randn(2, 1024))

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today")

    wrong: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
        "exception": (fails, r"weight \"4\.weight\" of \"Sequential\" could not be computed: RuntimeError: not today"),
        "shape": (lambda tensor: tensor[:4], r"a patch gives a tensor of torch\.float32 and shape \(1024, 1024\): .*4, 1024"),
        "dtype": (lambda tensor: tensor.half(), r"a patch gives a tensor of torch\.float32 .*float16"),
        "nothing": (lambda tensor: None, r"a patch gives a tensor .*: NoneType"),  # type: ignore[dict-item, return-value]
    }  # fmt: skip
    with forebay.attach(module, engine(), page_size=2 * MIB) as attachment:
        for function, message in wrong.values():
            attachment.set_patch("4.weight", function)
            with pytest.raises(forebay.ForebayError, match=message):
                module[4](x)
            for other in (0, 1, 2):
                module[other](x)
        attachment.set_patch("4.weight", None)
        module(x)


def test_names_that_mean_no_weight_or_several_are_errors(engine: EngineMaker) -> None:
    parts = {"one": randomize(linears(1)), "two": randomize(linears(1))}
    with forebay.attach(parts, engine()) as attachment:
        with pytest.raises(
            ValueError, match=r"is the name of 0\.weight of one, 0\.weight of two: '0\.weight'"
        ):
            attachment.set_patch("0.weight", torch.neg)
        with pytest.raises(ValueError, match=r"is the name of no weight that is attached: 'nothing'"):
            attachment.set_patch("nothing", torch.neg)
        attachment.set_patch("two.0.weight", torch.neg)
        assert same(parts["one"][0].weight.clone().cpu(), parts["one"][0].weight._source)
        assert same(parts["two"][0].weight.clone().cpu(), -parts["two"][0].weight._source)


def test_a_detached_model_takes_no_patches(engine: EngineMaker) -> None:
    attachment = forebay.attach(randomize(linears(1)), engine())
    attachment.detach()
    for call in (lambda: attachment.set_patch("0.weight", torch.neg), lambda: attachment.set_loras([])):
        with pytest.raises(forebay.DetachedError, match="attach it again to patch its weights"):
            call()


def test_a_detached_model_leaves_though_its_callable_has_a_weight_of_it(engine: EngineMaker) -> None:
    device = engine(64)

    def run() -> None:
        module = randomize(linears(3)).to(torch.bfloat16)
        attachment = forebay.attach(module, device)
        weight, bias = module[0].weight, module[1].bias
        attachment.set_patch("1.weight", lambda value: value + len(weight) + len(bias))
        module(move(torch.randn(4, 1024, dtype=torch.bfloat16)))
        attachment.detach()

    run()
    end = time.monotonic() + 10
    while device.stats()["models"] and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    assert device.stats()["models"] == []


def test_detaching_does_not_wait_for_a_callable(engine: EngineMaker) -> None:
    module = randomize(linears(2))
    began, go_on = threading.Event(), threading.Event()

    def waits(tensor: torch.Tensor) -> torch.Tensor:
        began.set()
        go_on.wait(60)
        return tensor

    attachment = forebay.attach(module, engine())
    attachment.set_patch("0.weight", waits)
    errors: list[BaseException] = []

    def use() -> None:
        try:
            module[0].weight.clone()
        except forebay.DetachedError as error:
            errors.append(error)

    user = threading.Thread(target=use)
    user.start()
    assert began.wait(60)
    attachment.detach()
    user.join(60)
    assert not user.is_alive() and len(errors) == 1
    del attachment
    go_on.set()


def test_threads_use_a_model_whose_weights_are_computed(engine: EngineMaker) -> None:
    module = randomize(linears(6))
    x = move(torch.randn(2, 1024))
    plain = reference(module)
    for layer in plain:
        layer.weight.neg_()
    expected = plain(x)
    wrong: list[object] = []

    def use() -> None:
        with torch.no_grad():
            for _ in range(4):
                if not same(module(x), expected):
                    wrong.append(module)

    with forebay.attach(module, engine(14)) as attachment:
        attachment.set_patch({f"{i}.weight": torch.neg for i in range(6)})
        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong

"""A forward that ran out of device memory is run once more, where that cannot change its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import MIB, linears, move, randomize, reference, same
from torch import nn

import forebay
from forebay.reclaiming import CacheRelease
from forebay.shortage import Shortage


class Hungry(nn.Module):
    """Runs out of memory in the middle of its forward, ``failures`` times, unless weights are out of the way."""

    def __init__(self, failures: int = 1) -> None:
        super().__init__()
        self.before, self.after = linears(4, 768), linears(4, 768)
        self.failures = failures
        self.calls = 0
        self.seen: list[int] = []
        self.held: Callable[[], int] = lambda: 0
        self.act: Callable[..., None] = lambda *_: None

    def forward(self, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        self.calls += 1
        noise = torch.randn_like(x)
        x = self.before(x) + noise
        self.act(*rest, *more.values())
        self.seen.append(self.held())
        if self.failures > 0:
            self.failures -= 1
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of"
            )
        return self.after(x * torch.rand((), device=x.device))


class Cache:
    """What a forward appends to."""

    def __init__(self) -> None:
        self.items: list[int] = []


@pytest.fixture
def hungry() -> Hungry:
    return randomize(Hungry())


X = torch.randn(3, 768)


def expected_of(model: Hungry, *args: Any, **kwargs: Any) -> torch.Tensor:
    plain = reference(model)
    plain.failures = 0
    torch.manual_seed(7)
    return plain(move(X), *args, **kwargs)


def test_the_second_run_is_what_the_first_would_have_been(hungry, engine) -> None:
    held = engine(64)
    hungry.held = lambda: held.stats()["held"]
    expected = expected_of(hungry)
    with forebay.attach(hungry, held, page_size=2 * MIB):
        torch.manual_seed(7)
        assert same(hungry(move(X)), expected)
        assert hungry.calls == 2
        # Half of the model had run.
        assert hungry.seen[0] >= 8 * MIB, "weights were there"
        assert hungry.seen[1] == held.stats()["reserved"], (
            "between two operations nothing that could leave is left"
        )
        torch.manual_seed(7)
        assert same(hungry(move(X)), expected)
        assert hungry.calls == 3
        for _ in range(200):
            hungry(move(X))
            if held.stats()["held"] >= 18 * MIB:
                break
        assert held.stats()["held"] >= 18 * MIB, "weights came back"


def test_a_part_that_is_called_by_itself_is_run_again(engine) -> None:
    whole = randomize(nn.ModuleDict({"decoder": nn.Sequential(nn.Sequential(linears(2, 768)), Hungry())}))
    x = move(X)
    decoder = whole["decoder"]
    plain = reference(decoder)
    plain[1].failures = 0
    torch.manual_seed(3)
    expected = plain(x)
    with forebay.attach(whole, engine(), page_size=2 * MIB):
        torch.manual_seed(3)
        assert same(decoder(x), expected)


@pytest.mark.parametrize(
    ("cached", "conf", "says"),
    [(3000, "", True), (2000, "", False), (3000, "expandable_segments:True", False)],
)
def test_memory_in_pieces_is_told(cached, conf, says, monkeypatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", conf)
    shortage = Shortage(
        device="cuda:0", needed=3584 * MIB, total=16384 * MIB, free=1000 * MIB, weights=0, pinned=0, operations=0, views=0,
        allocated=12000 * MIB, cached=cached * MIB, others=0,
    )  # fmt: skip
    assert ("expandable_segments" in str(shortage)) == says


class Whole(nn.Module):
    """Counts its calls. Its part may fail."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.calls = 0
        self.part = nn.Sequential(linears(2, 768), Failing(), linears(2, 768))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.part(x + self.noise * torch.randn_like(x) if self.noise else x)


class Failing(nn.Module):
    """Runs out of memory once, after it drew a random number if it is to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.draws = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.draws:
            x = x * torch.rand((), device=x.device)
        if self.calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB.")
        return x


@pytest.mark.parametrize(
    ("noise", "draws", "calls"), [(0.0, False, 1), (0.5, False, 2), (0.0, True, 2), (0.5, True, 2)]
)
def test_a_part_is_run_again_by_itself_unless_random_numbers_were_drawn(engine, noise, draws, calls) -> None:
    whole = randomize(Whole(noise))
    whole.part[1].draws = draws
    plain = reference(whole)
    plain.part[1].calls = 1
    torch.manual_seed(11)
    expected = plain(move(X))
    with forebay.attach(whole, engine(), page_size=2 * MIB):
        torch.manual_seed(11)
        assert same(whole(move(X)), expected)
        assert (whole.calls, whole.part[1].calls) == (calls, 2)


def test_a_second_failure_says_who_has_the_memory(hungry, engine) -> None:
    hungry.failures = 2
    with forebay.attach(hungry, engine(), page_size=2 * MIB):
        view = hungry.before[0].weight[:1]
        with pytest.raises(torch.OutOfMemoryError) as caught:
            hungry(move(X))
        assert hungry.calls == 2
        shortage = caught.value.shortage
        assert isinstance(shortage, Shortage)
        assert shortage.needed == 3584 * MIB
        assert shortage.views == 1 and shortage.pinned >= 4 * MIB, shortage
        notes = "".join(caught.value.__notes__)
        assert "3,584 MiB were asked for" in notes and "1 views" in notes, notes
        del view


@pytest.mark.parametrize(
    ("why", "arguments", "act"),
    [
        (
            "an object that it may have changed: Cache",
            lambda: (Cache(),),
            lambda cache: cache.items.append(1),
        ),
        ("wrote to a tensor", lambda: (torch.zeros(3),), lambda tensor: tensor.add_(1)),
    ],
)
def test_what_may_have_changed_is_not_run_again(hungry, engine, why, arguments, act) -> None:
    hungry.act = act
    with forebay.attach(hungry, engine(), page_size=2 * MIB):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            hungry(move(X), *arguments())
        assert hungry.calls == 1
        assert why in "".join(caught.value.__notes__)
        assert hungry(move(X), *arguments()) is not None


def test_training_and_gradients_are_not_run_again(hungry, engine) -> None:
    hungry.failures = 2
    with forebay.attach(hungry, engine(), page_size=2 * MIB):
        with torch.enable_grad(), pytest.raises(torch.OutOfMemoryError, match="Tried"):
            hungry(move(X.clone()).requires_grad_())
        hungry.train()
        with pytest.raises(torch.OutOfMemoryError, match="Tried"):
            hungry(move(X))
        assert hungry.calls == 2


def test_containers_are_put_back(hungry, engine) -> None:
    def act(found: list[Any], counts: dict[str, int]) -> None:
        found[0] += 1
        found.append("more")
        counts["calls"] = counts.get("calls", 0) + 1

    hungry.act = act
    found, counts = [5], {"other": 1}
    with forebay.attach(hungry, engine(), page_size=2 * MIB):
        hungry(move(X), found, counts=counts)
        assert hungry.calls == 2
        assert found == [6, "more"] and counts == {"other": 1, "calls": 1}


def test_generators_among_the_arguments_draw_the_same_again(hungry, engine) -> None:
    drawn: list[float] = []
    hungry.act = lambda generator: drawn.append(torch.rand((), generator=generator).item())
    with forebay.attach(hungry, engine(), page_size=2 * MIB):
        hungry(move(X), torch.Generator().manual_seed(5))
        assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_under_inference_mode_only_where_it_is_asked_for(hungry, engine) -> None:
    held = engine()
    with torch.inference_mode():
        x = move(torch.randn(3, 768))
        with forebay.attach(hungry, held, page_size=2 * MIB):
            with pytest.raises(torch.OutOfMemoryError) as caught:
                hungry(x)
            assert "inference_mode" in "".join(caught.value.__notes__)
        hungry.failures, hungry.calls = 1, 0
        expected = expected_of(hungry)
        with forebay.attach(hungry, held, page_size=2 * MIB, rerun="always"):
            torch.manual_seed(7)
            assert hungry(x).shape == expected.shape and hungry.calls == 2


def test_it_can_be_switched_off(hungry, engine) -> None:
    with forebay.attach(hungry, engine(), page_size=2 * MIB, rerun=False):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            hungry(move(X))
        assert hungry.calls == 1 and not hasattr(caught.value, "shortage")
    assert "forward" not in hungry.__dict__


def test_weights_that_did_not_fit_are_tried_once_more_as_well(engine) -> None:
    model = randomize(linears(2, 2048))  # 16 MiB each
    held = engine(12)
    with forebay.attach(model, held, page_size=2 * MIB):
        with pytest.raises(forebay.OutOfMemoryError) as caught:
            model(move(torch.randn(1, 2048)))
        assert caught.value.shortage.needed is None


class Spiky:
    """torch's memory: 100 MiB in tensors, and a cache."""

    def __init__(self) -> None:
        self.cached = 900 * MIB
        self.forward = 0
        self.releases: list[int] = []

    def used(self) -> tuple[int, int]:
        return 100 * MIB, 100 * MIB + self.cached

    def release(self) -> int:
        freed, self.cached = self.cached, 0
        self.releases.append(self.forward)
        return freed


@pytest.mark.parametrize("every_time", [False, True])
def test_torchs_cache_is_given_back_unless_it_comes_back(every_time) -> None:
    """After a spike that came once at once; where one comes every time less and less often."""
    spiky = Spiky()
    cache = CacheRelease(spiky.used, spiky.release)
    for forward in range(400):
        spiky.forward = forward
        if every_time:
            spiky.cached = 900 * MIB
        cache.after_forward()
    if every_time:
        assert spiky.releases[:4] == [0, 2, 5, 10], spiky.releases
        assert len(spiky.releases) <= 12
    else:
        assert spiky.releases == [0]

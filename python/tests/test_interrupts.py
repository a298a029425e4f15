"""Exceptions and interrupts leave no pin behind, and lent modules get their stand-ins back."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from support import MIB, linears, move, randomize, reference, same
from torch import nn

import forebay


class Hooked(nn.Module):
    """Calls something in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = linears(2, 768), linears(2, 768)
        self.attention = nn.MultiheadAttention(768, 4)
        self.between = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        self.between()
        return self.after(self.attention(x, x, x)[0])


@pytest.fixture
def module() -> Hooked:
    return randomize(Hooked())


def check_nothing_is_pinned(module: nn.Module, attachment: forebay.Attachment, least: int = 12) -> None:
    """A pass runs in the budget of its largest operation, and every module has its stand-ins."""
    before = attachment.engine.budget
    attachment.engine.set_budget(budget=least * MIB)
    if isinstance(module, Hooked):
        module.between = lambda: None
        module(move(torch.randn(3, 2, 768)))
    else:
        module(move(torch.randn(1, 1024)))
    attachment.engine.set_budget(budget=before)
    stand_ins = [parameter for parameter in module.parameters() if parameter.numel() > 16_384]
    assert all(isinstance(parameter, forebay.ForebayParameter) for parameter in stand_ins)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_a_forward(module, engine, error) -> None:
    x = move(torch.randn(3, 2, 768))
    expected = reference(module)(x)
    with forebay.attach(module, engine(16), page_size=2 * MIB) as attachment:

        def fail(*_: object) -> None:
            raise error

        module.between = fail
        with pytest.raises(error):
            module(x)
        check_nothing_is_pinned(module, attachment)
        module.between = lambda: None
        with pytest.raises(error), forebay.lend(module.after):
            fail()
        with pytest.raises((RuntimeError, AssertionError)):
            module.attention(x, x, x[:, :, :5])
        check_nothing_is_pinned(module, attachment)
        assert same(module(x), expected)


def test_an_operation_that_fails(module, engine) -> None:
    with forebay.attach(module, engine(16), page_size=2 * MIB) as attachment:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                module.before(move(torch.randn(2, 5)))
            with pytest.raises(RuntimeError):
                torch.cat([module.before[0].weight, move(torch.randn(2, 2, 2))])
        check_nothing_is_pinned(module, attachment)


def test_interrupts_at_any_moment(module, engine) -> None:
    """A timer interrupts passes that stream everything, wherever they are."""
    x = move(torch.randn(3, 2, 768))
    expected = reference(module)(x)
    interrupted = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with forebay.attach(module, engine(16), page_size=2 * MIB) as attachment:
        assert same(module(x), expected)
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            for round_ in range(60):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0007 * (round_ % 20))
                    for _ in range(50):
                        module(x)
                except KeyboardInterrupt:
                    interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert interrupted == 60
        check_nothing_is_pinned(module, attachment)
        assert same(module(x), expected)


class Held(torch.Tensor):
    """An operand whose products last until the test lets them go."""

    began = threading.Event()
    go_on = threading.Event()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.matmul:
            cls.began.set()
            cls.go_on.wait()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.fixture
def ctrl_c_heard() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_waiting(engine, ctrl_c_heard) -> None:
    """A wait that another thread's operation makes long ends with Ctrl-C."""
    module = randomize(linears(3, 1024))
    with forebay.attach(module, engine(8), page_size=2 * MIB) as attachment:
        held = move(torch.randn(1024, 1)).as_subclass(Held)
        # The weight comes first, so it is acquired before the other operand is asked.
        operation = threading.Thread(target=torch.matmul, args=(module[0].weight, held))
        operation.start()
        assert Held.began.wait(60)

        def press_ctrl_c() -> None:
            started = time.monotonic()
            while time.monotonic() < started + 0.3:
                pass
            _thread.interrupt_main()

        ctrl_c = threading.Thread(target=press_ctrl_c)
        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                ctrl_c.start()
                module[2](move(torch.randn(1, 1024)))
            # Uninterrupted it would wait for 30 s.
            assert time.monotonic() - started < 20
        finally:
            Held.go_on.set()
            ctrl_c.join()
            operation.join()
        check_nothing_is_pinned(module, attachment, 6)


def test_lending_what_does_not_fit(module, engine) -> None:
    with forebay.attach(module, engine(16), page_size=2 * MIB) as attachment:
        with pytest.raises(forebay.OutOfMemoryError), forebay.lend(module):
            pass
        check_nothing_is_pinned(module, attachment)

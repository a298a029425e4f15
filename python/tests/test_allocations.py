"""torch's own allocations press weights out, through the table that the calls go by."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import DEVICE, MIB, TORCH_DEVICE, linears, move, randomize, reference, same

import forebay
from forebay import _forebay, allocations

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="Linux on x86-64 only"
)
on_host = pytest.mark.skipif(DEVICE != "host", reason="a GPU's own allocator is tested below")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

RUNTIME = """
#include <stddef.h>
static int (*take)(size_t);
static int last;
void set_take(int (*function)(size_t)) { take = function; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetLastError(void) { int code = last; last = 0; return code; }
static int allocate(void **at, size_t size) { last = take(size); *at = (void *)size; return last; }
int cudaMalloc(void **at, size_t size) { return allocate(at, size); }
int cudaMallocAsync(void **at, size_t size, void *stream) { (void)stream; return allocate(at, size); }
int cudaDeviceGetDefaultMemPool(void **pool, int device) { (void)device; *pool = NULL; return 0; }
int cudaMemPoolGetAttribute(void *pool, int which, unsigned long long *value) {
    (void)pool; *value = which == 5 ? 6 << 20 : 2 << 20; return 0;
}
"""
CALLER = """
#include <stddef.h>
extern int cudaMalloc(void **, size_t);
extern int cudaMallocAsync(void **, size_t, void *);
int allocate(size_t size) { void *at; return cudaMalloc(&at, size); }
int allocate_async(size_t size) { void *at; return cudaMallocAsync(&at, size, NULL); }
"""


class Card:
    """A library that allocates as torch's does, from the memory of a host engine."""

    def __init__(self, folder: Path, engine: forebay.Engine) -> None:
        for name, text, extra in (
            ("runtime", RUNTIME, []),
            ("caller", CALLER, [str(folder / "libruntime.so"), f"-Wl,-rpath,{folder}"]),
        ):
            source = folder / f"{name}.c"
            source.write_text(text)
            command = ["cc", "-shared", "-fPIC", "-o", str(folder / f"lib{name}.so"), str(source), *extra]
            subprocess.run(command, check=True)
        self.taken: list[forebay._forebay.Ballast] = []
        self.asked: list[int] = []
        self._engine = engine
        # The caller has the interpreter for the length of a PyDLL's calls, not of a CDLL's.
        self.library = str(folder / "libcaller.so")
        # Not to the real runtime, which torch has loaded for everybody.
        mode = os.RTLD_NOW | os.RTLD_DEEPBIND
        self.without_interpreter = ctypes.CDLL(self.library, mode)
        self.with_interpreter = ctypes.PyDLL(self.library, mode)
        for library in (self.without_interpreter, self.with_interpreter):
            for function in (library.allocate, library.allocate_async):
                function.argtypes = [ctypes.c_size_t]
        self._callback = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(self._take_with)
        self._callback_without = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(self._take)
        self._runtime = ctypes.CDLL(str(folder / "libruntime.so"))

    def last_error(self) -> int:
        return int(self._runtime.cudaGetLastError())

    def allocate(self, nbytes: int, *, interpreter: bool = False, way: str = "allocate") -> int:
        """The code that the caller gets: 0, or 2 where there is no memory."""
        library = self.with_interpreter if interpreter else self.without_interpreter
        callback = self._callback if interpreter else self._callback_without
        self._runtime.set_take(ctypes.cast(callback, ctypes.c_void_p))
        return int(getattr(library, way)(nbytes))

    def _take(self, nbytes: int) -> int:
        self.asked.append(nbytes)
        try:
            self.taken.append(self._engine.ballast(nbytes))
        except forebay.OutOfMemoryError:
            return 2
        return 0

    def _take_with(self, nbytes: int) -> int:
        return self._take(nbytes)

    def give_back(self) -> None:
        while self.taken:
            self.taken.pop().close()


@pytest.fixture
def small() -> forebay.Engine:
    """An engine of a host device of 128 MiB, all of it for weights but for what is asked for."""
    return forebay.Engine("host", capacity=128 * MIB, headroom=0, readers=2, poison=True)


@pytest.fixture
def card(tmp_path: Path, small: forebay.Engine) -> Iterator[Card]:
    made = Card(tmp_path, small)
    functions = _forebay.redirect_allocations(made.library, allocations.interpreter_check(), small)
    assert functions == ["cudaMalloc", "cudaMallocAsync"]
    yield made
    assert _forebay.restore_allocations()


def filled(
    engine: forebay.Engine, count: int = 30
) -> tuple[torch.nn.Module, forebay.Attachment, Callable[[], bool]]:
    """A model of ``count`` weights of 4 MiB that has run, and a run of it that tells whether its result is right."""
    model = randomize(linears(count))
    x = move(torch.randn(2, 1024))
    expected = reference(model)(x)
    attachment = forebay.attach(model, engine, page_size=2 * MIB)

    def run() -> bool:
        return same(model(x), expected)

    for _ in range(3):
        assert run()
    return model, attachment, run


@linux
@on_host
@needs_compiler
@pytest.mark.parametrize("way", ["allocate", "allocate_async"])
@pytest.mark.parametrize("interpreter", [False, True], ids=["without interpreter", "with interpreter"])
def test_an_allocation_presses_out_what_it_lacks_and_no_more(card, small, way, interpreter) -> None:
    small.set_budget(budget=80 * MIB)  # too little for the model, so that it is not lent as a whole
    _, attachment, run = filled(small, 40)
    with attachment:
        small.settle()
        free, total = small.memory()
        assert free >= 40 * MIB, (free, total)
        held = small.stats()["held"]
        assert card.allocate(4 * MIB, interpreter=interpreter, way=way) == 0
        assert small.stats()["held"] == held, "there was enough"
        size = 64 * MIB
        assert card.allocate(size, interpreter=interpreter, way=way) == 0
        assert card.asked == [4 * MIB, size], "it was called once each, and with what was asked for"
        left = small.stats()["held"]
        assert held - left >= size - (free - 4 * MIB)
        # A margin beside what was missing, and not everything.
        assert left >= total - 4 * MIB - size - 40 * MIB, (left, held)
        assert run()
        card.give_back()
        assert run()


@linux
@on_host
@needs_compiler
def test_a_model_that_is_lent_as_a_whole_gives_way(card, small) -> None:
    _, attachment, run = filled(small, 20)
    with attachment:
        for _ in range(100):
            assert run()
            if attachment.stats()[0]["lent"]:
                break
        assert attachment.stats()[0]["lent"]
        assert card.allocate(110 * MIB) == 0, "without the interpreter the lease is waited for"
        assert not attachment.stats()[0]["lent"]
        card.give_back()
        assert run()


@linux
@on_host
@needs_compiler
def test_with_the_interpreter_held_nothing_of_pythons_is_waited_for(card, small) -> None:
    _, attachment, run = filled(small, 20)
    with attachment:
        for _ in range(100):
            assert run()
        assert attachment.stats()[0]["lent"]
        # It does not hang. The allocator of this test is Python, which may let others have the interpreter on the way: then
        # the model has given way by the time it is asked.
        code = card.allocate(110 * MIB, interpreter=True)
        assert code in (0, 2)
        assert card.last_error() == code, "the caller's own error"
        card.give_back()
        # It was asked back, and comes as soon as the interpreter is free.
        end = time.monotonic() + 60
        while attachment.stats()[0]["lent"]:
            assert time.monotonic() < end
            small.settle()
        assert card.allocate(110 * MIB, interpreter=True) == 0
        card.give_back()
        assert run()


@linux
@on_host
@needs_compiler
def test_an_allocation_that_cannot_be_had_fails_with_the_callers_error(card, small) -> None:
    _, attachment, run = filled(small, 4)
    with attachment:
        assert card.allocate(4096 * MIB) == 2
        assert card.last_error() == 2
        assert run()


@linux
@on_host
@needs_compiler
def test_threads_allocate_while_models_run(card, small) -> None:
    _, attachment, run = filled(small)
    stop = threading.Event()
    codes: list[int] = []

    def allocate(interpreter: bool) -> None:
        while not stop.is_set():
            codes.append(card.allocate(16 * MIB, interpreter=interpreter))
            if len(card.taken) > 2:
                card.taken.pop(0).close()

    with attachment:
        threads = [threading.Thread(target=allocate, args=(False,))]
        for thread in threads:
            thread.start()
        with torch.no_grad():
            right = [run() for _ in range(10)]
        stop.set()
        for thread in threads:
            thread.join()
        card.give_back()
        assert all(right)
        assert codes and codes.count(0) > len(codes) // 2, codes
        assert run()


@linux
@on_host
@needs_compiler
def test_switched_off_nothing_is_done(card, small) -> None:
    _, attachment, run = filled(small)
    with attachment:
        seen = _forebay.redirected_allocations()["seen"]
        assert _forebay.restore_allocations()
        held = small.stats()["held"]
        assert card.allocate(64 * MIB) == 2
        assert small.stats()["held"] == held
        assert _forebay.redirected_allocations() == {
            "object": None, "functions": [], "seen": seen,
            "pressed": _forebay.redirected_allocations()["pressed"],
            "repeated": _forebay.redirected_allocations()["repeated"],
        }  # fmt: skip
        assert not _forebay.restore_allocations()
        _forebay.redirect_allocations(card.library, allocations.interpreter_check(), small)
        assert card.allocate(64 * MIB) == 0
        card.give_back()
        assert run()


@linux
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA")
def test_torchs_own_library_is_redirected_and_put_back() -> None:
    was_on = bool(_forebay.redirected_allocations()["functions"])
    _forebay.restore_allocations()
    before = _forebay.import_of(allocations.LIBRARY, "cudaMalloc")
    try:
        assert forebay.redirect_allocations()
        assert _forebay.redirected_allocations()["functions"] == ["cudaMalloc", "cudaMallocAsync"]
        assert _forebay.import_of(allocations.LIBRARY, "cudaMalloc") != before
        check = next(check for check in forebay.doctor() if check.name == "torch's allocations")
        assert "(on)" in check.detail
        assert not forebay.redirect_allocations(False)
        assert _forebay.import_of(allocations.LIBRARY, "cudaMalloc") == before
        check = next(check for check in forebay.doctor() if check.name == "torch's allocations")
        assert (check.status, "switched off" in check.detail) == ("limited", True), check
    finally:
        forebay.redirect_allocations(was_on)
        allocations._wanted = True


@linux
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA")
@pytest.mark.parametrize(("value", "status"), [("0", "limited"), ("1", "works")])
def test_the_environment_switches_it(value, status) -> None:
    text = (
        'import forebay; print(next(c.status for c in forebay.doctor() if c.name == "torch\'s allocations"))'
    )
    environment = {**os.environ, allocations.SWITCH: value}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == status, done


def test_a_library_that_is_not_there_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"no shared object of this name is loaded: libnothing\.so"):
        _forebay.import_of("libnothing.so", "cudaMalloc")


@pytest.mark.skipif(DEVICE == "host", reason="needs a GPU")
def test_torch_allocates_what_weights_had(engine) -> None:
    """On a GPU that a ballast makes small: torch's tensor takes what the weights had."""
    held = forebay.Engine(DEVICE, headroom=64 * MIB)
    free, _ = held.memory()
    with held.ballast(free - 1024 * MIB):
        _, attachment, run = filled(held, 200)
        with attachment:
            torch.cuda.empty_cache()
            assert held.stats()["held"] > 600 * MIB
            pressed = _forebay.redirected_allocations()["pressed"]
            big = torch.empty(700 * MIB, dtype=torch.uint8, device=TORCH_DEVICE)
            assert _forebay.redirected_allocations()["pressed"] > pressed
            assert run()
            del big
            assert run()

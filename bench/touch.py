"""Memory that a virtual machine has not used for a while is given slowly: whoever comes first would pay for all."""

from __future__ import annotations

import mmap
import multiprocessing
import signal
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier

PROCESSES = 8
PATIENCE_S = 120.0
PAGE = 4096


def touch(nbytes: int) -> None:
    """Uses so much anonymous memory at once, and frees it.

    Raises:
        RuntimeError: Where there is not so much.
    """
    share = -(-nbytes // PROCESSES // PAGE) * PAGE
    if share == 0:
        return
    # The parent has neither threads nor torch.
    context = multiprocessing.get_context("fork")
    all_have = context.Barrier(PROCESSES)
    processes = [context.Process(target=_touch, args=(share, all_have)) for _ in range(PROCESSES)]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        # The others would wait for one that failed.
        while running and not any(process.exitcode for process in processes):
            for sentinel in wait(list(running)):
                running.pop(sentinel).join()
    finally:
        codes = sorted({process.exitcode for process in processes if process.exitcode})
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    if codes:
        raise RuntimeError(f"{nbytes} bytes of memory are not to be had: processes ended with {codes}")


def _touch(nbytes: int, all_have: Barrier) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[::PAGE] = b"\1" * (nbytes // PAGE)
        all_have.wait(PATIENCE_S)

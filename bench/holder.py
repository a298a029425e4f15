"""Another process that takes GPU memory when it is told to, in pieces as they become free, and gives it back.

Reads commands from its input, one a line: ``take BYTES``, ``give`` and ``free``. Answers each with a line of JSON. It needs
the driver alone, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time

PIECE = 256 << 20
PATIENCE_S = 30.0


class Driver:
    """The driver's primary context of one device."""

    def __init__(self, ordinal: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver's.

        Raises:
            RuntimeError: With the code that it gave.
        """
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: error {code}")

    def allocate(self, nbytes: int) -> int | None:
        """Memory of the device; None where it is not free."""
        address = ctypes.c_uint64()
        code = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes))
        if code not in (0, 2):  # out of memory
            raise RuntimeError(f"cuMemAlloc of {nbytes} bytes: error {code}")
        return address.value if code == 0 else None

    def free(self, address: int) -> None:
        """Gives back what was allocated."""
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def free_bytes(self) -> int:
        """What nobody has of the device's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, and no sooner
    driver = Driver(int(sys.argv[1]))
    held: dict[int, int] = {}
    answer({"ready": True})
    for line in sys.stdin:
        command, *rest = line.split()
        start = time.monotonic()
        if command == "free":
            answer({"free": driver.free_bytes()})
            continue
        if command == "take":
            take(driver, held, int(rest[0]))
        else:
            while held:
                driver.free(held.popitem()[0])
        answer({"held": sum(held.values()), "seconds": time.monotonic() - start})


def take(driver: Driver, held: dict[int, int], wanted: int) -> None:
    """Takes until so many bytes are held, as they become free. ``held`` has sizes by address."""
    end = time.monotonic() + PATIENCE_S
    while (missing := wanted - sum(held.values())) > 0 and time.monotonic() < end:
        piece = min(PIECE, missing)
        address = driver.allocate(piece)
        if address is None:
            time.sleep(0.0005)
        else:
            held[address] = piece


def answer(told: dict[str, object]) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

"""Another process that takes GPU memory when it is told to, in pieces as they become free, and gives it back.

Reads commands from its input, one a line: ``take BYTES`` and ``give``. Answers each with a line of JSON. It needs the
driver alone, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

PIECE = 256 << 20
PATIENCE_S = 30.0


class Driver:
    """The driver's primary context of one device."""

    def __init__(self, ordinal: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
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
        self._call("cuMemFree_v2", ctypes.c_uint64(address))


def main() -> None:
    driver = Driver(int(sys.argv[1]))
    held: list[int] = []
    answer({"ready": True})
    for line in sys.stdin:
        command, *rest = line.split()
        start = time.monotonic()
        if command == "take":
            wanted = int(rest[0])
            while len(held) * PIECE < wanted and time.monotonic() - start < PATIENCE_S:
                piece = driver.allocate(PIECE)
                if piece is None:
                    time.sleep(0.0005)
                else:
                    held.append(piece)
        else:
            while held:
                driver.free(held.pop())
        answer({"held": len(held) * PIECE, "seconds": time.monotonic() - start})


def answer(told: dict[str, object]) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

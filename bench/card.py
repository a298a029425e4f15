"""A card of less memory than the device has: another process has the rest."""

from __future__ import annotations

from others import OtherProcess


class Card:
    """What is left of a device. The process that has the rest takes nothing but what changes, and ends with this."""

    def __init__(self, ordinal: int = 0) -> None:
        self._ordinal = ordinal
        self._other: OtherProcess | None = None
        self._left = 0

    def leave(self, nbytes: int) -> None:
        """Leaves so many bytes free, what the other process needs for itself counted as taken; 0: everything.

        Raises:
            RuntimeError: Where the rest is not to be had.
        """
        if nbytes == self._left:
            return
        try:
            if nbytes:
                self._take_all_but(nbytes)
            else:
                self.close()
        except BaseException:
            self.close()
            raise
        self._left = nbytes

    def _take_all_but(self, nbytes: int) -> None:
        if self._other is None:
            # It is there before what is free is measured: its context takes memory as well.
            self._other = OtherProcess(self._ordinal)
        else:
            self._other.give()
        wanted = max(0, self._other.free_bytes() - nbytes)
        self._other.take(wanted)
        held, seconds = self._other.wait_until_taken()
        if held < wanted:
            raise RuntimeError(
                f"the card's rest is {wanted} bytes, of which {held} came free in {seconds:.0f} s"
            )

    def close(self) -> None:
        """Everything is left."""
        if self._other is not None:
            self._other.__exit__()
        self._other, self._left = None, 0

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

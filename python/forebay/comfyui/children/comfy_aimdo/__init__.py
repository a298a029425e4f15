"""In processes that a launched ComfyUI starts: Forebay's package under this name."""

STANDS_FOR_FOREBAY = True

from forebay.comfyui import substitute  # noqa: E402  says first what it is

substitute.alias()

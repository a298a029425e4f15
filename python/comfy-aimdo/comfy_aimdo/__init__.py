"""Forebay's package under the name that ComfyUI asks for."""

STANDS_FOR_FOREBAY = True

from forebay.comfyui import substitute  # noqa: E402  says first what it is

substitute.alias()

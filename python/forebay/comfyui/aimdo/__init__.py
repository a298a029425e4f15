"""What ComfyUI imports as ``comfy_aimdo``, over Forebay's engine.

A layer of names: address ranges, pages, frames, readers and pinned memory are the engine's. Its modules can be imported in
any order, before torch and without a GPU; the engine of a device starts with :func:`control.init_devices`.
"""

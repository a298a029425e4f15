"""ComfyUI on Forebay.

``python -m forebay.comfyui main.py [ComfyUI's arguments]`` starts an unmodified ComfyUI whose dynamic VRAM is Forebay's:
``aimdo`` is what it imports as ``comfy_aimdo``, ``substitute`` puts it in place, for this process and its children.
"""

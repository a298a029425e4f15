"""The patcher that attaches models where ComfyUI would load them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy import model_management
from comfy.model_patcher import CallbacksMP, ModelPatcher, ModelPatcherDynamic, wipe_lowvram_weight

from forebay.comfyui.native.loaded import Loaded, engine_for, loaded_of
from forebay.comfyui.native.patches import Patched

_log = logging.getLogger("forebay")

_Dynamic: Any = ModelPatcherDynamic


class ForebayModelPatcher(_Dynamic):  # type: ignore[misc]
    """Loads a model by attaching it. To ComfyUI it is a dynamic patcher: one whose weights leave by themselves."""

    def __new__(cls, *args: Any, **kwargs: Any) -> ForebayModelPatcher:
        # The dynamic patcher refuses the CPU, where Forebay has a device as well.
        self: ForebayModelPatcher = object.__new__(cls)
        return self

    def loaded_size(self) -> int:
        """Bytes of device memory that the model's weights take at this moment."""
        loaded = loaded_of(self.model)
        return 0 if loaded is None else loaded.nbytes

    def get_free_memory(self, device: torch.device) -> float:
        """Bytes that an operation may take: what weights hold leaves for it."""
        free: float = model_management.get_free_memory(device)
        if model_management.is_device_cpu(device):
            return free
        return free + engine_for(device).stats()["held"]

    def memory_required(self, input_shape: Any) -> Any:
        """Bytes that a run needs beside the weights."""
        return ModelPatcher.memory_required(self, input_shape)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        dirty: bool = False,
    ) -> None:
        """Attaches the model, with this patcher's patches."""
        device = self.load_device if device_to is None else device_to
        with self.use_ejected():
            self.unpatch_hooks()
            loaded = loaded_of(self.model)
            if loaded is not None and loaded.device != device:
                self._unload()
                loaded = None
            if loaded is None:
                loaded = Loaded(self.model, device)
                _log.info("%s: %s", type(self.model).__name__, loaded.attachment)
            else:
                loaded.adopt()
                loaded.attachment.prioritize()
            self._cast()
            self._patch(device)
            self.model.device = device
            self.model.model_lowvram = False
            self.model.lowvram_patch_counter = 0
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> None:
        """Attaches the model. How much of it is on the device is found out while it runs."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
            except Exception:
                self.detach()
                raise

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Gives device memory back that nothing uses at this moment."""
        return engine_for(self.load_device).make_room(min(memory_to_free, 1 << 60))

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Undoes patches of objects and, if asked, loading."""
        ModelPatcher.unpatch_model(self, device_to=None, unpatch_weights=False)
        if unpatch_weights:
            self._unload()
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.device = device_to

    def _unload(self) -> None:
        patched: Patched | None = self.model.__dict__.pop("forebay_patched", None)
        if patched is not None:
            patched.remove()
        loaded = loaded_of(self.model)
        if loaded is not None:
            loaded.unload()

    def _patch(self, device: torch.device) -> None:
        patched: Patched | None = self.model.__dict__.get("forebay_patched")
        if patched is not None and patched.uuid == self.patches_uuid:
            return
        if patched is not None:
            patched.remove()
        self.model.__dict__["forebay_patched"] = Patched(self, device)

    def _cast(self) -> None:
        """Has layers cast their weights where ComfyUI would, which loads the whole model."""
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            for kind in ("weight", "bias"):
                wrappers = self.weight_wrapper_patches.get(f"{name}.{kind}")
                if wrappers:
                    getattr(module, f"{kind}_function").extend(wrappers)

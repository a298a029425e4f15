"""The patcher that attaches models where ComfyUI would load them."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, NoReturn

import torch
from comfy import model_management
from comfy.model_patcher import CallbacksMP, ModelPatcher, ModelPatcherDynamic, wipe_lowvram_weight

from forebay._forebay import DeviceError
from forebay.comfyui.native import collector, kept
from forebay.comfyui.native.loaded import Loaded, engine_for, loaded_of

_log = logging.getLogger("forebay")

_MOST = 1 << 60
"""ComfyUI asks for 1e32 bytes where it means all."""


class ForebayModelPatcher(ModelPatcherDynamic):  # type: ignore[misc]
    """Loads a model by attaching it. To ComfyUI it is a dynamic patcher: one whose weights leave by themselves."""

    def __new__(
        cls,
        model: Any = None,
        load_device: torch.device | None = None,
        offload_device: torch.device | None = None,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> Any:
        """Where there is a card, models that ComfyUI runs on the CPU are plain ones: their weights are where they are used."""
        if load_device is not None and load_device.type == "cpu" and not model_management.cpu_mode():
            return ModelPatcher(model, load_device, offload_device, size, weight_inplace_update)
        if load_device is not None and load_device.type != "cpu":
            # Its threads and pinned memory are there before the model is to run. What is missing is told when it is loaded.
            with contextlib.suppress(DeviceError):
                engine_for(load_device)
        return object.__new__(cls)

    def __del__(self) -> None:
        model = getattr(self, "model", None)
        patchers = getattr(model, "dynamic_patchers", None)
        if patchers is None or id(self) not in patchers:
            return
        patchers.discard(id(self))
        self.detach(unpatch_all=False)
        if not patchers:
            self._unload()

    # ---- loading

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> None:
        """Attaches the model. What of it is on the device is found out while it runs.

        Args:
            device_to: Where to.
            extra_memory: Bytes that its weights may take beyond those they take; below 0: that they must give up.
            force_patch_weights: Patches are always applied.
        """
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
            except BaseException:
                self.detach()
                raise
        if extra_memory < 0:
            self.partially_unload(self.offload_device, -extra_memory)

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
        self.model_size()  # of what is stored: asked for later, it would count stand-ins
        with self.use_ejected():
            self.unpatch_hooks()
            loaded = loaded_of(self.model)
            if loaded is not None and loaded.device != device:
                self._unload()
                loaded = None
            if loaded is None:
                collector.postpone()
                loaded = Loaded(self.model, device, self.patches)
                _log.info("%s: %s", type(self.model).__name__, loaded.attachment)
            else:
                loaded.adopt()
                loaded.attachment.prioritize()
            self._cast()
            changed = loaded.patch(self.patches)
            if changed:
                _log.info("%s: the patches of %d weights changed", type(self.model).__name__, changed)
            self.model.device = device
            self.model.model_lowvram = False
            self.model.lowvram_patch_counter = 0
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)
            # It is about to run.
            loaded.attachment.prefetch()

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Gives device memory back that nothing uses at this moment. How many bytes."""
        return engine_for(self.load_device).make_room(min(memory_to_free, _MOST))

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Undoes patches of objects and, if asked, loading."""
        ModelPatcher.unpatch_model(self, device_to=None, unpatch_weights=False)
        if unpatch_weights:
            self._unload()
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.device = device_to

    # ---- accounting

    def loaded_size(self) -> int:
        """Bytes of device memory that the model's weights take at this moment."""
        loaded = loaded_of(self.model)
        return 0 if loaded is None else min(loaded.nbytes, self.model_size())

    def get_free_memory(self, device: torch.device) -> float:
        """Bytes that an operation may take: what is free, and what weights leave for it."""
        free = float(model_management.get_free_memory(device))
        return free if device.type == "cpu" else free + engine_for(device).stats()["held"]

    def memory_required(self, input_shape: Any) -> Any:
        """Bytes that a run needs beside the weights."""
        return ModelPatcher.memory_required(self, input_shape)

    # ---- pinned memory: there is none

    def register_load_device(self, device: torch.device) -> None:
        """ComfyUI keeps books on what dynamic patchers pin for a device."""
        self.model.dynamic_pins.setdefault(device, _NothingPinned())

    def loaded_ram_size(self) -> int:
        """0: a file's pages are the page cache's."""
        return 0

    def pinned_memory_size(self) -> int:
        """0."""
        return 0

    def partially_unload_ram(self, ram_to_unload: float, subsets: Any = None) -> int:
        """0 bytes given back."""
        return 0

    def unregister_inactive_pins(self, ram_to_unload: float, subsets: Any = None) -> int:
        """0 bytes given back."""
        return 0

    # ---- what others see of the weights

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """The stored weights, which stay valid when this model is unloaded, and their patches."""
        found: dict[str, Any] = super().get_key_patches(filter_prefix)
        loaded = loaded_of(self.model)
        stored = functools.partial(kept.used, self.model) if loaded is None else loaded.stored
        for key, patches in found.items():
            patches[0] = (stored(key, patches[0][0]), *patches[0][1:])
        return found

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> Any:
        """What is saved is read from the files and patched, weight by weight; the model is unloaded for it."""
        self._unload()
        kept.convert(self.model)
        return super().model_state_dict_for_saving(model, prefix)

    # ---- weight hooks, which change weights in the middle of a run: ComfyUI takes get_non_dynamic_delegate for them

    def patch_hook_weight_to_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses."""
        self._refuse_hooks()

    def patch_cached_hook_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses."""
        self._refuse_hooks()

    def _refuse_hooks(self) -> NoReturn:
        raise RuntimeError(
            "weight hooks change weights while a model runs, which attached weights do not allow; load the model with its "
            f"loader's disable_dynamic, or start without --native: {type(self.model).__name__}"
        )

    def _unload(self) -> None:
        loaded = loaded_of(self.model)
        if loaded is not None:
            loaded.unload()

    def _cast(self) -> None:
        """Has layers cast their weights where ComfyUI would, which loads the whole model."""
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            wrappers = {
                kind: self.weight_wrapper_patches.get(f"{name}.{kind}") for kind in ("weight", "bias")
            }
            # What a module sets goes through all that torch asks of it, for some hundreds of them.
            if _was_loaded(module) or any(wrappers.values()):
                wipe_lowvram_weight(module)
            module.__dict__["comfy_force_cast_weights"] = self.force_cast_weights
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            for kind, functions in wrappers.items():
                if functions:
                    getattr(module, f"{kind}_function").extend(functions)


def _was_loaded(module: torch.nn.Module) -> bool:
    """Whether a module has something of a load before."""
    functions = [getattr(module, f"{kind}_function", None) for kind in ("weight", "bias")]
    return hasattr(module, "prev_comfy_cast_weights") or any(functions)


class _NothingPinned(dict[str, Any]):
    """ComfyUI's books on a model's pinned memory, in which nothing is ever entered."""

    def __init__(self) -> None:
        super().__init__(active=False, current_prompt=False)

    def __setitem__(self, name: str, value: Any) -> None:
        pass

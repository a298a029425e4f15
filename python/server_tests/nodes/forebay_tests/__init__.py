"""Nodes for the test of the server: text without a text encoder, and a model on Forebay's own weights."""

import torch

import forebay

BUDGET = 16 << 20


class RandomConditioning:
    """What a text encoder would say."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        torch.manual_seed(seed)
        return ([[torch.randn(1, 64, 4096), {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]],)


class StreamedLayers:
    """Passes an image on, after a pass of a model that does not fit into the engine's budget."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "passes": ("INT", {"default": 1})}}

    kept = None

    def run(self, image, passes):
        if StreamedLayers.kept is None:
            model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(12)))
            attachment = forebay.attach(model.requires_grad_(False), "host", name="streamed layers")
            StreamedLayers.kept = model, attachment
        model, _ = StreamedLayers.kept
        forebay.set_budget(BUDGET, "host")
        for _ in range(passes):
            model(torch.randn(1, 1024))
        return (image,)


NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning, "StreamedLayers": StreamedLayers}

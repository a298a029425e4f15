"""Real architectures from transformers, with random weights."""

from __future__ import annotations

import pytest
import torch
from support import MIB, TORCH_DEVICE, move, press, randomize, reference, same

import forebay

transformers = pytest.importorskip("transformers")


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=1500, hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1024
    )
    return transformers.BertModel(config)


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1500,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=1024,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(params=[bert, llama], ids=["bert", "llama"])
def model(request) -> torch.nn.Module:
    made = request.param()
    buffers = {name: buffer.clone() for name, buffer in made.named_buffers()}
    randomize(made)
    for name, buffer in made.named_buffers():
        buffer.copy_(buffers[name])
    return made


@pytest.mark.parametrize("budget", [64, 8])
def test_bit_identical(model, budget, engine) -> None:
    inputs = move({"input_ids": torch.randint(0, 1500, (2, 11)), "attention_mask": torch.ones(2, 11).long()})
    inputs["attention_mask"][1, 7:] = 0
    expected = reference(model)(**inputs)[0]
    with forebay.attach(model, engine(budget), page_size=2 * MIB) as attachment:
        for _ in range(3):
            assert same(model(**inputs)[0], expected)
        press(attachment.engine)
        assert same(model(**inputs)[0], expected)
        assert model.device == TORCH_DEVICE
        assert model.dtype == torch.float32


def test_generation(engine) -> None:
    model = llama().eval()
    tokens = move(torch.randint(0, 1500, (1, 4)))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = reference(model).generate(tokens, **how)
    with forebay.attach(model, engine(8), page_size=2 * MIB):
        assert torch.equal(model.generate(tokens, **how), expected)


def test_saved_while_attached(model, engine, tmp_path) -> None:
    with forebay.attach(model, engine(8), page_size=2 * MIB):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))

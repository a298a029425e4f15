"""Modules of every kind, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, tuple[Any, ...]]
ZOO: dict[str, Callable[[], Made]] = {}


def entry(make: Callable[[], Made]) -> Callable[[], Made]:
    ZOO[make.__name__] = make
    return make


class Calls(nn.Module):
    """Calls a module's parts in an order of its own."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


@entry
def linear() -> Made:
    return nn.Sequential(nn.Linear(512, 1536), nn.GELU(), nn.Linear(1536, 512, bias=False)), (
        torch.randn(3, 512),
    )


@entry
def bilinear() -> Made:
    return nn.Bilinear(64, 64, 128), (torch.randn(3, 64), torch.randn(3, 64))


@entry
def conv1d() -> Made:
    return nn.Sequential(nn.Conv1d(256, 512, 3), nn.Conv1d(512, 256, 3, groups=2)), (torch.randn(2, 256, 20),)


@entry
def conv2d() -> Made:
    return nn.Sequential(nn.Conv2d(128, 512, 3, padding=1), nn.Conv2d(512, 128, 3, padding="same")), (
        torch.randn(1, 128, 8, 8),
    )


@entry
def conv_transposed() -> Made:
    return nn.Sequential(
        nn.ConvTranspose1d(256, 512, 4, 2), nn.Unflatten(1, (64, 8)), nn.ConvTranspose2d(64, 32, 3)
    ), (torch.randn(2, 256, 7),)


@entry
def conv_channels_last() -> Made:
    module = nn.Sequential(nn.Conv2d(128, 512, 3, padding=1), nn.Conv2d(512, 128, 3))
    return module.to(memory_format=torch.channels_last), (
        torch.randn(1, 128, 8, 8).to(memory_format=torch.channels_last),
    )


@entry
def embedding_tied_to_head() -> Made:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(tokens)))

    module = Calls(
        forward,
        table=nn.Embedding(1000, 768, padding_idx=3),
        body=nn.Linear(768, 768),
        head=nn.Linear(768, 1000, bias=False),
    )
    module.head.weight = module.table.weight
    return module, (torch.randint(0, 1000, (2, 9)),)


@entry
def embedding_bag() -> Made:
    return nn.Sequential(nn.EmbeddingBag(3000, 512, mode="mean"), nn.Linear(512, 64)), (
        torch.randint(0, 3000, (4, 6)),
    )


@entry
def norms() -> Made:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.group(self.batch(x.transpose(1, 2)))
        return self.rms(self.layer(self.linear(x.transpose(1, 2))))

    return Calls(
        forward,
        batch=nn.BatchNorm1d(768),
        group=nn.GroupNorm(8, 768),
        linear=nn.Linear(768, 768),
        layer=nn.LayerNorm(768),
        rms=nn.RMSNorm(768),
    ), (torch.randn(2, 5, 768),)


@entry
def instance_norm() -> Made:
    return nn.Sequential(
        nn.Conv2d(64, 256, 3), nn.InstanceNorm2d(256, affine=True, track_running_stats=True)
    ), (torch.randn(1, 64, 9, 9),)


@entry
def lstm() -> Made:
    return nn.LSTM(256, 256, num_layers=2, bidirectional=True, batch_first=True), (torch.randn(2, 5, 256),)


@entry
def lstm_projected() -> Made:
    return nn.LSTM(256, 384, proj_size=128), (torch.randn(5, 2, 256),)


@entry
def gru() -> Made:
    return nn.GRU(384, 384, num_layers=2), (torch.randn(4, 2, 384),)


@entry
def rnn() -> Made:
    return nn.RNN(768, 768, nonlinearity="relu"), (torch.randn(4, 2, 768),)


@entry
def recurrent_cells() -> Made:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.gru(self.lstm(x)[0])

    return Calls(forward, lstm=nn.LSTMCell(256, 512), gru=nn.GRUCell(512, 256)), (torch.randn(3, 256),)


def _attention(**how: Any) -> Made:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.attention(x, x, x, need_weights=how.get("need_weights", True))

    options = {key: value for key, value in how.items() if key != "need_weights"}
    return Calls(forward, attention=nn.MultiheadAttention(512, 8, **options)), (torch.randn(4, 6, 512),)


@entry
def attention() -> Made:
    return _attention()


@entry
def attention_fast_path() -> Made:
    return _attention(batch_first=True, need_weights=False)


@entry
def attention_other_sizes() -> Made:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.attention(x, y, y)

    made = nn.MultiheadAttention(512, 4, kdim=256, vdim=256, add_bias_kv=True)
    return Calls(forward, attention=made), (torch.randn(4, 2, 512), torch.randn(3, 2, 256))


@entry
def encoder_layer() -> Made:
    return nn.TransformerEncoderLayer(384, 4, 768, batch_first=True), (torch.randn(2, 6, 384),)


@entry
def encoder_with_padding() -> Made:
    """Takes the nested tensors' path."""

    def forward(self: Any, x: torch.Tensor, padding: torch.Tensor) -> Any:
        return self.encoder(x, src_key_padding_mask=padding)

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(384, 4, 768, batch_first=True), 3)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    return Calls(forward, encoder=encoder), (torch.randn(2, 6, 384), padding)


@entry
def decoder() -> Made:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(256, 4, 512), 2), (
        torch.randn(5, 2, 256),
        torch.randn(7, 2, 256),
    )


@entry
def half() -> Made:
    return nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512)).half(), (torch.randn(3, 1024).half(),)


@entry
def bfloat16() -> Made:
    return nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512)).bfloat16(), (
        torch.randn(3, 1024).bfloat16(),
    )


@entry
def float8_storage() -> Made:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))

    weight = nn.Parameter(torch.randn(2048, 1024).to(torch.float8_e4m3fn), requires_grad=False)
    return Calls(forward, weight=weight), (torch.randn(2, 1024),)


@entry
def transposed_weight() -> Made:
    module = nn.Linear(1024, 768)
    module.weight = nn.Parameter(torch.randn(1024, 768).t(), requires_grad=False)
    return module, (torch.randn(2, 1024),)


@entry
def strided_weight() -> Made:
    """A part of a larger tensor, and one element seen many times."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.part) + self.scale

    part = nn.Parameter(torch.randn(1024, 2048)[:, 512:1024], requires_grad=False)
    scale = nn.Parameter(torch.randn(1).expand(1024), requires_grad=False)
    return Calls(forward, part=part, scale=scale), (torch.randn(2, 512),)


@entry
def weight_norm() -> Made:
    parametrize = nn.utils.parametrizations.weight_norm
    return nn.Sequential(parametrize(nn.Linear(768, 768)), nn.Linear(768, 768)), (torch.randn(2, 768),)


@entry
def parameter_containers() -> Made:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for weight in self.items:
            x = x @ weight
        return x @ self.named["last"]

    items = nn.ParameterList(nn.Parameter(torch.randn(512, 512)) for _ in range(3))
    named = nn.ParameterDict({"last": nn.Parameter(torch.randn(512, 512))})
    return Calls(forward, items=items, named=named), (torch.randn(2, 512),)

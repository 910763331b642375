"""The LayerNorm Conformer as it is usually exported for streaming: what a deployment without this project starts from.

The layout is WeNet's: attention over (B, H, T, d_k) with a product for the keys and another one for the positions, which go
through their linear in every chunk; pointwise and depthwise convolutions as Conv1d between transposes; one stacked cache of
keys and values and one of the convolutions. It answers as `StreamingGraph` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.lower.graph import HIDDEN
from edgefuse.model import Encoder
from edgefuse.model.attention import Attention
from edgefuse.model.fusionformer import Block, Convolution, Subsampling
from edgefuse.model.streaming import Context, positions_within
from edgefuse.values import Entry, Streaming, TensorSpec

CACHES = ("past", "history", "attention", "convolution")


class PlainGraph(nn.Module):
    """features (1, 4 chunk, mels), length (1,), caches -> logits (1, chunk, vocabulary_size), caches for the next chunk.

    The caches: `past` (1,), `history` (1, 3, mels), `attention` (layers, H, left, 2 d_k), `convolution` (layers, 1, w, k - 1).
    """

    window: Tensor
    table: Tensor

    def __init__(self, encoder: Encoder, chunk: int, left: int) -> None:
        """Build it from a Conformer whose constant factors are not folded."""
        super().__init__()
        self.encoder, self.chunk, self.left = encoder, chunk, left
        blocks = [block.convolution for block in encoder.blocks if isinstance(block, Block)]
        self.expand = nn.ModuleList([_pointwise(each.pointwise1.linear) for each in blocks])
        self.project = nn.ModuleList([_pointwise(each.pointwise2.linear) for each in blocks])
        self.register_buffer("window", torch.arange(left + chunk, dtype=torch.float32) - left)
        self.register_buffer("table", positions_within(encoder.table, chunk, Context(chunk, left)))

    def forward(
        self, features: Tensor, length: Tensor, past: Tensor, history: Tensor, attention: Tensor, convolution: Tensor
    ) -> tuple[Tensor, ...]:
        """Answer for one chunk."""
        hidden = (torch.clamp(self.window + past, -1.0, 0.0) + torch.clamp(length - self.window - 1, -1.0, 0.0)) * HIDDEN
        frames = torch.cat((history, features), dim=1)
        x = _subsample(self.encoder.subsampling, frames)
        pasts, inputs = [], []
        for layer, block in enumerate(cast("Iterable[Block]", self.encoder.blocks)):
            x = x + 0.5 * _feed_forward(block.macaron, x)
            mixed, renewed = _attend(
                cast("Attention", block.attention), block.norm_attention(x, x), hidden, self.table, attention[layer : layer + 1]
            )
            pasts.append(renewed)
            x = x + mixed
            normed, pointwise = block.convolution.norm(x, x), (self.expand[layer], self.project[layer])
            convolved, renewed = _convolve(block.convolution, pointwise, normed, convolution[layer])
            inputs.append(renewed)
            x = x + convolved
            x = block.norm_final(x + 0.5 * _feed_forward(block.feed_forward, x), x)
        behind = torch.clamp(past + self.chunk, 0.0, float(self.left))
        caches = behind, frames[:, -self.encoder.subsampling.history :], torch.cat(pasts), torch.stack(inputs)
        return (self.encoder.ctc(self.encoder.norm(x, x)), *caches)


def plain_entry(encoder: Encoder, chunk: int, left: int, name: str) -> Entry:
    """The same as an entry of a program."""
    config = encoder.config
    shapes = (
        (1,),
        (1, encoder.subsampling.history, config.mel_bins),
        (config.layers, config.heads, left, 2 * config.head_dimension),
        (config.layers, 1, config.conv_width, config.kernel - 1),
    )
    given = {"features": (1, chunk * config.reduction, config.mel_bins), "length": (1,), **dict(zip(CACHES, shapes, strict=True))}
    taken = {"logits": (1, chunk, config.vocabulary_size), **{f"{n}_next": s for n, s in zip(CACHES, shapes, strict=True)}}
    inputs, outputs = (tuple(TensorSpec(n, s, "float32", "see PlainGraph") for n, s in each.items()) for each in (given, taken))
    inputs = (replace(inputs[0], frame_ms=config.frame_ms), *inputs[1:])
    streaming = Streaming(chunk, left, config.frame_ms, {n: f"{n}_next" for n in CACHES})
    graph = PlainGraph(encoder, chunk, left).eval().requires_grad_(requires_grad=False)
    return Entry(name, graph, inputs, outputs, streaming)


def _subsample(subsampling: Subsampling, frames: Tensor) -> Tensor:
    x = frames.unsqueeze(1)
    for each in subsampling.convolutions:
        x = F.relu(each.conv(x))
    return cast("Tensor", subsampling.linear.linear(x.permute(0, 2, 3, 1).flatten(2)))


def _feed_forward(module: nn.Module, x: Tensor) -> Tensor:
    return cast("Tensor", module(x, x))  # the mask is for batch norms only


def _attend(module: Attention, x: Tensor, hidden: Tensor, table: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """(q + u) k' + (q + v) p' over the cached keys and values (1, H, left, 2 d_k) and the chunk's."""
    q, k, v = (_heads(module, layer.linear(x)) for layer in (module.query, module.key, module.value))
    both = torch.cat((cache, torch.cat((k, v), dim=-1)), dim=2)
    keys, values = both.chunk(2, dim=-1)
    positions = _heads(module, module.position.linear(table))
    scores = (q + module.u[:, None]) @ keys.transpose(-2, -1) + (q + module.v[:, None]) @ positions.transpose(-2, -1)
    mixed = torch.softmax(scores * module.scale + hidden, dim=-1) @ values
    return module.output.linear(mixed.transpose(1, 2).flatten(2)), both[:, :, x.shape[1] :]


def _heads(module: Attention, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], module.heads, module.head_dimension).transpose(1, 2)


def _pointwise(source: nn.Linear) -> nn.Conv1d:
    """A linear as the Conv1d that it usually is."""
    conv = nn.Conv1d(source.in_features, source.out_features, 1)
    conv.load_state_dict({"weight": source.weight.unsqueeze(-1), "bias": source.bias})
    return conv


def _convolve(module: Convolution, pointwise: tuple[nn.Module, nn.Module], x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Conv1d over (1, C, T), after the last inputs of the depthwise one (1, w, k - 1)."""
    (expand, project), depthwise = pointwise, module.depthwise
    gated = F.glu(expand(x.transpose(1, 2)), dim=1)
    inputs = torch.cat((cache, gated), dim=2)
    mixed = depthwise.norm(depthwise.conv(inputs).transpose(1, 2), x).transpose(1, 2)
    return project(module.activation(mixed)).transpose(1, 2), inputs[:, :, x.shape[1] :]

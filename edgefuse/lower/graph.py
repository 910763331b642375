"""The deployment graphs, in the layouts that are fastest on all three runtimes: an utterance of a fixed length, or a chunk.

Every rewrite is exact:

- attention of batch 1 as (H, T, d_k), two batched products and no expanded axis;
- k + p and the key bias of the positions as constants of the fixed length;
- pointwise convolutions as linears; the depthwise one as conv2d over (1, C, 1, T), which needs no transpose in TFLite;
- the subsampling's flatten follows channels-last, as the model's own weights do;
- no softmax over the vocabulary: the best token is the same.

The utterance may be shorter than the graph: `length` hides the keys behind its end, and because every convolution is causal
nothing else of the padding can reach a valid frame.

A chunk has caches beside it, one tensor per layer and kind, each given back as the next chunk wants it. Keys are cached without
their positions, which count from the first frame of the chunk and so move with every chunk.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder
from edgefuse.model.attention import Attention
from edgefuse.model.config import SUBSAMPLING_HISTORY
from edgefuse.model.fusionformer import Block, Convolution, FeedForward, Subsampling
from edgefuse.model.layers import NormedConv2d, NormedLinear
from edgefuse.model.normalization import BatchNorm, LayerNorm, NoNorm
from edgefuse.model.streaming import Context, positions_within

HIDDEN = 10_000.0  # subtracted from the score of a hidden key: exp(-10000) is zero, and the value fits fp16


class Point(nn.Module):
    """A value whose range can be observed and whose bits can be fewer; it computes nothing.

    `into` are the linears and convolutions beside it in the same module that take it, `of` the one that makes it, a ReLU that
    runtimes fuse into it included; `line` is its own line in a scheme, if it has one.
    """

    def __init__(self, *into: str, of: str = "", line: str = "") -> None:
        """Name what is on either side."""
        super().__init__()
        self.into, self.of, self.line = into, of, line

    def forward(self, x: Tensor) -> Tensor:
        """The value itself."""
        return x


class Positions(nn.Module):
    """What attention adds to the keys: a constant (1, T, d), whose bits can be fewer."""

    p: Tensor

    def __init__(self, p: Tensor) -> None:
        """Keep it."""
        super().__init__()
        self.register_buffer("p", p)

    def forward(self) -> Tensor:
        """The constant itself."""
        return self.p


class DeploymentGraph(nn.Module):
    """features (1, 4T, mels), length (1,) -> logits (1, T, vocabulary_size).

    Takes any encoder: a folded FusionFormer leaves no norm in it; an unfolded one, or a Conformer, is built with the same
    layouts, so that a comparison compares the norms.
    """

    last_frame: Tensor
    score: Tensor

    def __init__(self, encoder: Encoder, frames: int) -> None:
        """Build it from an encoder for T encoder frames; weights are shared with the encoder, not copied."""
        super().__init__()
        table = encoder.table[:, :frames]
        self.subsampling = _Subsampling(encoder.subsampling)
        self.blocks = nn.ModuleList([_Block(block, table) for block in encoder.blocks if isinstance(block, Block)])
        self.head = _Head(encoder)
        self.register_buffer("last_frame", torch.arange(1.0, frames + 1)[None, None])
        self.register_buffer("score", torch.tensor([HIDDEN]))  # a number in the code would be cast in an fp16 graph

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        """Logits of one utterance; frames behind `length` are meaningless."""
        hidden = torch.clamp(length - self.last_frame, -1.0, 0.0) * self.score  # (1, 1, T): 0 where valid, -10000 where not
        x = self.subsampling(F.pad(features, (0, 0, SUBSAMPLING_HISTORY, 0)))
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(x)  # type: ignore[no-any-return]


class StreamingGraph(nn.Module):
    """features (1, 4 chunk, mels), length (1,), caches -> logits (1, chunk, vocabulary_size), caches for the next chunk.

    The caches, all zeros at the start of an utterance: `past` (1,), how many of the cached frames there are by now; the last
    feature frames (1, 3, mels); and per layer keys and values (1, left, d) and the convolution's last inputs (1, kernel - 1, w).
    After a chunk that is shorter than the graph, the last one, the caches are meaningless.
    """

    first_frame: Tensor
    last_frame: Tensor
    score: Tensor
    step: Tensor

    def __init__(self, encoder: Encoder, chunk: int, left: int) -> None:
        """Build it from an encoder for chunks after a past, both in encoder frames; weights are shared, not copied."""
        super().__init__()
        self.left = left
        reach = left + chunk
        self.subsampling = _Subsampling(encoder.subsampling)
        table = positions_within(encoder.table, reach, Context(chunk, left))
        self.blocks = nn.ModuleList([_Block(block, table) for block in encoder.blocks if isinstance(block, Block)])
        self.head = _Head(encoder)
        frames = torch.arange(reach, dtype=torch.float32)[None, None] - left  # 0 is the chunk's first
        self.register_buffer("first_frame", frames)
        self.register_buffer("last_frame", frames + 1)
        self.register_buffer("score", torch.tensor([HIDDEN]))
        self.register_buffer("step", torch.tensor([float(chunk)]))

    def forward(self, features: Tensor, length: Tensor, past: Tensor, history: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Logits of one chunk, those behind `length` meaningless, and the next caches in the order of the given ones."""
        before = torch.clamp(self.first_frame + past, -1.0, 0.0)  # -1 where nothing has been said yet
        behind = torch.clamp(length - self.last_frame, -1.0, 0.0)  # -1 where nothing is said any more
        hidden = (before + behind) * self.score
        frames = torch.cat((history, features), dim=1)
        x = self.subsampling(frames)
        following = [torch.clamp(past + self.step, 0.0, float(self.left)), frames[:, -SUBSAMPLING_HISTORY:]]
        blocks = cast("Iterable[_Block]", self.blocks)
        for block, keys, values, inputs in zip(blocks, caches[::3], caches[1::3], caches[2::3], strict=True):
            x, *renewed = block.stream(x, hidden, keys, values, inputs)
            following += renewed
        return (self.head(x), *following)


class _Head(nn.Module):
    def __init__(self, source: Encoder) -> None:
        super().__init__()
        self.norm, self.ctc = _norm(source.norm), source.ctc
        self.encoded, self.logits = Point("ctc"), Point(of="ctc", line="logits")

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.ctc(self.encoded(self.norm(x))))  # type: ignore[no-any-return]


class _Subsampling(nn.Module):
    def __init__(self, source: Subsampling) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv2d(source.conv1), _conv2d(source.conv2)
        self.linear = _linear(source.linear)
        self.scale = source.scale
        self.features, self.first = Point("conv1", line="features"), Point("conv2", of="conv1")
        self.second, self.flat, self.embedded = Point(of="conv2"), Point("linear"), Point(of="linear")

    def forward(self, frames: Tensor) -> Tensor:
        """(1, SUBSAMPLING_HISTORY + 4T, mels) to (1, T, d)."""
        x = self.features(frames.reshape(1, 1, frames.shape[1], frames.shape[2]))
        x = self.first(F.relu(self.conv1(x)))
        x = self.second(F.relu(self.conv2(x))).permute(0, 2, 3, 1)
        x = self.flat(x.reshape(1, x.shape[1], x.shape[2] * x.shape[3]))
        embedded: Tensor = self.embedded(self.linear(x))
        return embedded if self.scale == 1.0 else embedded * self.scale


class _Block(nn.Module):
    def __init__(self, source: Block, table: Tensor) -> None:
        super().__init__()
        self.macaron, self.feed_forward = _FeedForward(source.macaron), _FeedForward(source.feed_forward)
        self.norm_attention = _norm(source.norm_attention)
        self.attention = _Attention(source.attention, table)
        self.convolution = _Convolution(source.convolution)
        self.norm_final = _norm(source.norm_final)
        self.half_step = source.half_step
        self.sum1, self.sum2, self.sum3, self.sum4 = (Point(line="residual") for _ in range(4))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = self.sum1(x + self._step(self.macaron(x)))
        x = self.sum2(x + self.attention(self.norm_attention(x), hidden))
        x = self.sum3(x + self.convolution(x))
        x = self.sum4(x + self._step(self.feed_forward(x)))
        return self.norm_final(x)  # type: ignore[no-any-return]

    def stream(self, x: Tensor, hidden: Tensor, keys: Tensor, values: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        """The same for a chunk: x, and the caches as the next chunk wants them."""
        x = self.sum1(x + self._step(self.macaron(x)))
        mixed, keys, values = self.attention.stream(self.norm_attention(x), hidden, keys, values)
        x = self.sum2(x + mixed)
        convolved, inputs = self.convolution.stream(x, inputs)
        x = self.sum3(x + convolved)
        x = self.sum4(x + self._step(self.feed_forward(x)))
        return self.norm_final(x), keys, values, inputs

    def _step(self, x: Tensor) -> Tensor:
        return x if self.half_step == 1.0 else x * self.half_step


class _FeedForward(nn.Module):
    def __init__(self, source: FeedForward) -> None:
        super().__init__()
        self.norm, self.activation = _norm(source.norm), source.activation
        self.w1, self.w2 = _linear(source.w1), _linear(source.w2)
        self.input, self.output = Point("w1"), Point(of="w2")
        self.expanded, self.hidden = _around(source.activation, "w1", "w2")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(self.activation(self.expanded(self.w1(self.input(self.norm(x))))))
        return self.output(self.w2(hidden))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """softmax(q (k + p)' + bias) v, with p and the bias of each key as constants.

    The three linears take their input each through the same point: ExecuTorch cuts a delegate in two where they share one that
    is quantized.
    """

    bias: Tensor
    u: Tensor

    def __init__(self, source: Attention, table: Tensor) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            _linear(layer) for layer in (source.query, source.key, source.value, source.output)
        )
        self.heads, self.head_dimension, self.scale = source.heads, source.head_dimension, source.scale
        self.relative = source.relative
        self.input, self.mixed, self.mix = Point("query", "key", "value"), Point("output"), Point(of="output")
        self.queries, self.keys, self.values = Point(of="query"), Point(of="key"), Point(of="value")
        self.asked, self.placed, self.valued, self.scores, self.weights, self.product = (
            Point(line="attention") for _ in range(6)
        )
        with torch.no_grad():
            if self.relative:
                p = source.position(table, torch.ones(table.shape[:2], dtype=torch.bool))
                self.positions = Positions(p.contiguous())
                self.register_buffer("bias", source.key_bias(p)[0].contiguous())
            if self.relative and not source.folded:
                self.register_buffer("u", source.u.flatten().clone())

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self._attend(x, self.keys(self.key(self.input(x))), self.values(self.value(self.input(x))), hidden)

    def stream(self, x: Tensor, hidden: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a chunk, over the cached keys and values (1, left, d) as well: the mix, and both caches renewed."""
        keys = torch.cat((keys, self.keys(self.key(self.input(x)))), dim=1)
        values = torch.cat((values, self.values(self.value(self.input(x)))), dim=1)
        return self._attend(x, keys, values, hidden), keys[:, x.shape[1] :], values[:, x.shape[1] :]

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        if self.relative:
            keys, hidden = keys + self.positions(), hidden + self.bias
        queries, keys = self.asked(self._split(self._queries(x))), self.placed(self._split(keys).transpose(1, 2))
        scores = self.scores(torch.bmm(queries, keys)) + hidden
        weights = self.weights(torch.softmax(scores, dim=-1))
        product = self.product(torch.bmm(weights, self.valued(self._split(values))))
        mixed = self.mixed(product.transpose(0, 1).reshape(x.shape))
        return self.mix(self.output(mixed))  # type: ignore[no-any-return]

    def _queries(self, x: Tensor) -> Tensor:
        q: Tensor = self.queries(self.query(self.input(x)))
        q = q + self.u if hasattr(self, "u") else q
        return q if self.scale == 1.0 else q * self.scale

    def _split(self, x: Tensor) -> Tensor:
        """(1, T, d) to (H, T, d_k)."""
        return x.reshape(x.shape[1], self.heads, self.head_dimension).transpose(0, 1)


class _Convolution(nn.Module):
    silence: Tensor

    def __init__(self, source: Convolution) -> None:
        super().__init__()
        self.norm, self.gate, self.activation = _norm(source.norm), source.gate, source.activation
        self.pointwise1, self.pointwise2 = _linear(source.pointwise1), _linear(source.pointwise2)
        self.depthwise = _as_conv2d(source.depthwise.conv)
        self.depthwise_norm = _norm(source.depthwise.norm)
        conv = source.depthwise.conv
        self.register_buffer("silence", torch.zeros(1, source.depthwise.history, conv.in_channels, dtype=conv.weight.dtype))
        self.input, self.inputs, self.output = Point("pointwise1"), Point("depthwise"), Point(of="pointwise2")
        self.expanded, self.gated = _around(source.gate, "pointwise1")
        self.filtered, self.activated = Point(of="depthwise"), Point("pointwise2")

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x, self.silence)[0]

    def stream(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a chunk, after the last inputs of the depthwise convolution (1, kernel - 1, w); and these renewed."""
        inputs = torch.cat((inputs, self._inputs(x)), dim=1)
        return self._convolve(inputs), inputs[:, x.shape[1] :]

    def _inputs(self, x: Tensor) -> Tensor:
        return self.gated(self.gate(self.expanded(self.pointwise1(self.input(self.norm(x))))))  # type: ignore[no-any-return]

    def _convolve(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.inputs(x.reshape(1, 1, x.shape[1], x.shape[2]).permute(0, 3, 1, 2)))
        if isinstance(self.depthwise_norm, nn.Identity):
            x = self.activation(x)  # before the axes move back: runtimes fuse it into the convolution
        x = self.filtered(x).permute(0, 2, 3, 1).reshape(1, x.shape[3], x.shape[1])
        if not isinstance(self.depthwise_norm, nn.Identity):
            x = self.activation(self.depthwise_norm(x))
        return self.output(self.pointwise2(self.activated(x)))  # type: ignore[no-any-return]


class _ChannelsLastBatchNorm(nn.Module):
    """A batch norm that was not folded, over (1, T, C)."""

    def __init__(self, source: BatchNorm) -> None:
        super().__init__()
        self.source = nn.BatchNorm1d(source.num_features, eps=source.eps)
        self.source.load_state_dict(source.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.source(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class _LayerNorm(nn.LayerNorm):
    """A layer norm, over (1, T, C); without gain and shift where the layers behind it have absorbed them."""


def _norm(source: nn.Module) -> nn.Module:
    """A norm of the model as a norm of the deployment graph."""
    if isinstance(source, NoNorm):
        return nn.Identity()
    if isinstance(source, BatchNorm):
        return _ChannelsLastBatchNorm(source)
    assert isinstance(source, LayerNorm), "a norm is one of three"  # noqa: S101 - `edgefuse.model.layers` makes no other
    absorbed = bool((source.weight == 1).all() and (source.bias == 0).all())
    norm = _LayerNorm(source.normalized_shape, eps=source.eps, elementwise_affine=not absorbed)
    if not absorbed:
        norm.load_state_dict(source.state_dict())
    return norm


def _around(activation: nn.Module, of: str, *into: str) -> tuple[nn.Module, Point]:
    """The points before and behind an activation; runtimes fuse a ReLU into what is before it, and there is one point then."""
    if isinstance(activation, nn.ReLU | nn.Identity):
        return nn.Identity(), Point(*into, of=of)
    return Point(of=of), Point(*into)


def _linear(source: NormedLinear) -> nn.Module:
    return source.linear if isinstance(source.norm, NoNorm) else nn.Sequential(source.linear, _norm(source.norm))


def _conv2d(source: NormedConv2d) -> nn.Module:
    if isinstance(source.norm, NoNorm):
        return source.conv
    norm = nn.BatchNorm2d(source.norm.num_features, eps=source.norm.eps)  # type: ignore[arg-type]
    norm.load_state_dict(source.norm.state_dict())
    return nn.Sequential(source.conv, norm)


def _as_conv2d(source: nn.Conv1d) -> nn.Conv2d:
    """The same depthwise convolution over (1, C, 1, T)."""
    size, dtype = (1, source.kernel_size[0]), source.weight.dtype
    conv = nn.Conv2d(source.in_channels, source.out_channels, size, groups=source.groups, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(source.weight.unsqueeze(2))
        conv.bias.copy_(source.bias)  # type: ignore[union-attr, arg-type]
    return conv

"""The deployment graphs, in the layouts that are fastest on all three runtimes: an utterance of a fixed length, or a chunk.

Every rewrite is exact:

- attention of batch 1 as (H, T, d_k), two batched products and no expanded axis;
- k + p and the key bias of the positions as constants of the fixed length;
- pointwise convolutions as linears; the depthwise one as conv2d over (1, C, 1, T), which needs no transpose in TFLite;
- the subsampling's flatten follows channels-last, as the model's own weights do;
- no softmax over the vocabulary: the best token is the same.

The utterance may be shorter than the graph: what stands behind `length` is multiplied by 0 before anything hears it, and its keys
are hidden; because every convolution is causal nothing else of the padding can reach a valid frame. Hiding alone is not enough:
without a norm on the residual stream loud padding can grow from block to block until its scores outweigh what hides them.

A chunk has caches beside it, one tensor per layer and kind, each given back as the next chunk wants it. Keys are cached without
their positions, which count from the first frame of the chunk and so move with every chunk. Frames that are ahead of the chunk
are computed with it and leave nothing in a cache: they come again.

Blocks that are one and the same in the encoder are one module here, so that every runtime stores their weights once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.fold.algebra import affine_of
from edgefuse.model import Encoder
from edgefuse.model.attention import Attention
from edgefuse.model.config import BlockShape
from edgefuse.model.fusionformer import Block, Convolution, FeedForward, Subsampling
from edgefuse.model.layers import NormedConv2d, NormedLinear
from edgefuse.model.normalization import BatchNorm, LayerNorm, NoNorm, UnifiedNorm
from edgefuse.model.performer import OFFSET, Performer
from edgefuse.model.streaming import FULL, Context, positions_within

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


class Hidden(nn.Module):
    """What is added to the scores of the keys of a block: 0 where they are valid, -10000 where not, (1, 1, reach).

    Two blocks that look equally far back, at the same frame rate, share one. A Performer has no scores: it counts its keys, those
    of the chunk alone, as 1 where they are valid and 0 where not. So does the graph with what it is given.
    """

    first_frame: Tensor
    last_frame: Tensor
    score: Tensor
    one: Tensor
    rate: Tensor

    def __init__(self, context: Context, frames: int, rate: int, *, counts: bool) -> None:
        """For `frames` keys of a block's own, `rate` per encoder frame of the output; without a chunk there is no past."""
        super().__init__()
        self.counts = counts
        reach, left = context.reach(frames), context.left or 0
        first = torch.arange(reach, dtype=torch.float32)[None, None] - left  # 0 is the chunk's first
        self.chunked, self.is_faster = context.chunk is not None, rate > 1
        if self.chunked:
            self.register_buffer("first_frame", first)
        self.register_buffer("last_frame", first + 1)
        if counts:
            self.register_buffer("one", torch.ones(1))
        else:
            self.register_buffer("score", torch.tensor([HIDDEN]))  # a number in the code would be cast in an fp16 graph
        if self.is_faster:
            self.register_buffer("rate", torch.tensor([float(rate)]))

    def forward(self, length: Tensor, past: Tensor | None = None) -> Tensor:
        """`length` valid frames of the output; in a chunk also `past` cached ones."""
        hidden = torch.clamp(self._own(length) - self.last_frame, -1.0, 0.0)  # -1 where nothing is said any more
        if self.counts:
            return hidden + self.one
        if past is not None:
            hidden = torch.clamp(self.first_frame + self._own(past), -1.0, 0.0) + hidden  # -1 where nothing has been said yet
        return hidden * self.score

    def _own(self, count: Tensor) -> Tensor:
        return count * self.rate if self.is_faster else count


class _Network(nn.Module):
    """The modules of both graphs: blocks that are one in the encoder are one here, and so is what hides keys alike."""

    def _lay(self, encoder: Encoder, layers: Sequence[tuple[Block, BlockShape]], frames: int, context: Context) -> None:
        """Make them, for so many encoder frames at once."""
        shapes = [shape for _, shape in layers]
        self.contexts = [context.within(shape.frames, shape.left) for shape in shapes]
        owns = [frames * shape.frames for shape in shapes]
        made: dict[Block, int] = {}
        self.order = [made.setdefault(block, len(made)) for block, _ in layers]
        places = [self.order.index(number) for number in range(len(made))]
        self.blocks = nn.ModuleList([_Block(layers[i][0], encoder.table, shapes[i], owns[i], self.contexts[i]) for i in places])
        kinds: dict[tuple[Context, int, int, bool], int] = {}
        self.hiding: list[int | None] = []
        for shape, own, sees in zip(shapes, owns, self.contexts, strict=True):
            counts = shape.attention == "performer"
            kind = (FULL if counts else sees, own, shape.frames, counts)
            self.hiding.append(None if shape.attention == "none" else kinds.setdefault(kind, len(kinds)))
        self.counted = kinds.setdefault((FULL, frames, 1, True), len(kinds))
        self.hidden = nn.ModuleList([Hidden(c, own, rate, counts=counts) for c, own, rate, counts in kinds])

    def layers(self) -> list[tuple["_Block", int | None]]:
        """Each block in the order in which they run, and which `hidden` it wants."""
        blocks = [self.blocks[number] for number in self.order]
        return [(block, hiding) for block, hiding in zip(blocks, self.hiding, strict=True) if isinstance(block, _Block)]

    def hide(self, length: Tensor, past: Tensor | None = None) -> list[Tensor]:
        """What every block of a kind is told of its keys; of the kind `counted`, which encoder frames are valid."""
        return [each(length, past) for each in self.hidden]

    def valid(self, x: Tensor, hidden: list[Tensor]) -> Tensor:
        """What the graph is given, (1, rate T, w), with zeros behind its end."""
        counted = hidden[self.counted].transpose(1, 2)
        return (x.reshape(1, counted.shape[1], -1) * counted).reshape(x.shape)


class DeploymentGraph(_Network):
    """features (1, reduction T, mels), length (1,) -> logits (1, T, vocabulary_size); of a cascade those of its second pass.

    Takes any encoder: a folded FusionFormer leaves no norm in it; an unfolded one, or a Conformer, is built with the same
    layouts, so that a comparison compares the norms.
    """

    def __init__(self, encoder: Encoder, frames: int) -> None:
        """Build it from an encoder for T encoder frames; weights are shared with the encoder, not copied."""
        super().__init__()
        self.subsampling = _Subsampling(encoder.subsampling)
        self._lay(encoder, encoder.layers, frames, FULL)
        self.head = _second_head(encoder) if encoder.config.second_pass else _first_head(encoder)

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        """Logits of one utterance; frames behind `length` are meaningless."""
        hidden = self.hide(length)
        x = self.subsampling(F.pad(self.valid(features, hidden), (0, 0, self.subsampling.history, 0)))
        for block, hiding in self.layers():
            x = block(x, None if hiding is None else hidden[hiding])
        return self.head(x)  # type: ignore[no-any-return]


class SecondPassGraph(_Network):
    """encoded (1, T, d), length (1,) -> logits (1, T, vocabulary_size): the second pass over what the first one gave."""

    def __init__(self, encoder: Encoder, frames: int) -> None:
        """Build it from a cascade for T encoder frames; weights are shared with the encoder, not copied."""
        super().__init__()
        self._lay(encoder, encoder.second_pass, frames, FULL)
        self.head = _second_head(encoder)

    def forward(self, encoded: Tensor, length: Tensor) -> Tensor:
        """Logits of one utterance; frames behind `length` are meaningless."""
        hidden = self.hide(length)
        x = self.valid(encoded, hidden)
        for block, hiding in self.layers():
            x = block(x, None if hiding is None else hidden[hiding])
        return self.head(x)  # type: ignore[no-any-return]


class StreamingGraph(_Network):
    """features (1, reduction window, mels), length (1,), caches -> logits (1, chunk, vocabulary_size), caches for the next chunk.

    The window is the chunk and what is ahead of it. The caches, all zeros at the start of an utterance: `past` (1,), how many
    encoder frames have been spoken by now, up to the left context; the last feature frames (1, subsampling - 1, mels); and
    those of each block, as `caches_of` says. After a chunk that is shorter than the graph, the last one, the caches are
    meaningless. The first pass of a cascade also gives what the second one wants, (1, chunk, d), behind its logits.
    """

    step: Tensor

    def __init__(self, encoder: Encoder, context: Context) -> None:
        """Build it from an encoder for chunks after a limited past; weights are shared, not copied."""
        super().__init__()
        assert context.chunk is not None and context.left is not None, "a step has a chunk and a past"  # noqa: S101, PT018 - the callers' duty
        self.chunk, self.left, self.ahead = context.chunk, context.left, context.ahead
        self.features_ahead = context.ahead * encoder.config.reduction
        self.subsampling = _Subsampling(encoder.subsampling)
        self._lay(encoder, encoder.first_pass, context.window, context)
        self.head = _first_head(encoder)
        self.is_first_pass = encoder.config.second_pass > 0
        self.register_buffer("step", torch.tensor([float(self.chunk)]))

    def forward(self, features: Tensor, length: Tensor, past: Tensor, history: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Logits of one chunk, those behind `length` meaningless, and the next caches in the order of the given ones."""
        hidden = self.hide(length, past)
        frames = torch.cat((history, self.valid(features, hidden)), dim=1)
        x = self.subsampling(frames)
        history = _renewed(frames, features.shape[1], self.features_ahead)
        following = [torch.clamp(past + self.step, 0.0, float(self.left)), history]
        for block, hiding in self.layers():
            own, caches = caches[: block.caches], caches[block.caches :]
            x, *renewed = block.stream(x, None if hiding is None else hidden[hiding], *own)
            following += renewed
        x = x[:, : self.chunk] if self.ahead else x
        return (self.head(x), *((x,) if self.is_first_pass else ()), *following)


def _renewed(cached: Tensor, fresh: int, ahead: int) -> Tensor:
    """A cache behind which `fresh` frames stand, the last of them `ahead` of the chunk, as the next chunk wants it."""
    return cached[:, fresh - ahead : cached.shape[1] - ahead]


class _Head(nn.Module):
    def __init__(self, norm: nn.Module, ctc: nn.Linear) -> None:
        super().__init__()
        self.norm, self.ctc = _norm(norm), ctc
        self.encoded, self.logits = Point("ctc"), Point(of="ctc", line="logits")

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.ctc(self.encoded(self.norm(x))))  # type: ignore[no-any-return]


def _first_head(encoder: Encoder) -> _Head:
    return _Head(encoder.norm, encoder.ctc)


def _second_head(encoder: Encoder) -> _Head:
    return _Head(encoder.second_norm, encoder.second_ctc)


class _Subsampling(nn.Module):
    def __init__(self, source: Subsampling) -> None:
        super().__init__()
        self.history = source.history
        self.conv1, self.conv2 = _conv2d(source.convolutions[0]), _conv2d(source.convolutions[1])
        self.linear = _linear(source.linear)
        self.scale = source.scale
        self.features, self.first = Point("conv1", line="features"), Point("conv2", of="conv1")
        self.has_third = len(source.convolutions) == 3  # noqa: PLR2004 - by 8 it is three
        self.second = Point("conv3", of="conv2") if self.has_third else Point(of="conv2")
        if self.has_third:
            self.conv3, self.third = _conv2d(source.convolutions[2]), Point(of="conv3")
        self.flat, self.embedded = Point("linear"), Point(of="linear")

    def forward(self, frames: Tensor) -> Tensor:
        """(1, history + rate T, mels) to (1, T, d)."""
        x = self.features(frames.reshape(1, 1, frames.shape[1], frames.shape[2]))
        x = self.first(F.relu(self.conv1(x)))
        x = self.second(F.relu(self.conv2(x)))
        if self.has_third:
            x = self.third(F.relu(self.conv3(x)))
        x = x.permute(0, 2, 3, 1)
        x = self.flat(x.reshape(1, x.shape[1], x.shape[2] * x.shape[3]))
        embedded: Tensor = self.embedded(self.linear(x))
        return embedded if self.scale == 1.0 else embedded * self.scale


class _Block(nn.Module):
    attention: "_Attention | _Performer"

    def __init__(self, source: Block, table: Tensor, shape: BlockShape, frames: int, context: Context) -> None:
        super().__init__()
        self.macaron, self.feed_forward = _FeedForward(source.macaron), _FeedForward(source.feed_forward)
        self.stride, self.attends = shape.stride, source.attends
        if self.attends:
            self.norm_attention = _norm(source.norm_attention)
            self.attention = _attention(source.attention, positions_within(table, frames, context), frames, context.ahead)
        convolution = _TwoPathConvolution if source.convolution.paths > 1 else _Convolution
        self.convolution = convolution(source.convolution, context.ahead // shape.stride)
        self.norm_final = _norm(source.norm_final)
        self.half_step = source.half_step
        self.sum1, self.sum2, self.sum3, self.sum4 = (Point(line="residual") for _ in range(4))

    @property
    def caches(self) -> int:
        """How many it has: two of softmax attention or one of a Performer's, and one of each path of the convolution."""
        attention = (1 if isinstance(self.attention, _Performer) else 2) if self.attends else 0
        return attention + self.convolution.paths

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """`hidden` is what its `Hidden` gives, or None where it has no attention."""
        x = self.sum1(x + self._step(self.macaron(x)))
        if hidden is not None:
            x = self.sum2(every(x, self.stride) + self.attention(self.norm_attention(x), hidden))
        x = self.sum3(x + self.convolution(x))
        x = self.sum4(x + self._step(self.feed_forward(x)))
        return self.norm_final(x)  # type: ignore[no-any-return]

    def stream(self, x: Tensor, hidden: Tensor | None, *caches: Tensor) -> tuple[Tensor, ...]:
        """The same for a chunk: x, and the caches as the next chunk wants them."""
        past, inputs = [*caches[: -self.convolution.paths]], [*caches[-self.convolution.paths :]]
        x = self.sum1(x + self._step(self.macaron(x)))
        if hidden is not None:
            mixed, *past = self.attention.stream(self.norm_attention(x), hidden, *past)
            x = self.sum2(every(x, self.stride) + mixed)
        convolved, *inputs = self.convolution.stream(x, *inputs)
        x = self.sum3(x + convolved)
        x = self.sum4(x + self._step(self.feed_forward(x)))
        return self.norm_final(x), *past, *inputs

    def _step(self, x: Tensor) -> Tensor:
        return x if self.half_step == 1.0 else x * self.half_step


def every(x: Tensor, stride: int) -> Tensor:
    """The last of every `stride` frames of (1, T, d), by a slice without a step: not every runtime has one with."""
    return x if stride == 1 else x.reshape(1, x.shape[1] // stride, stride * x.shape[2])[:, :, -x.shape[2] :]


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

    def __init__(self, source: Attention, table: Tensor, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.query, self.key, self.value, self.output = (
            _linear(layer) for layer in (source.query, source.key, source.value, source.output)
        )
        self.heads, self.head_dimension, self.scale = source.heads, source.head_dimension, source.scale
        self.relative, self.stride = source.relative, source.stride
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
        """The same for a window, over the cached keys and values (1, left, d) as well: the mix, and both caches renewed."""
        keys = torch.cat((keys, self.keys(self.key(self.input(x)))), dim=1)
        values = torch.cat((values, self.values(self.value(self.input(x)))), dim=1)
        past_keys, past_values = (_renewed(each, x.shape[1], self.ahead) for each in (keys, values))
        return self._attend(x, keys, values, hidden), past_keys, past_values

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        if self.relative:
            keys, hidden = keys + self.positions(), hidden + self.bias
        asking = every(x, self.stride)
        queries, keys = self.asked(self._split(self._queries(asking))), self.placed(self._split(keys).transpose(1, 2))
        scores = self.scores(torch.bmm(queries, keys)) + hidden
        weights = self.weights(torch.softmax(scores, dim=-1))
        product = self.product(torch.bmm(weights, self.valued(self._split(values))))
        mixed = self.mixed(product.transpose(0, 1).reshape(1, asking.shape[1], self.heads * self.head_dimension))
        return self.mix(self.output(mixed))  # type: ignore[no-any-return]

    def _queries(self, x: Tensor) -> Tensor:
        q: Tensor = self.queries(self.query(self.input(x)))
        q = q + self.u if hasattr(self, "u") else q
        return q if self.scale == 1.0 else q * self.scale

    def _split(self, x: Tensor) -> Tensor:
        """(1, T, d) to (H, T, d_k)."""
        return x.reshape(x.shape[1], self.heads, self.head_dimension).transpose(0, 1)


def _attention(source: Attention | Performer, table: Tensor, frames: int, ahead: int) -> "_Attention | _Performer":
    return _Performer(source, frames, ahead) if isinstance(source, Performer) else _Attention(source, table, ahead)


class _Performer(nn.Module):
    """phi(q)' S / phi(q)' z over the utterance, or over a cache and the chunk; S and z side by side as S' = sum phi(k) (v, 1)'.

    Over a whole utterance every key counts as 1 / T, which the ratio does not notice: the sums then fit fp16.
    """

    share: Tensor
    offset: Tensor
    ones: Tensor

    def __init__(self, source: Performer, frames: int, ahead: int) -> None:
        super().__init__()
        self.chunk, self.ahead = frames - ahead, ahead
        self.query, self.key, self.value, self.output = (
            _linear(layer) for layer in (source.query, source.key, source.value, source.output)
        )
        self.heads, self.head_dimension = source.heads, source.head_dimension
        self.input, self.mixed, self.mix = Point("query", "key", "value"), Point("output"), Point(of="output")
        self.queries, self.keys, self.values = Point(of="query"), Point(of="key"), Point(of="value")
        self.register_buffer("share", torch.tensor([1.0 / frames]))
        self.register_buffer("offset", torch.tensor([OFFSET]))
        self.register_buffer("ones", torch.ones(self.heads, frames, 1))

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        keys, values = self._counted(x, counted * self.share)
        return self._answer(x, torch.bmm(keys, values))

    def stream(self, x: Tensor, counted: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a window, after the cached S' (H, d_k, d_k + 1) of all before; and S' with the chunk's."""
        keys, values = self._counted(x, counted)
        if not self.ahead:
            sums = sums + torch.bmm(keys, values)
            return self._answer(x, sums), sums
        sums = sums + torch.bmm(keys[:, :, : self.chunk], values[:, : self.chunk])
        return self._answer(x, sums + torch.bmm(keys[:, :, self.chunk :], values[:, self.chunk :])), sums

    def _counted(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """phi(k) as (H, d_k, T), of the keys that count, and (v, 1) as (H, T, d_k + 1)."""
        k = self._phi(self.keys(self.key(self.input(x)))) * counted.transpose(1, 2)
        v = torch.cat((self._split(self.values(self.value(self.input(x)))), self.ones), dim=2)
        return self._split(k).transpose(1, 2), v

    def _answer(self, x: Tensor, sums: Tensor) -> Tensor:
        both = torch.bmm(self._split(self._phi(self.queries(self.query(self.input(x))))), sums)
        ratio = both[:, :, : self.head_dimension] / both[:, :, self.head_dimension :]
        mixed = self.mixed(ratio.transpose(0, 1).reshape(1, x.shape[1], self.heads * self.head_dimension))
        return self.mix(self.output(mixed))  # type: ignore[no-any-return]

    def _phi(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.offset

    def _split(self, x: Tensor) -> Tensor:
        """(1, T, width) to (H, T, d_k)."""
        return x.reshape(x.shape[1], self.heads, self.head_dimension).transpose(0, 1)


class _Convolution(nn.Module):
    silence: Tensor
    paths = 1

    def __init__(self, source: Convolution, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.norm, self.gate, self.activation = _norm(source.norm), source.gate, source.activation
        self.shift = source.shift
        self.pointwise1, self.pointwise2 = _linear(source.pointwise1), _linear(source.pointwise2)
        self.depthwise = _as_conv2d(source.depthwise.conv)
        self.depthwise_norm = _norm(source.depthwise.norm)
        self.is_folded = isinstance(self.depthwise_norm, nn.Identity)
        conv = source.depthwise.conv
        self.register_buffer("silence", torch.zeros(1, source.depthwise.history, conv.in_channels, dtype=conv.weight.dtype))
        self.input, self.inputs, self.output = Point("pointwise1"), Point("depthwise"), Point(of="pointwise2")
        self.expanded, self.gated = _around(source.gate, "pointwise1")
        self.filtered, self.activated = Point(of="depthwise"), Point("pointwise2")

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x, *[self.silence] * self.paths)[0]

    def stream(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same for a window, after the last inputs of each depthwise convolution (1, kernel - 1, w); and these renewed."""
        heard = [torch.cat(each, dim=1) for each in zip(inputs, self._inputs(self.norm(x)), strict=True)]
        mixed: Tensor = self.output(self.pointwise2(self.activated(self._convolve(*heard))))
        return mixed, *(_renewed(each, x.shape[1], self.ahead) for each in heard)

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        gated: Tensor = self.gated(self.gate(self.expanded(self.pointwise1(self.input(x)))))
        return (gated if self.shift is None else gated - self.shift,)

    def _convolve(self, *inputs: Tensor) -> Tensor:
        x = self.depthwise(self.inputs(_as_image(inputs[0])))
        if self.is_folded:
            x = self.activation(x)  # before the axes move back: runtimes fuse it into the convolution
        x = _as_sequence(self.filtered(x))
        return x if self.is_folded else self.activation(self.depthwise_norm(x))


class _TwoPathConvolution(_Convolution):
    paths = 2

    def __init__(self, source: Convolution, ahead: int) -> None:
        super().__init__(source, ahead)
        self.second_pointwise1 = _linear(source.second_pointwise1)
        self.second_depthwise = _as_conv2d(source.second_depthwise.conv)
        self.second_depthwise_norm = _norm(source.second_depthwise.norm)
        self.input = Point("pointwise1", "second_pointwise1")
        self.second_inputs, self.second_filtered = Point("second_depthwise"), Point(of="second_depthwise")
        self.second_gated = Point(of="second_pointwise1")

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return *super()._inputs(x), self.second_gated(self.gate(self.second_pointwise1(self.input(x))))

    def _convolve(self, *inputs: Tensor) -> Tensor:
        first = self.filtered(self.depthwise(self.inputs(_as_image(inputs[0]))))
        second = self.second_filtered(self.second_depthwise(self.second_inputs(_as_image(inputs[1]))))
        if self.is_folded:
            return _as_sequence(self.activation(first + second))
        x: Tensor = self.depthwise_norm(_as_sequence(first)) + self.second_depthwise_norm(_as_sequence(second))
        return self.activation(x)  # type: ignore[no-any-return]


def _as_image(x: Tensor) -> Tensor:
    """(1, T, C) to (1, C, 1, T)."""
    return x.reshape(1, 1, x.shape[1], x.shape[2]).permute(0, 3, 1, 2)


def _as_sequence(x: Tensor) -> Tensor:
    """(1, C, 1, T) to (1, T, C)."""
    return x.permute(0, 2, 3, 1).reshape(1, x.shape[3], x.shape[1])


class _ChannelsLastBatchNorm(nn.Module):
    """A norm with running statistics that was not folded, over (1, T, C): all kinds are a batch norm in evaluation."""

    def __init__(self, source: BatchNorm | UnifiedNorm) -> None:
        super().__init__()
        self.source = nn.BatchNorm1d(len(source.weight), eps=source.eps)
        if type(source) is BatchNorm:
            self.source.load_state_dict(source.state_dict())
            return
        scale, shift = affine_of(source.state_dict(), source.eps)
        with torch.no_grad():  # the mean is 0 and the variance 1, as they are when it is made
            self.source.weight.copy_(scale * (1.0 + source.eps) ** 0.5)
            self.source.bias.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.source(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class _LayerNorm(nn.LayerNorm):
    """A layer norm, over (1, T, C); without gain and shift where the layers behind it have absorbed them."""


def _norm(source: nn.Module) -> nn.Module:
    """A norm of the model as a norm of the deployment graph."""
    if isinstance(source, NoNorm):
        return nn.Identity()
    if isinstance(source, BatchNorm | UnifiedNorm):
        return _ChannelsLastBatchNorm(source)
    assert isinstance(source, LayerNorm), "a norm has statistics of its own or of a frame"  # noqa: S101 - `edgefuse.model.layers` makes no other
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

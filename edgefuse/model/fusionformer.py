"""FusionFormer (arXiv 2210.17079), and the LayerNorm Conformer that it replaces, as one encoder.

With every norm N in its place (N is the identity where the configuration has none there):

    x   = N(W0 . relu(N(conv2d(relu(N(conv2d(features)))))))                    subsampling by 4; by 6 or 8 likewise
    x <- x + 1/2 FFN(x)            FFN(x) = N(W2 . act(N(W1 . N(x))))
    x <- x + Attention(N(x))       see attention.py, or performer.py; a convolution-only block has none
    x <- x + N(PW2 . act(N(DW . gate(N(PW1 . N(x))))))                          convolution module
    x <- N(x + 1/2 FFN(x))
    logits = Wc . N(x)                                                          CTC head

In a FusionFormer N follows every linear and every convolution, act and gate are ReLU, and nothing stands on the residual
stream: every N folds. In the Conformer N stands before each branch and after each block, act is Swish and gate is GLU. With two
paths a second N(DW . gate(N(PW1 . N(x)))) is added to the first in front of act. In a Conformer that WeNet trained a constant is
subtracted behind GLU (`EncoderConfig.gate_shift`).
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model.attention import Attention, sinusoids
from edgefuse.model.config import SUBSAMPLINGS, BlockShape, EncoderConfig
from edgefuse.model.layers import (
    CausalDepthwise,
    NormedConv2d,
    NormedLinear,
    norm_before,
    norm_of_output,
    norm_on_residual,
)
from edgefuse.model.normalization import BatchNorm
from edgefuse.model.performer import Performer
from edgefuse.model.streaming import (
    FULL,
    Context,
    Sight,
    attention_mask,
    every,
    gathered,
    looks_ahead,
    positions_within,
    spread,
    valid_frames,
)

BRANCH_GAIN = 0.3  # gamma that the last batch norm of a branch begins with: the sum on the residual stream grows slowly [I]

torch.fx.wrap("attention_mask")
torch.fx.wrap("positions_within")
torch.fx.wrap("valid_frames")


class Subsampling(nn.Module):
    """Strided convolutions and a linear: one frame from `subsampling` of 10 ms.

    Causal: as many zero frames stand before the first as one frame has more than one, so that output j sees, at 4, feature
    frames 4j-3 .. 4j+3 [I]. What is left over when the length does not divide is dropped.
    """

    def __init__(self, config: EncoderConfig) -> None:
        """Build the convolutions and the linear."""
        super().__init__()
        channels = config.subsampling_channels
        self.rate, self.history = config.subsampling, config.subsampling - 1
        self.sizes = SUBSAMPLINGS[config.subsampling]
        for number, (kernel, stride) in enumerate(self.sizes, start=1):
            conv = NormedConv2d(config, 1 if number == 1 else channels, channels, kernel=kernel, stride=stride)
            self.add_module(f"conv{number}", conv)
        flat = config.subsampled_bins * channels
        self.linear = NormedLinear(config, flat, config.dimension, normed=config.norm_subsampling)
        self.scale = math.sqrt(config.dimension) if config.scale_embedding and not config.folded else 1.0

    @property
    def convolutions(self) -> tuple[NormedConv2d, ...]:
        """From the features up."""
        found = (self.get_submodule(f"conv{number}") for number in range(1, len(self.sizes) + 1))
        return tuple(cast("NormedConv2d", each) for each in found)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, mels) to (B, T // rate, d)."""
        x = F.pad(features, (0, 0, self.history, 0)).unsqueeze(-1)
        frames, lengths = features.shape[1] + self.history, lengths + self.history
        for conv, (kernel, stride) in zip(self.convolutions, self.sizes, strict=True):
            frames, lengths = (frames - kernel) // stride + 1, (lengths - kernel) // stride + 1
            valid = valid_frames(lengths, frames)
            x = F.relu(conv(x, valid))
        return self.linear(x.flatten(2), valid) * self.scale  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """FFN(x) = N(W2 . act(N(W1 . N(x)))); the half step is the caller's, and inside W2 after the fold."""

    def __init__(self, config: EncoderConfig, width: int) -> None:
        """Two linears around an activation of that width."""
        super().__init__()
        self.norm = norm_before(config)
        self.w1 = NormedLinear(config, config.dimension, width)
        self.w2 = NormedLinear(config, width, config.dimension)
        self.activation = activation(config)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.w2(self.activation(self.w1(self.norm(x, valid), valid)), valid)  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """N(PW2 . act(N(DW . gate(N(PW1 . N(x)))))). Pointwise convolutions are linears: the same sum, in the faster layout."""

    def __init__(self, config: EncoderConfig, kernel: int) -> None:
        """Two pointwise layers around a causal depthwise one."""
        super().__init__()
        self.norm = norm_before(config)
        swish = config.activation == "swish"
        self.pointwise1 = NormedLinear(config, config.dimension, config.conv_width * (2 if swish else 1))
        self.depthwise = CausalDepthwise(config, kernel)
        self.pointwise2 = NormedLinear(config, config.conv_width, config.dimension)
        self.paths = config.conv_paths
        if self.paths > 1:
            self.second_pointwise1 = NormedLinear(config, config.dimension, config.conv_width)
            self.second_depthwise = CausalDepthwise(config, kernel)
        self.gate = nn.GLU() if swish else relu_if(config.conv_relu in ("both", "pointwise"))
        self.shift = nn.Parameter(torch.zeros(config.conv_width)) if config.gate_shift else None
        self.activation = nn.SiLU() if swish else relu_if(config.conv_relu in ("both", "depthwise"))

    def forward(self, x: Tensor, valid: Tensor, context: Context) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = self.norm(x, valid)
        gated = self.gate(self.pointwise1(x, valid))
        filtered = self.depthwise(gated if self.shift is None else gated - self.shift, valid, context)
        if self.paths > 1:
            filtered = filtered + self.second_depthwise(self.gate(self.second_pointwise1(x, valid)), valid, context)
        return self.pointwise2(self.activation(filtered), valid)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step; each on the residual stream."""

    def __init__(self, config: EncoderConfig, shape: BlockShape) -> None:
        """Four branches, or three without attention."""
        super().__init__()
        self.half_step, self.stride = 1.0 if config.folded else 0.5, shape.stride
        self.macaron = FeedForward(config, shape.feed_forward)
        if shape.attention != "none":
            self.norm_attention = norm_before(config)
            self.attention = Attention(config, shape) if shape.attention == "softmax" else Performer(config, shape)
        self.convolution = Convolution(config, shape.kernel)
        self.feed_forward = FeedForward(config, shape.feed_forward)
        self.norm_final = norm_on_residual(config)
        self.dropout = nn.Dropout(config.dropout)
        attending = (self.attention.output,) if self.attends else ()
        for last in (self.macaron.w2, *attending, self.convolution.pointwise2, self.feed_forward.w2):
            if isinstance(last.norm, BatchNorm):
                nn.init.constant_(last.norm.weight, BRANCH_GAIN)

    @property
    def attends(self) -> bool:
        """Whether it has attention, and is not convolution only."""
        return hasattr(self, "attention")

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, d) to (B, T / stride, d)."""
        x = x + self.half_step * self.dropout(self.macaron(x, sight.valid))
        if self.attends:
            mixed = self.attention(self.norm_attention(x, sight.valid), sight)
            x = every(x, self.stride) + self.dropout(mixed)
        x = x + self.dropout(self.convolution(x, sight.left, sight.context_left))
        x = x + self.half_step * self.dropout(self.feed_forward(x, sight.left))
        return self.norm_final(x, sight.left)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A FusionFormer or a Conformer, with a CTC head; or a cascade of two passes, with a head each."""

    table: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        """Build it from its configuration, with fresh weights."""
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        shapes = config.blocks[:1] if config.shared_blocks else config.blocks
        self.blocks = nn.ModuleList([Block(config, shape) for shape in shapes])
        self.norm = norm_of_output(config)
        self.ctc = nn.Linear(config.dimension, config.vocabulary_size)
        if config.second_pass:
            self.second_norm = norm_of_output(config)
            self.second_ctc = nn.Linear(config.dimension, config.vocabulary_size)
        table = sinusoids(config.max_frames * config.rate, config.dimension)[None]
        self.register_buffer("table", table, persistent=False)

    @property
    def layers(self) -> tuple[tuple[Block, BlockShape], ...]:
        """The blocks in the order in which they run, with their shapes; one that is shared stands there as often as it runs."""
        shapes = self.config.blocks
        blocks = [self.blocks[0]] * len(shapes) if self.config.shared_blocks else [*self.blocks]
        return tuple((cast("Block", block), shape) for block, shape in zip(blocks, shapes, strict=True))

    @property
    def first_pass(self) -> tuple[tuple[Block, BlockShape], ...]:
        """Those in front of the first CTC head: all, but for a cascade."""
        return tuple(each for each in self.layers if not each[1].second_pass)

    @property
    def second_pass(self) -> tuple[tuple[Block, BlockShape], ...]:
        """Those behind it."""
        return tuple(each for each in self.layers if each[1].second_pass)

    def forward(
        self, features: Tensor, lengths: Tensor, context: Context = FULL, depth: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of a padded batch; of a cascade those of its second pass, but in chunks those of its first.

        Args:
            features: (B, T, mels) normalized log-mel, 10 ms a frame.
            lengths: (B,) valid feature frames.
            context: how far attention looks.
            depth: how many blocks to run, from the bottom up; all by default.

        Returns:
            Logits (B, T // reduction, vocabulary_size), not normalized, and their valid lengths (B,).
        """
        x, lengths = self.encode(features, lengths, context, depth)
        if self.config.second_pass and context == FULL:
            return self.again(x, lengths), lengths
        return self.ctc(self.norm(x, valid_frames(lengths, x.shape[1]))), lengths

    def answers(self, features: Tensor, lengths: Tensor, context: Context = FULL) -> tuple[Tensor, ...]:
        """Logits of every head for a padded batch, the first pass first: what a cascade is trained with, and folded by."""
        x, lengths = self.encode(features, lengths, context)
        first: Tensor = self.ctc(self.norm(x, valid_frames(lengths, x.shape[1])))
        return (first, self.again(x, lengths)) if self.config.second_pass else (first,)

    def encode(
        self, features: Tensor, lengths: Tensor, context: Context = FULL, depth: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the first pass makes of a padded batch, (B, T // reduction, d), before its head; and the valid lengths."""
        config = self.config
        x = self.subsampling(features, lengths)
        lengths, frames = lengths // config.reduction, features.shape[1] // config.reduction
        if config.rate > 1:
            x = x[:, : frames * config.rate]
        blocks = self.first_pass
        blocks = blocks[:depth] if isinstance(depth, int) else blocks  # to the tracer of the fold it is neither number nor None
        return self._run(blocks, x, lengths, frames, context), lengths

    def again(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The second pass over what the first made of a whole utterance, (B, T', d): logits (B, T', vocabulary_size)."""
        frames = x.shape[1]
        x = self._run(self.second_pass, x, lengths, frames, FULL)
        return self.second_ctc(self.second_norm(x, valid_frames(lengths, frames)))  # type: ignore[no-any-return]

    def _run(
        self, blocks: Sequence[tuple[Block, BlockShape]], x: Tensor, lengths: Tensor, frames: int, context: Context
    ) -> Tensor:
        if looks_ahead(context):
            x = spread(x, context.within(blocks[0][1].frames))
        sights: dict[tuple[int, int, int | None], Sight] = {}
        for block, shape in blocks:
            key = (shape.frames, shape.stride, shape.left)
            if key not in sights:
                sights[key] = self._sight(shape, lengths, frames, context)
            x = block(x, sights[key])
        return gathered(x, context, frames) if looks_ahead(context) else x

    def _sight(self, shape: BlockShape, lengths: Tensor, frames: int, context: Context) -> Sight:
        """What a block of that shape is told; lengths, frames and context are those of the output."""
        own, lengths = frames * shape.frames, lengths * shape.frames
        context, context_left = context.within(shape.frames, shape.left), context.within(shape.frames // shape.stride)
        valid = valid_frames(lengths, own)
        left = valid if shape.stride == 1 else valid_frames(lengths // shape.stride, own // shape.stride)
        if looks_ahead(context):
            valid, left = spread(valid, context), spread(left, context_left)
        mask = attention_mask(valid, context, shape.stride)
        return Sight(valid, left, mask, positions_within(self.table, own, context), context, context_left)


def activation(config: EncoderConfig) -> nn.Module:
    """Swish in a Conformer, ReLU in a FusionFormer."""
    return nn.SiLU() if config.activation == "swish" else nn.ReLU()


def relu_if(wanted: bool) -> nn.Module:  # noqa: FBT001 - the name says what it means
    """ReLU, or nothing."""
    return nn.ReLU() if wanted else nn.Identity()

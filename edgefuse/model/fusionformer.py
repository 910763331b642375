"""FusionFormer (arXiv 2210.17079), and the LayerNorm Conformer that it replaces, as one encoder.

With every norm N in its place (N is the identity where the configuration has none there):

    x   = N(W0 . relu(N(conv2d(relu(N(conv2d(features)))))))                    subsampling by 4
    x <- x + 1/2 FFN(x)            FFN(x) = N(W2 . act(N(W1 . N(x))))
    x <- x + Attention(N(x))       see attention.py
    x <- x + N(PW2 . act(N(DW . gate(N(PW1 . N(x))))))                          convolution module
    x <- N(x + 1/2 FFN(x))
    logits = Wc . N(x)                                                          CTC head

In a FusionFormer N follows every linear and every convolution, act and gate are ReLU, and nothing stands on the residual
stream: every N folds. In the Conformer N stands before each branch and after each block, act is Swish and gate is GLU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model.attention import Attention, sinusoids
from edgefuse.model.config import SUBSAMPLING, SUBSAMPLING_HISTORY, EncoderConfig
from edgefuse.model.layers import (
    CausalDepthwise,
    NormedConv2d,
    NormedLinear,
    norm_before,
    norm_of_output,
    norm_on_residual,
)
from edgefuse.model.normalization import BatchNorm
from edgefuse.model.streaming import FULL, Context, attention_mask, positions_within, valid_frames

BRANCH_GAIN = 0.3  # gamma that the last batch norm of a branch begins with: the sum on the residual stream grows slowly [I]

torch.fx.wrap("attention_mask")
torch.fx.wrap("positions_within")
torch.fx.wrap("valid_frames")


class Subsampling(nn.Module):
    """Two convolutions of stride 2 and a linear: one frame of 40 ms from four of 10 ms.

    Causal: three zero frames stand before the first, so that output j sees feature frames 4j-3 .. 4j+3 [I]. What is left
    over when the length does not divide by four is dropped.
    """

    def __init__(self, config: EncoderConfig) -> None:
        """Build the two convolutions and the linear."""
        super().__init__()
        channels = config.subsampling_channels
        self.conv1 = NormedConv2d(config, 1, channels)
        self.conv2 = NormedConv2d(config, channels, channels)
        flat = config.subsampled_bins * channels
        self.linear = NormedLinear(config, flat, config.dimension, normed=config.norm_subsampling)
        self.scale = math.sqrt(config.dimension) if config.scale_embedding and not config.folded else 1.0

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, mels) to (B, T // 4, d)."""
        x = F.pad(features, (0, 0, SUBSAMPLING_HISTORY, 0)).unsqueeze(-1)
        half = (features.shape[1] + SUBSAMPLING_HISTORY - 1) // 2
        quarter = features.shape[1] // SUBSAMPLING
        x = F.relu(self.conv1(x, valid_frames((lengths + 2) // 2, half)))
        x = F.relu(self.conv2(x, valid_frames(lengths // SUBSAMPLING, quarter)))
        return self.linear(x.flatten(2), valid_frames(lengths // SUBSAMPLING, quarter)) * self.scale  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """FFN(x) = N(W2 . act(N(W1 . N(x)))); the half step is the caller's, and inside W2 after the fold."""

    def __init__(self, config: EncoderConfig) -> None:
        """Two linears around an activation."""
        super().__init__()
        self.norm = norm_before(config)
        self.w1 = NormedLinear(config, config.dimension, config.feed_forward)
        self.w2 = NormedLinear(config, config.feed_forward, config.dimension)
        self.activation = activation(config)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.w2(self.activation(self.w1(self.norm(x, valid), valid)), valid)  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """N(PW2 . act(N(DW . gate(N(PW1 . N(x)))))). Pointwise convolutions are linears: the same sum, in the faster layout."""

    def __init__(self, config: EncoderConfig) -> None:
        """Two pointwise layers around a causal depthwise one."""
        super().__init__()
        self.norm = norm_before(config)
        swish = config.activation == "swish"
        self.pointwise1 = NormedLinear(config, config.dimension, config.conv_width * (2 if swish else 1))
        self.depthwise = CausalDepthwise(config)
        self.pointwise2 = NormedLinear(config, config.conv_width, config.dimension)
        self.gate = nn.GLU() if swish else relu_if(config.conv_relu in ("both", "pointwise"))
        self.activation = nn.SiLU() if swish else relu_if(config.conv_relu in ("both", "depthwise"))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = self.gate(self.pointwise1(self.norm(x, valid), valid))
        return self.pointwise2(self.activation(self.depthwise(x, valid)), valid)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step; each on the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        """Four branches."""
        super().__init__()
        self.half_step = 1.0 if config.folded else 0.5
        self.macaron = FeedForward(config)
        self.norm_attention = norm_before(config)
        self.attention = Attention(config)
        self.convolution = Convolution(config)
        self.feed_forward = FeedForward(config)
        self.norm_final = norm_on_residual(config)
        self.dropout = nn.Dropout(config.dropout)
        for last in (self.macaron.w2, self.attention.output, self.convolution.pointwise2, self.feed_forward.w2):
            if isinstance(last.norm, BatchNorm):
                nn.init.constant_(last.norm.weight, BRANCH_GAIN)

    def forward(self, x: Tensor, valid: Tensor, mask: Tensor, table: Tensor, context: Context) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = x + self.half_step * self.dropout(self.macaron(x, valid))
        x = x + self.dropout(self.attention(self.norm_attention(x, valid), valid, mask, table, context))
        x = x + self.dropout(self.convolution(x, valid))
        x = x + self.half_step * self.dropout(self.feed_forward(x, valid))
        return self.norm_final(x, valid)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A FusionFormer or a LayerNorm Conformer, with a CTC head."""

    table: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        """Build it from its configuration, with fresh weights."""
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = norm_of_output(config)
        self.ctc = nn.Linear(config.dimension, config.vocabulary_size)
        self.register_buffer("table", sinusoids(config.max_frames, config.dimension)[None], persistent=False)

    def forward(self, features: Tensor, lengths: Tensor, context: Context = FULL) -> tuple[Tensor, Tensor]:
        """Logits of a padded batch.

        Args:
            features: (B, T, mels) normalized log-mel, 10 ms a frame.
            lengths: (B,) valid feature frames.
            context: how far attention looks.

        Returns:
            Logits (B, T // 4, vocabulary_size), 40 ms a frame, not normalized, and their valid lengths (B,).
        """
        x = self.subsampling(features, lengths)
        lengths = lengths // SUBSAMPLING
        frames = x.shape[1]
        valid = valid_frames(lengths, frames)
        mask = attention_mask(lengths, frames, context)
        table = positions_within(self.table, frames, context)
        for block in self.blocks:
            x = block(x, valid, mask, table, context)
        return self.ctc(self.norm(x, valid)), lengths


def activation(config: EncoderConfig) -> nn.Module:
    """Swish in a Conformer, ReLU in a FusionFormer."""
    return nn.SiLU() if config.activation == "swish" else nn.ReLU()


def relu_if(wanted: bool) -> nn.Module:  # noqa: FBT001 - the name says what it means
    """ReLU, or nothing."""
    return nn.ReLU() if wanted else nn.Identity()

"""What a second of audio costs: multiply-accumulates of the deployed network, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgefuse.model.config import FEATURE_HOP_MS, SUBSAMPLINGS, BlockShape, EncoderConfig
from edgefuse.model.fusionformer import Encoder

SECOND_MS = 1000


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates per encoder frame; norms, activations and what is constant at export cost none.

    Attributes:
        subsampling: the convolutions and a linear.
        linears: of all blocks, and the CTC head; of a cascade both heads.
        depthwise: of all blocks.
        attention: of all blocks, what does not depend on how many frames are attended to: both products with a Performer's state.
        attention_per_key: of all blocks, both products, for each encoder frame that is attended to.
        frame_ms: one encoder frame, in milliseconds.
    """

    subsampling: int
    linears: int
    depthwise: int
    attention: int
    attention_per_key: int
    frame_ms: int

    def macs_per_second(self, seconds: float) -> int:
        """Per second of audio, for whole utterances of that many seconds: attention grows with their length."""
        frames = SECOND_MS / self.frame_ms
        return round(self._macs(frames, keys=int(seconds * frames)))

    def macs(self, frames: int, keys: int) -> int:
        """Of so many encoder frames, each of which attends to so many."""
        return int(self._macs(frames, keys))

    def _macs(self, frames: float, keys: int) -> float:
        each = self.subsampling + self.linears + self.depthwise + self.attention
        return frames * (each + self.attention_per_key * keys)


def cost(config: EncoderConfig) -> Cost:
    """Count an encoder: a linear (i, o) has i o, a convolution outputs x taps x inputs, a product of T queries T d per key."""
    blocks = config.blocks
    heads = 2 if config.second_pass else 1
    return Cost(
        subsampling=_subsampling(config) * config.rate,
        linears=sum(_linears(config, block) for block in blocks) + heads * config.dimension * config.vocabulary_size,
        depthwise=sum(block.frames // block.stride * config.conv_paths * config.conv_width * block.kernel for block in blocks),
        attention=sum(_state(block) for block in blocks),
        attention_per_key=sum(_per_key(block) for block in blocks),
        frame_ms=config.reduction * FEATURE_HOP_MS,
    )


def _subsampling(config: EncoderConfig) -> int:
    """Per frame of the first block."""
    channels, bins, inputs = config.subsampling_channels, config.mel_bins, 1
    macs, frames = 0, config.subsampling
    for kernel, stride in SUBSAMPLINGS[config.subsampling]:
        bins, frames = (bins - kernel) // stride + 1, frames // stride
        macs += frames * bins * channels * inputs * kernel * kernel
        inputs = channels
    return macs + bins * channels * config.dimension


def _linears(config: EncoderConfig, block: BlockShape) -> int:
    """Per encoder frame: what stands before the stride runs as often as there are frames before it."""
    d, width, before, behind = config.dimension, config.conv_width, block.frames, block.frames // block.stride
    gate = 2 if config.activation == "swish" else config.conv_paths
    attention = 0 if block.attention == "none" else d * block.attention_dimension * (2 * before + 2 * behind)
    return (before + behind) * 2 * d * block.feed_forward + attention + behind * (gate * d * width + width * d)


def _per_key(block: BlockShape) -> int:
    """Scores and mix, per encoder frame and encoder frame that is attended to; below a stride both are several."""
    return 2 * block.attention_dimension * block.frames // block.stride * block.frames if block.attention == "softmax" else 0


def _state(block: BlockShape) -> int:
    """A Performer adds to its state, and asks it: per head d_k (d_k + 1) each."""
    each = block.heads * block.head_dimension * (block.head_dimension + 1)
    return 2 * each * block.frames if block.attention == "performer" else 0


@dataclass(frozen=True, slots=True)
class Parameters:
    """Trained values, statistics left out: how many are stored, and how many are run with; shared blocks run several times."""

    stored: int
    run: int


def parameters(config: EncoderConfig) -> Parameters:
    """Count those of an encoder."""
    with torch.device("meta"):
        encoder = Encoder(config)
    stored = sum(each.numel() for each in encoder.parameters())
    block = sum(each.numel() for each in encoder.blocks.parameters())
    return Parameters(stored, stored + (block * (config.layers - 1) if config.shared_blocks else 0))

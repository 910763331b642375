"""What a second of audio costs: multiply-accumulates of the deployed network, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from edgefuse.model.config import SUBSAMPLING, EncoderConfig

FRAMES_PER_SECOND = 100 // SUBSAMPLING  # encoder frames of 40 ms


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates per encoder frame; norms, activations and what is constant at export cost none.

    Attributes:
        subsampling: two convolutions and a linear.
        linears: of all blocks, and the CTC head.
        depthwise: of all blocks.
        attention_per_key: of all blocks, both products, for each frame that is attended to.
    """

    subsampling: int
    linears: int
    depthwise: int
    attention_per_key: int

    def macs_per_second(self, seconds: float) -> int:
        """Per second of audio, for whole utterances of that many seconds: attention grows with their length."""
        return self.macs(FRAMES_PER_SECOND, keys=int(seconds * FRAMES_PER_SECOND))

    def macs(self, frames: int, keys: int) -> int:
        """Of so many encoder frames, each of which attends to so many."""
        return frames * (self.subsampling + self.linears + self.depthwise + self.attention_per_key * keys)


def cost(config: EncoderConfig) -> Cost:
    """Count an encoder: a linear (i, o) has i o, a convolution outputs x taps x inputs, a product of T queries T d per key."""
    d, channels, width = config.dimension, config.subsampling_channels, config.conv_width
    first_bins = (config.mel_bins - 1) // 2
    conv1 = 2 * first_bins * channels * 9  # two of its frames become one of conv2's
    conv2 = config.subsampled_bins * channels * channels * 9
    gate = 2 if config.activation == "swish" else 1
    block = 4 * d * config.feed_forward + 4 * d * d + gate * d * width + width * d
    return Cost(
        subsampling=conv1 + conv2 + config.subsampled_bins * channels * d,
        linears=config.layers * block + d * config.vocabulary_size,
        depthwise=config.layers * width * config.kernel,
        attention_per_key=config.layers * 2 * d,
    )

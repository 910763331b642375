"""The layers that a batch norm follows. Everything is channels last: (B, T, C) and (B, T, F, C)."""

from torch import Tensor, nn

from edgefuse.model.config import EncoderConfig
from edgefuse.model.normalization import BatchNorm, LayerNorm, NoNorm


def norm_after(config: EncoderConfig, channels: int, *, normed: bool = True) -> nn.Module:
    """What follows a linear or a convolution: a batch norm in a FusionFormer that is not folded yet."""
    return BatchNorm(channels) if normed and config.norm == "batch" and not config.folded else NoNorm()


def norm_before(config: EncoderConfig) -> nn.Module:
    """What a branch begins with: a layer norm in a Conformer."""
    return LayerNorm(config.dimension) if config.norm == "layer" else NoNorm()


def norm_on_residual(config: EncoderConfig) -> nn.Module:
    """What stands on the residual stream after a block, in front of the next branches and of the skip path: it never folds."""
    if config.norm_residual != "block":
        return NoNorm()
    return BatchNorm(config.dimension) if config.norm == "batch" else LayerNorm(config.dimension)


def norm_of_output(config: EncoderConfig) -> nn.Module:
    """What stands between the last block and the CTC head: a batch norm folds into the head."""
    if config.norm_residual == "none" or (config.norm == "batch" and config.folded):
        return NoNorm()
    return BatchNorm(config.dimension) if config.norm == "batch" else LayerNorm(config.dimension)


class NormedLinear(nn.Module):
    """BN(W x + b), the pair of which a FusionFormer is made."""

    def __init__(self, config: EncoderConfig, inputs: int, outputs: int, *, normed: bool = True, bias: bool = True) -> None:
        """A linear and the norm that follows it."""
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.norm = norm_after(config, outputs, normed=normed)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, outputs)."""
        return self.norm(self.linear(x), valid)  # type: ignore[no-any-return]


class NormedConv2d(nn.Module):
    """BN(conv2d(x)) without padding, as WeNet subsamples."""

    def __init__(self, config: EncoderConfig, inputs: int, outputs: int, *, kernel: int, stride: int) -> None:
        """A convolution and the norm that follows it."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=kernel, stride=stride)
        self.norm = norm_after(config, outputs, normed=config.norm_subsampling)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, F, inputs) to (B, T', F', outputs); `valid` is at the rate of the output."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), valid)  # type: ignore[no-any-return]


class CausalDepthwise(nn.Module):
    """BN(DW x) over time; the past of the first frames is zeros, at this convolution's own input.

    WeNet pads at the input of the convolution module, NeMo here [R]; here the zeros need no pointwise pass, so the cache
    of a streaming step is what the convolution itself saw [I].
    """

    def __init__(self, config: EncoderConfig, kernel: int) -> None:
        """A convolution and the norm that follows it, of either kind."""
        super().__init__()
        width = config.conv_width
        self.history = kernel - 1
        self.conv = nn.Conv1d(width, width, kernel, groups=width)
        if config.norm == "layer" and config.conv_norm == "layer":
            self.norm: nn.Module = LayerNorm(width)
        else:
            self.norm = NoNorm() if config.folded else BatchNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C); frame t sees t - kernel + 1 .. t."""
        past_and_now = nn.functional.pad(x.transpose(1, 2), (self.history, 0))
        return self.norm(self.conv(past_and_now).transpose(1, 2), valid)  # type: ignore[no-any-return]

"""Norms by their places, and the layers that a batch norm follows. Everything is channels last: (B, T, C) and (B, T, F, C)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn

from edgefuse.model.config import EncoderConfig, Norm
from edgefuse.model.normalization import BatchNorm, LayerNorm, NoNorm, RepBatchNorm, UnifiedNorm
from edgefuse.model.streaming import Context, looks_ahead, windows

KINDS: Mapping[Norm, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "batch": BatchNorm,
        "batch-in-place": BatchNorm,
        "layer": LayerNorm,
        "unified": UnifiedNorm,
        "rep": RepBatchNorm,
        "none": lambda _: NoNorm(),
    }
)


def norm_after(config: EncoderConfig, channels: int, *, normed: bool = True) -> nn.Module:
    """What follows a linear or a convolution: a batch norm in a FusionFormer that is not folded yet."""
    return BatchNorm(channels) if normed and config.norm == "batch" and not config.folded else NoNorm()


def norm_before(config: EncoderConfig) -> nn.Module:
    """What a branch begins with, where the Conformer has a layer norm; all kinds but that fold into the linears behind it."""
    return NoNorm() if config.norm == "batch" else _unless_folded(config, config.dimension)


def norm_on_residual(config: EncoderConfig) -> nn.Module:
    """What stands on the residual stream after a block: all kinds but LayerNorm fold by a change of the stream's basis."""
    if config.norm_residual != "block":
        return NoNorm()
    return KINDS[config.norm](config.dimension) if config.residual_norms_kept else _unless_folded(config, config.dimension)


def norm_of_output(config: EncoderConfig) -> nn.Module:
    """What stands between the last block and the CTC head, into which all kinds but LayerNorm fold."""
    return NoNorm() if config.norm_residual == "none" else _unless_folded(config, config.dimension)


def norm_of_depthwise(config: EncoderConfig, channels: int) -> nn.Module:
    """What follows the depthwise convolution: of the same kind as the others, but `conv_norm` where these are LayerNorms."""
    if config.norm == "layer" and config.conv_norm == "batch":
        return NoNorm() if config.folded else BatchNorm(channels)
    return _unless_folded(config, channels)


def _unless_folded(config: EncoderConfig, channels: int) -> nn.Module:
    """A norm of the config's kind, or nothing where that kind has been folded."""
    return NoNorm() if config.folded and config.norm != "layer" else KINDS[config.norm](channels)


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
        self.norm = norm_of_depthwise(config, width)

    def forward(self, x: Tensor, valid: Tensor, context: Context) -> Tensor:
        """(B, T, C) to (B, T, C); frame t sees t - kernel + 1 .. t, with a look-ahead of its own window and the chunks before."""
        if looks_ahead(context):
            heard = windows(x.unsqueeze(1), replace(context, left=self.history)).flatten(0, 2)
            return self.norm(self.conv(heard.transpose(1, 2)).transpose(1, 2).reshape(x.shape), valid)  # type: ignore[no-any-return]
        past_and_now = nn.functional.pad(x.transpose(1, 2), (self.history, 0))
        return self.norm(self.conv(past_and_now).transpose(1, 2), valid)  # type: ignore[no-any-return]

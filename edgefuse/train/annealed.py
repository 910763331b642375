"""A LayerNorm Conformer on its way to a network that folds: every module is a mixture of what it was and what it will be.

With lambda going from 1 to 0 while the network is trained (SLAB trains so [R code]; the activations and all starts are ours [I]):

    norm        lambda LN(x) + (1 - lambda) RepBN(x)
    activation  lambda swish(x) + (1 - lambda) (c relu(x) + e)
    gate        lambda GLU(z) + (1 - lambda) (relu(M z + n) - lambda m)

All starts are fitted to speech, each to what its module gives in the Conformer (closeness.py): RepBN as the regression of LN(x)
on x, with alpha = 0; c and e as that of Swish on ReLU; M, n and m by a few hundred steps down the squared error. A ReLU has no
negative values and a GLU has: they are m apart, which the norm behind the depthwise convolution takes away. In the end c and e go
into the linear behind, M and n into the one before.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.fusionformer import Convolution, FeedForward
from edgefuse.model.normalization import BatchNorm, LayerNorm, RepBatchNorm


class Annealed(nn.Module):
    """A mixture; `share` is lambda."""

    share = 1.0

    def mixed(self, before: Tensor, after: Tensor) -> Tensor:
        """Lambda before + (1 - lambda) after."""
        return self.share * before + (1 - self.share) * after


class AnnealedNorm(Annealed):
    """From a layer norm, which is not trained any more, to a RepBN."""

    def __init__(self, layer: LayerNorm) -> None:
        """RepBN's statistics, gain and shift are still to be found."""
        super().__init__()
        self.layer = layer.requires_grad_(requires_grad=False)
        self.rep = RepBatchNorm(layer.normalized_shape[0])
        nn.init.zeros_(self.rep.alpha)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, C)."""
        after = self.rep(x, valid)
        return self.mixed(self.layer(x, valid), after) if self.share else after


class AnnealedGate(Annealed):
    """From GLU to a ReLU; `mix` is M and n, `offset` m."""

    offset: Tensor

    def __init__(self, channels: int) -> None:
        """relu(a), of the halves a and b that a GLU has."""
        super().__init__()
        self.mix = nn.Linear(2 * channels, channels)
        self.register_buffer("offset", torch.zeros(channels))
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(channels, 2 * channels))
            self.mix.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """(B, T, 2 C) to (B, T, C)."""
        after = F.relu(self.mix(z))
        return self.mixed(F.glu(z, dim=-1), after - self.share * self.offset) if self.share else after


class AnnealedActivation(Annealed):
    """From Swish to a ReLU; `gain` is c, `offset` e."""

    gain: Tensor
    offset: Tensor

    def __init__(self, channels: int) -> None:
        """ReLU as it is: c = 1, e = 0."""
        super().__init__()
        self.register_buffer("gain", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C)."""
        after = F.relu(x) * self.gain + self.offset
        return self.mixed(F.silu(x), after) if self.share else after


def annealed(encoder: Encoder) -> Encoder:
    """A copy of a LayerNorm Conformer, its modules as mixtures that are still what they were."""
    encoder = copy.deepcopy(encoder)
    for parent in [*encoder.modules()]:
        for name, child in [*parent.named_children()]:
            if (mixture := _mixture(parent, child)) is not None:
                setattr(parent, name, mixture)
    return encoder.to(encoder.ctc.weight.dtype)


def _mixture(parent: nn.Module, child: nn.Module) -> nn.Module | None:
    if isinstance(child, LayerNorm):
        return AnnealedNorm(child)
    if isinstance(child, BatchNorm) and not isinstance(child, RepBatchNorm):
        rep = RepBatchNorm(child.num_features)
        nn.init.zeros_(rep.alpha)
        rep.load_state_dict(child.state_dict(), strict=False)  # all but alpha
        return rep
    if isinstance(child, nn.SiLU):
        following = parent.w2 if isinstance(parent, FeedForward) else cast("Convolution", parent).pointwise2
        return AnnealedActivation(following.linear.in_features)
    if isinstance(child, nn.GLU):
        return AnnealedGate(cast("Convolution", parent).depthwise.conv.in_channels)
    return None


def anneal(encoder: Encoder, share: float) -> None:
    """Set lambda."""
    for module in encoder.modules():
        if isinstance(module, Annealed):
            module.share = share


def converted_config(config: EncoderConfig) -> EncoderConfig:
    """What a LayerNorm Conformer becomes."""
    return replace(config, norm="rep", conv_norm="batch", activation="relu", conv_expansion=1, conv_relu="both")


@torch.no_grad()
def settled(encoder: Encoder) -> Encoder:
    """The plain encoder that an annealed one is with lambda = 0, in evaluation mode."""
    encoder = copy.deepcopy(encoder)
    for parent in encoder.modules():
        for absorb in _absorbing(parent):
            absorb()
    plain = Encoder(converted_config(encoder.config)).to(encoder.ctc.weight.dtype)
    wanted = plain.state_dict()
    weights = {name.replace(".rep.", ".").removeprefix("rep."): tensor for name, tensor in encoder.state_dict().items()}
    plain.load_state_dict({name: weights[name][: len(like)] if like.ndim else weights[name] for name, like in wanted.items()})
    return plain.eval()


def _absorbing(parent: nn.Module) -> Iterator[partial[None]]:
    """What a module's activations end with, into the linears beside them."""
    if isinstance(parent, FeedForward):
        yield partial(_behind, parent.w2.linear, cast("AnnealedActivation", parent.activation))
    if isinstance(parent, Convolution):
        yield partial(_before, parent.pointwise1.linear, cast("AnnealedGate", parent.gate))
        yield partial(_behind, parent.pointwise2.linear, cast("AnnealedActivation", parent.activation))


def _behind(linear: nn.Linear, activation: AnnealedActivation) -> None:
    """W' = W diag(c), b' = b + W e."""
    linear.bias.add_(linear.weight @ activation.offset)
    linear.weight.mul_(activation.gain)


def _before(linear: nn.Linear, gate: AnnealedGate) -> None:
    """W' = M W, b' = M b + n: in the first rows; there are half as many."""
    weight, bias = gate.mix.weight @ linear.weight, gate.mix(linear.bias)
    linear.weight[: len(weight)] = weight
    linear.bias[: len(bias)] = bias

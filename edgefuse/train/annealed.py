"""A LayerNorm Conformer on its way to a network that folds: each step draws which blocks still are what they were.

A block is what it was with a probability lambda that goes to 0 while the network is trained; what it was is never trained. In
what it will be, every module has a successor:

    norm        LN(x)      RepBN(x)
    activation  swish(x)   c relu(x) + e
    gate        GLU(z)     relu(M z + n)

All begin fitted to speech, each to what its module gives in the Conformer (closeness.py): RepBN as the regression of LN(x) on
x, with alpha = 0; c and e as that of Swish on ReLU; M and n by a few hundred steps down the squared error. A ReLU has no
negative values and a GLU has: the norm behind the depthwise convolution takes the difference of the means away. In the end c
and e go into the linear behind, M and n into the one before.

SLAB goes from one norm to the other by a mixture, lambda LN(x) + (1 - lambda) RepBN(x) [R code]. Here that ended in a cliff:
however small lambda is, LayerNorm normalizes each frame, and the network leans on it. Of `conformer-tiny`, with 46 hours of
speech, 300 s a step and lambda from 1 to 0 in 810 steps, word errors on `dev` were 2.4 % after 700 steps, 91 % after 800, and
88 to 100 % until 1500, where it was given up; with blocks that are drawn they are 20 % after 100 steps and 7.6 % after 200
[M]. Modules that are replaced at random, in a growing share, are BERT-of-Theseus's (arXiv 2002.02925) [R abstract]; there the
new ones are smaller.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.fusionformer import Block, Convolution, FeedForward
from edgefuse.model.normalization import BatchNorm, LayerNorm, RepBatchNorm
from edgefuse.model.streaming import Sight


class Annealed(nn.Module):
    """A block that is `before`, or `after`, which it always is in evaluation."""

    def __init__(self, before: Block, after: Block) -> None:
        """What it was is not trained, and computes as in evaluation."""
        super().__init__()
        self.before, self.after = before.requires_grad_(requires_grad=False), after
        self.is_before = False

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, d) to (B, T / stride, d)."""
        block = self.before if self.is_before and self.training else self.after
        return block(x, sight)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - PyTorch's
        """Leave what it was in evaluation."""
        super().train(mode)
        self.before.eval()
        return self


class MixedReLU(nn.Module):
    """What follows a GLU: relu(M z + n); `mix` is M and n."""

    def __init__(self, channels: int) -> None:
        """relu(a), of the halves a and b that a GLU has."""
        super().__init__()
        self.mix = nn.Linear(2 * channels, channels)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(channels, 2 * channels))
            self.mix.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """(B, T, 2 C) to (B, T, C)."""
        return F.relu(self.mix(z))


class ShiftedReLU(nn.Module):
    """What follows a Swish: c relu(x) + e; `gain` is c, `offset` e."""

    gain: Tensor
    offset: Tensor

    def __init__(self, channels: int) -> None:
        """ReLU as it is: c = 1, e = 0."""
        super().__init__()
        self.register_buffer("gain", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C)."""
        return F.relu(x) * self.gain + self.offset


def succeeded(encoder: Encoder) -> Encoder:
    """A copy of a LayerNorm Conformer with the successor of every module, not fitted yet."""
    encoder = copy.deepcopy(encoder)
    for parent in [*encoder.modules()]:
        for name, child in [*parent.named_children()]:
            if (successor := _successor(parent, child)) is not None:
                setattr(parent, name, successor)
    return encoder.to(encoder.ctc.weight.dtype)


def _successor(parent: nn.Module, child: nn.Module) -> nn.Module | None:
    if isinstance(child, LayerNorm):
        return _rep(child.normalized_shape[0])
    if isinstance(child, BatchNorm) and not isinstance(child, RepBatchNorm):
        rep = _rep(child.num_features)
        rep.load_state_dict(child.state_dict(), strict=False)  # all but alpha
        return rep
    if isinstance(child, nn.SiLU):
        following = parent.w2 if isinstance(parent, FeedForward) else cast("Convolution", parent).pointwise2
        return ShiftedReLU(following.linear.in_features)
    if isinstance(child, nn.GLU):
        return MixedReLU(cast("Convolution", parent).depthwise.conv.in_channels)
    return None


def _rep(channels: int) -> RepBatchNorm:
    rep = RepBatchNorm(channels)
    nn.init.zeros_(rep.alpha)
    return rep


def annealed(before: Encoder, after: Encoder) -> Encoder:
    """A Conformer with successors whose blocks may be what they were; the blocks before are copied."""
    for number, (was, will_be) in enumerate(zip(before.blocks, after.blocks, strict=True)):
        after.blocks[number] = Annealed(cast("Block", copy.deepcopy(was)), cast("Block", will_be))
    return after


def anneal(encoder: Encoder, share: float, draw: torch.Generator) -> None:
    """Draw which blocks are what they were, each with probability lambda."""
    for block in encoder.blocks:
        cast("Annealed", block).is_before = float(torch.rand((), generator=draw)) < share


def converted_config(config: EncoderConfig) -> EncoderConfig:
    """What a LayerNorm Conformer becomes."""
    return replace(config, norm="rep", conv_norm="batch", activation="relu", conv_expansion=1, conv_relu="both")


@torch.no_grad()
def settled(encoder: Encoder) -> Encoder:
    """The plain encoder that one with successors is, in evaluation mode; of blocks that may be either, what they will be."""
    encoder = copy.deepcopy(encoder)
    encoder.blocks = nn.ModuleList([each.after if isinstance(each, Annealed) else each for each in encoder.blocks])
    for parent in encoder.modules():
        for absorb in _absorbing(parent):
            absorb()
    plain = Encoder(converted_config(encoder.config)).to(encoder.ctc.weight.dtype)
    wanted, weights = plain.state_dict(), encoder.state_dict()
    plain.load_state_dict({name: weights[name][: len(like)] if like.ndim else weights[name] for name, like in wanted.items()})
    return plain.eval()


def _absorbing(parent: nn.Module) -> Iterator[partial[None]]:
    """What a module's activations end with, into the linears beside them."""
    if isinstance(parent, FeedForward):
        yield partial(_behind, parent.w2.linear, cast("ShiftedReLU", parent.activation))
    if isinstance(parent, Convolution):
        yield partial(_before, parent.pointwise1.linear, cast("MixedReLU", parent.gate))
        yield partial(_behind, parent.pointwise2.linear, cast("ShiftedReLU", parent.activation))


def _behind(linear: nn.Linear, activation: ShiftedReLU) -> None:
    """W' = W diag(c), b' = b + W e."""
    linear.bias.add_(linear.weight @ activation.offset)
    linear.weight.mul_(activation.gain)


def _before(linear: nn.Linear, gate: MixedReLU) -> None:
    """W' = M W, b' = M b + n: in the first rows; there are half as many."""
    weight, bias = gate.mix.weight @ linear.weight, gate.mix(linear.bias)
    linear.weight[: len(weight)] = weight
    linear.bias[: len(bias)] = bias

"""A LayerNorm Conformer on its way to a network that folds: every module is a mixture of what it was and what it will be.

With lambda going from 1 to 0 while the network is trained (SLAB trains so [R code]; the activations and all starts are ours [I]):

    norm        lambda LN(x) + (1 - lambda) RepBN(x)
    activation  lambda swish(x) + (1 - lambda) (c relu(x) + e)
    gate        lambda a sigmoid(b) + (1 - lambda) c relu(a)

RepBN begins as the regression of LN(x) on x over speech, with alpha = 0; so do c and e as that of Swish on ReLU, and c as that of
GLU. In the end c and e go into the linears beside them; there is no e behind a gate, where zeros are padded.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.fusionformer import Convolution, FeedForward
from edgefuse.model.normalization import BatchNorm, LayerNorm, RepBatchNorm

GAINS = (0.05, 2.0)  # within which c stays: a channel that almost never opens would say anything
FLAT = 1e-8  # variance of a channel that says nothing


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


class AnnealedActivation(Annealed):
    """From Swish or GLU to a ReLU; `gain` is c, `offset` e."""

    gain: Tensor
    offset: Tensor

    def __init__(self, smooth: nn.Module, channels: int) -> None:
        """ReLU as it is: c = 1, e = 0."""
        super().__init__()
        self.smooth = smooth
        self.register_buffer("gain", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C), or (B, T, 2 C) to (B, T, C) for a gate."""
        after = self.sharp(x) * self.gain + self.offset
        return self.mixed(self.smooth(x), after) if self.share else after

    def sharp(self, x: Tensor) -> Tensor:
        """relu(x), or relu(a)."""
        return F.relu(x[..., : len(self.gain)])


class _Regression:
    """Of y on x, per channel, over valid frames: y ~ slope x + offset, or without an offset."""

    def __init__(self) -> None:
        self.count, self.sums = 0, torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """(N, C) both."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.sums = self.sums + torch.stack([each.sum(0) for each in (x, y, x * x, x * y)])

    @property
    def means(self) -> Tensor:
        """Of x, y, x^2 and x y: (4, C)."""
        return self.sums / max(1, self.count)

    def line(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean of x, mean of y, variance of x, slope."""
        x, y, xx, xy = self.means
        var = (xx - x * x).clamp_min(FLAT)
        return x, y, var, (xy - x * y) / var


def annealed(encoder: Encoder) -> Encoder:
    """A copy of a LayerNorm Conformer, its modules as mixtures that are still what they were."""
    encoder = copy.deepcopy(encoder)
    for parent in [*encoder.modules()]:
        for name, child in [*parent.named_children()]:
            if (mixture := _mixture(parent, child)) is not None:
                setattr(parent, name, mixture)
    return encoder


def _mixture(parent: nn.Module, child: nn.Module) -> nn.Module | None:
    if isinstance(child, LayerNorm):
        return AnnealedNorm(child)
    if isinstance(child, BatchNorm) and not isinstance(child, RepBatchNorm):
        rep = RepBatchNorm(child.num_features)
        nn.init.zeros_(rep.alpha)
        rep.load_state_dict(child.state_dict(), strict=False)  # all but alpha
        return rep
    if isinstance(child, nn.SiLU | nn.GLU):
        following = parent.w2 if isinstance(parent, FeedForward) else cast("Convolution", parent).pointwise2
        return AnnealedActivation(child, cast("nn.Linear", following.linear).in_features)
    return None


def anneal(encoder: Encoder, share: float) -> None:
    """Set lambda."""
    for module in encoder.modules():
        if isinstance(module, Annealed):
            module.share = share


@torch.no_grad()
def begin_close(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit what each mixture will be to what it was, over speech: (features (B, T, mels), lengths (B,)), in place."""
    seen = {module: _Regression() for module in encoder.modules() if isinstance(module, Annealed)}
    now: list[Tensor] = []  # the mask of the frames that run through the encoder

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, AnnealedNorm):
            now[:] = [inputs[1]]
            seen[module].add(inputs[0][now[0]], output[now[0]])
        elif isinstance(module, AnnealedActivation):
            seen[module].add(module.sharp(inputs[0])[now[0]], output[now[0]])

    handles = [module.register_forward_hook(watch) for module in seen]
    anneal(encoder.eval(), 1.0)
    for features, lengths in batches:
        encoder(features, lengths)
    for handle in handles:
        handle.remove()
    for module, regression in seen.items():
        _fit(module, regression)


def _fit(module: Annealed, regression: _Regression) -> None:
    x, y, var, slope = regression.line()
    if isinstance(module, AnnealedNorm):
        rep = module.rep
        rep.weight.copy_(slope * (var + rep.eps).sqrt())
        rep.bias.copy_(y)
        cast("Tensor", rep.running_mean).copy_(x)
        cast("Tensor", rep.running_var).copy_(var)
    if isinstance(module, AnnealedActivation):
        gated = isinstance(module.smooth, nn.GLU)
        _, _, xx, xy = regression.means
        gain = (xy / xx.clamp_min(FLAT) if gated else slope).clamp(*GAINS)
        module.gain.copy_(gain)
        module.offset.copy_(torch.zeros_like(y) if gated else y - gain * x)


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
    plain = Encoder(converted_config(encoder.config))
    wanted = plain.state_dict()
    weights = {name.replace(".rep.", ".").removeprefix("rep."): tensor for name, tensor in encoder.state_dict().items()}
    plain.load_state_dict({name: weights[name][: len(like)] if like.ndim else weights[name] for name, like in wanted.items()})
    return plain.eval()


def _absorbing(parent: nn.Module) -> Iterator[partial[None]]:
    """c and e of a module's activations into the linears beside them."""
    if isinstance(parent, FeedForward):
        yield partial(_behind, cast("nn.Linear", parent.w2.linear), cast("AnnealedActivation", parent.activation))
    if isinstance(parent, Convolution):
        yield partial(_before, cast("nn.Linear", parent.pointwise1.linear), cast("AnnealedActivation", parent.gate))
        yield partial(_behind, cast("nn.Linear", parent.pointwise2.linear), cast("AnnealedActivation", parent.activation))


def _behind(linear: nn.Linear, activation: AnnealedActivation) -> None:
    """W' = W diag(c), b' = b + W e."""
    linear.bias.add_(linear.weight @ activation.offset)
    linear.weight.mul_(activation.gain)


def _before(linear: nn.Linear, gate: AnnealedActivation) -> None:
    """W' = diag(c) W, b' = c b, of the rows of a; c > 0 goes through a ReLU."""
    rows = len(gate.gain)
    linear.weight[:rows].mul_(gate.gain[:, None])
    linear.bias[:rows].mul_(gate.gain)

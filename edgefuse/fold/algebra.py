"""The equations of the fold, in float64, tensors in and tensors out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A linear or a convolution: weight (outputs, ...), bias (outputs,)."""

    weight: Tensor
    bias: Tensor


class Affine(NamedTuple):
    """What a batch norm is in evaluation, and what a layer norm ends with: y = scale * x + shift, per channel."""

    scale: Tensor
    shift: Tensor


def affine(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, epsilon: float) -> Affine:
    """s = gamma / sqrt(var + eps),  t = beta - mean * s."""
    scale = gamma.double() / torch.sqrt(var.double() + epsilon)
    return Affine(scale, beta.double() - mean.double() * scale)


def norm_after(layer: Weights, norm: Affine) -> Weights:
    """W' = diag(s) W,  b' = s * b + t: a norm behind a linear or a convolution, exact at padded borders too."""
    return Weights(layer.weight.double() * _per_output(norm.scale, layer.weight), layer.bias.double() * norm.scale + norm.shift)


def norm_before(norm: Affine, layer: Weights) -> Weights:
    """W' = W diag(s),  b' = b + W t: a norm in front of a linear. A zero-padded convolution has no such form."""
    return Weights(layer.weight.double() * norm.scale, layer.bias.double() + layer.weight.double() @ norm.shift)


def scaled(layer: Weights, factor: float) -> Weights:
    """W' = c W,  b' = c b: a constant factor behind a layer."""
    return Weights(layer.weight.double() * factor, layer.bias.double() * factor)


def shifted(layer: Weights, offset: Tensor) -> Weights:
    """W' = W,  b' = b + o: a constant offset behind a layer."""
    return Weights(layer.weight.double(), layer.bias.double() + offset.double())


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.dim() - 1))

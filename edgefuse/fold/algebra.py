"""The equations of the fold, in float64, tensors in and tensors out."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A linear or a convolution: weight (outputs, ...), bias (outputs,)."""

    weight: Tensor
    bias: Tensor


class Affine(NamedTuple):
    """What a norm with running statistics is in evaluation, and a layer norm's end: y = scale * x + shift, per channel."""

    scale: Tensor
    shift: Tensor


def affine(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, epsilon: float) -> Affine:
    """s = gamma / sqrt(var + eps),  t = beta - mean * s."""
    scale = gamma.double() / torch.sqrt(var.double() + epsilon)
    return Affine(scale, beta.double() - mean.double() * scale)


def unified_affine(gamma: Tensor, beta: Tensor, second_moment: Tensor, epsilon: float) -> Affine:
    """s = gamma / sqrt(sigma2 + eps),  t = beta: Unified Normalization subtracts nothing."""
    return Affine(gamma.double() / torch.sqrt(second_moment.double() + epsilon), beta.double())


def rep_affine(norm: Affine, alpha: Tensor) -> Affine:
    """s' = s + alpha,  t' = t: RepBN(x) = BN(x) + alpha x."""
    return Affine(norm.scale + alpha.double(), norm.shift)


def affine_of(state: Mapping[str, Tensor], epsilon: float) -> Affine:
    """Of a norm with running statistics, from its state: the kind is in the names."""
    gamma, beta, var = state["weight"], state["bias"], state["running_var"]
    if "running_mean" not in state:
        return unified_affine(gamma, beta, var, epsilon)
    norm = affine(gamma, beta, state["running_mean"], var, epsilon)
    return rep_affine(norm, state["alpha"]) if "alpha" in state else norm


def chained(first: Affine, then: Affine) -> Affine:
    """s = s2 * s1,  t = s2 * t1 + t2: one affine behind another."""
    return Affine(then.scale * first.scale, then.scale * first.shift + then.shift)


def undone(norm: Affine, scale: Tensor) -> Affine:
    """s' = s2 / s,  t' = t2 / s: what an affine adds to a stream whose basis has the scale s."""
    return Affine(norm.scale / scale, norm.shift / scale)


def norm_after(layer: Weights, norm: Affine) -> Weights:
    """W' = diag(s) W,  b' = s * b + t: a norm behind a linear or a convolution, exact at padded borders too."""
    return Weights(layer.weight.double() * _per_output(norm.scale, layer.weight), layer.bias.double() * norm.scale + norm.shift)


def norm_before(norm: Affine, layer: Weights) -> Weights:
    """W' = W diag(s),  b' = b + W t: a norm, or a basis, in front of a linear. A zero-padded convolution has no such form.

    The norm in front of a pointwise layer is exact at borders too, because the zeros of the depthwise convolution are padded at
    its own input, behind the pointwise layer.
    """
    return Weights(layer.weight.double() * norm.scale, layer.bias.double() + layer.weight.double() @ norm.shift)


def basis_after(layer: Weights, scale: Tensor) -> Weights:
    """W' = diag(1/s) W,  b' = b / s: what a layer adds to a stream whose basis has the scale s."""
    return Weights(layer.weight.double() / _per_output(scale, layer.weight), layer.bias.double() / scale)


def scaled(layer: Weights, factor: float) -> Weights:
    """W' = c W,  b' = c b: a constant factor behind a layer."""
    return Weights(layer.weight.double() * factor, layer.bias.double() * factor)


def shifted(layer: Weights, offset: Tensor) -> Weights:
    """W' = W,  b' = b + o: a constant offset behind a layer."""
    return Weights(layer.weight.double(), layer.bias.double() + offset.double())


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.dim() - 1))

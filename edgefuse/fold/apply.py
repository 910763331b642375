"""One walk over the plan; every decision has been made there."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgefuse.checkpoint import ISTD, MEAN, assemble, encoder_of
from edgefuse.fold.algebra import Affine, Weights, affine, norm_after, norm_before, scaled, shifted
from edgefuse.fold.plan import AFFINE, plan
from edgefuse.model.config import EncoderConfig
from edgefuse.model.normalization import EPSILON
from edgefuse.values import Checkpoint, Fold, FoldedModel, Refusal

HALF = 0.5


def fold(checkpoint: Checkpoint) -> FoldedModel:
    """Fold whatever the plan folds, in float64; what it refuses stays as it is. A folded checkpoint comes back as it was."""
    sites = plan(encoder_of(checkpoint))
    if checkpoint.config.folded:
        return FoldedModel(checkpoint, sites, parent=checkpoint.digest)
    weights = {name: t.double() if t.is_floating_point() else t for name, t in checkpoint.weights.items()}
    for site in sites:
        if isinstance(site, Fold):
            _RULES[site.rule](weights, site, checkpoint.config)
    config = dataclasses.replace(checkpoint.config, folded=True)
    tensors = {**weights, MEAN: checkpoint.frontend_mean, ISTD: checkpoint.frontend_istd}
    return FoldedModel(assemble(config, tensors, checkpoint.tokens), sites, parent=checkpoint.digest)


def refusals(model: FoldedModel) -> tuple[Refusal, ...]:
    """What the fold left in the graph."""
    return tuple(site for site in model.plan if isinstance(site, Refusal))


def _norm_after(weights: dict[str, Tensor], site: Fold, _: EncoderConfig) -> None:
    _put(weights, site.into[0], norm_after(_layer(weights, site.into[0]), _take_affine(weights, site.site)))


def _norm_before(weights: dict[str, Tensor], site: Fold, _: EncoderConfig) -> None:
    norm = _take_affine(weights, site.site)
    for name in site.into:
        _put(weights, name, norm_before(norm, _layer(weights, name)))


def _affine_before(weights: dict[str, Tensor], site: Fold, _: EncoderConfig) -> None:
    """The layer norm stays, with the gain 1 and the shift 0."""
    name = site.site.removesuffix(AFFINE)
    gamma, beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
    for layer in site.into:
        _put(weights, layer, norm_before(Affine(gamma, beta), _layer(weights, layer)))
    weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones_like(gamma), torch.zeros_like(beta)


def _half_step(weights: dict[str, Tensor], site: Fold, _: EncoderConfig) -> None:
    for name in site.into:
        _put(weights, name, scaled(_layer(weights, name), HALF))


def _embedding_scale(weights: dict[str, Tensor], site: Fold, config: EncoderConfig) -> None:
    _put(weights, site.into[0], scaled(_layer(weights, site.into[0]), config.dimension**0.5))


def _query(weights: dict[str, Tensor], site: Fold, config: EncoderConfig) -> None:
    """q' = (W x + b + u) / sqrt(d_k); u stays until the key bias has used it."""
    query = _layer(weights, site.into[0])
    attention = site.site.removesuffix(".scale")
    if (u := weights.get(f"{attention}.u")) is not None:
        query = shifted(query, u.flatten())
    _put(weights, site.into[0], scaled(query, config.head_dimension**-0.5))


def _key_bias(weights: dict[str, Tensor], site: Fold, config: EncoderConfig) -> None:
    """w = (v - u) / sqrt(d_k)."""
    attention = site.site.removesuffix(".v")
    u, v = weights.pop(f"{attention}.u"), weights.pop(f"{attention}.v")
    weights[site.into[0]] = (v - u) * config.head_dimension**-0.5


_RULES: Mapping[str, Callable[[dict[str, Tensor], Fold, EncoderConfig], None]] = MappingProxyType(
    {
        "norm after": _norm_after,
        "norm before": _norm_before,
        "affine before": _affine_before,
        "half step": _half_step,
        "embedding scale": _embedding_scale,
        "query": _query,
        "key bias": _key_bias,
    }
)
EQUATIONS: Mapping[str, str] = MappingProxyType(
    {
        "norm after": "W' = diag(s) W, b' = s b + t",
        "norm before": "W' = W diag(s), b' = b + W t",
        "affine before": "W' = W diag(gamma), b' = b + W beta; the norm goes on with gamma = 1, beta = 0",
        "half step": "W' = W / 2, b' = b / 2",
        "embedding scale": "W' = sqrt(d) W, b' = sqrt(d) b",
        "query": "W' = W / sqrt(d_k), b' = (b + u) / sqrt(d_k)",
        "key bias": "w = (v - u) / sqrt(d_k)",
    }
)


def _layer(weights: Mapping[str, Tensor], name: str) -> Weights:
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    return Weights(weight, bias if bias is not None else torch.zeros(weight.shape[0], dtype=torch.float64))


def _put(weights: dict[str, Tensor], name: str, layer: Weights) -> None:
    weights[f"{name}.weight"], weights[f"{name}.bias"] = layer


def _take_affine(weights: dict[str, Tensor], name: str) -> Affine:
    """Take a norm out of the model."""
    weights.pop(f"{name}.num_batches_tracked")
    gamma, beta, mean, var = (weights.pop(f"{name}.{n}") for n in ("weight", "bias", "running_mean", "running_var"))
    return affine(gamma, beta, mean, var, EPSILON)

"""One walk over the plan; every decision has been made there."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from edgefuse.checkpoint import ISTD, MEAN, assemble, encoder_of
from edgefuse.fold.algebra import (
    Affine,
    Weights,
    affine_of,
    basis_after,
    chained,
    norm_after,
    norm_before,
    scaled,
    shifted,
    undone,
)
from edgefuse.fold.plan import AFFINE, plan
from edgefuse.model.config import EncoderConfig
from edgefuse.model.normalization import EPSILON
from edgefuse.values import Checkpoint, Fold, FoldedModel, Refusal

HALF = 0.5
NORM_RULES = ("norm after", "norm before", "residual basis")  # whose site is a norm that disappears


@dataclass
class _State:
    """A model on its way: the weights that are left, and the norms that have been taken out of it but not folded yet."""

    weights: dict[str, Tensor]
    affines: dict[str, Affine]
    config: EncoderConfig

    def change(self, name: str, equation: Callable[[Weights], Weights]) -> None:
        """A layer by an equation; it has a bias from then on."""
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        layer = Weights(weight, bias if bias is not None else torch.zeros(weight.shape[0], dtype=torch.float64))
        self.weights[f"{name}.weight"], self.weights[f"{name}.bias"] = equation(layer)


def fold(checkpoint: Checkpoint) -> FoldedModel:
    """Fold whatever the plan folds, in float64; what it refuses stays as it is. A folded checkpoint comes back as it was."""
    sites = plan(encoder_of(checkpoint))
    if checkpoint.config.folded:
        return FoldedModel(checkpoint, sites, parent=checkpoint.digest)
    weights = {name: t.double() if t.is_floating_point() else t for name, t in checkpoint.weights.items()}
    folds = sorted((site for site in sites if isinstance(site, Fold)), key=lambda site: site.rule != "residual basis")
    affines = {site.site: take_affine(weights, site.site) for site in folds if site.rule in NORM_RULES}
    state = _State(weights, affines, checkpoint.config)
    for site in folds:  # the residual stream first: it changes norms that are folded after it
        _RULES[site.rule](state, site)
    kept = any(name.endswith(".running_var") for name in weights)
    config = dataclasses.replace(checkpoint.config, folded=True, residual_norms_kept=kept)
    tensors = {**weights, MEAN: checkpoint.frontend_mean, ISTD: checkpoint.frontend_istd}
    return FoldedModel(assemble(config, tensors, checkpoint.tokens), sites, parent=checkpoint.digest)


def refusals(model: FoldedModel) -> tuple[Refusal, ...]:
    """What the fold left in the graph."""
    return tuple(site for site in model.plan if isinstance(site, Refusal))


def _norm_after(state: _State, site: Fold) -> None:
    state.change(site.into[0], lambda layer: norm_after(layer, state.affines[site.site]))


def _norm_before(state: _State, site: Fold) -> None:
    for name in site.into:
        state.change(name, lambda layer: norm_before(state.affines[site.site], layer))


def _residual_basis(state: _State, site: Fold) -> None:
    """The stream carries c instead of s c + t from here to the next norm on it, which is one of the readers."""
    basis = state.affines[site.site]
    for name in site.readers:
        if name in state.affines:
            state.affines[name] = chained(basis, state.affines[name])
        else:
            state.change(name, lambda layer: norm_before(basis, layer))
    for name in site.writers:
        if name in state.affines:
            state.affines[name] = undone(state.affines[name], basis.scale)
        else:
            state.change(name, lambda layer: basis_after(layer, basis.scale))


def _affine_before(state: _State, site: Fold) -> None:
    """The layer norm stays, with the gain 1 and the shift 0."""
    name, weights = site.site.removesuffix(AFFINE), state.weights
    gamma, beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
    for layer in site.into:
        state.change(layer, lambda each: norm_before(Affine(gamma, beta), each))
    weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones_like(gamma), torch.zeros_like(beta)


def _half_step(state: _State, site: Fold) -> None:
    for name in site.into:
        state.change(name, lambda layer: scaled(layer, HALF))


def _embedding_scale(state: _State, site: Fold) -> None:
    state.change(site.into[0], lambda layer: scaled(layer, state.config.dimension**0.5))


def _query(state: _State, site: Fold) -> None:
    """q' = (W x + b + u) / sqrt(d_k); u stays until the key bias has used it."""
    attention = site.site.removesuffix(".scale")
    u = state.weights.get(f"{attention}.u")
    state.change(site.into[0], lambda layer: layer if u is None else shifted(layer, u.flatten()))
    state.change(site.into[0], lambda layer: scaled(layer, _head_dimension(attention, state.config) ** -0.5))


def _key_bias(state: _State, site: Fold) -> None:
    """w = (v - u) / sqrt(d_k)."""
    attention = site.site.removesuffix(".v")
    u, v = state.weights.pop(f"{attention}.u"), state.weights.pop(f"{attention}.v")
    state.weights[site.into[0]] = (v - u) * _head_dimension(attention, state.config) ** -0.5


def _head_dimension(attention: str, config: EncoderConfig) -> int:
    """d_k of blocks.N.attention."""
    return config.blocks[int(attention.split(".")[1])].head_dimension


_RULES: Mapping[str, Callable[[_State, Fold], None]] = MappingProxyType(
    {
        "norm after": _norm_after,
        "norm before": _norm_before,
        "residual basis": _residual_basis,
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
        "residual basis": "W' = W diag(s), b' = b + W t of what reads the stream; W' = diag(1/s) W, b' = b / s of what is added",
        "affine before": "W' = W diag(gamma), b' = b + W beta; the norm goes on with gamma = 1, beta = 0",
        "half step": "W' = W / 2, b' = b / 2",
        "embedding scale": "W' = sqrt(d) W, b' = sqrt(d) b",
        "query": "W' = W / sqrt(d_k), b' = (b + u) / sqrt(d_k)",
        "key bias": "w = (v - u) / sqrt(d_k)",
    }
)


def take_affine(weights: dict[str, Tensor], name: str) -> Affine:
    """Take a norm out of a model."""
    own = [each for each in weights if each.rpartition(".")[0] == name]
    return affine_of({each.rpartition(".")[2]: weights.pop(each) for each in own}, EPSILON)

"""The fold: what it absorbs, what it refuses, and how exact it is."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from edgefuse.checkpoint import ISTD, MEAN, assemble, encoder_of
from edgefuse.errors import FoldInexact
from edgefuse.fold import exactness, fold, plan
from edgefuse.fold.algebra import Weights, affine, norm_after, norm_before, scaled
from edgefuse.fold.plan import plan_norms
from edgefuse.lower import DeploymentGraph
from edgefuse.model import Encoder
from edgefuse.model.normalization import BatchNorm, LayerNorm
from edgefuse.values import Fold, Refusal
from tests.conftest import a_checkpoint, a_config

BOUND = 1e-10
FOLDABLE = [
    {},
    {"conv_expansion": 2},
    {"conv_paths": 2},
    {"norm_positions": True},
    {"norm_residual": "output"},
    {"scale_embedding": True},
    {"positions": "none"},
    {"norm_subsampling": False},
    {"activation": "swish"},
]


def an_affine(channels: int):
    g = torch.Generator().manual_seed(1)
    gamma, beta, mean = (torch.randn(channels, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(channels, generator=g, dtype=torch.float64) + 0.1
    return affine(gamma, beta, mean, var, 1e-5), (gamma, beta, mean, var)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (4, 6)),
        (nn.Conv1d(6, 5, 3, padding=2), (2, 6, 9)),
        (nn.Conv1d(5, 5, 7, groups=5, padding=3), (2, 5, 9)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 8)),
    ],
    ids=["linear", "conv1d", "depthwise", "conv2d"],
)
def test_a_norm_after_a_layer_disappears_into_it_even_at_padded_borders(layer, shape):
    layer = layer.double()
    norm, (gamma, beta, mean, var) = an_affine(5)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = nn.functional.batch_norm(layer(x), mean, var, gamma, beta, training=False, eps=1e-5)
    weight, bias = norm_after(Weights(layer.weight, layer.bias), norm)
    layer.weight.data, layer.bias.data = weight, bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_norm_before_a_linear_disappears_into_it():
    linear = nn.Linear(5, 3).double()
    norm, (gamma, beta, mean, var) = an_affine(5)
    x = torch.randn(4, 5, dtype=torch.float64)
    wanted = linear(nn.functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-5))
    torch.testing.assert_close(nn.functional.linear(x, *norm_before(norm, Weights(linear.weight, linear.bias))), wanted)


def test_a_constant_factor_scales_weight_and_bias():
    weight, bias = scaled(Weights(torch.ones(2, 2), torch.ones(2)), 0.5)
    assert weight.unique().tolist() == bias.unique().tolist() == [0.5]


@pytest.mark.parametrize("changes", FOLDABLE, ids=str)
def test_every_norm_of_a_fusionformer_folds_exactly_in_a_padded_batch(changes, padded_batch):
    checkpoint = a_checkpoint(**changes)
    folded = fold(checkpoint)
    assert not [site for site in folded.plan if isinstance(site, Refusal)]
    assert not [m for m in encoder_of(folded.checkpoint).modules() if isinstance(m, (BatchNorm, LayerNorm))]
    measured = exactness(checkpoint, folded, *padded_batch)
    assert measured.sites
    assert measured.worst_site <= BOUND
    assert measured.end_to_end <= BOUND


def test_a_conformer_keeps_its_layer_norms_and_still_answers_the_same(conformer, padded_batch):
    folded = fold(conformer)
    refused = [site for site in folded.plan if isinstance(site, Refusal)]
    assert len(refused) == 2 * 6 + 1
    assert all("LayerNorm" in refusal.reason for refusal in refused)
    assert exactness(conformer, folded, *padded_batch).end_to_end <= BOUND


CONFORMERS = [{}, {"conv_norm": "batch"}, {"positions": "none"}, {"norm_residual": "none"}, {"activation": "relu"}]


@pytest.mark.parametrize("changes", CONFORMERS, ids=str)
def test_the_linears_behind_a_layer_norm_absorb_its_gain_and_shift_exactly(changes, padded_batch):
    checkpoint = a_checkpoint("layer", **changes)
    folded = fold(checkpoint)
    absorbed = {site.site: site.into for site in folded.plan if isinstance(site, Fold) and site.rule == "affine before"}
    assert absorbed["blocks.0.macaron.norm.affine"] == ("blocks.0.macaron.w1.linear",)
    assert absorbed["blocks.0.norm_attention.affine"] == tuple(
        f"blocks.0.attention.{n}.linear" for n in ("query", "key", "value")
    )
    assert absorbed["blocks.1.convolution.norm.affine"] == ("blocks.1.convolution.pointwise1.linear",)
    measured = exactness(checkpoint, folded, *padded_batch)
    assert {layer for into in absorbed.values() for layer in into} - {"ctc"} <= set(measured.sites)
    assert measured.worst_site <= BOUND
    assert measured.end_to_end <= BOUND


def test_a_layer_norm_whose_gain_nothing_can_absorb_keeps_it_and_says_why(conformer):
    folded = fold(conformer)
    refused = {site.site: site.reason for site in folded.plan if isinstance(site, Refusal)}
    assert "residual stream" in refused["blocks.0.norm_final"]
    assert "before blocks.1.convolution.activation" in refused["blocks.1.convolution.depthwise.norm"]
    for name in ("blocks.0.norm_final", "blocks.1.convolution.depthwise.norm"):
        assert torch.equal(folded.checkpoint.weights[f"{name}.weight"], conformer.weights[f"{name}.weight"])


def test_a_gain_that_was_absorbed_is_not_computed(conformer):
    def gains(checkpoint):
        norms = DeploymentGraph(encoder_of(checkpoint), 8).named_modules()
        return {name for name, each in norms if isinstance(each, nn.LayerNorm) and each.elementwise_affine}

    absorbed = {"macaron.norm", "norm_attention", "convolution.norm", "feed_forward.norm"}
    expected = {f"blocks.{layer}.{name}" for layer in range(2) for name in absorbed} | {"head.norm"}
    assert gains(conformer) - gains(fold(conformer).checkpoint) == expected


class NormThen(nn.Module):
    def __init__(self, also: str) -> None:
        super().__init__()
        self.norm, self.linear, self.also = nn.LayerNorm(4), nn.Linear(4, 4), also

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.also == "axes":
            return self.linear(y.transpose(1, 2))
        return self.linear(self.linear(y)) if self.also == "linear" else self.linear(y) + y


@pytest.mark.parametrize("also", ["linear", "axes", "skip"])
def test_a_gain_before_anything_but_linears_of_their_own_stays(also):
    (site,) = plan_norms(NormThen(also), torch.randn(2, 4, 4))
    assert isinstance(site, Refusal)
    assert "its gain and shift stay too" in site.reason


def test_the_plan_names_every_norm_of_the_model(fusionformer):
    encoder = encoder_of(fusionformer)
    norms = {name for name, module in encoder.named_modules() if isinstance(module, BatchNorm)}
    assert norms <= {site.site for site in plan(encoder)}


class BeforePaddedConvolution(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.norm, self.inside = nn.BatchNorm1d(4), inside
        self.conv = nn.Conv1d(4, 4, 3, padding=2 if inside else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.conv(x if self.inside else nn.functional.pad(x, (2, 0)))


@pytest.mark.parametrize("inside", [True, False], ids=["by the convolution", "by F.pad"])
def test_a_norm_before_a_zero_padded_convolution_is_refused(inside):
    (site,) = plan_norms(BeforePaddedConvolution(inside), torch.randn(2, 4, 9))
    assert isinstance(site, Refusal)
    assert "zeros are padded after the norm" in site.reason


class OneLinearTwice(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), BatchNorm(4)
        self.other = nn.Linear(4, 4)
        if tied:
            self.other.weight = self.linear.weight
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x), None)
        return (self.other if self.tied else self.linear)(y.relu())


@pytest.mark.parametrize("tied", [True, False], ids=["shared with another layer", "one layer run twice"])
def test_a_weight_that_is_used_twice_is_refused(tied):
    (site,) = plan_norms(OneLinearTwice(tied), torch.randn(2, 3, 4))
    assert isinstance(site, Refusal)
    assert "used twice" in site.reason


class OutputUsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), BatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y, None) + y


def test_a_layer_whose_output_is_also_used_without_the_norm_is_refused():
    (site,) = plan_norms(OutputUsedTwice(), torch.randn(2, 3, 4))
    assert isinstance(site, Refusal)
    assert "without the norm" in site.reason


class NormOfAnotherAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()  # (B, 4, 4): the norm is over time, not over the linear's channels


def test_a_norm_over_another_axis_than_the_layers_channels_does_not_fold():
    (site,) = plan_norms(NormOfAnotherAxis(), torch.randn(2, 4, 4))
    assert isinstance(site, Refusal)


def test_folding_twice_changes_nothing(fusionformer, conformer):
    for checkpoint, stays in ((fusionformer, 0), (conformer, 13)):
        once = fold(checkpoint)
        twice = fold(once.checkpoint)
        assert twice.digest == once.digest
        assert len([site for site in twice.plan if isinstance(site, Refusal)]) == len(twice.plan) == stays


def test_a_model_that_was_folded_when_gains_were_not_is_read_and_stays_as_it_is(conformer, padded_batch):
    folded = fold(conformer).checkpoint
    norm, layer = "blocks.0.macaron.norm", "blocks.0.macaron.w1.linear.weight"
    earlier = {**folded.weights, f"{norm}.weight": folded.weights[f"{norm}.weight"] * 2, layer: folded.weights[layer] / 2}
    tensors = {**earlier, MEAN: folded.frontend_mean, ISTD: folded.frontend_istd}
    checkpoint = assemble(folded.config, tensors, folded.tokens)
    again = fold(checkpoint)
    assert again.digest == checkpoint.digest
    assert not [site for site in again.plan if isinstance(site, Fold)]
    assert exactness(conformer, again, *padded_batch).end_to_end <= BOUND


def test_a_wrong_fold_is_noticed(fusionformer, padded_batch):
    folded = fold(fusionformer)
    weights = {**folded.checkpoint.weights}
    name = "blocks.1.convolution.depthwise.conv.bias"
    weights[name] = weights[name] + 1e-6
    broken = dataclasses.replace(folded, checkpoint=dataclasses.replace(folded.checkpoint, weights=weights))
    measured = exactness(fusionformer, broken, *padded_batch)
    assert max(measured.sites, key=measured.sites.__getitem__) == "blocks.1.convolution.depthwise.conv"
    with pytest.raises(FoldInexact):
        measured.require()


def test_constants_of_the_graph_are_in_the_plan():
    rules = {site.rule for site in plan(Encoder(a_config(scale_embedding=True)).eval()) if isinstance(site, Fold)}
    assert rules == {"norm after", "half step", "embedding scale", "query", "key bias"}

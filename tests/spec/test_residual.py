"""Norms in LayerNorm's places fold, those on the residual stream by a change of its basis; what must not is refused in words."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from edgefuse import store
from edgefuse.checkpoint import ISTD, MEAN, assemble, encoder_of
from edgefuse.errors import FoldInexact
from edgefuse.fold import exactness, fold, plan
from edgefuse.fold.algebra import Affine, Weights, affine_of, basis_after, norm_before
from edgefuse.fold.plan import plan_norms
from edgefuse.lower import DeploymentGraph
from edgefuse.model.config import Stage
from edgefuse.model.normalization import BatchNorm, LayerNorm, RepBatchNorm, StatisticsNorm, UnifiedNorm
from edgefuse.values import Checkpoint, Fold, Refusal
from tests.conftest import a_checkpoint

BOUND = 1e-10
PLACES = [(norm, where) for norm in ("batch", "batch-in-place", "unified", "rep") for where in ("none", "output", "block")]


def norms_of(checkpoint: Checkpoint) -> list[str]:
    return [n for n, m in encoder_of(checkpoint).named_modules() if isinstance(m, (StatisticsNorm, LayerNorm))]


def refused(sites) -> dict[str, str]:
    return {site.site: site.reason for site in sites if isinstance(site, Refusal)}


@pytest.mark.parametrize(("norm", "where"), PLACES, ids=["-".join(place) for place in PLACES])
def test_every_norm_with_statistics_folds_exactly_wherever_it_stands(norm, where, padded_batch):
    checkpoint = a_checkpoint(norm, norm_residual=where, layers=3)
    folded = fold(checkpoint)
    assert not refused(folded.plan)
    assert norms_of(checkpoint)
    assert not norms_of(folded.checkpoint)
    measured = exactness(checkpoint, folded, *padded_batch)
    layers = {name for site in folded.plan if isinstance(site, Fold) and site.rule != "key bias" for name in site.into}
    assert {name for name in layers if f"{name}.weight" in folded.checkpoint.weights} - {"ctc"} == set(measured.sites)
    assert measured.worst_site <= BOUND
    assert measured.end_to_end <= BOUND


SHAPES = [
    {"stages": (Stage(1, attention="none", kernel=3), Stage(2, attention="performer", heads=1, attention_dimension=8))},
    {"stages": (Stage(1), Stage(2, stride=2, heads=4))},
    {"second_pass": 1},
    {"subsampling": 8, "activation": "swish"},
]


@pytest.mark.parametrize("changes", SHAPES, ids=["kinds of attention", "stride", "second pass", "swish"])
@pytest.mark.parametrize("norm", ["batch", "unified", "rep"])
def test_the_basis_of_the_stream_changes_whatever_the_blocks_are(norm, changes, padded_batch):
    checkpoint = a_checkpoint(norm, norm_residual="block", layers=3, **changes)
    folded = fold(checkpoint)
    assert not refused(folded.plan)
    measured = exactness(checkpoint, folded, *padded_batch)
    assert max(measured.worst_site, measured.end_to_end) <= BOUND


def test_a_basis_names_every_layer_and_norm_up_to_the_next_one_on_the_stream():
    (first, *_) = [site for site in plan(encoder_of(a_checkpoint("rep", norm_residual="block"))) if site.rule == "residual basis"]
    assert first.site == "blocks.0.norm_final"
    norms = ("macaron.norm", "norm_attention", "convolution.norm", "feed_forward.norm", "norm_final")
    assert set(first.readers) == {f"blocks.1.{name}" for name in norms}
    writers = ("macaron.w2.linear", "attention.output.linear", "convolution.pointwise2.linear", "feed_forward.w2.linear")
    assert set(first.writers) == {f"blocks.1.{name}" for name in writers}
    assert first.into == (*first.readers, *first.writers)


@pytest.mark.parametrize("norm", ["unified", "rep"])
def test_one_norm_folds_into_queries_keys_and_values(norm):
    sites = {site.site: site.into for site in plan(encoder_of(a_checkpoint(norm))) if isinstance(site, Fold)}
    assert sites["blocks.0.norm_attention"] == tuple(f"blocks.0.attention.{n}.linear" for n in ("query", "key", "value"))
    assert sites["blocks.0.convolution.depthwise.norm"] == ("blocks.0.convolution.depthwise.conv",)
    assert sites["blocks.0.convolution.norm"] == ("blocks.0.convolution.pointwise1.linear",)


def test_a_sum_in_another_basis_is_the_same_sum():
    s, t = torch.randn(5, dtype=torch.float64) + 3, torch.randn(5, dtype=torch.float64)
    c, layer = torch.randn(7, 5, dtype=torch.float64), nn.Linear(5, 5).double()
    x = s * c + t
    reads = nn.functional.linear(c, *norm_before(Affine(s, t), Weights(layer.weight, layer.bias)))
    torch.testing.assert_close(reads, layer(x))
    written = nn.functional.linear(x, *basis_after(Weights(layer.weight, layer.bias), s))
    torch.testing.assert_close(s * (c + written) + t, x + layer(x))


@pytest.mark.parametrize("kind", [BatchNorm, RepBatchNorm, UnifiedNorm])
def test_the_affine_of_a_norm_is_what_it_does_in_evaluation(kind):
    norm = kind(6).double().eval()
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.2)
        del name
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    scale, shift = affine_of(norm.state_dict(), norm.eps)
    torch.testing.assert_close(norm(x, None), scale * x + shift)


@pytest.mark.parametrize("norm", ["unified", "rep", "batch-in-place"])
def test_an_unfolded_one_answers_the_same_once_it_is_lowered(norm):
    encoder = encoder_of(a_checkpoint(norm, norm_residual="block"))
    features = torch.randn(1, 32, 80)
    with torch.no_grad():
        wanted, _ = encoder(features, torch.tensor([32]))
        got = DeploymentGraph(encoder, 8).eval()(features, torch.tensor([8.0]))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def with_a_silent_channel(checkpoint: Checkpoint, norm: str, value: float) -> Checkpoint:
    weights = dict(checkpoint.weights)
    weights[f"{norm}.weight"] = weights[f"{norm}.weight"].clone()
    weights[f"{norm}.weight"][3] = value
    tensors = {**weights, MEAN: checkpoint.frontend_mean, ISTD: checkpoint.frontend_istd}
    return assemble(checkpoint.config, tensors, checkpoint.tokens)


@pytest.mark.parametrize("value", [0.0, 1e-8])
def test_a_channel_that_the_norm_silences_keeps_all_norms_on_the_stream(value, padded_batch):
    checkpoint = with_a_silent_channel(a_checkpoint("unified", norm_residual="block", layers=3), "blocks.1.norm_final", value)
    folded = fold(checkpoint)
    stays = refused(folded.plan)
    assert list(stays) == [f"blocks.{number}.norm_final" for number in range(3)] == norms_of(folded.checkpoint)
    assert "too small to divide by in 1 of its channels" in stays["blocks.1.norm_final"]
    assert "all of them fold, or none" in stays["blocks.2.norm_final"] or "too small" in stays["blocks.2.norm_final"]
    assert folded.checkpoint.config.residual_norms_kept
    assert exactness(checkpoint, folded, *padded_batch).end_to_end <= BOUND
    again = fold(folded.checkpoint)
    assert again.digest == folded.digest
    assert set(refused(again.plan)) == set(stays)


@pytest.mark.parametrize("norm", ["batch", "rep"])
def test_blocks_that_are_shared_fold_once_but_on_the_stream(norm, padded_batch):
    checkpoint = a_checkpoint(norm, norm_residual="block", layers=3, shared_blocks=True)
    folded = fold(checkpoint)
    stays = refused(folded.plan)
    assert list(stays) == ["blocks.0.norm_final"] == norms_of(folded.checkpoint)
    assert "runs 3 times" in stays["blocks.0.norm_final"]
    assert exactness(checkpoint, folded, *padded_batch).end_to_end <= BOUND
    whole = a_checkpoint(norm, norm_residual="output", layers=3, shared_blocks=True)
    assert not norms_of(fold(whole).checkpoint)
    assert exactness(whole, fold(whole), *padded_batch).end_to_end <= BOUND


@pytest.mark.parametrize("layer", ["blocks.1.macaron.w1.linear.bias", "blocks.1.convolution.pointwise2.linear.weight"])
def test_a_wrong_basis_is_noticed_at_its_layer(layer, padded_batch):
    checkpoint = a_checkpoint("rep", norm_residual="block")
    folded = fold(checkpoint)
    weights = {**folded.checkpoint.weights, layer: folded.checkpoint.weights[layer] * (1 + 1e-6)}
    broken = dataclasses.replace(folded, checkpoint=dataclasses.replace(folded.checkpoint, weights=weights))
    measured = exactness(checkpoint, broken, *padded_batch)
    assert max(measured.sites, key=measured.sites.__getitem__) == layer.rpartition(".")[0]
    with pytest.raises(FoldInexact):
        measured.require()


def test_a_plan_with_a_basis_is_read_as_it_was_written(tmp_path, padded_batch):
    checkpoint = a_checkpoint("rep", norm_residual="block")
    folded = fold(checkpoint)
    store.write_folded(tmp_path / "folded", folded, exactness(checkpoint, folded, *padded_batch))
    assert store.read_plan(tmp_path / "folded", folded.checkpoint).plan == folded.plan


class OnTheStream(nn.Module):
    """A norm, a branch beside its output, and what follows the sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm, self.drop = way, BatchNorm(4), nn.Dropout(0.1)
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer_norm, self.after = LayerNorm(4), BatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:  # noqa: PLR0911 - a way a line
        x = self.norm(x, None)
        y = self.branch(self.layer_norm(x, None) if self.way == "layer norm" else x)
        if self.way == "activation":
            y = y.relu()
        if self.way == "moved":
            return self.head((x.transpose(1, 2) + (0.5 * self.drop(y)).transpose(1, 2)).transpose(1, 2))
        if self.way == "product":
            return self.head(x * y)
        if self.way == "also used":
            return self.head(x + y) + y
        if self.way == "other axis":
            return self.head(x + y.transpose(1, 2))
        if self.way == "read":
            return self.head(x + y) + x.relu()
        if self.way == "norm":
            return self.head(self.after(x + self.drop(y) / 2, None))
        return self.head(x + y)


@pytest.mark.parametrize("way", ["plain", "moved", "norm"])
def test_a_stream_is_found_through_dropout_factors_and_moved_axes(way):
    site, *others = plan_norms(OnTheStream(way), torch.randn(2, 4, 4))
    reader = "after" if way == "norm" else "head"
    assert site == Fold("norm", ("branch", reader, "branch"), "residual basis", ("branch",))
    assert others == ([Fold("after", ("head",), "norm before")] if way == "norm" else [])


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("layer norm", "the LayerNorm layer_norm reads"),
        ("activation", "what add adds to it is no layer's output"),
        ("product", "before mul"),
        ("also used", "also used elsewhere"),
        ("other axis", "over another axis"),
        ("read", "before relu"),
    ],
)
def test_a_stream_that_something_else_reads_or_writes_is_refused_in_words(way, reason):
    assert reason in refused(plan_norms(OnTheStream(way), torch.randn(2, 4, 4)))["norm"]


class Repeated(nn.Module):
    """One block three times, perhaps with something else between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.before, self.linear, self.after = way, BatchNorm(4), nn.Linear(4, 4), BatchNorm(4)
        self.other = BatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(3):
            last = turn == 2 and self.way != "always"
            y = x if last and self.way == "without" else (self.other if last and self.way == "another" else self.before)(x, None)
            x = x + self.after(self.linear(y.relu() if last and self.way == "activation" else y), None).relu()
        return x


def test_a_layer_that_runs_several_times_folds_where_every_run_has_the_same_norm():
    assert plan_norms(Repeated("always"), torch.randn(2, 3, 4)) == (
        Fold("before", ("linear",), "norm before"),
        Fold("after", ("linear",), "norm after"),
    )


@pytest.mark.parametrize("way", ["without", "another", "activation"])
def test_a_layer_that_runs_once_without_the_norm_keeps_it(way):
    sites = plan_norms(Repeated(way), torch.randn(2, 3, 4))
    assert set(refused(sites)) == {"before", *(["other"] if way == "another" else [])}
    assert Fold("after", ("linear",), "norm after") in sites


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = BatchNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, None).transpose(1, 2))


def test_a_linear_over_another_axis_than_the_norms_channels_does_not_absorb_it():
    assert "another axis" in refused(plan_norms(Transposed(), torch.randn(2, 4, 4)))["norm"]

"""Averaged checkpoints have the mean of the weights, and statistics of the speech that the average hears."""

from dataclasses import replace

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli
from edgefuse.average import average, averaged
from edgefuse.errors import UsageError
from edgefuse.model.normalization import BatchNorm
from edgefuse.recognize import frontend_of, hear
from edgefuse.speech import read_speech
from tests.conftest import a_checkpoint


@pytest.fixture
def two(tmp_path):
    """Two checkpoints that differ in every number, and a third that is their mean by hand."""
    places = []
    for seed in (1, 2):
        one = a_checkpoint("batch")
        draw = torch.Generator().manual_seed(seed)
        weights = {
            name: tensor + seed
            if not tensor.is_floating_point()
            else tensor * (1 + 0.1 * torch.rand(tensor.shape, generator=draw))
            for name, tensor in one.weights.items()
        }
        tensors = {**weights, checkpoints.MEAN: one.frontend_mean, checkpoints.ISTD: one.frontend_istd}
        places.append(tmp_path / f"epoch{seed}")
        places[-1].mkdir()
        checkpoints.write(places[-1], checkpoints.assemble(one.config, tensors, one.tokens))
    return places


def test_weights_are_the_mean_and_counters_the_largest(two):
    one, other = map(checkpoints.read, two)
    mean = averaged([one, other])
    for name, tensor in mean.weights.items():
        if tensor.is_floating_point():
            wanted = ((one.weights[name].double() + other.weights[name].double()) / 2).to(tensor.dtype)
        else:
            wanted = torch.maximum(one.weights[name], other.weights[name])
        assert torch.equal(tensor, wanted)
        assert tensor.dtype == one.weights[name].dtype


def test_statistics_are_those_that_the_average_measures_itself(two, speech, tmp_path):
    """Measured here by hand: mean and variance of all that comes to the first norm, over all utterances."""
    made = average(two, tmp_path / "mean", speech=speech)
    encoder = checkpoints.encoder_of(made)
    norm = encoder.subsampling.conv1.norm
    assert isinstance(norm, BatchNorm)
    rows = []
    norm.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][inputs[1]].flatten(0, -2)))
    for heard in hear(read_speech(speech), frontend_of(made)):
        features = torch.from_numpy(heard.features)[None]
        with torch.no_grad():
            encoder(features, torch.tensor([features.shape[1]]))
    together = torch.cat(rows).double()
    assert torch.allclose(norm.running_mean.double(), together.mean(dim=0), rtol=1e-4, atol=1e-4)
    assert torch.allclose(norm.running_var.double(), together.var(dim=0), rtol=1e-3)
    kept = averaged(list(map(checkpoints.read, two)))
    assert not torch.allclose(norm.running_mean, kept.weights["subsampling.conv1.norm.running_mean"], atol=1e-2)
    assert checkpoints.read(tmp_path / "mean").digest == made.digest


def test_a_mean_of_equal_checkpoints_is_that_checkpoint(two):
    one = checkpoints.read(two[0])
    assert averaged([one, one, one]).digest == one.digest


def test_statistics_are_averaged_where_that_is_asked_for(two, speech, tmp_path):
    wanted = averaged(list(map(checkpoints.read, two)))
    assert average(two, tmp_path / "mean", average_statistics=True).digest == wanted.digest
    assert checkpoints.read(tmp_path / "mean").digest == wanted.digest
    with pytest.raises(UsageError, match="not both"):
        average(two, tmp_path / "both", speech=speech, average_statistics=True)
    assert not (tmp_path / "both").exists()


def test_layer_norms_need_no_speech(tmp_path):
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
        checkpoints.write(place, a_checkpoint("layer"))
    assert average(places, tmp_path / "mean").digest == a_checkpoint("layer").digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: replace(one, tokens=("<blk>", *reversed(one.tokens[1:]))), "other tokens"),
        (lambda one: replace(one, frontend_mean=one.frontend_mean + 1), "normalizes its features otherwise"),
        (lambda one: replace(one, config=replace(one.config, dropout=0.5)), "another architecture than .*: dropout"),
    ],
)
def test_checkpoints_that_differ_otherwise_are_refused(two, tmp_path, change, words):
    one = change(checkpoints.read(two[1]))
    tensors = {**one.weights, checkpoints.MEAN: one.frontend_mean, checkpoints.ISTD: one.frontend_istd}
    checkpoints.write(two[1], checkpoints.assemble(one.config, tensors, one.tokens))
    with pytest.raises(UsageError, match=words):
        average(two, tmp_path / "mean")


def test_the_command_says_what_it_made(two, speech, tmp_path, capsys):
    asked = ["average", *map(str, two), "--reestimate", str(speech), "-o", str(tmp_path / "mean")]
    assert cli.run(asked) == 0
    assert "of 2 checkpoints" in capsys.readouterr().out

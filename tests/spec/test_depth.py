"""The lowest layers of a model are a model: cut, estimated again, folded and exported, and it is told what they were cut from."""

import json
from dataclasses import replace

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli, store
from edgefuse.depth import lowest
from edgefuse.errors import BadScheme, UsageError
from edgefuse.model import Encoder
from edgefuse.model.config import Stage
from edgefuse.model.cost import parameters
from edgefuse.model.reestimate import reestimate
from edgefuse.pipeline import export
from edgefuse.quantize.scheme import SCHEMES
from edgefuse.refold import refold
from edgefuse.report import bundle_rows
from edgefuse.report.page import page
from edgefuse.speech import read_speech
from edgefuse.values import Origin
from tests.conftest import a_checkpoint, a_config
from tests.spec.conftest import ONE_LAYER

DEEPER = {**ONE_LAYER, "layers": 3}


def answer(checkpoint, features, lengths):
    return checkpoints.encoder_of(checkpoint)(features, lengths)[0]


def test_depth_6_of_a_shared_block_is_the_encoder_of_6_layers_with_its_weights(padded_batch):
    deep = a_checkpoint(layers=12, shared_blocks=True)
    six = Encoder(a_config(layers=6, shared_blocks=True)).eval()
    six.load_state_dict(dict(deep.weights))
    cut = lowest(deep, 6)
    assert torch.equal(answer(cut, *padded_batch), six(*padded_batch)[0])
    assert cut.digest != deep.digest
    assert not torch.allclose(answer(cut, *padded_batch), answer(deep, *padded_batch))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_lowest_blocks_answer_as_the_whole_model_does_when_it_stops_there(norm, depth, padded_batch):
    deep = a_checkpoint(norm, layers=4, stages=(Stage(2, kernel=7), Stage(2, "none")))
    cut = lowest(deep, depth)
    assert torch.equal(answer(cut, *padded_batch), checkpoints.encoder_of(deep)(*padded_batch, depth=depth)[0])
    assert not any(name.startswith(f"blocks.{depth}.") for name in cut.weights)


def test_all_layers_are_the_checkpoint_itself():
    deep = a_checkpoint()
    assert lowest(deep, 2).digest == deep.digest


@pytest.mark.parametrize(
    ("changes", "depth", "words"),
    [
        ({}, 0, "A depth of 0 is none of a model with layers 1 to 3"),
        ({}, 4, "A depth of 4"),
        ({}, -1, "A depth of -1"),
        ({"second_pass": 1}, 2, "cascade"),
        ({"stages": (Stage(1), Stage(2, stride=2))}, 1, "end before a stride"),
    ],
    ids=str,
)
def test_a_depth_that_a_model_does_not_have_is_refused_in_words(changes, depth, words):
    with pytest.raises(UsageError, match=words):
        lowest(a_checkpoint(layers=3, **changes), depth)


@pytest.mark.parametrize("norm", ["batch", "unified"])
def test_the_statistics_of_a_shared_norm_are_those_of_all_that_it_hears_at_any_depth(norm, padded_batch):
    features, lengths = padded_batch
    encoder = Encoder(a_config(norm, layers=4, shared_blocks=True)).double()
    first = encoder.blocks[0].macaron.w1.norm if norm == "batch" else encoder.blocks[0].macaron.norm
    heard = []
    with first.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0][inputs[1]])):
        reestimate(encoder, [(features.double(), lengths), (features[:1].double() * 2, lengths[:1])])
    assert len(heard) == 2 * 4
    rows_ = torch.cat(heard)
    second = rows_.var(0, correction=0) if norm == "batch" else rows_.square().mean(0)
    torch.testing.assert_close(first.running_var, second)
    if norm == "batch":
        torch.testing.assert_close(first.running_mean, rows_.mean(0))


def test_what_a_shared_norm_counts_is_nothing_behind_an_utterance(padded_batch):
    features, lengths = padded_batch
    louder = features + 9.0 * (torch.arange(200) >= lengths[:, None])[..., None]
    statistics = []
    for each in (features, louder):
        torch.manual_seed(0)
        encoder = Encoder(a_config(layers=3, shared_blocks=True)).double()
        reestimate(encoder, [(each.double(), lengths)])
        statistics.append(encoder.blocks[0].feed_forward.w2.norm.running_var)
    torch.testing.assert_close(*statistics)


def test_a_bundle_says_what_its_layers_were_cut_from_and_on_which_speech_they_were_estimated(order, calibration, tmp_path):
    deep = a_checkpoint(**DEEPER, shared_blocks=True)
    store.write_checkpoint(tmp_path / "deep", deep)
    verified = export(tmp_path / "deep", tmp_path / "bundle", replace(order, depth=2, reestimate=calibration))
    bundle = store.read_bundle(tmp_path / "bundle")
    assert verified.passed
    assert bundle.config.layers == 2
    assert bundle.origin == Origin(deep.digest, 3, read_speech(calibration).digest)
    assert bundle.checkpoint not in (deep.digest, lowest(deep, 2).digest)  # its statistics are others
    assert deep.digest in page(bundle)
    told = " ".join(bundle_rows.depth_lines(bundle))
    assert "lowest 2 of 3 layers" in told
    assert "weights of 2 blocks are stored once" in told


@pytest.mark.parametrize("changes", [{"shared_blocks": True}, {"norm_residual": "output"}], ids=str)
def test_a_depth_at_which_the_statistics_are_wrong_needs_speech(changes, order, tmp_path):
    store.write_checkpoint(tmp_path / "deep", a_checkpoint(**DEEPER, **changes))
    with pytest.raises(UsageError, match="are those of 3 layers, not of 2"):
        export(tmp_path / "deep", tmp_path / "bundle", replace(order, depth=2))
    with pytest.raises(UsageError, match="are those of 3 layers, not of 2"):
        refold(tmp_path / "deep", tmp_path / "folded", depth=2)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    refold(tmp_path / "deep", tmp_path / "folded", depth=3)  # all of them


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_depth_that_no_statistics_depend_on_needs_no_speech(norm, order, tmp_path):
    store.write_checkpoint(tmp_path / "deep", a_checkpoint(norm, **DEEPER))
    bundle = export(tmp_path / "deep", tmp_path / "bundle", replace(order, depth=2)).bundle
    assert bundle_rows.depth_lines(bundle) == [f"The lowest 2 of 3 layers of checkpoint {bundle.origin.checkpoint[:16]}"]


def test_a_folded_model_remembers_what_it_was_cut_from(order, calibration, tmp_path):
    deep = a_checkpoint(**DEEPER, shared_blocks=True)
    store.write_checkpoint(tmp_path / "deep", deep)
    refold(tmp_path / "deep", tmp_path / "folded", depth=2, speech=calibration)
    bundle = export(tmp_path / "folded", tmp_path / "bundle", order).bundle
    assert bundle.origin == Origin(deep.digest, 3, read_speech(calibration).digest)
    with pytest.raises(UsageError, match="is folded"):
        refold(tmp_path / "folded", tmp_path / "again", depth=1)


def test_what_is_tested_on_is_not_estimated_on(order, speech, tmp_path):
    store.write_checkpoint(tmp_path / "deep", a_checkpoint(**DEEPER))
    with pytest.raises(UsageError, match="never tested on"):
        export(tmp_path / "deep", tmp_path / "bundle", replace(order, depth=2, reestimate=speech))


def test_parameters_of_shared_blocks_are_stored_once_and_run_as_often_as_there_are_layers(tmp_path, capsys):
    one, eight, apart = (parameters(a_config(**c)) for c in ({"layers": 1}, {"layers": 8, "shared_blocks": True}, {"layers": 8}))
    assert (eight.stored, eight.run) == (one.stored, apart.stored)
    assert apart.run == apart.stored
    store.write_checkpoint(tmp_path / "shared", a_checkpoint(layers=8, shared_blocks=True))
    assert cli.run(["inspect", str(tmp_path / "shared"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["parameters"], told["parameters_run"]) == (eight.stored, eight.run)
    assert cli.run(["inspect", str(tmp_path / "shared")]) == 0
    assert "8 blocks are one" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4-weights"])
def test_a_shared_block_is_not_quantized_and_that_is_said(precision, order, calibration, tmp_path):
    store.write_checkpoint(tmp_path / "shared", a_checkpoint(**DEEPER, shared_blocks=True))
    with pytest.raises(BadScheme, match="3 blocks of this model are one"):
        export(
            tmp_path / "shared",
            tmp_path / "bundle",
            replace(order, precision=SCHEMES[precision], calibration=calibration, depth=3),
        )
    assert not (tmp_path / "bundle").exists()

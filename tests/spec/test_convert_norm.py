"""A conversion begins as the Conformer that it is given, and ends as a network whose norms fold."""

import json
from dataclasses import replace

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli, store
from edgefuse.errors import UsageError
from edgefuse.fold import exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.model import Encoder
from edgefuse.model.normalization import LayerNorm, RepBatchNorm
from edgefuse.train.annealed import Annealed, MixedReLU, anneal, annealed, settled, succeeded
from edgefuse.train.closeness import _fit, begin_close
from edgefuse.train.convert_norm import Conversion, convert_norm, fit
from edgefuse.train.loop import open_speech
from edgefuse.train.recipe import CONVERSION
from edgefuse.values import Refusal
from tests.conftest import a_checkpoint
from tests.spec.test_training import NO_AUGMENTATION, TOKENS, write_corpus

QUICK = replace(CONVERSION, epochs=2, epoch_batches=3, batch_seconds=8.0, augmentation=NO_AUGMENTATION)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = ["abc", "bad cab", "cad", "dab a", "add", "bcd dc", "ab ba", "cba", "dad", "a bad dab", "cc", "d a b"]
    write_corpus(folder, "train", words)
    for name in ("dev", "seen", "unseen"):
        write_corpus(folder, name, words[:2])
    return folder


def a_conformer(**changes):
    """With the tokens of the tones."""
    made = a_checkpoint("layer", dropout=0.0, **changes)
    return checkpoints.of_encoder(checkpoints.encoder_of(made), made.frontend_mean, made.frontend_istd, TOKENS.symbols)


@pytest.fixture(params=[{}, {"conv_norm": "batch"}, {"norm_residual": "output", "positions": "none"}], ids=str)
def teacher(request) -> Encoder:
    return checkpoints.encoder_of(a_checkpoint("layer", dropout=0.0, **request.param), torch.float64)


def heard(encoder, batch):
    features, lengths = batch
    with torch.no_grad():
        logits, valid = encoder(features.double(), lengths)
    return logits[torch.arange(logits.shape[1]) < valid[:, None]]


def begun(teacher, batch) -> Encoder:
    """With the successors of its modules, fitted."""
    encoder = succeeded(teacher)
    begin_close(encoder, teacher, [(batch[0].double(), batch[1])])
    return encoder


def test_blocks_that_are_what_they_were_answer_as_the_conformer_until_they_are_deployed(teacher, padded_batch):
    encoder = annealed(teacher, begun(teacher, padded_batch))
    wanted, draw = heard(teacher, padded_batch), torch.Generator().manual_seed(0)
    encoder.norm = teacher.norm  # of the last norm there is the successor alone
    anneal(encoder.train(), 1.0, draw)
    assert torch.equal(heard(encoder, padded_batch), wanted)
    assert not torch.equal(heard(encoder.eval(), padded_batch), wanted)
    anneal(encoder.train(), 0.0, draw)
    assert not any(block.is_before for block in encoder.blocks)


def test_what_it_was_is_not_trained(teacher, padded_batch):
    encoder = annealed(teacher, succeeded(teacher)).train()
    anneal(encoder, 1.0, torch.Generator().manual_seed(0))
    before = {name: each.clone() for name, each in encoder.state_dict().items() if ".before." in name}
    features, lengths = padded_batch
    encoder(features.double(), lengths)[0].sum().backward()
    assert before
    assert all(torch.equal(encoder.state_dict()[name], each) for name, each in before.items())
    assert not any(p.requires_grad for block in encoder.blocks for p in block.before.parameters())


def test_it_settles_to_a_plain_encoder_of_what_it_will_be(teacher, padded_batch):
    encoder = annealed(teacher, begun(teacher, padded_batch)).eval()
    plain = settled(encoder)
    assert (plain.config.norm, plain.config.activation, plain.config.conv_expansion) == ("rep", "relu", 1)
    assert plain.config.norm_residual == teacher.config.norm_residual
    assert not any(isinstance(each, LayerNorm) for each in plain.modules())
    torch.testing.assert_close(heard(plain, padded_batch), heard(encoder, padded_batch))


def test_the_start_is_closer_than_fresh_norms_and_plain_relus(padded_batch):
    before = checkpoints.encoder_of(a_checkpoint("layer"), torch.float64)
    close, fresh = begun(before, padded_batch).eval(), succeeded(before).eval()
    for name, module in before.named_modules():
        if isinstance(module, LayerNorm):
            fresh.get_submodule(name).weight.data.copy_(module.weight)
            fresh.get_submodule(name).bias.data.copy_(module.bias)
    wanted = heard(before, padded_batch)
    assert (heard(close, padded_batch) - wanted).norm() < 0.5 * (heard(fresh, padded_batch) - wanted).norm()


def test_the_first_norm_begins_as_the_regression_of_the_layer_norm(padded_batch):
    before = checkpoints.encoder_of(a_checkpoint("layer"), torch.float64)
    encoder, (features, lengths) = succeeded(before).eval(), (padded_batch[0].double(), padded_batch[1])
    begin_close(encoder, before, [(features[:1], lengths[:1]), (features[1:], lengths[1:])])
    with torch.no_grad():
        x = before.subsampling(features, lengths)
        x = x[torch.arange(x.shape[1]) < (lengths // 4)[:, None]]
        y = before.blocks[0].macaron.norm(x, None)
    norm = encoder.blocks[0].macaron.norm
    design = torch.stack([x[:, 3], torch.ones(len(x), dtype=torch.float64)], dim=1)
    slope, offset = torch.linalg.lstsq(design, y[:, 3:4]).solution.flatten()
    got = norm(torch.eye(16, dtype=torch.float64)[None] * 2.0, None)[0, :, 3]
    torch.testing.assert_close(got, torch.where(torch.arange(16) == 3, 2.0 * slope + offset, offset))
    assert isinstance(norm, RepBatchNorm)
    assert norm.alpha.tolist() == [0.0]


def test_fewer_and_fewer_blocks_are_what_they_were_and_none_after_its_share_of_the_steps(corpus, tmp_path, monkeypatch):
    seen, drawn, step = [], [], Conversion.training_step

    def watched(self, *batch):
        loss = step(self, *batch)
        seen.append(self.lambda_)
        drawn.append([block.is_before for block in self.encoder.blocks])
        return loss

    monkeypatch.setattr(Conversion, "training_step", watched)
    spoken, dev = (open_speech(corpus).load(name) for name in ("train", "dev"))
    training = fit(a_conformer(), spoken, dev, tmp_path, replace(QUICK, anneal_share=0.5, epochs=4))
    steps = training.steps
    assert seen == pytest.approx([0.5 * max(0.0, 1 - number / (0.5 * steps)) for number in range(steps)])
    assert any(any(blocks) for blocks in drawn[: steps // 2])
    assert not all(all(blocks) for blocks in drawn[: steps // 2])
    assert not any(any(blocks) for blocks in drawn[steps // 2 :])
    assert all(isinstance(block, Annealed) for block in training.averaged.blocks)


def test_an_interrupted_conversion_ends_with_the_same_weights(corpus, tmp_path, monkeypatch):
    before = a_conformer()
    spoken, dev = (open_speech(corpus).load(name) for name in ("train", "dev"))

    whole = fit(before, spoken, dev, tmp_path / "whole", QUICK)
    with monkeypatch.context() as patch:  # the power goes at the second epoch's start
        patch.setattr(Conversion, "on_train_epoch_start", lambda self: 1 / (1 - self.current_epoch), raising=False)
        with pytest.raises(ZeroDivisionError):
            fit(before, spoken, dev, tmp_path / "half", QUICK)
    resumed = fit(before, spoken, dev, tmp_path / "half", QUICK, resume=True)
    wanted = whole.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state_dict().items())


def test_a_conversion_leaves_a_checkpoint_whose_norms_all_fold_and_its_errors(corpus, tmp_path):
    given = a_conformer()
    store.write_checkpoint(tmp_path / "given", given)
    trained = convert_norm(tmp_path / "given", corpus, tmp_path / "run", QUICK, precision="fp32", features=corpus / "features")
    made = checkpoints.read(trained.folder)
    assert made.config == replace(
        given.config, norm="rep", conv_norm="batch", activation="relu", conv_expansion=1, conv_relu="both"
    )
    assert made.tokens == given.tokens == TOKENS.symbols
    assert torch.equal(made.frontend_mean, given.frontend_mean)
    folded = fold(made)
    assert not [site for site in folded.plan if isinstance(site, Refusal)]
    measured = exactness(made, folded, *probe(80))
    assert max(measured.worst_site, measured.end_to_end) <= 1e-10
    assert {"seen, before", "unseen, before", "seen", "unseen", "unseen, 640 ms"} <= set(trained.errors)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["recipe"]["from"] == given.digest
    assert "norm" not in written["recipe"]


@pytest.mark.parametrize(
    ("norm", "changes", "folds", "words"),
    [
        ("layer", {}, True, "folded"),
        ("batch", {}, False, "FusionFormer"),
        ("rep", {}, False, "not a LayerNorm Conformer"),
        ("layer", {"activation": "relu"}, False, "with relu"),
    ],
)
def test_what_is_no_layer_norm_conformer_is_refused_in_words(norm, changes, folds, words, corpus, tmp_path):
    checkpoint = a_checkpoint(norm, **changes)
    store.write_checkpoint(tmp_path / "given", fold(checkpoint).checkpoint if folds else checkpoint)
    with pytest.raises(UsageError, match=words):
        convert_norm(tmp_path / "given", corpus, tmp_path / "run", QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "LayerNorm Conformer to begin with"),
        (["--from", "ANY", "--precision", "int8"], "two steps"),
        (["--from", "ANY", "--preset", "tiny"], "--preset is the checkpoint's own"),
        (["--from", "ANY", "--norm", "batch"], "--norm is the checkpoint's own"),
        (["--from", "ANY", "--calibration", "SPEECH"], "Nothing is calibrated"),
    ],
)
def test_options_that_contradict_a_conversion_are_refused_in_words(options, words, tmp_path, capsys):
    command = ["train", "--speech", str(tmp_path), "-o", str(tmp_path / "run"), "--convert-norm", *options]
    assert cli.run(command) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_command_converts(corpus, tmp_path, monkeypatch, capsys):
    asked = {}

    def instead(*given, **options):
        asked.update(recipe=given[3], **options)
        raise UsageError("that is all")

    monkeypatch.setattr("edgefuse.train.convert_norm.convert_norm", instead)
    words = ["--from", str(tmp_path), "--convert-norm", "--epochs", "3", "--threads", "1"]
    assert cli.run(["train", "--speech", str(corpus), "-o", str(tmp_path / "run"), *words]) != 0
    assert asked["recipe"] == replace(CONVERSION, epochs=3, seed=0)
    assert asked["threads"] == 1
    capsys.readouterr()


def test_a_gate_is_closer_than_half_of_it_is():
    gate, g = MixedReLU(6).double(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 600, 5, generator=g, dtype=torch.float64)
    z = x @ torch.randn(5, 12, generator=g, dtype=torch.float64)
    wanted = torch.nn.functional.glu(z, dim=-1)

    def error():
        with torch.no_grad():
            return float((gate(z) - wanted).var(dim=(0, 1)).mean())  # their means may be apart

    before = error()
    _fit(gate, z.flatten(0, 1), wanted.flatten(0, 1))
    assert error() < 0.7 * before

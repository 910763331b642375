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
from edgefuse.model.config import Stage
from edgefuse.model.normalization import LayerNorm
from edgefuse.model.streaming import FULL, Context
from edgefuse.train.closeness import _fit_gate, converted_config, successor
from edgefuse.train.convert_norm import Conversion, convert_norm, fit
from edgefuse.train.recipe import CONVERSION
from edgefuse.train.speech import open_speech
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


def heard(encoder, batch, context=FULL):
    features, lengths = batch
    with torch.no_grad():
        logits, valid = encoder(features.double(), lengths, context)
    return logits[torch.arange(logits.shape[1]) < valid[:, None]]


def speech_like(batches: int = 4):
    """Batches whose loudness varies, as that of speech does."""
    g = torch.Generator().manual_seed(2)
    for number in range(batches):
        features = torch.randn(3, 160, 80, generator=g) + 2 * torch.randn(3, 160, 1, generator=g)
        yield features.double(), torch.tensor([160, 149, 96]), Context(8, 8) if number % 2 else FULL


ANY_CONFORMER = [
    {},
    {"conv_norm": "batch"},
    {"norm_residual": "output", "positions": "none"},
    {"shared_blocks": True},
    {"layers": 3, "second_pass": 1},
    {"layers": 3, "subsampling": 6, "stages": (Stage(1, "none"), Stage(1, "performer"), Stage(1, stride=2))},
    {"scale_embedding": True, "gate_shift": True},
]


@pytest.mark.parametrize("changes", ANY_CONFORMER, ids=str)
def test_it_begins_as_a_plain_encoder_that_is_close_to_the_conformer(changes):
    before = checkpoints.encoder_of(a_checkpoint("layer", dropout=0.0, **changes), torch.float64)
    begun = successor(before, speech_like())
    assert begun.config == converted_config(before.config)
    assert (begun.config.norm, begun.config.activation, begun.config.conv_paths) == ("rep", "relu", 2)
    assert not any(isinstance(each, LayerNorm) for each in begun.modules())
    fresh = Encoder(begun.config).double().eval()
    for context in (FULL, Context(8, 8)):
        batch = next(iter(speech_like(1)))[:2]
        wanted = heard(before, batch, context)
        spread = (wanted - wanted.mean(0)).norm()
        assert (heard(begun, batch, context) - wanted).norm() < 0.7 * spread
        assert (heard(fresh, batch, context) - wanted).norm() > 0.9 * spread


def test_a_linear_behind_a_norm_begins_as_the_regression_of_what_it_gave_behind_layer_norm():
    before = checkpoints.encoder_of(a_checkpoint("layer", norm_residual="output"), torch.float64)
    block, was, speech = successor(before, speech_like()).blocks[0], before.blocks[0], [*speech_like()]
    with torch.no_grad():
        x = torch.cat([before.subsampling(f, lengths)[torch.arange(40) < (lengths // 4)[:, None]] for f, lengths, _ in speech])
        wanted, got = (each.macaron.w1.linear(each.macaron.norm(x, None)) for each in (was, block))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    best = design @ torch.linalg.lstsq(design, wanted).solution
    assert (got - wanted).norm() < 1.05 * (best - wanted).norm()  # the ridge is all that is between them
    assert (got - wanted).norm() < 0.5 * (was.macaron.w1.linear(x) - wanted).norm()


def test_two_relus_gate_as_a_glu_does():
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(1200, 12, generator=g, dtype=torch.float64)
    wanted = torch.nn.functional.glu(z, dim=-1)
    with torch.no_grad():
        gate = _fit_gate(z, wanted)
    opened = (z @ gate.mix.T + gate.shift).relu().unflatten(1, (2, -1))
    left = (opened * gate.shares).sum(1) - wanted
    assert float(left.var(0).mean()) < 0.02 * float(wanted.var(0).mean())


def test_its_norms_keep_their_statistics_and_learn_the_rest(corpus, tmp_path):
    spoken, dev = (open_speech(corpus).load(name) for name in ("train", "dev"))
    training = fit(a_conformer(), spoken, dev, tmp_path, QUICK)
    norm = "blocks.0.macaron.norm"
    assert not training.encoder.get_submodule(norm).training
    for each in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(training.averaged.state_dict()[f"{norm}.{each}"], training.encoder.state_dict()[f"{norm}.{each}"])
    assert int(training.encoder.state_dict()[f"{norm}.num_batches_tracked"]) == 0
    assert training.encoder.get_submodule(norm).weight.detach().ne(1.0).any()  # where it began


def test_runs_of_any_seed_begin_alike_so_that_they_have_a_mean(corpus, tmp_path):
    spoken, dev = (open_speech(corpus).load(name) for name in ("train", "dev"))
    one, other = (fit(a_conformer(), spoken, dev, tmp_path / str(seed), replace(QUICK, seed=seed)) for seed in (1, 2))
    theirs = other.encoder.state_dict()
    statistics = [name for name in theirs if "running_" in name]
    assert statistics  # norms keep those that they begin with
    assert all(torch.equal(one.encoder.state_dict()[name], theirs[name]) for name in statistics)
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in one.encoder.state_dict().items())


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
    assert made.config == converted_config(given.config)
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

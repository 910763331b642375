"""Masked prediction: what is hidden is learnt from what is not, nothing else counts, and no transcript is needed."""

import json
from dataclasses import replace

import pytest
import torch
from lhotse import CutSet
from torch import Generator

from edgefuse import checkpoint as checkpoints
from edgefuse import cli
from edgefuse.errors import EmptyAudio, UsageError
from edgefuse.model import Context, Encoder
from edgefuse.train.augment import Augmentation
from edgefuse.train.batches import Batch
from edgefuse.train.masked import Masking, Pretraining, hide
from edgefuse.train.pretrain import PRETRAINING, TOKENS, pretrain
from edgefuse.train.recipe import PRETRAINED, Recipe
from edgefuse.train.train import train
from tests.spec.test_training import SMALL, write_corpus

QUIET = Augmentation(
    tempo=0, vocal_tract=0, gain_db=0, channel_db=0, pause_share=0, noise_share=0, frequency_masks=0, time_masks=0
)
ARCHITECTURE = {"dimension": 32, "layers": 2, "heads": 2, "feed_forward": 48, "kernel": 3, "subsampling_channels": 8}
SHORT = replace(PRETRAINING, architecture=ARCHITECTURE, epochs=30, batch_seconds=8.0, peak_learning_rate=1e-2, augmentation=QUIET)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """Tones that last, and nobody says what they mean: half of the cuts have no text, the others not even a place for one."""
    folder = tmp_path_factory.mktemp("unlabelled")
    words = [letter * length for length in (8, 11, 14) for letter in "afkp"]
    for name in ("train", "dev"):
        write_corpus(folder, name, words)
        cuts = [*CutSet.from_file(folder / f"{name}.cuts.jsonl.gz")]
        for number, cut in enumerate(cuts):
            cut.supervisions = [replace(each, text=None) for each in cut.supervisions] if number % 2 else []
        CutSet.from_cuts(cuts).to_file(folder / f"{name}.cuts.jsonl.gz")
    return folder


@pytest.fixture(scope="module")
def pretrained(unlabelled, tmp_path_factory):
    return pretrain(unlabelled, tmp_path_factory.mktemp("run") / "run", SHORT, precision="fp32")


def test_spans_hide_some_frames_of_every_utterance_and_none_behind_it():
    lengths = torch.randint(1, 200, (300,), generator=Generator().manual_seed(1))
    masks = Masking().draw(lengths, Generator().manual_seed(0))
    valid = torch.arange(masks.shape[1]) < lengths[:, None]
    assert not (masks & ~valid).any()
    assert masks.any(dim=1).all()
    assert float(masks[valid].float().mean()) == pytest.approx(1 - 0.9**5, abs=0.02)
    long = masks[lengths > 100]
    begins = long & ~torch.nn.functional.pad(long, (1, 0))[:, :-1]
    assert float(long.sum() / begins.sum()) > 5  # spans, not single frames


def test_the_targets_are_what_was_hidden_and_all_else_is_heard(padded_batch):
    features, lengths = padded_batch
    hidden = hide(features, lengths, 4, Masking(), Generator().manual_seed(0))
    rebuilt = hidden.features.clone()
    for row, frame in hidden.masks.nonzero().tolist():
        assert float(hidden.features[row, 4 * frame : 4 * frame + 4].abs().sum()) == 0.0
        rebuilt[row, 4 * frame : 4 * frame + 4] = hidden.targets[row, frame].reshape(4, 80)
    assert torch.equal(rebuilt, features)
    assert not torch.equal(hidden.features, features)


def a_batch(features, lengths):
    none = torch.zeros(0, dtype=torch.long)
    return Batch(features, lengths, none, none, none, none, ("",) * len(lengths))


def test_only_hidden_frames_count_in_the_loss(padded_batch):
    features, lengths = padded_batch
    training = Pretraining(Encoder(replace(SMALL, layers=2)).eval(), TOKENS, SHORT, 10)
    torch.nn.init.zeros_(training.head.weight)
    torch.nn.init.constant_(training.head.bias, 0.25)
    torch.manual_seed(5)
    loss = training.loss(a_batch(features, lengths), Context())
    torch.manual_seed(5)
    masks = hide(features, lengths, 4, training.masking, Generator().manual_seed(int(torch.randint(2**31, ())))).masks
    wanted = [(features[row, 4 * frame : 4 * frame + 4] - 0.25).abs().mean() for row, frame in masks.nonzero().tolist()]
    torch.testing.assert_close(loss, torch.stack(wanted).mean())


def test_with_sampled_layers_a_step_runs_as_many_as_it_draws(padded_batch):
    training = Pretraining(Encoder(replace(SMALL, layers=4, shared_blocks=True)), TOKENS, replace(SHORT, sampled_depth=True), 10)
    runs, counts = [], set()
    training.encoder.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    for step in range(12):
        training.__dict__["_step"] = step
        type(training).global_step = property(lambda self: self.__dict__["_step"])
        training.loss(a_batch(*padded_batch), Context())
        counts.add(len(runs))
        runs.clear()
    del type(training).global_step
    assert counts == {1, 2, 3, 4}


def test_speech_without_transcripts_is_enough_to_learn_from(pretrained):
    assert pretrained.after < 0.8 * pretrained.before
    assert pretrained.after < 0.8 * pretrained.mean
    told = json.loads((pretrained.folder / PRETRAINED).read_text(encoding="utf-8"))
    written = checkpoints.read(pretrained.folder)
    assert told["digest"] == written.digest
    assert "untrained" in told["what"]
    assert written.tokens == TOKENS.symbols


def test_a_training_begins_with_the_encoder_and_learns_characters_first(pretrained, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("train", "dev", "seen", "unseen"):
        write_corpus(corpus, name, ["abc", "bad cab", "cad", "dab a"])
    seen = []
    monkeypatch.setattr("edgefuse.train.train.run", lambda training, *_, **__: seen.append(training))
    recipe = Recipe(vocabulary_size=29, epochs=1, batch_seconds=8.0)
    train(corpus, tmp_path / "run", recipe, start=pretrained.folder)
    begun, given = seen[0].encoder.state_dict(), checkpoints.read(pretrained.folder).weights
    assert all(torch.equal(begun[name], tensor) for name, tensor in given.items() if "running" not in name and "num_" not in name)
    assert seen[0].recipe.characters_first == recipe.characters_first > 0


def test_a_training_with_transcripts_that_are_none_points_to_the_pretraining(unlabelled, tmp_path):
    with pytest.raises(UsageError, match="No utterance of the corpus has a transcript") as told:
        train(unlabelled, tmp_path / "run", replace(SHORT, vocabulary_size=512))
    assert "edgefuse pretrain" in str(told.value.hint)


def test_a_cascade_is_not_pretrained(unlabelled, tmp_path):
    with pytest.raises(UsageError, match="second pass"):
        pretrain(unlabelled, tmp_path / "run", replace(SHORT, architecture={**ARCHITECTURE, "second_pass": 1}))


def test_speech_that_is_too_long_for_the_encoder_is_refused_in_words(tmp_path):
    write_corpus(tmp_path, "train", ["abc d" * 6])
    write_corpus(tmp_path, "dev", ["abc"])
    with pytest.raises(EmptyAudio, match="1 and 100 frames of 40 ms"):
        pretrain(tmp_path, tmp_path / "run", replace(SHORT, architecture={**ARCHITECTURE, "max_frames": 100}))


def test_the_command_says_what_was_learnt_and_goes_on_from_there(unlabelled, tmp_path, capsys):
    file = tmp_path / "small.toml"
    file.write_text("".join(f"{name} = {value}\n" for name, value in ARCHITECTURE.items()), encoding="utf-8")
    run = ["pretrain", "--speech", str(unlabelled), "-o", str(tmp_path / "run"), "--epochs", "1"]
    assert cli.run([*run, "--architecture", str(file), "--layers-sampled"]) == 0
    assert f"go on with: edgefuse train --from {tmp_path / 'run' / 'checkpoint'}" in capsys.readouterr().out
    assert cli.run(run) != 0
    assert "holds a training already" in capsys.readouterr().err
    assert cli.run(["pretrain", "--speech", str(tmp_path), "-o", str(tmp_path / "other")]) != 0
    assert "error: " in capsys.readouterr().err

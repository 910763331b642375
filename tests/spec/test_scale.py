"""Training at scale: a kill at any moment, several processes, several batches a step, an early end, what it says of itself."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edgefuse.errors import TrainingDiverged, UsageError
from edgefuse.model import Encoder
from edgefuse.model.normalization import BatchNorm
from edgefuse.train import callbacks
from edgefuse.train.augment import Augmentation
from edgefuse.train.batches import Share
from edgefuse.train.loop import EpochBatches
from edgefuse.train.module import Training
from edgefuse.train.recipe import Recipe
from edgefuse.train.speech import open_speech
from edgefuse.train.train import fit
from tests.spec.test_training import QUICK, SMALL, TOKENS, corpus, one_thread, speech, weights

__all__ = ["corpus", "one_thread"]  # fixtures
DRY = replace(SMALL, dropout=0.0)  # draws differ from part to part
STEADY = replace(QUICK, peak_learning_rate=1e-3, average_decay=0.5)


# --- every process takes its share of a batch


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_of_a_batch_are_what_the_whole_batch_is(corpus, parts):
    spoken = speech(corpus, "train")
    options = {"seed": 3, "epoch": 2, "augmentation": Augmentation()}
    whole = list(spoken.batches(TOKENS, 4.0 * parts, **options))
    shares = [list(spoken.batches(TOKENS, 4.0, share=Share(parts, (part,)), **options)) for part in range(parts)]
    for number, batch in enumerate(whole):
        split = [share[number] for share in shares]
        assert sum(part.share for part in split) == pytest.approx(parts)
        heard = {t: f for part in split if part.share for t, f in zip(part.texts, part.features, strict=True)}
        assert sorted(t for part in split if part.share for t in part.texts) == sorted(batch.texts)
        for text, length, features in zip(batch.texts, batch.lengths, batch.features, strict=True):
            assert torch.equal(features[:length], heard[text][:length])


def test_one_process_takes_its_parts_one_after_another(corpus):
    spoken = speech(corpus, "train")
    together = spoken.batches(TOKENS, 2.0, share=Share(4, (1, 3)))
    apart = [list(spoken.batches(TOKENS, 2.0, share=Share(4, (part,)))) for part in (1, 3)]
    assert [b.texts for b in together] == [b.texts for pair in zip(*apart, strict=True) for b in pair]
    assert len(together) == 2 * len(apart[0])


def test_what_is_skipped_changes_nothing_of_what_follows(corpus):
    spoken = speech(corpus, "train")
    options = {"seed": 1, "epoch": 1, "augmentation": Augmentation()}
    whole = list(spoken.batches(TOKENS, 2.0, share=Share(2, (0, 1)), **options))
    rest = spoken.batches(TOKENS, 2.0, share=Share(2, (0, 1), skip=4), **options)
    assert len(whole) == len(rest) > 4
    assert all(torch.equal(one.features, other.features) for one, other in zip(whole[4:], rest, strict=True))


def curve(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the steps of trainings from now on."""
    losses: list[float] = []
    step = Training.optimizer_step

    def noted(training, *arguments, **options):
        step(training, *arguments, **options)
        losses.append(training.step_loss)

    monkeypatch.setattr(Training, "optimizer_step", noted)
    return losses


def test_accumulated_batches_are_one_batch_where_no_norm_counts_them(corpus, tmp_path, monkeypatch):
    """LayerNorm: the same steps up to the order of sums; AdamW turns the last digit of a tiny gradient into a visible one."""
    config, losses = replace(DRY, norm="layer", conv_norm="layer"), curve(monkeypatch)
    train, dev = speech(corpus, "train"), speech(corpus, "dev")
    one = fit(train, dev, tmp_path / "one", replace(STEADY, batch_seconds=6.0), config, TOKENS)
    steps = len(losses)
    two = fit(train, dev, tmp_path / "two", replace(STEADY, batch_seconds=2.0, accumulate=3), config, TOKENS)
    assert one.steps == two.steps == steps == len(losses) - steps
    assert losses[steps:] == pytest.approx(losses[:steps], rel=1e-4)
    for name, tensor in one.averaged.state_dict().items():
        torch.testing.assert_close(two.averaged.state_dict()[name], tensor, rtol=1e-2, atol=2e-3)


def test_running_means_of_accumulated_parts_are_those_of_the_batch():
    torch.manual_seed(0)
    rows = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(0)) + torch.arange(4.0)[:, None, None]
    training = Training(Encoder(SMALL), TOKENS, replace(QUICK, accumulate=4), steps=1)
    norm = training.encoder.subsampling.linear.norm
    whole = BatchNorm(32)
    whole(rows.reshape(1, -1, 32), torch.ones(1, 200, dtype=torch.bool))
    for part in range(4):
        training._correct_momenta(part)
        norm(rows[part][None], torch.ones(1, 50, dtype=torch.bool))
    torch.testing.assert_close(norm.running_mean, whole.running_mean)
    within = 0.9 + 0.1 * rows.var(dim=1).mean(dim=0)
    torch.testing.assert_close(norm.running_var, within)


def test_statistics_and_weights_stay_in_float32_where_layers_compute_in_bf16(corpus, tmp_path):
    training = fit(
        speech(corpus, "train"), speech(corpus, "dev"), tmp_path, replace(QUICK, epochs=1), SMALL, TOKENS, precision="bf16"
    )
    kinds = {tensor.dtype for tensor in weights(training).values()}
    assert kinds == {torch.float32, torch.int64}
    assert training.encoder.subsampling.linear.norm.running_mean.abs().sum() > 0


# --- killed, and resumed

CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
from edgefuse.model import EncoderConfig
from edgefuse.train.augment import Augmentation
from edgefuse.train.speech import open_speech
from edgefuse.train.train import fit
from edgefuse.train.module import Training
from edgefuse.train.recipe import Recipe
from edgefuse.train import callbacks, ranks
from edgefuse.decode.tokens import character_tokens

torch.set_num_threads(1)
folder, output, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
fatal, where = told.pop("fatal", None), told.pop("where", "step")
config = EncoderConfig(**told.pop("config"))
recipe = Recipe(**{**told, "augmentation": Augmentation(**told["augmentation"])})
step, replace, losses = Training.optimizer_step, Path.replace, []

def taken(training, *arguments, **options):
    if where == "step" and training.global_step == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    step(training, *arguments, **options)
    losses.append(training.step_loss)

def renamed(path, place):
    if where == "write" and len(losses) == fatal:
        with path.open("r+b") as stream:
            stream.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, place)

Training.optimizer_step, Path.replace = taken, renamed
with ranks.joined():
    heard = open_speech(folder)
    begun = output / "last.ckpt"
    training = fit(heard.load("train"), heard.load("dev"), output, recipe, config, character_tokens(), resume=begun.is_file())
if ranks.is_first():
    torch.save(training.state_dict(), output / "weights.pt")
    (output / "losses.json").write_text(json.dumps(losses))
"""


def child(corpus: Path, output: Path, recipe: Recipe, *, processes: int = 1, config=SMALL, **told: object):
    """Train in a process of its own, or in several."""
    asked = json.dumps({**asdict(recipe), "config": config.to_json(), **told})
    script = output.parent / "child.py"
    script.write_text(CHILD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *torchrun, str(script), str(corpus), str(output), asked]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("where", "epoch"), [("step", 0), ("write", 1)])
def test_a_training_that_was_killed_ends_with_the_same_weights(corpus, tmp_path, where, epoch):
    """Killed in the middle of an epoch, in a step behind a checkpoint or while the next one is written."""
    recipe = replace(QUICK, epochs=2, batch_seconds=1.0, accumulate=2, augmentation=Augmentation(), checkpoint_minutes=0)
    config = replace(SMALL, dropout=0.1)
    whole = fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path / "whole", recipe, config, TOKENS)
    fatal = whole.steps // 2 * epoch + 2
    killed = child(corpus, tmp_path / "cut", recipe, config=config, fatal=fatal, where=where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "weights.pt").exists()
    left = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=False)["global_step"]
    assert left == (fatal if where == "step" else fatal - 1)
    assert left % (whole.steps // 2) != 0, "it must not be killed between two epochs"
    resumed = fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path / "cut", recipe, config, TOKENS, resume=True)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_a_checkpoint_is_as_old_as_asked_for_at_most(corpus, tmp_path, monkeypatch):
    clock, written = iter(range(0, 100_000, 40)), []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: float(next(clock)))
    write = callbacks.Keep._write

    def noted(keep, trainer):
        written.append(trainer.global_step)
        write(keep, trainer)

    monkeypatch.setattr(callbacks.Keep, "_write", noted)
    recipe = replace(QUICK, epochs=1, batch_seconds=2.0, checkpoint_minutes=4)
    training = fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, recipe, SMALL, TOKENS)
    assert 1 < len(written) < training.steps
    assert written[-1] == training.steps


# --- several processes


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "within"), [("layer", 1e-4), ("batch", 0.01)])
def test_two_processes_take_the_steps_of_one_with_the_double_batch(corpus, tmp_path, norm, within):
    config = replace(DRY, norm=norm, conv_norm=norm)
    recipe = replace(STEADY, characters_first=0.2, augmentation=Augmentation(), epochs=6)
    one = child(corpus, tmp_path / "one", replace(recipe, batch_seconds=6.0), config=config)
    two = child(corpus, tmp_path / "two", replace(recipe, batch_seconds=3.0), config=config, processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    first, second = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    assert len(first) > 10
    assert second == pytest.approx(first, rel=within)
    assert one.stdout.count("dev WER") == two.stdout.count("dev WER") == recipe.epochs


@pytest.mark.slow
def test_the_command_trains_with_two_processes_and_tells_it_once(corpus, tmp_path):
    asked = ["train", "--speech", str(corpus), "-o", str(tmp_path / "run"), "--epochs", "1", "--vocabulary", "29", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgefuse", *asked]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"checkpoint"') == 1
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


# --- the end


def test_a_training_ends_when_patience_does_and_keeps_the_best_average(corpus, tmp_path, monkeypatch):
    """The rate of errors is made up: best after the second epoch."""
    rates, averages = iter([50.0, 40.0, 45.0, 40.0, 30.0]), []

    def validated(training):
        averages.append({name: tensor.clone() for name, tensor in training.averaged.state_dict().items()})
        training.log("dev_wer_percent", next(rates))

    monkeypatch.setattr(Training, "on_validation_epoch_end", validated)
    recipe = replace(QUICK, epochs=5, patience=2)
    training = fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, recipe, SMALL, TOKENS)
    assert len(averages) == 4
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in training.averaged.state_dict().items())
    resumed = fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, recipe, SMALL, TOKENS, resume=True)
    assert len(averages) == 4
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in resumed.averaged.state_dict().items())


@pytest.mark.parametrize("asked", [{"accumulate": 0}, {"patience": 0}, {"checkpoint_minutes": -1.0}])
def test_what_no_training_can_do_is_refused(asked):
    with pytest.raises(UsageError, match=r"too few|no time"):
        Recipe(**asked)


@pytest.mark.parametrize("name", ["blocks.0.macaron.w1.linear", "subsampling.linear.linear", "ctc"])
def test_a_loss_that_is_no_number_names_the_layer_that_made_it(corpus, tmp_path, monkeypatch, name):
    begin = Training.on_train_batch_start if hasattr(Training, "on_train_batch_start") else None

    def spoil(training, _batch, number):
        if number == 1:
            training.encoder.get_submodule(name).weight.data[0, 0] = float("inf")
        return begin(training, _batch, number) if begin else None

    monkeypatch.setattr(Training, "on_train_batch_start", spoil)
    recipe = replace(QUICK, batch_seconds=2.0, epochs=1)
    with pytest.raises(TrainingDiverged, match=rf"encoder\.{name} \(.*weight not finite either\) made it") as told:
        fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, recipe, SMALL, TOKENS)
    assert "--resume" in str(told.value.hint)


def test_a_gradient_that_is_no_number_names_the_layer_nearest_the_loss(corpus, tmp_path, monkeypatch):
    place = "blocks.0.macaron.w1.linear"

    def spoil(training, _batch, _number):
        training.encoder.get_submodule(place).weight.register_hook(lambda g: g * float("nan"))

    monkeypatch.setattr(Training, "on_train_batch_start", spoil)
    with pytest.raises(TrainingDiverged, match=rf"norm of the gradient of step 0 is nan.*not the gradient of encoder\.{place}"):
        fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, replace(QUICK, epochs=1), SMALL, TOKENS)


def test_curves_hold_loss_rate_gradient_pace_and_errors_once_per_step(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "CURVE_STEPS", 1)
    recipe = replace(QUICK, epochs=2, batch_seconds=2.0)
    train, dev = speech(corpus, "train"), speech(corpus, "dev")
    training = fit(train, dev, tmp_path, recipe, SMALL, TOKENS)
    drawn = EventAccumulator(str(tmp_path / "curves")).Reload()
    names = {"loss", "learning rate", "gradient norm", "seconds per step", "dev WER %"}
    assert set(drawn.Tags()["scalars"]) == names
    for name in names - {"dev WER %"}:
        assert [point.step for point in drawn.Scalars(name)] == [*range(1, training.trainer.global_step + 1)]
    assert len(drawn.Scalars("dev WER %")) == 2


def test_the_development_set_is_heard_once_whatever_the_processes(corpus, monkeypatch):
    heard = open_speech(corpus)
    texts = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", rank)
        batches = EpochBatches(heard.load("train"), heard.load("dev"), TOKENS, QUICK)
        texts += [text for batch in batches.val_dataloader() if batch.share for text in batch.texts]
    assert sorted(texts) == sorted(u.text for u in heard.load("dev").store.utterances.values())

"""The training loop: a corpus folder and a recipe in, a checkpoint and its word error rates out.

A run folder holds ``last.ckpt`` (what ``resume`` goes on from, written after every epoch), ``curves/`` (the losses, one
CSV per start), and at the end ``checkpoint/`` (what edgefuse folds) and ``metrics.json`` (its word error rates).
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lhotse import CutSet
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from edgefuse import checkpoint
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import MissingFile, OutputExists, UsageError
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.model.normalization import UnifiedNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.train.batches import Batch, Batches, trainable
from edgefuse.train.features import FeatureStore, open_or_compute, read_cuts
from edgefuse.train.module import Answer, Steps, Training, evaluate
from edgefuse.train.pieces import learn_tokens
from edgefuse.train.recipe import Recipe
from edgefuse.values import Checkpoint
from edgefuse.verify.wer import WordErrors

LAST = "last.ckpt"
TESTS = ("seen", "unseen")
DEV_UTTERANCES = 200
FRAMES_PER_SECOND = 100
REESTIMATION_SECONDS = 1800.0  # of clean training speech: 45,000 encoder frames for every mean and variance
EVALUATION_BATCH_SECONDS = 120.0
CONTEXTS = {"": FULL, **{f", {40 * chunk} ms": Context(chunk, 64) for chunk in (4, 8, 16, 32)}}  # chunks after 2.56 s of past
AGAIN = ", second pass after 640 ms"  # behind a test set: what a cascade hears in it once its first pass has streamed
ROWS = {**CONTEXTS, AGAIN: Context(16, 64)}
FOREIGN_WARNINGS = (
    ".*does not have many workers",  # one core has none to spare, and the features are in memory
    "The number of training batches",  # a small corpus logs nothing but its epochs
    ".*exists and is not empty",  # so does a training that is resumed
    "Found .* in eval mode",  # a teacher is
    "You have overridden `transfer_batch_to_device`",  # in the module, as it should be
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 calls what PyTorch 2.13 renames
)
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    folder: Path  # the checkpoint
    errors: dict[str, WordErrors]  # by test set; "seen, 640 ms" is the same set in chunks


@dataclass(frozen=True)
class Speech:
    """A set of utterances and its features."""

    cuts: CutSet
    store: FeatureStore

    def batches(self, tokens: Tokens, seconds: float, **options: Any) -> Batches:  # noqa: ANN401 - as `Batches` takes them
        """Batches of it."""
        return Batches(self.cuts, self.store, tokens, batch_seconds=seconds, **options)


def train(
    speech: Path,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    threads: int = 1,
    precision: Precision = "bf16",
    features: Path | None = None,
    start: Path | None = None,
) -> Trained:
    """Train an encoder on the cuts ``train`` of a corpus folder, evaluate it on ``seen`` and ``unseen``.

    ``features`` keeps the log-mel frames, ``speech``/features by default; several trainings may share it. ``resume`` goes
    on from the last whole epoch in ``output``; without it a used ``output`` is refused. ``start`` is a checkpoint whose
    encoder is where the training begins; its vocabulary may be another one, and characters need not come first any more.
    """
    if start:
        recipe = replace(recipe, characters_first=0.0)
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    begin = checkpoint.read(start) if start else None
    if begin and begin.config.folded:
        raise UsageError(
            f"{start} is folded: it has no norms left to train with.",
            hint="Fine-tune it for fewer bits with --precision, or begin with what it was folded from.",
        )
    output.mkdir(parents=True, exist_ok=True)
    stores = features or speech / "features"
    corpus = load_speech(speech, "train", stores)
    tokens = learn_tokens((utterance.text for utterance in corpus.store.utterances.values()), recipe.vocabulary_size)
    config = recipe.encoder(len(tokens))
    corpus = replace(corpus, cuts=trainable(corpus.cuts, corpus.store, tokens, config.reduction))
    dev = load_speech(speech, "dev", stores, utterances=DEV_UTTERANCES)
    training = fit(corpus, dev, output, recipe, config, tokens, begin=begin, resume=resume, precision=precision)
    encoder = finish(training, corpus, tokens)
    written = output / "checkpoint"
    written.mkdir(exist_ok=True)
    checkpoint.write(written, checkpoint.of_encoder(encoder, corpus.store.mean, corpus.store.istd, tokens.symbols))
    errors = test(encoder, speech, stores, corpus.store, tokens, CONTEXTS)
    if config.second_pass:
        errors |= test(partial(answer_again, encoder), speech, stores, corpus.store, tokens, [AGAIN])
    write_metrics(output, recipe.to_json(), errors)
    return Trained(written, errors)


def fit(
    corpus: Speech,
    dev: Speech,
    output: Path,
    recipe: Recipe,
    config: EncoderConfig,
    tokens: Tokens,
    *,
    begin: Checkpoint | None = None,
    resume: bool = False,
    precision: Precision = "fp32",
) -> Training:
    """Run the epochs, from the start or from ``last.ckpt``; the same seed gives the same weights either way (on a CPU).

    With ``begin`` the weights start as that checkpoint's, but for a head of another vocabulary.
    """
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    batches = EpochBatches(corpus, dev, tokens, recipe)
    encoder = Encoder(config)
    if begin is not None:
        _begin_with(encoder, begin)
    for norm in encoder.modules():
        if isinstance(norm, UnifiedNorm):
            norm.warm_up, norm.outlier_filtration = recipe.unified_warm_up, recipe.outlier_filtration
            norm.restart()
    training = Training(encoder, tokens, recipe, batches.steps)
    run(training, batches, output, resume=resume, precision=precision)
    return training


def run(training: Steps, batches: EpochBatches, output: Path, *, resume: bool, precision: Precision) -> None:
    """Take every step, or those that are left behind ``last.ckpt``."""
    with _quiet():
        trainer = _trainer(output, training.recipe, precision, training.steps)
        trainer.fit(training, datamodule=batches, ckpt_path=output / LAST if resume else None, weights_only=False)


def _begin_with(encoder: Encoder, begin: Checkpoint) -> None:
    """Load a checkpoint's weights; the head stays fresh where the vocabularies differ in size."""
    weights = dict(begin.weights)
    if begin.config.vocabulary_size != encoder.config.vocabulary_size:
        weights |= {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(("ctc.", "second_ctc."))}
    if replace(begin.config, vocabulary_size=encoder.config.vocabulary_size, dropout=encoder.config.dropout) != encoder.config:
        raise UsageError(
            "The checkpoint to begin with is of another architecture.", hint="Train it with the same --preset and --norm."
        )
    encoder.load_state_dict(weights)


def _trainer(output: Path, recipe: Recipe, precision: Precision, steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=recipe.epochs,
        limit_train_batches=recipe.epoch_batches,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=20,
        logger=CSVLogger(output, name="curves"),
        callbacks=[_keep_last(output), _Lines(steps)],
        default_root_dir=output,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advertising, and without its warnings about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def finish(training: Training, corpus: Speech, tokens: Tokens) -> Encoder:
    """The average of the weights, its batch statistics measured on clean training speech, in evaluation mode."""
    encoder = training.averaged.cpu().requires_grad_(requires_grad=True)
    reestimate(encoder, clean_speech(corpus, tokens, training.recipe.seed))
    return encoder.eval()


def clean_speech(
    corpus: Speech, tokens: Tokens, seed: int, seconds: float = REESTIMATION_SECONDS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training speech that nothing is done to: features and lengths, to measure on."""
    batches = corpus.batches(tokens, EVALUATION_BATCH_SECONDS, seed=seed)
    return ((b.features, b.lengths) for b in _first_seconds(batches, seconds))


def heard_by(begin: Checkpoint, spoken: Speech) -> Speech:
    """Normalized as a checkpoint has learnt to hear."""
    mean, istd = begin.frontend_mean.float(), begin.frontend_istd.float()
    return replace(spoken, store=replace(spoken.store, mean=mean, istd=istd))


def test(
    answer: Answer, speech: Path, stores: Path, statistics: FeatureStore, tokens: Tokens, contexts: Iterable[str]
) -> dict[str, WordErrors]:
    """Word errors on both test sets, in the contexts of those rows: of whole utterances and in chunks."""
    errors: dict[str, WordErrors] = {}
    for name in TESTS:
        spoken = load_speech(speech, name, stores, statistics=statistics)
        batches = spoken.batches(tokens, EVALUATION_BATCH_SECONDS, shuffle=False)
        errors |= {f"{name}{told}": evaluate(answer, batches, tokens, ROWS[told]) for told in contexts}
    return errors


def answer_again(encoder: Encoder, features: Tensor, lengths: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Logits of a cascade's second pass, which hears the whole of what the first gives in that context; and lengths."""
    return encoder.answers(features, lengths, context)[1], lengths // encoder.config.reduction


def load_speech(
    speech: Path,
    name: str,
    stores: Path,
    *,
    utterances: int | None = None,
    statistics: FeatureStore | None = None,
) -> Speech:
    """One set of the corpus, its features from ``stores`` (computed there at the first call).

    ``utterances`` takes that many, evenly spread; ``statistics`` normalizes with another store's mean and deviation.
    """
    cuts = read_cuts(speech, name)
    store = open_or_compute(cuts, stores / name)
    if statistics is not None:
        store = replace(store, mean=statistics.mean, istd=statistics.istd)
    if utterances is not None:
        step = max(1, len(cuts) // utterances)
        cuts = CutSet.from_cuts([*cuts][::step][:utterances])
    return Speech(cuts, store)


class EpochBatches(L.LightningDataModule):
    """Training batches of the current epoch, and the development set."""

    def __init__(self, corpus: Speech, dev: Speech, tokens: Tokens, recipe: Recipe) -> None:
        """The development set is normalized as the training speech is."""
        super().__init__()
        self.corpus, self.tokens, self.recipe = corpus, tokens, recipe
        self.dev = replace(dev, store=replace(dev.store, mean=corpus.store.mean, istd=corpus.store.istd))

    @property
    def steps(self) -> int:
        """Of the whole training, if every epoch is as long as the first; they differ by a few, unless the recipe limits them."""
        first = len(self._batches(0))
        return self.recipe.epochs * min(first, self.recipe.epoch_batches or first)

    def train_dataloader(self) -> Batches:
        """The batches of this epoch."""
        return self._batches(cast("L.Trainer", self.trainer).current_epoch)

    def val_dataloader(self) -> Batches:
        """The development set, in order."""
        return self.dev.batches(self.tokens, EVALUATION_BATCH_SECONDS, shuffle=False)

    def _batches(self, epoch: int) -> Batches:
        recipe = self.recipe
        return self.corpus.batches(
            self.tokens, recipe.batch_seconds, seed=recipe.seed, epoch=epoch, augmentation=recipe.augmentation
        )


class _Lines(Callback):
    """Progress as lines, for logs: every hundred steps the loss, the rate and the time that is left."""

    def __init__(self, steps: int, every: int = 100) -> None:
        self.steps, self.every = steps, every
        self._began: tuple[float, int] | None = None
        self._losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, _: object, outputs: Any, *__: object) -> None:  # noqa: ANN401
        """Print a line now and then."""
        self._losses.append(float(outputs["loss"]))
        now, step = time.monotonic(), trainer.global_step
        began, first = self._began = self._began or (now, step)
        if step % self.every or step == first:
            return
        pace = (now - began) / (step - first)
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        left = max(0, self.steps - step) * pace / 60
        print(  # noqa: T201 - progress is what a callback of this name is for
            f"epoch {trainer.current_epoch} step {step}/{self.steps} loss {loss:.3f} lr {rate:.2e} "
            f"{pace:.3f} s/step {left:.0f} min left",
            flush=True,
        )

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        """Print the word error rate."""
        wer = float(trainer.callback_metrics.get("dev_wer_percent", float("nan")))
        print(f"epoch {trainer.current_epoch} dev WER {wer:.2f} %", flush=True)  # noqa: T201 - as above


def _keep_last(output: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=output,
        filename=Path(LAST).stem,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def require_free_run(output: Path, *, resume: bool) -> None:
    """Raise an error where there is nothing to resume, or something that would be trained over."""
    if resume and not (output / LAST).is_file():
        raise MissingFile(f"There is no {output / LAST} to resume from.", hint="Leave --resume away.")
    if not resume and (output / LAST).exists():
        raise OutputExists(f"{output} holds a training already.", hint="Go on with --resume, or choose another folder.")


def _first_seconds(batches: Batches, seconds: float) -> Iterator[Batch]:
    frames = 0
    for batch in batches:
        yield batch
        frames += int(batch.lengths.sum())
        if frames / FRAMES_PER_SECOND >= seconds:
            return


def write_metrics(output: Path, recipe: dict[str, Any], errors: dict[str, WordErrors]) -> None:
    """`metrics.json`."""
    rates = {name: {**asdict(e), "wer_percent": e.wer_percent} for name, e in errors.items()}
    text = json.dumps({"recipe": recipe, "errors": rates}, indent=2)
    (output / "metrics.json").write_text(text + "\n", encoding="utf-8")

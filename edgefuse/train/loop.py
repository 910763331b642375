"""The training loop: a corpus folder and a recipe in, a checkpoint and its word error rates out.

A run folder holds ``last.ckpt`` (what ``resume`` goes on from, written after every epoch and every ten minutes), ``curves/``
(see them with: ``tensorboard --logdir``), and at the end ``checkpoint/`` (what edgefuse folds) and ``metrics.json`` (its word
error rates; of Chinese, character error rates).

The same command trains on one CPU, on one GPU, and on many of either, where ``torchrun`` starts a process for each::

    torchrun --nproc-per-node 8 -m edgefuse train --speech CORPUS -o RUN
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 -m edgefuse train --speech CORPUS -o RUN

Each step then has as many times the speech, as if one process had so many times ``batch_seconds``. The first process alone
computes features, writes, prints, and tests at the end; only to resume do all have to find ``last.ckpt``. A training that was
killed at any moment ends, resumed on CPUs with as many processes, with the very weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lhotse import CutSet
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from edgefuse import checkpoint
from edgefuse.decode.spaceless import is_spaceless
from edgefuse.decode.tokens import SPACE, Tokens
from edgefuse.errors import EmptyAudio, MissingFile, OutputExists, UsageError
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.model.normalization import UnifiedNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.train import ranks
from edgefuse.train.batches import Batch, Batches, Share, made_ahead, trainable
from edgefuse.train.callbacks import AtomicFile, Curves, Keep, Lines, Patience
from edgefuse.train.corpora import DEV, TRAIN, Corpus, open_corpus
from edgefuse.train.features import FeatureStore, open_or_compute
from edgefuse.train.module import Answer, Steps, Training, draw_context, evaluate
from edgefuse.train.pieces import learn_tokens
from edgefuse.train.recipe import ARCHITECTURE, PRETRAINED, Recipe
from edgefuse.values import Checkpoint
from edgefuse.verify.wer import WordErrors

LAST = "last.ckpt"
DEV_UTTERANCES = 200
FEWEST_SPELLED = 0.5  # of the texts, by the tokens of a checkpoint that keeps them
FRAMES_PER_SECOND = 100
REESTIMATION_SECONDS = 7200.0  # of training speech: 180,000 encoder frames for every mean and variance
REESTIMATION_BATCH_SECONDS = 600.0  # a variance is the mean of those within batches
CLEAN_SECONDS = 1800.0
EVALUATION_BATCH_SECONDS = 120.0
WHOLE = {"": FULL}  # what every encoder is tested in
CHUNKS_MS, LEFT_MS = (160, 320, 640, 1280), 2560  # and in which chunks
AGAIN_MS = 640  # the chunks behind which the second pass of a cascade is tested
FOREIGN_WARNINGS = (
    ".*does not have many workers",  # one core has none to spare, and the features are in memory
    "Your `IterableDataset` has `__len__` defined",  # and its workers share its batches
    "You're resuming from a checkpoint that ended before the epoch ended",  # and our batches begin where it ended
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
    characters: bool = False  # whether these are character errors, of a language that is written without spaces


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
    precision: Precision | None = None,
    features: Path | None = None,
    start: Path | None = None,
) -> Trained | None:
    """Train an encoder on the set ``train`` of a corpus (see `corpora` for its layouts), and evaluate it on all its tests.

    ``features`` keeps the log-mel frames, ``speech``/features by default; several trainings may share it. ``resume`` goes
    on from the last step that was kept in ``output``; without it a used ``output`` is refused. ``start`` is a checkpoint whose
    encoder, of whatever architecture, is where the training begins; features are normalized as it has learnt to hear. Its tokens
    stay where they spell most of the corpus and the recipe does not want another number of them; else others are learnt, for a
    fresh head. Characters need not come first any more. Neither holds for a checkpoint that was pre-trained without words. Of
    several processes the first returns what was trained, the others nothing.
    """
    knows_words = start is not None and not (start / PRETRAINED).is_file()
    if knows_words:
        recipe = replace(recipe, characters_first=0.0)
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    begin = checkpoint.read(start) if start else None
    if begin and begin.config.folded:
        raise UsageError(
            f"{start} is folded: it has no norms left to train with.",
            hint="Fine-tune it for fewer bits with --precision, or begin with what it was folded from.",
        )
    with ranks.joined():
        heard = open_speech(speech, features)
        corpus = heard_by(begin, heard.load(TRAIN)) if begin else heard.load(TRAIN)
        _require_transcripts(corpus)
        texts = [utterance.text for utterance in corpus.store.utterances.values()]
        tokens = tokens_for(texts, recipe, begin if knows_words else None)
        config = _config_of(begin, recipe, tokens) if begin else recipe.encoder(len(tokens))
        corpus = fitting(corpus, tokens, config)
        dev = heard.load(DEV, utterances=DEV_UTTERANCES)
        output.mkdir(parents=True, exist_ok=True)
        training = fit(
            corpus, dev, output, recipe, config, tokens, begin=begin, resume=resume, precision=precision or usual_precision()
        )
    if not ranks.is_first():
        return None
    encoder = finish(training, corpus, tokens)
    written = output / "checkpoint"
    checkpoint.write(written, checkpoint.of_encoder(encoder, corpus.store.mean, corpus.store.istd, tokens.symbols))
    errors = test(encoder, heard, corpus.store, tokens, contexts_of(encoder.config))
    if config.second_pass:
        after = {f", second pass after {AGAIN_MS} ms": contexts_of(config)[f", {AGAIN_MS} ms"]}
        errors |= test(partial(answer_again, encoder), heard, corpus.store, tokens, after)
    write_metrics(output, _told(recipe, begin), errors)
    return Trained(written, errors, characters=spell_spaceless(tokens))


def _told(recipe: Recipe, begin: Checkpoint | None) -> dict[str, Any]:
    """What was trained with, as JSON; what the checkpoint to begin with decided is its digest."""
    told = recipe.to_json()
    if begin is None:
        return told
    return {"from": begin.digest} | {name: value for name, value in told.items() if name not in ARCHITECTURE}


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

    With ``begin`` the weights start as that checkpoint's, but for the head of another vocabulary.
    """
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    batches = EpochBatches(corpus, dev, tokens, recipe)
    encoder = Encoder(config)
    if begin is not None:
        _begin_with(encoder, begin, tokens)
    for norm in encoder.modules():
        if isinstance(norm, UnifiedNorm):
            norm.warm_up, norm.outlier_filtration = recipe.unified_warm_up, recipe.outlier_filtration
            norm.restart()
    training = Training(encoder, tokens, recipe, batches.steps)
    run(training, batches, output, resume=resume, precision=precision)
    return training


def run(training: Steps, batches: EpochBatches, output: Path, *, resume: bool, precision: Precision) -> None:
    """Take every step, or those that are left behind ``last.ckpt``."""
    recipe, place = training.recipe, output / LAST
    patience = Patience(training, recipe.patience) if recipe.patience else None
    beside = [patience] if patience else []
    with _quiet():
        trainer = L.Trainer(
            **_machines(),
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=recipe.epochs,
            limit_train_batches=recipe.epoch_batches and recipe.epoch_batches * recipe.accumulate,
            accumulate_grad_batches=recipe.accumulate,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty() and ranks.is_first(),
            enable_checkpointing=False,
            logger=False,
            plugins=[AtomicFile()],
            callbacks=[
                *beside,
                Lines(training),
                Curves(training, output / "curves"),
                Keep(training, place, recipe.checkpoint_minutes),
            ],
            default_root_dir=output,
        )
        trainer.fit(training, datamodule=batches, ckpt_path=place if resume else None, weights_only=False)
    if patience:
        patience.restore()


def usual_precision() -> Precision:
    """bf16 where it is fast: on a GPU, and on a CPU that multiplies it; others take six times as long as with fp32 [M, AVX2]."""
    cpu = torch.cpu.get_capabilities()
    multiplied = any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16" if torch.cuda.is_available() or multiplied else "fp32"


def _machines() -> dict[str, Any]:
    """What Lightning is told of the processes that torchrun has started; without it, one CPU or one GPU.

    A head that has no share of the loss yet has no gradient, in any process.
    """
    if ranks.world() == 1:
        return {"accelerator": "auto", "devices": 1}
    local = ranks.local_world()
    strategy = DDPStrategy(find_unused_parameters=True)
    return {"accelerator": "auto", "devices": local, "num_nodes": ranks.world() // local, "strategy": strategy}


def _require_transcripts(corpus: Speech) -> None:
    if not any(utterance.text.split() for utterance in corpus.store.utterances.values()):
        raise UsageError("No utterance of the corpus has a transcript.", hint="Learn from speech alone with: edgefuse pretrain")


def tokens_for(texts: Sequence[str], recipe: Recipe, begin: Checkpoint | None) -> Tokens:
    """The tokens of the checkpoint to begin with, where they are as many as are wanted and spell most texts; or learnt ones.

    What a few texts have besides is left out later, and said; to lose the head for it would cost more.
    """
    if begin and recipe.vocabulary_size in (None, len(begin.tokens)):
        if sum(set(text.replace(" ", SPACE)) <= {*begin.tokens} for text in texts) >= FEWEST_SPELLED * len(texts):
            return Tokens(begin.tokens)
        ranks.say("The checkpoint's tokens do not spell the corpus: others are learnt, and the head begins anew.")
    return learn_tokens(texts, recipe.pieces)


def _config_of(begin: Checkpoint, recipe: Recipe, tokens: Tokens) -> EncoderConfig:
    """The checkpoint's own encoder, for these tokens."""
    return replace(begin.config, vocabulary_size=len(tokens), dropout=recipe.dropout)


def _begin_with(encoder: Encoder, begin: Checkpoint, tokens: Tokens) -> None:
    """Load a checkpoint's weights; the head stays fresh where it knows other tokens."""
    weights = dict(begin.weights)
    if tuple(begin.tokens) != tuple(tokens.symbols):
        weights |= {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(("ctc.", "second_ctc."))}
    encoder.load_state_dict(weights)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advertising, and without its warnings about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def finish(training: Training, corpus: Speech, tokens: Tokens) -> Encoder:
    """The average of the weights, its batch statistics measured on what it was trained on, in evaluation mode."""
    encoder = training.averaged.cpu().requires_grad_(requires_grad=True)
    reestimate(encoder, training_speech(corpus, tokens, training.recipe, encoder.config.frame_ms))
    return encoder.eval()


def training_speech(
    corpus: Speech,
    tokens: Tokens,
    recipe: Recipe,
    frame_ms: int,
    *,
    seconds: float | None = None,
    batch_seconds: float | None = None,
) -> Iterator[tuple[Tensor, Tensor, Context]]:
    """Speech as a training hears it, augmented and in whole or in chunks: features, lengths and context, to measure on."""
    batches = corpus.batches(
        tokens, batch_seconds or REESTIMATION_BATCH_SECONDS, seed=recipe.seed, augmentation=recipe.augmentation
    )
    for number, batch in enumerate(_first_seconds(batches, seconds or REESTIMATION_SECONDS)):
        yield batch.features, batch.lengths, draw_context(recipe, number, frame_ms)


def clean_speech(corpus: Speech, tokens: Tokens, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training speech that nothing is done to: features and lengths, to measure on."""
    batches = corpus.batches(tokens, EVALUATION_BATCH_SECONDS, seed=seed)
    return ((b.features, b.lengths) for b in _first_seconds(batches, CLEAN_SECONDS))


def heard_by(begin: Checkpoint, spoken: Speech) -> Speech:
    """Normalized as a checkpoint has learnt to hear.

    Raises:
        UsageError: it hears otherwise than a corpus is computed.
    """
    if begin.config.mel_bins != KALDI_80.mel_bins:
        raise UsageError(
            f"The checkpoint hears {begin.config.mel_bins} mel bins; a corpus has {KALDI_80.mel_bins}.",
            hint=f"Begin with one that hears {KALDI_80.mel_bins}.",
        )
    mean, istd = begin.frontend_mean.float(), begin.frontend_istd.float()
    return replace(spoken, store=replace(spoken.store, mean=mean, istd=istd))


def contexts_of(config: EncoderConfig) -> dict[str, Context]:
    """What is heard in whole, and in which chunks, by what a table says behind the name of a test set."""
    ms = config.frame_ms
    return {**WHOLE, **{f", {chunk} ms": Context(-(-chunk // ms), -(-LEFT_MS // ms)) for chunk in CHUNKS_MS}}


def test(
    answer: Answer, heard: OpenSpeech, statistics: FeatureStore, tokens: Tokens, contexts: Mapping[str, Context]
) -> dict[str, WordErrors]:
    """Word errors on all test sets, of whole utterances and in chunks."""
    errors: dict[str, WordErrors] = {}
    for name in heard.corpus.tests:
        spoken = heard.load(name, statistics=statistics)
        batches = spoken.batches(tokens, EVALUATION_BATCH_SECONDS, learnt=False)
        errors |= {f"{name}{told}": evaluate(answer, batches, tokens, context) for told, context in contexts.items()}
    return errors


def answer_again(encoder: Encoder, features: Tensor, lengths: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Logits of a cascade's second pass, which hears the whole of what the first gives in that context; and lengths."""
    return encoder.answers(features, lengths, context)[1], lengths // encoder.config.reduction


def spell_spaceless(tokens: Tokens) -> bool:
    """Whether tokens spell a language that is written without spaces."""
    return any(map(is_spaceless, tokens.symbols))


@dataclass(frozen=True)
class OpenSpeech:
    """A corpus, and the folder with the features of its sets."""

    corpus: Corpus
    stores: Path

    def load(self, name: str, *, utterances: int | None = None, statistics: FeatureStore | None = None) -> Speech:
        """One set of the corpus, its features computed at the first call.

        ``utterances`` takes that many, evenly spread; ``statistics`` normalizes with another store's mean and deviation.
        """
        cuts = self.corpus.cuts(name)
        store = open_or_compute(cuts, self.stores / name)
        if statistics is not None:
            store = replace(store, mean=statistics.mean, istd=statistics.istd)
        cuts = cuts.filter(lambda cut: store.utterances[cut.id].count > 0).to_eager()
        if utterances is not None:
            step = max(1, len(cuts) // utterances)
            cuts = CutSet.from_cuts([*cuts][::step][:utterances])
        return Speech(cuts, store)


def open_speech(speech: Path, features: Path | None = None) -> OpenSpeech:
    """Find a corpus; what is computed of it once is kept in ``features``, ``speech``/features by default."""
    stores = features or speech / "features"
    with ranks.in_turn():
        return OpenSpeech(open_corpus(speech, stores), stores)


def fitting(corpus: Speech, tokens: Tokens, config: EncoderConfig) -> Speech:
    """What of a corpus can be trained on; what is left out is said."""
    cuts, left_out = trainable(corpus.cuts, corpus.store, tokens, config)
    for reason, count in sorted(left_out.items()):
        ranks.say(f"Left out: {count} utterances {reason}")
    if not len(cuts):
        raise EmptyAudio("The corpus has no utterance to train on.", hint="Check its transcripts, or pass another --speech.")
    return replace(corpus, cuts=cuts)


class EpochBatches(L.LightningDataModule):
    """Training batches of the current epoch, and the development set."""

    def __init__(self, corpus: Speech, dev: Speech, tokens: Tokens, recipe: Recipe) -> None:
        """The development set is normalized as the training speech is."""
        super().__init__()
        self.corpus, self.tokens, self.recipe = corpus, tokens, recipe
        self.dev = replace(dev, store=replace(dev.store, mean=corpus.store.mean, istd=corpus.store.istd))
        self._done = (0, 0)  # an epoch, and how many of its batches

    @property
    def steps(self) -> int:
        """Of the whole training, if every epoch is as long as the first; they differ by a few, unless the recipe limits them."""
        first = len(self._batches(0)) // self.recipe.accumulate
        return self.recipe.epochs * min(first, self.recipe.epoch_batches or first)

    def train_dataloader(self) -> DataLoader[Batch] | Batches:
        """The batches of this epoch; of one that was interrupted, those that are left."""
        epoch = cast("L.Trainer", self.trainer).current_epoch
        return made_ahead(self._batches(epoch, skip=self._done[1] if epoch == self._done[0] else 0), self.recipe.workers)

    def val_dataloader(self) -> Batches:
        """The development set, in order; every process hears a part of each batch."""
        share = Share(ranks.world(), (ranks.rank(),))
        return self.dev.batches(self.tokens, EVALUATION_BATCH_SECONDS, learnt=False, share=share)

    def state_dict(self) -> dict[str, Any]:
        """The epoch that is under way, and how many of its batches are done."""
        trainer = cast("L.Trainer", self.trainer)
        return {"done": (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.completed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._done = state["done"]

    def _batches(self, epoch: int, skip: int = 0) -> Batches:
        """One after another, the parts of each batch that fall to this process."""
        recipe, world = self.recipe, ranks.world()
        return self.corpus.batches(
            self.tokens,
            recipe.batch_seconds,
            seed=recipe.seed,
            epoch=epoch,
            augmentation=recipe.augmentation,
            share=Share(world * recipe.accumulate, range(ranks.rank(), world * recipe.accumulate, world), skip),
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

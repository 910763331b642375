"""What a training hears: the sets of a corpus with their features, normalized, and those utterances that can be learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lhotse import CutSet
from torch import Tensor

from edgefuse.decode.tokens import Tokens
from edgefuse.errors import EmptyAudio, UsageError
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.model import Context, EncoderConfig
from edgefuse.train import ranks
from edgefuse.train.batches import Batch, Batches, trainable
from edgefuse.train.corpora import DEV, Corpus, open_corpus
from edgefuse.train.features import FeatureStore, open_or_compute
from edgefuse.train.module import draw_context
from edgefuse.train.recipe import Recipe
from edgefuse.values import Checkpoint

DEV_UTTERANCES = 200
FRAMES_PER_SECOND = 100
REESTIMATION_SECONDS = 7200.0  # of training speech: 180,000 encoder frames for every mean and variance
REESTIMATION_BATCH_SECONDS = 600.0  # a variance is the mean of those within batches
CLEAN_SECONDS = 1800.0
EVALUATION_BATCH_SECONDS = 120.0


@dataclass(frozen=True)
class Speech:
    """A set of utterances and its features."""

    cuts: CutSet
    store: FeatureStore

    def batches(self, tokens: Tokens, seconds: float, **options: Any) -> Batches:  # noqa: ANN401 - as `Batches` takes them
        """Batches of it."""
        return Batches(self.cuts, self.store, tokens, batch_seconds=seconds, **options)


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

    def dev(self, statistics: FeatureStore | None = None) -> Speech:
        """As much of the development set as is heard after every epoch."""
        return self.load(DEV, utterances=DEV_UTTERANCES, statistics=statistics)


def open_speech(speech: Path, features: Path | None = None) -> OpenSpeech:
    """Find a corpus; what is computed of it once is kept in ``features``, ``speech``/features by default."""
    stores = features or speech / "features"
    with ranks.in_turn():
        return OpenSpeech(open_corpus(speech, stores), stores)


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


def fitting(corpus: Speech, tokens: Tokens, config: EncoderConfig) -> Speech:
    """What of a corpus can be trained on; what is left out is said."""
    cuts, left_out = trainable(corpus.cuts, corpus.store, tokens, config)
    for reason, count in sorted(left_out.items()):
        ranks.say(f"Left out: {count} utterances {reason}")
    if not len(cuts):
        raise EmptyAudio("The corpus has no utterance to train on.", hint="Check its transcripts, or pass another --speech.")
    return replace(corpus, cuts=cuts)


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


def _first_seconds(batches: Batches, seconds: float) -> Iterator[Batch]:
    frames = 0
    for batch in batches:
        yield batch
        frames += int(batch.lengths.sum())
        if frames / FRAMES_PER_SECOND >= seconds:
            return

"""Batches of utterances of similar length, drawn by Lhotse's bucketing sampler, augmented and padded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from edgefuse.decode.tokens import Tokens, character_tokens
from edgefuse.errors import UsageError
from edgefuse.frontend.log_mel import normalize
from edgefuse.model.config import FEATURE_HOP_MS
from edgefuse.train.augment import Augmentation, augment, draw_tempo, mask, warp_tempo
from edgefuse.train.features import FeatureStore, Stored

CHARACTERS = character_tokens()
BUCKETS = 12
FEWEST_ALIGNED = 0.5  # of the utterances; a corpus always has some that are broken
FEWEST_PER_BUCKET = 50  # a bucket must fill some batches, or the rest of each becomes a small batch


@dataclass(frozen=True)
class Batch:
    """Padded utterances and their transcripts."""

    features: Tensor  # (B, T, 80) normalized, zeros after the end
    lengths: Tensor  # (B,) valid feature frames
    targets: Tensor  # (sum of target_lengths,) token ids
    target_lengths: Tensor  # (B,)
    characters: Tensor  # (sum of character_lengths,) the same transcripts as ids of characters
    character_lengths: Tensor  # (B,)
    texts: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.features.to(device),
            self.lengths.to(device),
            self.targets.to(device),
            self.target_lengths.to(device),
            self.characters.to(device),
            self.character_lengths.to(device),
            self.texts,
        )


class Batches:
    """The batches of one epoch: iterate over it as often as you like, it is always the same.

    Order, composition and augmentation depend on ``seed`` and ``epoch`` alone, which is what makes a resumed training
    equal to an uninterrupted one. Without ``augmentation`` the speech is clean.
    """

    def __init__(
        self,
        cuts: CutSet,
        store: FeatureStore,
        tokens: Tokens,
        *,
        batch_seconds: float,
        seed: int = 0,
        epoch: int = 0,
        augmentation: Augmentation | None = None,
        shuffle: bool = True,
    ) -> None:
        """Nothing is read before the first iteration. ``batch_seconds`` limits the speech, padding included."""
        self._cuts, self._store, self._tokens = cuts, store, tokens
        self._batch_seconds, self._shuffle = batch_seconds, shuffle
        self._seed, self._epoch, self._augmentation = seed, epoch, augmentation
        self._bins = _quantiles([cut.duration for cut in cuts], min(BUCKETS, 2 + len(cuts) // FEWEST_PER_BUCKET))

    def __iter__(self) -> Iterator[Batch]:
        """Draw the batches of the epoch."""
        draw = Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        for cuts in self._sampler():
            yield self._collate(cuts, draw)

    def __len__(self) -> int:
        """How many batches; found by running the sampler."""
        return sum(1 for _ in self._sampler())

    def _sampler(self) -> DynamicBucketingSampler:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eagerly read CutSet")  # it fits; the frames are what is large
            sampler = DynamicBucketingSampler(
                self._cuts,
                max_duration=self._batch_seconds,
                duration_bins=self._bins,
                shuffle=self._shuffle,
                seed=self._seed,
                world_size=1,
                rank=0,
            )
        sampler.set_epoch(self._epoch)
        return sampler

    def _collate(self, cuts: CutSet, draw: Generator) -> Batch:
        tempo = draw_tempo(self._augmentation, draw) if self._augmentation else 1.0
        features = [self._features(cut.id, tempo, draw) for cut in cuts]
        texts = tuple(self._store.utterances[cut.id].text for cut in cuts)
        targets, target_lengths = _encoded(texts, self._tokens)
        characters, character_lengths = _encoded(texts, CHARACTERS)
        return Batch(
            features=pad_sequence(features, batch_first=True),
            lengths=torch.tensor([f.shape[0] for f in features]),
            targets=targets,
            target_lengths=target_lengths,
            characters=characters,
            character_lengths=character_lengths,
            texts=texts,
        )

    def _features(self, utterance: str, tempo: float, draw: Generator) -> Tensor:
        features = self._store.features(utterance)
        if self._augmentation is not None:
            features = augment(warp_tempo(features, tempo), self._augmentation, draw)
        features = normalize(features, self._store.mean, self._store.istd)
        if self._augmentation is not None:
            features = mask(features, self._augmentation, draw)
        return features


def _encoded(texts: Iterable[str], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The ids of all texts one after another, and how many each has."""
    ids = [tokens.encode(text) for text in texts]
    return torch.tensor([number for sentence in ids for number in sentence]), torch.tensor([len(sentence) for sentence in ids])


def _quantiles(durations_s: list[float], buckets: int) -> list[float]:
    """The limits between so many buckets of equally many utterances."""
    ranked = sorted(durations_s)
    return [ranked[len(ranked) * number // buckets] for number in range(1, buckets)]


def trainable(cuts: CutSet, store: FeatureStore, tokens: Tokens, reduction: int) -> CutSet:
    """Only cuts that CTC can align: an encoder frame, of so many feature frames, for every token, and a blank between equals.

    Raises:
        UsageError: there are fewer frames than tokens in most of them.
    """
    held = cuts.filter(lambda cut: _aligns(store.utterances[cut.id], tokens, reduction)).to_eager()
    if len(held) < len(cuts) * FEWEST_ALIGNED:
        raise UsageError(
            f"With {reduction * FEATURE_HOP_MS} ms per frame CTC can align {len(held)} of {len(cuts)} utterances only: "
            "the others have fewer frames than tokens.",
            hint="Reduce the frame rate less, or learn longer tokens with: --vocabulary-size",
        )
    return held


def _aligns(stored: Stored, tokens: Tokens, reduction: int) -> bool:
    ids = tokens.encode(stored.text)
    repeats = sum(1 for now, then in pairwise(ids) if now == then)
    return 0 < len(ids) + repeats <= stored.count // reduction

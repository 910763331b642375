"""Batches of utterances of similar length, drawn by Lhotse's bucketing sampler, augmented and padded.

Several processes, or several backward passes before one step, share a batch: it is drawn for all of them together, and each part
of it takes every so-manieth utterance. So a step hears the same speech, and moves the weights as far, however many share it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler
from lhotse.utils import fastcopy
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from edgefuse.decode.tokens import Tokens
from edgefuse.errors import BadConfig, UsageError
from edgefuse.frontend.log_mel import normalize
from edgefuse.model.config import FEATURE_HOP_MS, EncoderConfig
from edgefuse.train.augment import Augmentation, augment, draw_pauses, draw_tempo, mask, warp_tempo
from edgefuse.train.features import FeatureStore
from edgefuse.train.pieces import characters_in

BUCKETS = 24
AHEAD = 4  # batches that each worker makes before they are asked for
TOO_SHORT = "too short for their text"
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
    part: int = 0  # which part of what was drawn
    share: float = 1.0  # times its loss; the mean over all parts is then the mean over all utterances

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Share:
    """What of an epoch one process takes: of every batch some of its parts, one after another.

    Attributes:
        parts: how many a batch is split into.
        mine: which of them.
        skip: how many batches, parts counted apart, were taken before.
    """

    parts: int = 1
    mine: Sequence[int] = (0,)
    skip: int = 0


WHOLE = Share()


class Batches(IterableDataset[Batch]):
    """The batches of one epoch: iterate over it as often as you like, it is always the same.

    Order, composition and pauses depend on ``seed`` and ``epoch`` alone, what else is done to an utterance besides on the number
    of its batch and on its place in it. So a training that is resumed behind any batch goes on with what it would have heard, and
    draws nothing of what is skipped. Without ``augmentation`` the speech is clean.
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
        learnt: bool = True,
        share: Share = WHOLE,
    ) -> None:
        """Nothing is read before the first iteration. ``batch_seconds`` limits the speech of a part, padding included.

        What is not ``learnt`` is only listened to: it comes in order, and its texts need not be spelled in tokens.
        """
        self._cuts, self._store, self._tokens, self._characters = cuts, store, tokens, characters_in(tokens)
        self._drawn_seconds, self._learnt, self._share = batch_seconds * share.parts, learnt, share
        self._seed, self._epoch, self._augmentation = seed, epoch, augmentation

    def __iter__(self) -> Iterator[Batch]:
        """Draw the batches of the epoch; of several workers each makes those that come to its turn."""
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        left = (number for number in range(len(self._drawn)) if number * len(self._share.mine) >= self._share.skip)
        parts = ((number, part) for number in left for part in self._share.mine)
        for number, part in islice(parts, turn, None, workers):
            yield self._collate(number, part, self._drawn[number])

    def __len__(self) -> int:
        """How many batches, with those that are skipped."""
        return len(self._drawn) * len(self._share.mine)

    @cached_property
    def _drawn(self) -> list[list[str]]:
        """The utterances of every batch."""
        return [[cut.id for cut in cuts] for cuts in self._sampler()]

    @cached_property
    def _pauses(self) -> dict[str, tuple[int, int]]:
        """The frames of quiet before and behind each utterance that has some in this epoch."""
        if self._augmentation is None:
            return {}
        drawn = draw_pauses(self._augmentation, len(self._cuts), drawn_from(self._seed, self._epoch)).tolist()
        return {cut.id: (before, behind) for cut, (before, behind) in zip(self._cuts, drawn, strict=True) if before or behind}

    def _sampler(self) -> DynamicBucketingSampler:
        """Utterances of similar length with their pauses; without, 37 % of a batch of 300 s was padding, and now 4 % [M]."""
        quiet_s = {name: sum(frames) * FEATURE_HOP_MS / 1000 for name, frames in self._pauses.items()}
        cuts = CutSet.from_cuts(fastcopy(cut, duration=cut.duration + quiet_s.get(cut.id, 0.0)) for cut in self._cuts)
        bins = _quantiles([cut.duration for cut in cuts], min(BUCKETS, 2 + len(cuts) // FEWEST_PER_BUCKET))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eagerly read CutSet")  # it fits; the frames are what is large
            sampler = DynamicBucketingSampler(
                cuts,
                max_duration=self._drawn_seconds,
                duration_bins=bins,
                shuffle=self._learnt,
                seed=self._seed,
                world_size=1,
                rank=0,
            )
        sampler.set_epoch(self._epoch)
        return sampler

    def _collate(self, number: int, part: int, utterances: Sequence[str]) -> Batch:
        """One part of a batch; where there are fewer utterances than parts, some hear the first one again, for a share of 0."""
        places = range(part, len(utterances), self._share.parts)
        draw = drawn_from(self._seed, self._epoch, number)
        tempo = draw_tempo(self._augmentation, draw) if self._augmentation else 1.0
        features = [
            self._features(utterances[place], tempo, drawn_from(self._seed, self._epoch, number, 1 + place))
            for place in places or range(1)
        ]
        texts = tuple(self._store.utterances[utterances[place]].text for place in places or range(1))
        targets, target_lengths = _encoded(texts if self._learnt else (), self._tokens)
        characters, character_lengths = _encoded(texts if self._learnt else (), self._characters)
        return Batch(
            features=pad_sequence(features, batch_first=True),
            lengths=torch.tensor([f.shape[0] for f in features]),
            targets=targets,
            target_lengths=target_lengths,
            characters=characters,
            character_lengths=character_lengths,
            texts=texts,
            part=part,
            share=len(places) * self._share.parts / len(utterances),
        )

    def _features(self, utterance: str, tempo: float, draw: Generator) -> Tensor:
        features = self._store.features(utterance)
        if self._augmentation is not None:
            features = augment(warp_tempo(features, tempo), self._augmentation, draw, self._pauses.get(utterance, (0, 0)))
        features = normalize(features, self._store.mean, self._store.istd)
        if self._augmentation is not None:
            features = mask(features, self._augmentation, draw)
        return features


def made_ahead(batches: Batches, workers: int) -> DataLoader[Batch] | Batches:
    """The same batches in the same order, made by so many processes beside the training; by itself where there are none."""
    if not workers or not len(batches):  # which draws them: a worker's sampler would draw others
        return batches
    return DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="fork", prefetch_factor=AHEAD)


def drawn_from(*numbers: int) -> Generator:
    """A generator whose draws depend on all of these numbers, and differ where one of them does."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return Generator().manual_seed(int(seed) >> 1)


def _encoded(texts: Iterable[str], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The ids of all texts one after another, and how many each has."""
    ids = [tokens.encode(text) for text in texts]
    return torch.tensor([number for sentence in ids for number in sentence]), torch.tensor([len(sentence) for sentence in ids])


def _quantiles(durations_s: list[float], buckets: int) -> list[float]:
    """The limits between so many buckets of equally many utterances."""
    ranked = sorted(durations_s)
    return [ranked[len(ranked) * number // buckets] for number in range(1, buckets)]


def trainable(cuts: CutSet, store: FeatureStore, tokens: Tokens, config: EncoderConfig) -> tuple[CutSet, dict[str, int]]:
    """What can be trained on, and how many utterances are left out, by the reason.

    CTC aligns a text that has an encoder frame for every token, and one for a blank between equal neighbours.

    Raises:
        UsageError: there are fewer frames than tokens in most of them.
    """
    reasons = {cut.id: _unfit(store.utterances[cut.id].count, store.utterances[cut.id].text, tokens, config) for cut in cuts}
    left_out = Counter(reason for reason in reasons.values() if reason)
    if left_out[TOO_SHORT] > len(cuts) * (1 - FEWEST_ALIGNED):
        raise UsageError(
            f"With {config.reduction * FEATURE_HOP_MS} ms per frame CTC can align {len(cuts) - left_out[TOO_SHORT]} of "
            f"{len(cuts)} utterances only: the others have fewer frames than tokens.",
            hint="Reduce the frame rate less, or learn longer tokens with: --vocabulary",
        )
    return cuts.filter(lambda cut: not reasons[cut.id]).to_eager(), {reason: left_out[reason] for reason in left_out}


def _unfit(frames: int, text: str, tokens: Tokens, config: EncoderConfig) -> str:
    """Why an utterance is left out; nothing where it is not."""
    if not text.split():
        return "without a word"
    encoded = frames // config.reduction
    if encoded > config.max_frames:
        return f"longer than {config.max_frames} encoder frames"
    try:
        ids = tokens.encode(text)
    except BadConfig:
        return "with characters that are no tokens"
    repeats = sum(1 for now, then in pairwise(ids) if now == then)
    return TOO_SHORT if len(ids) + repeats > encoded else ""

"""CTC prefix beam search (Hannun et al. 2014, arXiv:1408.2873), frame by frame, with a bonus for hotwords.

It is written here because no kept library does it: pyctcdecode (last released in 2023) refuses numpy 2, ctcdecode (2020) and
flashlight-text (2024) are as quiet and boost no hotwords, and what is younger has yet to show that it will be kept.

A text has many alignments, one id per frame, and is as probable as their sum. For the prefixes l that are kept, p_b(l) is the
probability of the alignments that end in a blank and p_nb(l) of those that end in the last token of l. Frame t turns them into

    p_b'(l)      =  P(blank | t) (p_b(l) + p_nb(l))
    p_nb'(l)     =  P(last(l) | t) p_nb(l)                     the token goes on
    p_nb'(l + c) +=  P(c | t) (p_b(l) + p_nb(l))               another token begins
    p_nb'(l + c) +=  P(c | t) p_b(l)       if c = last(l)      the same token again, which only a blank allows

and the prefixes with the greatest log(p_b' + p_nb') + bonus(l) are kept. Beside each sum goes its single best alignment, which
is where the times come from. All numbers below are natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgefuse.decode.hotwords import NO_HOTWORDS, NOTHING_YET, Biasing, Matched
from edgefuse.decode.spelling import NOTHING_SAID, Spelling
from edgefuse.decode.tokens import BLANK_ID

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NEVER = -math.inf
LEAST = -10.0  # a token less probable than e^-10 = 0.005 % begins nowhere
MOST = 16  # nor does one with so many more probable ones in its frame


class Paths(NamedTuple):
    """Alignments of one prefix: their summed probability, and the best of them with the frames in which its tokens begin."""

    total: float
    best: float
    frames: tuple[int, ...]

    def then(self, log_p: float, *begins: int) -> Paths:
        """One frame on, in which nothing begins, or one token."""
        return Paths(self.total + log_p, self.best + log_p, self.frames + begins)


NO_PATHS = Paths(NEVER, NEVER, ())


class Prefix(NamedTuple):
    """A prefix that the beam keeps: its alignments that end in a blank and in its last token, and the hotwords in it."""

    blank: Paths
    token: Paths
    matched: Matched

    @property
    def log_p(self) -> float:
        """Of all its alignments."""
        return added(self.blank.total, self.token.total)

    @property
    def score(self) -> float:
        """What the beam is sorted by; a hotword that has only begun counts as far as it goes."""
        return self.log_p + self.matched.bonus

    def without(self, count: int) -> Prefix:
        """The same without the times of its first tokens."""
        blank, token = (paths._replace(frames=paths.frames[count:]) for paths in (self.blank, self.token))
        return Prefix(blank, token, self.matched)


Kept = Mapping[tuple[int, ...], Prefix]


@dataclass(frozen=True)
class Beam:
    """A beam search that goes on from chunk to chunk: the same however the frames are cut.

    Attributes:
        width: how many prefixes are kept.
        biasing: the hotwords, in the tokens of the model.
        settled: what all prefixes begin with, kept once: a long recording costs little more than a short one.
        prefixes: the rests behind it, best first.
        frames: how many have been heard.
    """

    width: int
    biasing: Biasing = NO_HOTWORDS
    settled: Spelling = NOTHING_SAID
    prefixes: tuple[tuple[tuple[int, ...], Prefix], ...] = (((), Prefix(Paths(0.0, 0.0, ()), NO_PATHS, NOTHING_YET)),)
    frames: int = 0

    def accept(self, logits: ArrayLike) -> Beam:
        """The search after some more logits or log-probabilities (T, V); V[0] is the blank."""
        kept: Kept = dict(self.prefixes)
        rows = log_softmax(logits)
        for frame, log_p in enumerate(rows, start=self.frames):
            kept = _step(kept, log_p, frame, self)
        return _settled(replace(self, prefixes=tuple(kept.items()), frames=self.frames + len(rows)))

    @property
    def best(self) -> Spelling:
        """The best prefix, as if nothing came after it: a hotword that has only begun counts nothing."""
        ids, prefix = max(self.prefixes, key=lambda each: each[1].log_p + self.biasing.final(each[1].matched))
        paths = max(prefix.blank, prefix.token, key=lambda paths: paths.best)
        return Spelling(self.settled.ids + ids, self.settled.frames + paths.frames)


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """log P(v | t) = x_v - log sum_u exp(x_u) of (T, V), in float64; log-probabilities stay what they are."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    log_p: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return log_p


def added(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


def either(a: Paths, b: Paths) -> Paths:
    """The alignments of both."""
    best = a if a.best >= b.best else b
    return Paths(added(a.total, b.total), best.best, best.frames)


def _step(kept: Kept, log_p: NDArray[np.float64], frame: int, beam: Beam) -> Kept:
    """One frame: the equations above, then the prune."""
    blank, begin = float(log_p[BLANK_ID]), _probable(log_p)
    new: dict[tuple[int, ...], Prefix] = {}
    for ids, prefix in kept.items():
        both = either(prefix.blank, prefix.token)
        last = ids[-1] if ids else BLANK_ID
        goes_on = prefix.token.then(float(log_p[last])) if ids else NO_PATHS
        _add(new, ids, Prefix(both.then(blank), goes_on, prefix.matched))
        for c, p in begin:
            paths = (prefix.blank if c == last else both).then(p, frame)
            if paths.total > NEVER:
                _add(new, (*ids, c), Prefix(NO_PATHS, paths, beam.biasing.step(prefix.matched, c)))
    best = sorted(new.items(), key=lambda each: each[1].score, reverse=True)
    return dict(best[: beam.width])


def _probable(log_p: NDArray[np.float64]) -> list[tuple[int, float]]:
    """The tokens that may begin in a frame, and their log-probabilities."""
    ids = np.flatnonzero(log_p > LEAST)
    if len(ids) > MOST:
        ids = ids[np.argsort(log_p[ids], kind="stable")[-MOST:]]
    return [(c, float(log_p[c])) for c in ids.tolist() if c != BLANK_ID]


def _add(new: dict[tuple[int, ...], Prefix], ids: tuple[int, ...], more: Prefix) -> None:
    """Add alignments to those of a prefix."""
    old = new.get(ids)
    new[ids] = Prefix(either(old.blank, more.blank), either(old.token, more.token), more.matched) if old else more


def _settled(beam: Beam) -> Beam:
    """Move what all prefixes begin with, at the same times, to `settled`; but for one token, which the next frame may repeat."""
    paths = [paths.frames for _, prefix in beam.prefixes for paths in (prefix.blank, prefix.token) if paths.total > NEVER]
    count = min(_in_common([ids for ids, _ in beam.prefixes]) - 1, _in_common(paths))
    if count < 1:
        return beam
    ids, frames = beam.prefixes[0][0][:count], paths[0][:count]
    return replace(
        beam,
        settled=Spelling(beam.settled.ids + ids, beam.settled.frames + frames),
        prefixes=tuple((ids[count:], prefix.without(count)) for ids, prefix in beam.prefixes),
    )


def _in_common(rows: Sequence[tuple[int, ...]]) -> int:
    """With how many equal numbers all rows begin."""
    equal = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(1 for _ in takewhile(bool, equal))

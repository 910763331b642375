"""How far an artifact's word error rate is from the model's, or another's, and how much of that is the luck of the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgefuse.verify.wer import WordErrors, total

if TYPE_CHECKING:
    from edgefuse.bundle import Findings, Reference

BLOCKS, RESAMPLES, SEED = 100, 100, 0  # 10,000 resamples, so many at once
LEVEL_PERCENT = 95
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """Word errors of an artifact and of the model, or of what it is compared with, on the same utterances.

    Attributes:
        part: of the test set; "" is all of it.
        model: of the checkpoint in PyTorch, or of another artifact.
        artifact: of the artifact.
        changed: utterances in which one of them has more errors than the other.
        interval: where the difference lies in points, by `paired_bootstrap`.
    """

    part: str
    model: WordErrors
    artifact: WordErrors
    changed: int
    interval: Interval

    @property
    def apart(self) -> int:
        """How many errors more the artifact makes."""
        return self.artifact.errors - self.model.errors

    @property
    def points(self) -> float:
        """The same per hundred words."""
        return 100.0 * self.apart / max(1, self.model.words)

    def tells(self, within: float) -> bool:
        """Whether the interval lies inside of -within .. within points, or outside of it."""
        low, high = self.interval
        return max(-low, high) <= within or low > within or high < -within


def differences(reference: Reference, findings: Findings) -> tuple[Difference, ...]:
    """On the whole test set, and on each part of it where it has several."""
    parts = tuple(dict.fromkeys(reference.parts.values()))
    members = {part: [name for name, of in reference.parts.items() if of == part] for part in parts}
    apart = members.items() if len(parts) > 1 else ()
    return tuple(
        difference(part, [(reference.words[name], findings.words[name]) for name in names])
        for part, names in (("", [*reference.parts]), *apart)
    )


def difference(part: str, pairs: Sequence[tuple[WordErrors, WordErrors]]) -> Difference:
    """Of every utterance what the model does, and what the artifact does."""
    more = [artifact.errors - model.errors for model, artifact in pairs]
    interval = paired_bootstrap(more, [model.words for model, _ in pairs])
    models, artifacts = (total(each) for each in zip(*pairs, strict=True))
    return Difference(part, models, artifacts, sum(map(bool, more)), interval)


def paired_bootstrap(more: Sequence[int], words: Sequence[int]) -> Interval:
    """The middle 95 % of d* = 100 sum_k e[u_k] / sum_k w[u_k] over draws u_1 .. u_N of N utterances with replacement.

    e are the errors that the artifact makes beyond the model's in each utterance, w its words. Both are drawn together, so that
    what makes an utterance hard for either cancels. Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR
    performance evaluation", 2004 [R]. The same errors give the same interval.
    """
    draw, errors, said = np.random.default_rng(SEED), np.asarray(more), np.asarray(words)
    drawn = (draw.integers(len(errors), size=(RESAMPLES, len(errors))) for _ in range(BLOCKS))
    points = np.concatenate([100.0 * errors[each].sum(axis=1) / np.maximum(1, said[each].sum(axis=1)) for each in drawn])
    tail = (100 - LEVEL_PERCENT) / 2
    low, high = np.percentile(points, (tail, 100 - tail))
    return float(low), float(high)

"""Word error rate, counted by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True)
class WordErrors:
    """Counts over a test set; the rate is derived from them."""

    substitutions: int
    deletions: int
    insertions: int
    words: int  # in the references
    utterances: int

    @property
    def errors(self) -> int:
        """All three kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer_percent(self) -> float:
        """Errors per hundred reference words; it can exceed 100. NaN without reference words."""
        return 100.0 * self.errors / self.words if self.words else float("nan")

    def __add__(self, other: WordErrors) -> WordErrors:
        """Counts of both test sets together."""
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
            self.utterances + other.utterances,
        )


def count_word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Compare texts pairwise, word by word; an empty reference makes every hypothesis word an insertion."""
    pairs = list(zip(references, hypotheses, strict=True))
    silent = sum(len(hypothesis.split()) for reference, hypothesis in pairs if not reference.split())
    spoken = [(reference, hypothesis) for reference, hypothesis in pairs if reference.split()]
    if not spoken:
        return WordErrors(0, 0, silent, 0, len(pairs))
    output = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
    return WordErrors(
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions + silent,
        words=output.hits + output.substitutions + output.deletions,
        utterances=len(pairs),
    )

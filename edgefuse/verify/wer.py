"""Word error rate, counted by jiwer."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
    def kinds(self) -> dict[str, int]:
        """Each kind."""
        return {"substitutions": self.substitutions, "deletions": self.deletions, "insertions": self.insertions}

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


def total(errors: Iterable[WordErrors]) -> WordErrors:
    """Counts of several test sets, or utterances, together."""
    return sum(errors, WordErrors(0, 0, 0, 0, 0))


def rates_by_part(words: Mapping[str, WordErrors], parts: Mapping[str, str]) -> dict[str, float]:
    """Word error rates in percent, by part of the test set; none of a part in which nobody says a word."""
    rates = {
        part: total(each for identity, each in words.items() if parts[identity] == part).wer_percent
        for part in dict.fromkeys(parts.values())
    }
    return {part: rate for part, rate in rates.items() if math.isfinite(rate)}


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


def split_word_errors(
    references: Sequence[str], hypotheses: Sequence[str], special: Container[str]
) -> tuple[WordErrors, WordErrors, int]:
    """The same counts for the special words and for all others, and how many special words were heard where none was said.

    A word that was said and missed counts where it belongs, and so does one that was only heard. Their sum is what
    `count_word_errors` finds.
    """
    pairs = list(_aligned(references, hypotheses))
    inside, outside = (
        WordErrors(
            substitutions=sum(1 for said, heard in pairs if said and heard and said != heard and (said in special) is which),
            deletions=sum(1 for said, heard in pairs if not heard and (said in special) is which),
            insertions=sum(1 for said, heard in pairs if not said and (heard in special) is which),
            words=sum(1 for said, _ in pairs if said and (said in special) is which),
            utterances=len(references),
        )
        for which in (True, False)
    )
    return inside, outside, sum(1 for said, heard in pairs if heard in special and said != heard)


def _aligned(references: Sequence[str], hypotheses: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word that was said with the word that was heard in its place; the empty word stands for none."""
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        if not reference.split():
            yield from (("", heard) for heard in hypothesis.split())
            continue
        output = jiwer.process_words(reference, hypothesis)
        for chunk in output.alignments[0]:
            said = output.references[0][chunk.ref_start_idx : chunk.ref_end_idx]
            heard = output.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]
            yield from zip_longest(said, heard, fillvalue="")

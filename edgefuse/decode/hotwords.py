"""Hotwords: phrases that a beam search hears more readily, such as the names of rooms and people.

A file of them is UTF-8 with one phrase a line, and behind a tab its weight if it is not to have the usual one. A text that says
a phrase gets a bonus of weight * characters (natural logarithms, spaces counted) beside its log-probability:

    score(text) = log P(text | audio) + sum over the phrases said in it of weight * len(phrase)

The bonus comes letter by letter while a phrase is being said, or the beam would drop it before it is whole, and is taken back
when the text goes on differently. Letters, not tokens: a model may spell a phrase in any pieces. A phrase counts as whole
words only ("ann" is not in "anna"); phrases do not overlap, and the longest of those that begin first counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgefuse.decode.tokens import SPACE, Tokens
from edgefuse.errors import BadHotwords, MissingFile

WEIGHT = 0.4  # per character; of those that help most on the sets dev and seen, the one that hears fewest where none are said
END = "\n"  # in no phrase


class Matched(NamedTuple):
    """How far a text has got with the phrases.

    Attributes:
        pending: its end, if a phrase may begin with it; None within a word that begins none.
        banked: the bonus of the phrases before.
        bonus: with that of `pending`, which may yet be taken back.
    """

    pending: str | None
    banked: float
    bonus: float


NOTHING_YET = Matched("", 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Biasing:
    """Phrases, ready for a search.

    Attributes:
        symbols: what each token spells, spaces as spaces.
        whole: the bonus of each phrase.
        begun: the bonus of all that a phrase can begin with, the empty text and whole phrases included.
    """

    symbols: Sequence[str]
    whole: Mapping[str, float]
    begun: Mapping[str, float]

    def step(self, matched: Matched, token: int) -> Matched:
        """A text with one more token."""
        if not self.whole:
            return matched
        pending, banked = matched.pending, matched.banked
        for letter in self.symbols[token]:
            pending, gained = self._letter(pending, letter)
            banked += gained
        return Matched(pending, banked, banked + self.begun.get(pending or "", 0.0))

    def final(self, matched: Matched) -> float:
        """The bonus of a text that ends here."""
        return matched.banked + (self._settled(f"{matched.pending} {END}")[1] if matched.pending else 0.0)

    def _letter(self, pending: str | None, letter: str) -> tuple[str | None, float]:
        between = pending is None or pending == "" or pending.endswith(" ")
        if letter == " " and between:
            return pending or "", 0.0
        return (None, 0.0) if pending is None else self._settled(pending + letter)

    def _settled(self, text: str) -> tuple[str | None, float]:
        """What of a text may yet become a phrase, and the bonus of the phrases that it says before."""
        gained = 0.0
        while text not in self.begun:
            if phrase := self._said_first(text):
                gained += self.whole[phrase]
                text = text[len(phrase) + 1 :]
            elif " " in text:
                text = text.partition(" ")[2]
            else:
                return None, gained
        return text, gained

    def _said_first(self, text: str) -> str | None:
        """The longest phrase with which a text begins, a space behind it."""
        ends = (place for place in range(len(text) - 1, 0, -1) if text[place] == " ")
        return next((text[:place] for place in ends if text[:place] in self.whole), None)


NO_HOTWORDS = Biasing((), {}, {"": 0.0})


def biasing(hotwords: Mapping[str, float], tokens: Tokens) -> Biasing:
    """Make phrases and their weights per character ready for a model; a `BadHotwords` if its tokens cannot spell one."""
    symbols = tuple(symbol.replace(SPACE, " ") for symbol in tokens.symbols)
    letters = {letter for symbol in symbols[1:] for letter in symbol}
    for phrase in hotwords:
        if unknown := sorted(set(phrase) - letters - {" "}):
            raise BadHotwords(
                f"The hotword {phrase!r} has characters that the model never writes: {' '.join(unknown)}.",
                hint=f"It writes: {' '.join(sorted(letters - {' '}))}",
            )
    begun: dict[str, float] = {"": 0.0}
    for phrase, weight in hotwords.items():
        for length in range(1, len(phrase) + 1):
            begun[phrase[:length]] = max(begun.get(phrase[:length], 0.0), weight * length)
    return Biasing(symbols, {phrase: weight * len(phrase) for phrase, weight in hotwords.items()}, begun)


def read_hotwords(path: Path) -> dict[str, float]:
    """Phrases, single-spaced, and their weights per character; of a phrase that stands there twice, the last weight."""
    found = {}
    for number, line in enumerate(_lines(path), start=1):
        phrase, _, weight = line.partition("\t")
        if phrase.split():
            found[" ".join(phrase.split())] = _weight(f"{path}, line {number}", weight.strip())
        elif weight.strip():
            raise BadHotwords(f"{path}, line {number}: a weight, but no phrase.", hint="The phrase stands before the tab.")
    if not found:
        raise BadHotwords(f"{path} holds no phrase.", hint="Write one a line, for example: living room")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise MissingFile(f"There is no file of hotwords at {path}.", hint="Write one, with one phrase a line.") from error
    except UnicodeDecodeError as error:
        raise BadHotwords(f"{path} is not text in UTF-8.", hint="Save it as UTF-8, one phrase a line.") from error
    except OSError as error:
        raise BadHotwords(f"{path} cannot be read: {error.strerror}.", hint="Name a file with one phrase a line.") from error


def _weight(where: str, told: str) -> float:
    try:
        weight = float(told) if told else WEIGHT
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise BadHotwords(
            f"{where}: the weight {told!r} is no positive number.", hint=f"It counts per character; {WEIGHT} is usual."
        )
    return weight

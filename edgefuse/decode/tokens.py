"""Tokens: what the ids of the CTC head mean.

``tokens.txt`` holds one token per line, in the order of their ids: first the blank ``<blk>``; ``▁`` is the space. A token is
a character or a longer piece of a word, with the space in front of it where it begins one.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgefuse.errors import BadConfig, MissingFile

BLANK = "<blk>"
SPACE = "▁"
BLANK_ID = 0


@dataclass(frozen=True)
class Tokens:
    """The symbols of a vocabulary, in the order of their ids; the blank is id 0."""

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a vocabulary that cannot be decoded, in words."""
        if problem := _problem(self.symbols):
            raise BadConfig(
                f"The tokens are impossible: {problem}.", hint=f"tokens.txt holds one token per line, and the first is {BLANK}."
            )

    def __len__(self) -> int:
        """How many symbols, the blank included."""
        return len(self.symbols)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    @cached_property
    def _longest(self) -> int:
        return max(len(symbol) for symbol in self.symbols[1:])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, at each place the longest token that fits; a character that is no token is a `BadConfig`.

        In a vocabulary of pieces the first word has a space in front of it, as every other has.
        """
        symbols = text.replace(" ", SPACE)
        if self._longest > 1:
            symbols = SPACE + symbols
        if unknown := sorted(set(symbols) - set(self.symbols)):
            raise BadConfig(
                f"The text {text!r} has characters that are no tokens: {' '.join(unknown)}.",
                hint=f"The tokens are: {' '.join(self.symbols)}",
            )
        ids, place = [], 0
        while place < len(symbols):
            fitting = (symbols[place : place + length] for length in range(self._longest, 0, -1))
            token = next(symbol for symbol in fitting if symbol in self._ids)
            ids.append(self._ids[token])
            place += len(token)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without blanks, single-spaced and stripped."""
        return " ".join("".join(self.symbols[number] for number in ids).replace(SPACE, " ").split())


def character_tokens() -> Tokens:
    """English characters: the blank, the space, the apostrophe and a-z; 29 in all."""
    return Tokens((BLANK, SPACE, "'", *string.ascii_lowercase))


def write_tokens(path: Path, tokens: Tokens) -> None:
    """Write ``tokens.txt``."""
    path.write_text("".join(f"{symbol}\n" for symbol in tokens.symbols), encoding="utf-8")


def read_tokens(path: Path) -> Tokens:
    """Read ``tokens.txt``; `MissingFile` if it is not there, `BadConfig` if it is malformed."""
    try:
        return Tokens(tuple(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError as error:
        raise MissingFile(f"There is no {path}.", hint="A checkpoint folder holds tokens.txt.") from error
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not text in UTF-8.", hint="It holds one token per line, the blank first.") from error


def _problem(symbols: Sequence[str]) -> str | None:
    if len(symbols) < 2:  # noqa: PLR2004 - the blank and one token
        return "a vocabulary needs the blank and at least one token"
    if symbols[0] != BLANK:
        return f"id 0 is {symbols[0]!r}, not the blank {BLANK!r}"
    if twice := sorted({symbol for symbol in symbols if symbols.count(symbol) > 1}):
        return f"{', '.join(map(repr, twice))} has more than one id"
    return None

"""What a search finds: tokens, the frames in which they begin, and the words that they spell.

The times of a word are those of its peaks. CTC is trained to say a token somewhere within its sound, mostly in one frame, and
leaves the rest to the blank: a word therefore begins when its first token peaks (often after the sound has begun) and ends
with the frame in which its last token peaks (before the sound has faded). A word of one token seems to last one frame. The order
is right and a gap between utterances shows; to cut audio at these times, leave some hundred milliseconds on either side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from edgefuse.decode.tokens import SPACE, Tokens

FRAME_MS = 40  # one encoder frame, of most encoders


@dataclass(frozen=True, slots=True)
class Spelling:
    """Token ids, blanks and repeats removed, and the encoder frame in which each begins."""

    ids: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()


NOTHING_SAID = Spelling()


@dataclass(frozen=True, slots=True)
class Word:
    """A word and its time in the recording, in seconds: from the peak of its first token to that of its last."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """One utterance; `second_pass` says whether the second pass of a cascade has heard it, behind a first that streamed."""

    words: tuple[Word, ...]
    second_pass: bool = False

    @property
    def text(self) -> str:
        """Its words in a row."""
        return text_of(self.words)


def words_of(spelling: Spelling, tokens: Tokens, first_frame: int = 0, frame_ms: int = FRAME_MS) -> tuple[Word, ...]:
    """The words that tokens spell; their frames are counted from `first_frame` of the recording."""
    letters = [
        (letter, first_frame + frame)
        for number, frame in zip(spelling.ids, spelling.frames, strict=True)
        for letter in tokens.symbols[number].replace(SPACE, " ")
    ]
    found = (list(group) for between, group in groupby(letters, key=lambda each: each[0].isspace()) if not between)
    return tuple(_word("".join(letter for letter, _ in word), word[0][1], word[-1][1], frame_ms) for word in found)


def text_of(words: Iterable[Word]) -> str:
    """Words in a row, as `Tokens.decode` spells them."""
    return " ".join(word.text for word in words)


def _word(text: str, first: int, last: int, frame_ms: int) -> Word:
    return Word(text, first * frame_ms / 1000, (last + 1) * frame_ms / 1000)

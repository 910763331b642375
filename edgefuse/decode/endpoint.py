"""When an utterance of a live stream is over."""

from __future__ import annotations

from dataclasses import dataclass

from edgefuse.decode.spelling import FRAME_MS
from edgefuse.errors import UsageError


@dataclass(frozen=True, slots=True)
class Endpointing:
    """An utterance is over after silence, and at the latest after some time: the rules of Kaldi's online decoders.

    Silence is what the encoder hears nothing new in: frames whose best token is the blank. A long vowel is such, too, so that
    much less than half a second would cut words apart. Infinity switches a rule off.

    Attributes:
        silence_ms: ends an utterance in which something was said.
        nothing_ms: ends one in which nothing was; it leaves no trace.
        longest_ms: ends any, within a word if need be.
    """

    silence_ms: float = 800.0
    nothing_ms: float = 5_000.0
    longest_ms: float = 20_000.0

    def __post_init__(self) -> None:
        """Refuse times that never begin."""
        if not min(self.silence_ms, self.nothing_ms, self.longest_ms) > 0:
            raise UsageError("An utterance cannot end after no time.", hint="Give it some: --endpoint-silence-ms 800")

    def over(self, frames: int, blanks: int, frame_ms: int = FRAME_MS) -> bool:
        """Whether an utterance of so many frames is over, so many of which, at its end, are blank."""
        silence_ms = self.silence_ms if blanks < frames else self.nothing_ms
        return blanks * frame_ms >= silence_ms or frames * frame_ms >= self.longest_ms

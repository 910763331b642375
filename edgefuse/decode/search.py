"""How a text is searched for, and the search that does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgefuse.decode.beam import Beam
from edgefuse.decode.greedy import Greedy
from edgefuse.decode.hotwords import biasing, read_hotwords
from edgefuse.decode.spelling import Spelling
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

GREEDY, BEAM = 1, 8  # the width without hotwords, and with them


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a text is searched for.

    Attributes:
        beam: how many prefixes are kept from frame to frame; 1 is greedy search.
        hotwords: phrases and their weights per character, as `read_hotwords` gives them; they need a beam.
    """

    beam: int = GREEDY
    hotwords: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        if self.beam < GREEDY:
            raise UsageError(f"A beam of {self.beam} finds nothing.", hint=f"Give it some width: --beam {BEAM}")
        if self.hotwords and self.beam == GREEDY:
            raise UsageError("Greedy search does not listen for hotwords.", hint=f"Give it a beam: --beam {BEAM}")


GREEDILY = Decoding()


class Search(Protocol):
    """A search on its way; a value, which going on from it leaves as it was."""

    @property
    def best(self) -> Spelling:
        """What has been said so far."""
        ...

    def accept(self, logits: ArrayLike) -> Search:
        """The search after some more logits or log-probabilities (T, V), cut from the utterance anywhere."""
        ...


def decoding_of(beam: int | None, hotwords: Path | None) -> Decoding:
    """What was asked for: greedy search if nothing was, a beam if there is a file of hotwords."""
    phrases = read_hotwords(hotwords) if hotwords else {}
    width = BEAM if phrases else GREEDY
    return Decoding(width if beam is None else beam, phrases)


def begin(decoding: Decoding, tokens: Tokens) -> Search:
    """The search before the first frame; a `BadHotwords` if the tokens cannot spell one."""
    return Greedy() if decoding.beam == GREEDY else Beam(decoding.beam, biasing(decoding.hotwords, tokens))

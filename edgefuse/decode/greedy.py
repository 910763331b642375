"""CTC greedy search: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgefuse.decode.spelling import NOTHING_SAID, Spelling
from edgefuse.decode.tokens import BLANK_ID, Tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy search that goes on from chunk to chunk: the same however the frames are cut.

    Attributes:
        best: what has been said so far.
        last: the best token of the last frame; a token that goes on in the next one is not said twice.
        frames: how many have been heard.
    """

    best: Spelling = NOTHING_SAID
    last: int = BLANK_ID
    frames: int = 0

    def accept(self, logits: ArrayLike) -> Greedy:
        """The search after some more logits or log-probabilities (T, V)."""
        path = np.asarray(logits).argmax(axis=-1).tolist()
        new = beginnings(path, self.last)
        ids = (*self.best.ids, *(path[frame] for frame in new))
        frames = (*self.best.frames, *(self.frames + frame for frame in new))
        return Greedy(Spelling(ids, frames), [self.last, *path][-1], self.frames + len(path))


def greedy_ids(logits: ArrayLike) -> list[int]:
    """Token ids of logits or log-probabilities (T, V); V[0] is the blank. Numpy arrays and tensors alike."""
    return list(Greedy().accept(logits).best.ids)


def merge_repeats(path: Sequence[int]) -> list[int]:
    """Collapse an alignment (one id per frame) to its ids: equal neighbours are one, blanks are none."""
    return [path[frame] for frame in beginnings(path)]


def beginnings(path: Sequence[int], last: int = BLANK_ID) -> list[int]:
    """The frames of an alignment in which a token begins, `last` being the id of the frame before the first."""
    before = [last, *path]  # one longer: the last frame precedes nothing
    return [frame for frame, (now, then) in enumerate(zip(path, before, strict=False)) if now not in (then, BLANK_ID)]


def greedy_text(logits: ArrayLike, tokens: Tokens) -> str:
    """The text of logits (T, V)."""
    return tokens.decode(greedy_ids(logits))

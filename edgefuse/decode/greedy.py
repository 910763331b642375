"""CTC greedy search: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgefuse.decode.tokens import BLANK_ID, Tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def greedy_ids(logits: ArrayLike) -> list[int]:
    """Token ids of logits or log-probabilities (T, V); V[0] is the blank. Numpy arrays and tensors alike."""
    best = np.asarray(logits).argmax(axis=-1)
    return merge_repeats(best.tolist())


def merge_repeats(best: list[int]) -> list[int]:
    """Collapse an alignment (one id per frame) to its ids: equal neighbours are one, blanks are none."""
    before = [BLANK_ID, *best]  # one longer: the last frame precedes nothing
    return [now for now, last in zip(best, before, strict=False) if now not in (last, BLANK_ID)]


def greedy_text(logits: ArrayLike, tokens: Tokens) -> str:
    """The text of logits (T, V)."""
    return tokens.decode(greedy_ids(logits))

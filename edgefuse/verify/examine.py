"""Run an artifact on speech and write down what was found; the gate judges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgefuse.bundle import Findings
from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.tokens import Tokens
from edgefuse.recognize import answer, encoder_frames, fit, fitting
from edgefuse.verify.parity import agreeing_frames, worst_snr_db
from edgefuse.verify.wer import count_word_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.bundle import Reference
    from edgefuse.recognize import Heard
    from edgefuse.target import Session
    from edgefuse.values import Artifact, Mode


def examine(
    session: Session, artifact: Artifact, mode: Mode, reference: Reference, heard: Sequence[Heard], tokens: tuple[str, ...]
) -> Findings:
    """Parity on the golden vectors, tokens and words on the test set, in one mode."""
    fits = fit(heard, mode)
    given = {each.identity: _answer(session, artifact, mode, each) for each in fits}
    texts = [greedy_text(given[each.identity], Tokens(tokens)) for each in fits]
    agreeing, frames = agreeing_frames(reference.alignments, given)
    return Findings(
        snr_db=worst_snr_db(session, artifact, mode, reference.goldens, noise=False),
        padded_snr_db=worst_snr_db(session, artifact, mode, reference.goldens, noise=True),
        agreeing_frames=agreeing,
        frames=frames,
        errors=count_word_errors([each.text for each in fits], texts),
    )


def _answer(session: Session, artifact: Artifact, mode: Mode, each: Heard) -> NDArray[np.float32]:
    entry = mode.name if mode.streaming else fitting(mode.inputs, encoder_frames(each.features))
    assert entry is not None, "only what fits is asked"  # noqa: S101 - `fit` leaves out what does not
    return answer(session, artifact, entry, each.features)

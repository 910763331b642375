"""Run an artifact on speech and write down what was found; the gate judges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgefuse.bundle import Findings
from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.tokens import Tokens
from edgefuse.recognize import answer, encoder_frames, fitting
from edgefuse.verify.parity import agreeing_frames, worst_snr_db
from edgefuse.verify.wer import count_word_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.bundle import Reference
    from edgefuse.recognize import Heard
    from edgefuse.target import Session, Target
    from edgefuse.values import Artifact


def examine(
    target: Target, session: Session, artifact: Artifact, reference: Reference, heard: Sequence[Heard], tokens: tuple[str, ...]
) -> Findings:
    """Structure, parity on the golden vectors, tokens and words on the test set."""
    given = {each.identity: _answer(session, artifact, each) for each in heard}
    texts = [greedy_text(given[each.identity], Tokens(tokens)) for each in heard]
    agreeing, frames = agreeing_frames(reference.alignments, given)
    return Findings(
        structure=target.structure(artifact),
        snr_db=worst_snr_db(session, artifact, reference.goldens, noise=False),
        padded_snr_db=worst_snr_db(session, artifact, reference.goldens, noise=True),
        agreeing_frames=agreeing,
        frames=frames,
        errors=count_word_errors([each.text for each in heard], texts),
    )


def _answer(session: Session, artifact: Artifact, each: Heard) -> NDArray[np.float32]:
    entry = fitting(artifact.inputs, encoder_frames(each.features))
    assert entry is not None, "only what fits was heard"  # noqa: S101 - `hear` leaves out what does not
    return answer(session, artifact, entry, each.features)

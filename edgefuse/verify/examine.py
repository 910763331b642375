"""Run an artifact on speech and write down what was found; the gate judges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgefuse.bundle import Findings
from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.tokens import Tokens
from edgefuse.frontend.intake import intake_of
from edgefuse.recognize import answer, encoded, fit, fitting, taken
from edgefuse.verify.parity import agreeing_frames, kaldi_snr_db, worst_snr_db
from edgefuse.verify.wer import count_word_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.bundle import Bundle
    from edgefuse.recognize import Heard
    from edgefuse.target import Session
    from edgefuse.values import Artifact, Mode


def examine(session: Session, artifact: Artifact, mode: Mode, bundle: Bundle, heard: Sequence[Heard]) -> Findings:
    """Parity on the golden vectors, tokens and words on the test set, in one mode.

    A second pass hears of a golden vector what the reference's first pass gives; of the test set what the artifact's own gives.
    """
    reference, fits = bundle.references[mode.name], fit(heard, mode)
    given = {each.identity: _answer(session, artifact, mode, each) for each in fits}
    texts = {name: greedy_text(logits, Tokens(bundle.tokens)) for name, logits in given.items()}
    agreeing, frames = agreeing_frames(reference.alignments, given)
    goldens, samples = reference.goldens, any(intake_of(specs).hears_samples for specs in mode.inputs.values())
    return Findings(
        snr_db=worst_snr_db(session, artifact, mode, goldens, noise=False),
        padded_snr_db=worst_snr_db(session, artifact, mode, goldens, noise=True),
        agreeing_frames=agreeing,
        frames=frames,
        words={each.identity: count_word_errors([each.text], [texts[each.identity]]) for each in fits},
        features_snr_db=kaldi_snr_db(session, artifact, mode, goldens, bundle.frontend) if samples else None,
    )


def _answer(session: Session, artifact: Artifact, mode: Mode, each: Heard) -> NDArray[np.float32]:
    entry = mode.name if mode.streaming else fitting(mode.inputs, len(each.features))
    assert entry is not None, "only what fits is asked"  # noqa: S101 - `fit` leaves out what does not
    heard = encoded(session, artifact, each) if mode.after else taken(each, mode.inputs[entry])
    return answer(session, artifact, entry, heard)

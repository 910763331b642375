"""How far an artifact's logits are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.frontend.intake import FEATURES
from edgefuse.frontend.kaldi import kaldi_log_mel
from edgefuse.frontend.log_mel import normalize
from edgefuse.recognize import answers, holds, taken
from edgefuse.values import ENCODED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.bundle import Frontend, Golden
    from edgefuse.target import Session
    from edgefuse.values import Artifact, Mode, TensorSpec

IDENTICAL_DB, NONSENSE_DB = 300.0, -300.0  # no error at all; and NaN, infinity, or an answer where silence was due
LOUD = 10.0  # standard deviations of a feature, or times full scale: louder than any speech


def snr_db(reference: NDArray[np.float64], given: NDArray[np.floating]) -> float:
    """10 log10(sum r^2 / sum (r - g)^2), within -300 and 300."""
    if reference.shape != given.shape or not np.isfinite(given).all():
        return NONSENSE_DB
    with np.errstate(over="ignore"):
        noise = float(np.square(reference - given.astype(np.float64)).sum())
        power = float(np.square(reference).sum())
    if noise == 0.0:
        return IDENTICAL_DB
    if power == 0.0 or not math.isfinite(noise) or not math.isfinite(power):
        return NONSENSE_DB
    return min(IDENTICAL_DB, max(NONSENSE_DB, 10.0 * math.log10(power / noise)))


def worst_snr_db(session: Session, artifact: Artifact, mode: Mode, goldens: Iterable[Golden], *, noise: bool) -> float:
    """The smallest ratio over every golden vector and every entry that takes it; padded with zeros, or with loud noise."""
    worst = IDENTICAL_DB
    for golden, entry, specs in _held(mode, goldens):
        padding = _noise(specs[0].shape) if noise else None
        given = answers(session, artifact, entry, taken(golden, specs), padding)
        worst = min(worst, snr_db(golden.logits, given[artifact.outputs[entry][0].name]))
        if golden.encoded is not None and ENCODED in given:
            worst = min(worst, snr_db(golden.encoded.astype(np.float64), given[ENCODED]))
    return worst


def kaldi_snr_db(session: Session, artifact: Artifact, mode: Mode, goldens: Iterable[Golden], frontend: Frontend) -> float:
    """The same for the features that an artifact makes of samples, against those that kaldi-native-fbank makes of them."""
    mean, istd = torch.tensor(frontend.mean), torch.tensor(frontend.istd)
    worst = IDENTICAL_DB
    for golden, entry, _ in _held(mode, goldens):
        given = answers(session, artifact, entry, golden.samples)[FEATURES]
        wanted = normalize(kaldi_log_mel(torch.from_numpy(golden.samples), frontend.spec), mean, istd)[: len(given)]
        worst = min(worst, snr_db(wanted.double().numpy(), given))
    return worst


def agreeing_frames(reference: Mapping[str, Sequence[int]], given: Mapping[str, NDArray[np.floating]]) -> tuple[int, int]:
    """Frames whose best token is the reference's, and all frames; a NaN agrees with nothing."""
    agreeing = frames = 0
    for identity, best in reference.items():
        logits = given[identity]
        frames += len(best)
        finite = np.isfinite(logits).all(axis=-1)
        agreeing += int(((logits.argmax(axis=-1) == np.asarray(best)) & finite).sum())
    return agreeing, frames


def _held(mode: Mode, goldens: Iterable[Golden]) -> Iterator[tuple[Golden, str, tuple[TensorSpec, ...]]]:
    """Every golden vector with every entry that takes it."""
    for golden in goldens:
        for entry, specs in mode.inputs.items():
            if mode.streaming or holds(specs, len(golden.features)):
                yield golden, entry, specs


def _noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    draw = np.random.default_rng(0)
    return (draw.standard_normal(shape) * LOUD).astype(np.float32)

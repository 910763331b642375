"""An hour of speech through one session: whether it drifts, and whether it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from edgefuse.errors import UsageError
from edgefuse.frontend.intake import intake_of, of_samples
from edgefuse.recognize import Stream, features_of, streaming_entry
from edgefuse.values import Check
from edgefuse.verify.parity import snr_db
from edgefuse.verify.reference import context_of, logits_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.bundle import Frontend
    from edgefuse.model import Encoder
    from edgefuse.recognize import Heard
    from edgefuse.target import Session
    from edgefuse.values import Artifact, Mode, Precision

MINUTE_MS = 60_000
GROWTH_PERCENT = 2.0  # of the resident memory of the process, after the first minute
DRIFT_DB, COARSE_DRIFT_DB = 1.0, 3.0  # of the last minute's SNR against the first minute's: in fp32, and with fewer bits


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a long utterance did to a session.

    Attributes:
        minutes: how long it was.
        first_snr_db: logits of the first minute against the float64 folded model.
        last_snr_db: the same of the last minute.
        first_bytes: resident memory of the process after the first minute.
        most_bytes: the most that it was at the end of any later minute.
        not_finite: frames with a NaN or an infinity.
    """

    minutes: int
    first_snr_db: float
    last_snr_db: float
    first_bytes: int
    most_bytes: int
    not_finite: int

    @property
    def growth_percent(self) -> float:
        """How far the memory rose above the first minute's."""
        return 100.0 * (self.most_bytes / self.first_bytes - 1)

    def checks(self, precision: Precision) -> tuple[Check, ...]:
        """What was found, held against the bars."""
        drift, most = self.first_snr_db - self.last_snr_db, DRIFT_DB if precision == "fp32" else COARSE_DRIFT_DB
        endured, small = drift <= most, self.growth_percent <= GROWTH_PERCENT
        return (
            Check("values that are not finite", str(self.not_finite), "0", self.not_finite == 0),
            Check("SNR, first minute", f"{self.first_snr_db:.1f} dB", "reported only", passed=True),
            Check("SNR, last minute", f"{self.last_snr_db:.1f} dB", f"at most {most:g} dB less", endured),
            Check("memory", f"{self.growth_percent:+.2f} %", f"<= +{GROWTH_PERCENT:g} %", small),
        )


def soak(
    session: Session, artifact: Artifact, exact: Encoder, frontend: Frontend, heard: Sequence[Heard], minutes: int
) -> Soaked:
    """Feed the test set, over and over, to the streaming entry of an artifact as one utterance.

    `exact` is the folded model in float64. Its answer to the last minute needs no more of the past than can reach that minute:
    per block the left context, and the taps of the convolution.

    Raises:
        UsageError: the artifact does not stream, or less than two minutes.
    """
    entry = streaming_entry(artifact)
    mode = next(mode for mode in artifact.modes if mode.name == entry)
    if minutes < 2:  # noqa: PLR2004 - a first and a last
        raise UsageError(f"{minutes} minutes have no first and last.", hint="For example: --minutes 60")
    speech = _Endless(frontend, np.concatenate([each.samples for each in heard]), exact.config.frame_ms)
    memory, not_finite = [], 0
    answers = _minutes(session, artifact, mode, speech, minutes)
    first = last = next(answers)
    for last in chain((first,), answers):
        memory.append(psutil.Process().memory_info().rss)
        not_finite += int((~np.isfinite(last)).any(axis=-1).sum())
    return Soaked(
        minutes,
        first_snr_db=snr_db(_exactly(exact, mode, speech, 0, len(first)), first),
        last_snr_db=snr_db(_exactly(exact, mode, speech, (minutes - 1) * len(last), len(last)), last),
        first_bytes=memory[0],
        most_bytes=max(memory[1:]),
        not_finite=not_finite,
    )


@dataclass(frozen=True, slots=True)
class _Endless:
    """Speech that begins again whenever it ends, by encoder frames."""

    frontend: Frontend
    spoken: NDArray[np.float32]
    frame_ms: int

    def samples(self, start: int, frames: int) -> NDArray[np.float32]:
        """What so many frames are made of, those included that the frame behind them needs as well."""
        intake = of_samples(self.frame_ms)
        first = intake.per_frame * start
        return self.spoken.take(range(first, first + intake.count(frames)), mode="wrap")

    def features(self, start: int, frames: int) -> NDArray[np.float32]:
        """What a front end makes of them."""
        return features_of(torch.from_numpy(self.samples(start, frames)).double(), self.frontend)


def _minutes(session: Session, artifact: Artifact, mode: Mode, speech: _Endless, minutes: int) -> Iterator[NDArray[np.float32]]:
    """The logits of one minute of whole chunks after another."""
    stream = Stream(session, artifact, mode.name)
    per_minute = MINUTE_MS // speech.frame_ms // stream.frames
    heard = speech.samples if intake_of(artifact.inputs[mode.name]).hears_samples else speech.features
    for minute in range(minutes):
        starts = range(minute * per_minute * stream.frames, (minute + 1) * per_minute * stream.frames, stream.frames)
        yield np.concatenate([stream.accept(heard(start, stream.window)[stream.has :]) for start in starts])


def _exactly(exact: Encoder, mode: Mode, speech: _Endless, start: int, frames: int) -> NDArray[np.float64]:
    """The model's answer to so many frames of the long utterance, from `start` on."""
    assert mode.streaming is not None, "only what streams is soaked"  # noqa: S101 - `soak` asked for it
    chunk, left = mode.streaming.chunk, mode.streaming.left
    blocks = exact.config.blocks
    reach = sum(left + -(-block.kernel // (block.frames // block.stride)) for block in blocks) + chunk
    endless = any(block.attention == "performer" for block in blocks)  # a sum over all that was said
    before = start if endless else min(start, -(-reach // chunk) * chunk)
    heard = speech.features(start - before, before + frames + mode.streaming.ahead)
    return logits_of(exact, heard, context_of(mode))[before : before + frames]

"""Live speech to text: samples as they come in, the text as it forms.

loaded = load(Path("BUNDLE/model.tflite"))      # once; any number of recognizers may share it
recognizer = Recognizer(loaded)                 # one per speaker
for pcm in microphone:
    print(recognizer.accept(pcm))               # what has been said so far
print(recognizer.finish())                      # the last, partial chunk included
recognizer.reset()                              # the next utterance, without a trace of this one
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.decode.tokens import BLANK_ID, Tokens
from edgefuse.errors import AudioError, AudioNotFinite, UsageError
from edgefuse.frontend.intake import SAMPLES, intake_of
from edgefuse.model.config import SUBSAMPLING
from edgefuse.recognize import Stream, features_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.bundle import Bundle
    from edgefuse.target import Session
    from edgefuse.values import Artifact

FULL_SCALE = 32_768.0  # of 16-bit samples


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact that is ready to answer, and the bundle that describes it."""

    bundle: Bundle
    artifact: Artifact
    session: Session


@dataclass(frozen=True, slots=True)
class Streamed:
    """What was heard in a recording that was fed chunk by chunk.

    Attributes:
        path: the recording.
        seconds: how long it is.
        text: what was said.
        latency_ns: computing time of each chunk, features included.
    """

    path: Path
    seconds: float
    text: str
    latency_ns: tuple[int, ...]

    @property
    def real_time_factor(self) -> float:
        """Computing time divided by the time that the speech takes."""
        return sum(self.latency_ns) / 1e9 / self.seconds

    def latency_ms(self, percent: float) -> float:
        """A percentile of the chunks' latencies."""
        return float(np.percentile(self.latency_ns, percent)) / 1e6


class Recognizer:
    """One speaker's utterance at a time, through the streaming entry of an artifact. Not for two threads at once."""

    def __init__(self, loaded: Loaded) -> None:
        """Begin the first utterance.

        Raises:
            UsageError: the artifact takes whole utterances only.
        """
        self._loaded = loaded
        self._entry = next(iter(loaded.artifact.streaming), "")
        if not self._entry:
            raise UsageError(
                f"{loaded.artifact.path} takes whole utterances only.",
                hint="Export one that streams with: --chunk-ms 640",
            )
        self._tokens = Tokens(loaded.bundle.tokens)
        self._hears_samples = intake_of(loaded.artifact.inputs[self._entry]) is SAMPLES
        self.reset()

    def reset(self) -> None:
        """Begin a new utterance."""
        self._stream = Stream(self._loaded.session, self._loaded.artifact, self._entry)
        self._samples = np.zeros(0, np.float32)  # of frames that are not whole yet
        mel_bins = self._loaded.bundle.frontend.spec.mel_bins
        self._heard = np.zeros(0 if self._hears_samples else (0, mel_bins), np.float32)  # of a chunk that is not
        self._ids: list[int] = []
        self._last = BLANK_ID
        self._finished = False
        self.latency_ns: list[int] = []

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self._tokens.decode(self._ids)

    @property
    def chunk_samples(self) -> int:
        """How many samples fill a chunk; pieces of any other size are taken as well."""
        return self._stream.frames * SUBSAMPLING * self._loaded.bundle.frontend.spec.hop_samples

    def accept(self, pcm: NDArray[np.float32] | NDArray[np.int16]) -> str:
        """Hear some more: (N,) samples at 16 kHz, float32 in [-1, 1] or int16. Returns the text so far.

        Raises:
            AudioError: the samples are not such; the utterance is as it was before.
            UsageError: the utterance is finished.
        """
        samples = _checked(pcm)
        self._require_unfinished()
        began = time.perf_counter_ns()
        self._hear(samples)
        while len(self._heard) >= (takes := self._stream.takes):
            self._answer(self._heard[:takes])
            self._heard = self._heard[takes:]
            self.latency_ns.append(time.perf_counter_ns() - began)
            began = time.perf_counter_ns()
        return self.text

    def finish(self) -> str:
        """Hear what is left of the last chunk, and return the whole text.

        Raises:
            UsageError: the utterance is finished already.
        """
        self._require_unfinished()
        self._finished = True
        if self._stream.frames_in(len(self._heard)):
            began = time.perf_counter_ns()
            self._answer(self._heard)
            self.latency_ns.append(time.perf_counter_ns() - began)
        return self.text

    def _require_unfinished(self) -> None:
        if self._finished:
            raise UsageError("This utterance is finished.", hint="Begin the next one with: recognizer.reset()")

    def _hear(self, samples: NDArray[np.float32]) -> None:
        """Add the samples to what the entry hears next, or else the features of every frame that is whole by now."""
        if self._hears_samples:
            self._heard = np.concatenate((self._heard, samples))
            return
        spec = self._loaded.bundle.frontend.spec
        self._samples = np.concatenate((self._samples, samples))
        frames = spec.frames(len(self._samples))
        if frames:
            features = features_of(torch.from_numpy(self._samples), self._loaded.bundle.frontend)
            self._heard = np.concatenate((self._heard, features))
            self._samples = self._samples[frames * spec.hop_samples :]

    def _answer(self, heard: NDArray[np.float32]) -> None:
        """Greedy search goes on from chunk to chunk: a token that the last frame had already is the same one."""
        for best in self._stream.accept(heard).argmax(axis=-1).tolist():
            if best not in (self._last, BLANK_ID):
                self._ids.append(best)
            self._last = best


def _checked(pcm: NDArray[np.float32] | NDArray[np.int16]) -> NDArray[np.float32]:
    samples = np.asarray(pcm)
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.int16):
        raise AudioError(
            f"The samples are {samples.dtype} of shape {samples.shape}, not a row of float32 or int16.",
            hint="Pass one channel at 16 kHz, as numpy.float32 in [-1, 1] or numpy.int16.",
        )
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(FULL_SCALE)
    if not np.isfinite(samples).all():
        raise AudioNotFinite("The samples have values that are NaN or infinite.", hint="Look for a division by zero.")
    return samples.astype(np.float32, copy=False)

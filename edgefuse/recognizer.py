"""Live speech to text: samples as they come in, the text as it forms.

loaded = load(Path("BUNDLE/model.tflite"))      # once; any number of recognizers may share it
recognizer = Recognizer(loaded)                 # one per speaker
for pcm in microphone:
    print(recognizer.accept(pcm))               # what has been said so far
print(recognizer.finish())                      # the last, partial chunk included
print(recognizer.said)                          # every utterance, its words with their times
recognizer.reset()                              # the next speaker, without a trace of this one

Recognizer(loaded, Decoding(beam=8, hotwords={"kitchen": 0.5}), Endpointing(silence_ms=800))   # or so
Recognizer(loaded, second_pass=True)            # of a cascade: when an utterance is over, the second pass writes its text anew
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.checked import Checked
from edgefuse.decode.endpoint import Endpointing
from edgefuse.decode.search import GREEDILY, Decoding, begin
from edgefuse.decode.spelling import Said, Word, text_of, words_of
from edgefuse.decode.tokens import BLANK_ID, Tokens
from edgefuse.errors import AudioError, AudioNotFinite, UsageError
from edgefuse.frontend.intake import intake_of
from edgefuse.recognize import Stream, Transcript, capacity, features_of, heard_again, second_passes, streaming_entry
from edgefuse.target import find
from edgefuse.values import ENCODED

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

    def session_of(self, entry: str) -> Session:
        """The session for one more utterance at the same time: a new one if the artifact holds an utterance's caches itself."""
        how = self.artifact.streaming.get(entry)
        return Checked(find(self.artifact.target).open(self.artifact), self.artifact) if how and how.held else self.session


@dataclass(frozen=True, slots=True)
class Streamed(Transcript):
    """What was heard in a recording that was fed chunk by chunk.

    Attributes:
        latency_ns: computing time of each chunk, features and search included.
    """

    latency_ns: tuple[int, ...]

    @property
    def real_time_factor(self) -> float:
        """Computing time divided by the time that the speech takes."""
        return sum(self.latency_ns) / 1e9 / self.seconds

    def latency_ms(self, percent: float) -> float:
        """A percentile of the chunks' latencies."""
        return float(np.percentile(self.latency_ns, percent)) / 1e6


class Recognizer:
    """One speaker, through the streaming entry of an artifact. Not for two threads at once.

    Without `endpointing` all that is heard is one utterance. With it, one utterance follows another: `accept` returns the text
    of the one that is being said, and `said` has those that are over. The next begins with the very frame after the last.

    With `second_pass` an utterance that is over is heard once more by the second pass of a cascade, from what the first one gave:
    the same search goes over its logits, and what it finds are the words. An utterance longer than the entries of the second
    pass keeps the first pass's words, and `Said.second_pass` says so.
    """

    def __init__(
        self,
        loaded: Loaded,
        decoding: Decoding = GREEDILY,
        endpointing: Endpointing | None = None,
        *,
        second_pass: bool = False,
    ) -> None:
        """Begin the first utterance.

        Raises:
            UsageError: the artifact takes whole utterances only, or has no second pass and is asked for one.
            BadHotwords: the model cannot write one of them.
        """
        self._loaded = loaded
        self._entry = streaming_entry(loaded.artifact)
        self._second_pass = second_pass
        self._most = max(map(capacity, second_passes(loaded.artifact).values())) if second_pass else 0  # encoder frames
        self._session = loaded.session_of(self._entry)
        self._tokens = Tokens(loaded.bundle.tokens)
        self._silent = begin(decoding, self._tokens)
        self._endpointing = endpointing
        self._intake = intake_of(loaded.artifact.inputs[self._entry])
        self.reset()

    def reset(self) -> None:
        """Forget all that was heard."""
        mel_bins = self._loaded.bundle.frontend.spec.mel_bins
        self._samples = np.zeros(0, np.float32)  # of features that are not whole yet
        self._heard = np.zeros(0 if self._intake.hears_samples else (0, mel_bins), np.float32)  # from the next encoder frame on
        self._said: list[Said] = []
        self._finished = False
        self.latency_ns: list[int] = []
        self._begin(first_frame=0)

    def _begin(self, first_frame: int) -> None:
        """Begin an utterance at a frame of the recording; what is not yet answered is the beginning of it."""
        self._stream = Stream(self._session, self._loaded.artifact, self._entry)
        self._search = self._silent
        self._first_frame = first_frame
        self._frames = self._blanks = 0
        self._encoded: list[NDArray[np.float32]] = []  # for the second pass; none of an utterance that is too long for it

    @property
    def words(self) -> tuple[Word, ...]:
        """What has been said so far in this utterance; times count from the beginning of the recording."""
        return words_of(self._search.best, self._tokens, self._first_frame, self._intake.frame_ms)

    @property
    def text(self) -> str:
        """What has been said so far in this utterance; greedy search only adds to it, a beam may change its mind."""
        return text_of(self.words)

    @property
    def said(self) -> tuple[Said, ...]:
        """The utterances that are over, those without a word left out."""
        return tuple(self._said)

    @property
    def chunk_samples(self) -> int:
        """How many samples fill a chunk; pieces of any other size are taken as well. What is ahead of it is not counted."""
        return self._stream.frames * self._loaded.bundle.config.reduction * self._loaded.bundle.frontend.spec.hop_samples

    def accept(self, pcm: NDArray[np.float32] | NDArray[np.int16]) -> str:
        """Hear some more: (N,) samples at 16 kHz, float32 in [-1, 1] or int16. Returns the text of the utterance so far.

        Raises:
            AudioError: the samples are not such; the utterance is as it was before.
            UsageError: the recording is finished.
        """
        samples = _checked(pcm)
        self._require_unfinished()
        began = time.perf_counter_ns()
        self._hear(samples)
        window = self._intake.count(self._stream.window)
        while len(self._heard) >= window:
            self._answer(window)
            self.latency_ns.append(time.perf_counter_ns() - began)
            began = time.perf_counter_ns()
        return self.text

    def finish(self) -> str:
        """Hear what is left of the last chunk, end the utterance, and return its text.

        Raises:
            UsageError: the recording is finished already.
        """
        self._require_unfinished()
        self._finished = True
        while frames := self._intake.frames(len(self._heard)):
            began = time.perf_counter_ns()
            self._answer(self._intake.count(frames))
            self.latency_ns.append(time.perf_counter_ns() - began)
        began = time.perf_counter_ns()
        self._keep()
        if self._second_pass and self.latency_ns:
            self.latency_ns[-1] += time.perf_counter_ns() - began  # as at every other end, the last chunk waits for it
        return self.text

    def _require_unfinished(self) -> None:
        if self._finished:
            raise UsageError("This recording is finished.", hint="Begin the next one with: recognizer.reset()")

    def _hear(self, samples: NDArray[np.float32]) -> None:
        """Add the samples to what the entry hears next, or else the features of every frame that is whole by now."""
        if self._intake.hears_samples:
            self._heard = np.concatenate((self._heard, samples))
            return
        spec = self._loaded.bundle.frontend.spec
        self._samples = np.concatenate((self._samples, samples))
        frames = spec.frames(len(self._samples))
        if frames:
            features = features_of(torch.from_numpy(self._samples), self._loaded.bundle.frontend)
            self._heard = np.concatenate((self._heard, features))
            self._samples = self._samples[frames * spec.hop_samples :]

    def _answer(self, count: int) -> None:
        """Hear so many features or samples, or those before the end of the utterance: it ends where it ends, not with a chunk."""
        given = self._stream.run(self._heard[self._stream.has : count])
        logits = given[self._loaded.artifact.outputs[self._entry][0].name]
        over = self._count(logits.argmax(axis=-1).tolist())
        taken = len(logits) if over is None else over
        if self._second_pass:
            self._encoded = [*self._encoded, given[ENCODED][:taken]] if self._frames <= self._most else []
        self._search = self._search.accept(logits[:taken])
        self._heard = self._heard[taken * self._intake.per_frame :]
        if over is not None:
            self._keep()
            self._begin(self._first_frame + self._frames)

    def _count(self, path: Sequence[int]) -> int | None:
        """Count frames, and the blank ones at the end; with how many more the utterance is over, if it is."""
        for taken, best in enumerate(path, start=1):
            self._frames += 1
            self._blanks = self._blanks + 1 if best == BLANK_ID else 0
            if self._endpointing and self._endpointing.over(self._frames, self._blanks, self._intake.frame_ms):
                return taken
        return None

    def _keep(self) -> None:
        """End the utterance, with the second pass if it is wanted and can."""
        again = heard_again(self._session, self._loaded.artifact, np.concatenate(self._encoded)) if self._encoded else None
        if again is not None:
            self._search = self._silent.accept(again)
        if words := self.words:
            self._said.append(Said(words, again is not None))


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

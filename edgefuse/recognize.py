"""From a recording to text, through any artifact: features, the shortest entry that fits, logits, the best tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgefuse.bundle import Bundle, Frontend, Golden
from edgefuse.decode.search import Decoding, begin
from edgefuse.decode.spelling import Said, Word, text_of, words_of
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import AudioTooLong, UsageError
from edgefuse.frontend.audio import read_audio
from edgefuse.frontend.intake import OVERLAP, intake_of
from edgefuse.frontend.log_mel import KALDI_80, log_mel, normalize
from edgefuse.model.config import FEATURE_HOP_MS
from edgefuse.speech import TestSet
from edgefuse.values import ENCODED, OFFLINE, SECOND_PASS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.target import Session
    from edgefuse.values import Artifact, Checkpoint, Mode, TensorSpec

Inputs = Mapping[str, "tuple[TensorSpec, ...]"]  # per entry, as an `Artifact` has them
FRAME_SECONDS = 0.01  # one feature frame


@dataclass(frozen=True, slots=True)
class Heard:
    """An utterance: samples (N,) in [-1, 1], and features (T, mel_bins) as the encoder gets them, normalized; float32.

    `part` is the part of the test set that it belongs to.
    """

    identity: str
    text: str
    samples: NDArray[np.float32]
    features: NDArray[np.float32]
    part: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """What an artifact heard in a recording.

    Attributes:
        path: the recording.
        seconds: how long it is.
        said: its utterances that have words; one at most, unless pauses end them.
    """

    path: Path
    seconds: float
    said: tuple[Said, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """Of all utterances."""
        return tuple(word for said in self.said for word in said.words)

    @property
    def text(self) -> str:
        """Of all utterances."""
        return text_of(self.words)


def frontend_of(checkpoint: Checkpoint) -> Frontend:
    """What a device must do before the encoder, in float32."""
    spec = dataclasses.replace(KALDI_80, mel_bins=checkpoint.config.mel_bins)
    mean, istd = checkpoint.frontend_mean.float().tolist(), checkpoint.frontend_istd.float().tolist()
    return Frontend(spec, tuple(mean), tuple(istd))


def features_of(samples: Tensor, frontend: Frontend) -> NDArray[np.float32]:
    """Normalized features (T, mel_bins) of samples (N,), computed in the precision of the samples."""
    mean, istd = (torch.tensor(each, dtype=samples.dtype) for each in (frontend.mean, frontend.istd))
    return np.asarray(normalize(log_mel(samples, frontend.spec), mean, istd).float().numpy())


def heard_in(path: Path, frontend: Frontend, identity: str = "", text: str = "") -> Heard:
    """A recording; its features are computed in float64. An `AudioError` says what is wrong with it."""
    samples = read_audio(path)
    return Heard(identity, text, samples.numpy(), features_of(samples.double(), frontend))


def hear(speech: TestSet, frontend: Frontend) -> tuple[Heard, ...]:
    """Every utterance of a test set."""
    return tuple(dataclasses.replace(heard_in(u.path, frontend, u.identity, u.text), part=u.subset) for u in speech.utterances)


def taken(utterance: Heard | Golden, specs: Sequence[TensorSpec]) -> NDArray[np.float32]:
    """What an entry hears of an utterance: its samples (N,), its features (T, mel_bins), or of a golden vector its `encoded`."""
    intake = intake_of(specs)
    if intake.hears_encoded:
        assert isinstance(utterance, Golden)  # noqa: S101 - of other speech a first pass gives it
        assert utterance.encoded is not None  # noqa: S101 - `refer` put it there
        return utterance.encoded
    return utterance.samples if intake.hears_samples else utterance.features


def fit(heard: Sequence[Heard], mode: Mode) -> tuple[Heard, ...]:
    """The utterances that a mode takes: one that streams takes any, the others what their longest entry holds."""
    return tuple(each for each in heard if mode.streaming or fitting(mode.inputs, len(each.features)))


def feature_frames(specs: Sequence[TensorSpec]) -> int:
    """How many feature frames fill an entry: with one encoder frame more it would be too small."""
    return capacity(specs) * intake_of(specs).frame_ms // FEATURE_HOP_MS


def holds(specs: Sequence[TensorSpec], features: int) -> bool:
    """Whether an entry takes an utterance of so many feature frames at once; those that fill no encoder frame do not count."""
    reduction = intake_of(specs).frame_ms // FEATURE_HOP_MS
    return features // reduction <= capacity(specs)


def capacity(specs: Sequence[TensorSpec]) -> int:
    """How many encoder frames an entry takes."""
    return specs[0].shape[1] // intake_of(specs).per_frame


def fitting(inputs: Inputs, features: int) -> str | None:
    """The shortest entry that takes so many feature frames; None when there is none."""
    fits = [(capacity(specs), name) for name, specs in inputs.items() if holds(specs, features)]
    return min(fits)[1] if fits else None


def answer(
    session: Session, artifact: Artifact, entry: str, heard: NDArray[np.float32], padding: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Logits (T, vocabulary_size) of what an entry hears of an utterance; what stands behind its end is `padding`, or zeros."""
    return answers(session, artifact, entry, heard, padding)[artifact.outputs[entry][0].name]


def encoded(session: Session, artifact: Artifact, heard: Heard) -> NDArray[np.float32]:
    """What the first pass of a cascade makes of an utterance, (T, d), in the chunks of the first entry that streams."""
    entry = streaming_entry(artifact)
    return answers(session, artifact, entry, taken(heard, artifact.inputs[entry]))[ENCODED]


def answers(
    session: Session, artifact: Artifact, entry: str, heard: NDArray[np.float32], padding: NDArray[np.float32] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Everything that an entry says of an utterance, by the names of its outputs, its caches left out."""
    stream = Stream(session, artifact, entry)
    pieces = [stream.run(piece, padding) for piece in stream.pieces(heard)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


class Stream:
    """An utterance on its way through an entry: piece by piece if the entry streams, at one go if it does not."""

    def __init__(self, session: Session, artifact: Artifact, entry: str) -> None:
        """Begin an utterance; sessions are shared, streams are not."""
        self._session, self._entry = session, entry
        streaming = artifact.streaming.get(entry)
        self._heard, self._length, *states = artifact.inputs[entry]
        self._intake = intake_of(artifact.inputs[entry])
        self._renewed = streaming.states if streaming else {}
        self._answers = [spec for spec in artifact.outputs[entry] if spec.name not in self._renewed.values()]
        self._states = {spec.name: np.zeros(spec.shape, np.float32) for spec in states}
        self._lead = self._intake.lead  # what an utterance has before its first encoder frame, until that has come
        self._most = self.window = capacity(artifact.inputs[entry])  # encoder frames of the next piece, and of any
        self.frames = streaming.chunk if streaming else self.window

    @property
    def takes(self) -> int:
        """How many features, or samples, fill the next piece; the first may be longer than the others."""
        return self._lead + self.window * self._intake.per_frame

    @property
    def has(self) -> int:
        """How many of the samples of the next encoder frame it has in a cache already."""
        return self._intake.lead - self._lead

    def pieces(self, heard: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """A whole utterance cut for `run`, each piece with what is ahead of it; the last ones may be short, or empty."""
        hop, ahead = (frames * self._intake.per_frame for frames in (self.frames, self.window - self.frames))
        ends = [0, *range(self._lead + hop, len(heard), hop), len(heard)]
        return [heard[start : end + ahead] for start, end in itertools.pairwise(ends)]

    def accept(self, heard: NDArray[np.float32], padding: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits (T, vocabulary_size) of the next features (T', mel_bins) or samples (N,); fewer than it `takes` end it.

        What is ahead of the chunk comes again with the next one, to the end of the utterance too.

        Raises:
            UsageError: more than the entry takes at once, or something behind the end; the utterance is as it was.
        """
        return self.run(heard, padding)[self._answers[0].name]

    def run(self, heard: NDArray[np.float32], padding: NDArray[np.float32] | None = None) -> dict[str, NDArray[np.float32]]:
        """The same with every output, by name: (T, ...) of logits, (reduction T, ...) of features."""
        frames = max(0, len(heard) - self._lead) // self._intake.per_frame
        if heard.shape[1:] != self._heard.shape[2:] or len(heard) > self.takes:
            most = (self.takes, *self._heard.shape[2:])
            raise UsageError(f"{self._entry} takes {self._heard.name} up to {most}, not {heard.shape}.")
        if frames == 0:
            return {spec.name: np.zeros((0, *spec.shape[2:]), np.float32) for spec in self._answers}
        if frames > self._most:
            raise UsageError("The utterance has ended: its last chunk was not full.", hint="Begin the next one.")
        states, piece = self._begun(heard)
        given = np.zeros(self._heard.shape, np.float32) if padding is None else padding.reshape(self._heard.shape).copy()
        given[0, : len(piece)] = piece
        length = np.full(self._length.shape, len(piece) // self._intake.per_length, np.float32)
        outputs = self._session.run(self._entry, {self._heard.name: given, self._length.name: length, **states})
        self._lead = 0 if OVERLAP in states else self._lead
        self._most = self.window if frames == self.window else max(0, frames - self.frames)
        frames = min(frames, self.frames)
        self._states = {name: np.array(outputs[renewed]) for name, renewed in self._renewed.items()}
        return {spec.name: np.array(outputs[spec.name])[0, : frames * (spec.shape[1] // self.frames)] for spec in self._answers}

    def _begun(self, heard: NDArray[np.float32]) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
        """The caches and the piece: where there is an `overlap`, an utterance begins with its first samples there."""
        if self._lead == 0 or OVERLAP not in self._states:
            return self._states, heard
        return {**self._states, OVERLAP: heard[None, : self._lead]}, heard[self._lead :]


def transcribe(session: Session, bundle: Bundle, artifact: Artifact, recording: Path, decoding: Decoding) -> Transcript:
    """The text of a recording.

    Raises:
        AudioError: the recording is not what the model hears, or (`AudioTooLong`) longer than the artifact takes.
        BadHotwords: the model cannot write one of them.
    """
    tokens = Tokens(bundle.tokens)
    search = begin(decoding, tokens)
    heard = heard_in(recording, bundle.frontend)
    seconds = len(heard.samples) / bundle.frontend.spec.sample_rate_hz
    entry = entry_for(artifact, recording, len(heard.features), seconds)
    logits = answer(session, artifact, entry, taken(heard, artifact.inputs[entry]))
    words = words_of(search.accept(logits).best, tokens, frame_ms=bundle.config.frame_ms)
    return Transcript(recording, seconds, (Said(words),) if words else ())


def entry_for(artifact: Artifact, recording: Path, features: int, seconds: float) -> str:
    """The shortest entry that takes a recording of so many feature frames at once, or else one that streams."""
    offline: Inputs = next((mode.inputs for mode in artifact.modes if mode.name == OFFLINE), {})
    entry = fitting(offline, features) or next(iter(artifact.streaming), None)
    if entry is None:
        most = max(feature_frames(specs) for specs in artifact.inputs.values()) * FRAME_SECONDS
        raise AudioTooLong(
            f"{recording} lasts {seconds:.2f} s; {artifact.path.name} takes {most:.2f} s.",
            hint=f"Export it with: --seconds {np.ceil(seconds):.0f}  (or cut the recording).",
        )
    return entry


def second_passes(artifact: Artifact) -> Inputs:
    """The entries that are the second pass of a cascade; a `UsageError` if there is none."""
    found = next((mode.inputs for mode in artifact.modes if mode.name == SECOND_PASS), None)
    if found is None:
        raise UsageError(
            f"{artifact.path} has no second pass behind a stream.",
            hint="Export a cascade (a model whose config says second_pass) with both: --chunk-ms 640 --seconds 5.12",
        )
    return found


def heard_again(session: Session, artifact: Artifact, encoded: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Logits (T, vocabulary_size) of a cascade's second pass over all that the first one gave, (T, d); None if it takes less."""
    fits = [(capacity(specs), name) for name, specs in second_passes(artifact).items() if capacity(specs) >= len(encoded)]
    return answer(session, artifact, min(fits)[1], encoded) if fits else None


def streaming_entry(artifact: Artifact) -> str:
    """The entry that streams; a `UsageError` if there is none."""
    entry = next(iter(artifact.streaming), None)
    if entry is None:
        raise UsageError(f"{artifact.path} takes whole utterances only.", hint="Export one that streams with: --chunk-ms 640")
    return entry

"""From a recording to text, through any artifact: features, the shortest entry that fits, logits, the best tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.bundle import Bundle, Frontend
from edgefuse.decode.search import Decoding, begin
from edgefuse.decode.spelling import Said, Word, text_of, words_of
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import AudioTooLong, UsageError
from edgefuse.frontend.audio import read_audio
from edgefuse.frontend.log_mel import KALDI_80, log_mel, normalize
from edgefuse.model.config import SUBSAMPLING
from edgefuse.speech import TestSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.target import Session
    from edgefuse.values import Artifact, Checkpoint, Mode, TensorSpec

Inputs = Mapping[str, "tuple[TensorSpec, ...]"]  # per entry, as an `Artifact` has them
FRAME_SECONDS = 0.01  # one feature frame


@dataclass(frozen=True, slots=True)
class Heard:
    """An utterance as the encoder gets it: features (T, mel_bins), float32, normalized."""

    identity: str
    text: str
    features: NDArray[np.float32]


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


def features_of(path: Path, frontend: Frontend) -> tuple[NDArray[np.float32], float]:
    """Normalized features (T, mel_bins) of a recording, and its seconds; an `AudioError` says what is wrong with it."""
    samples = read_audio(path)
    mean, istd = torch.tensor(frontend.mean), torch.tensor(frontend.istd)
    features = normalize(log_mel(samples, frontend.spec), mean, istd)
    return features.numpy(), samples.numel() / frontend.spec.sample_rate_hz


def hear(speech: TestSet, frontend: Frontend) -> tuple[Heard, ...]:
    """Every utterance of a test set."""
    return tuple(Heard(u.identity, u.text, features_of(u.path, frontend)[0]) for u in speech.utterances)


def fit(heard: Sequence[Heard], mode: Mode) -> tuple[Heard, ...]:
    """The utterances that a mode takes: one that streams takes any, the others what their longest entry holds."""
    return tuple(each for each in heard if mode.streaming or encoder_frames(each.features) <= longest(mode.inputs))


def encoder_frames(features: NDArray[np.float32]) -> int:
    """How many frames of 40 ms the encoder makes of features (T, mel_bins)."""
    return len(features) // SUBSAMPLING


def capacity(specs: Sequence[TensorSpec]) -> int:
    """How many encoder frames an entry takes."""
    return specs[0].shape[1] // SUBSAMPLING


def longest(inputs: Inputs) -> int:
    """Encoder frames of the longest entry."""
    return max(capacity(specs) for specs in inputs.values())


def fitting(inputs: Inputs, frames: int) -> str | None:
    """The shortest entry that takes so many encoder frames; None when there is none."""
    fits = [(capacity(specs), name) for name, specs in inputs.items() if capacity(specs) >= frames]
    return min(fits)[1] if fits else None


def answer(
    session: Session, artifact: Artifact, entry: str, features: NDArray[np.float32], padding: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Logits (T // 4, vocabulary_size) of features (T, mel_bins); what stands behind their end is `padding`, or zeros."""
    stream = Stream(session, artifact, entry)
    hop = stream.frames * SUBSAMPLING
    whole = encoder_frames(features) * SUBSAMPLING
    return np.concatenate([stream.accept(features[start : min(start + hop, whole)], padding) for start in range(0, whole, hop)])


class Stream:
    """An utterance on its way through an entry: piece by piece if the entry streams, at one go if it does not."""

    def __init__(self, session: Session, artifact: Artifact, entry: str) -> None:
        """Begin an utterance; sessions are shared, streams are not."""
        self._session, self._entry = session, entry
        streaming = artifact.streaming.get(entry)
        self._features, self._length, *states = artifact.inputs[entry]
        self._logits = artifact.outputs[entry][0].name
        self._renewed = streaming.states if streaming else {}
        self._states = {spec.name: np.zeros(spec.shape, np.float32) for spec in states}
        self._ended = False
        self.frames = capacity(artifact.inputs[entry])

    def accept(self, features: NDArray[np.float32], padding: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits (T // 4, vocabulary_size) of the next features (T, mel_bins); fewer than `frames` end the utterance.

        Raises:
            UsageError: more features than the entry takes at once, or features behind the end; the utterance is as it was.
        """
        frames = encoder_frames(features)
        if features.shape[1:] != self._features.shape[2:] or len(features) > self._features.shape[1]:
            raise UsageError(f"{self._entry} takes features up to {self._features.shape[1:]}, not {features.shape}.")
        if self._ended:
            raise UsageError("The utterance has ended: its last chunk was not full.", hint="Begin the next one.")
        padded = np.zeros(self._features.shape, np.float32) if padding is None else padding.reshape(self._features.shape).copy()
        padded[0, : len(features)] = features
        length = np.full(self._length.shape, frames, np.float32)
        given = {self._features.name: padded, self._length.name: length, **self._states}
        outputs = self._session.run(self._entry, given)
        self._ended = frames < self.frames
        self._states = {name: np.array(outputs[renewed]) for name, renewed in self._renewed.items()}
        return np.array(outputs[self._logits])[0, :frames]


def transcribe(session: Session, bundle: Bundle, artifact: Artifact, recording: Path, decoding: Decoding) -> Transcript:
    """The text of a recording.

    Raises:
        AudioError: the recording is not what the model hears, or (`AudioTooLong`) longer than the artifact takes.
        BadHotwords: the model cannot write one of them.
    """
    tokens = Tokens(bundle.tokens)
    search = begin(decoding, tokens)
    features, seconds = features_of(recording, bundle.frontend)
    entry = entry_for(artifact, recording, encoder_frames(features), seconds)
    words = words_of(search.accept(answer(session, artifact, entry, features)).best, tokens)
    return Transcript(recording, seconds, (Said(words),) if words else ())


def entry_for(artifact: Artifact, recording: Path, frames: int, seconds: float) -> str:
    """The shortest entry that takes a recording of so many encoder frames at once, or else one that streams."""
    offline = {name: specs for name, specs in artifact.inputs.items() if name not in artifact.streaming}
    entry = fitting(offline, frames) or next(iter(artifact.streaming), None)
    if entry is None:
        most = longest(artifact.inputs) * SUBSAMPLING * FRAME_SECONDS
        raise AudioTooLong(
            f"{recording} lasts {seconds:.2f} s; {artifact.path.name} takes {most:.2f} s.",
            hint=f"Export it with: --seconds {np.ceil(seconds):.0f}  (or cut the recording).",
        )
    return entry


def streaming_entry(artifact: Artifact) -> str:
    """The entry that streams; a `UsageError` if there is none."""
    entry = next(iter(artifact.streaming), None)
    if entry is None:
        raise UsageError(f"{artifact.path} takes whole utterances only.", hint="Export one that streams with: --chunk-ms 640")
    return entry

"""The speech that is fed while something is timed: the golden vectors of a bundle, whose right answers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgefuse.measurement import Call
from edgefuse.recognize import Stream, holds, taken
from edgefuse.verify.parity import IDENTICAL_DB, NONSENSE_DB, snr_db

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.bundle import Golden
    from edgefuse.values import Artifact

FEW = 2  # utterances for devices on which a call takes seconds


@dataclass(slots=True)
class _Recorder:
    """A session that writes down what it is given, and answers with zeros."""

    artifact: Artifact
    how: str = "recorded"
    given: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        self.given.append({name: np.array(value, np.float32) for name, value in inputs.items()})
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in self.artifact.outputs[entry]}


def feed_of(artifact: Artifact, entry: str, goldens: Sequence[Golden], *, few: bool = False) -> tuple[Call, ...]:
    """Every golden vector that the entry takes, call by call; with `few` the shortest and the one that fills the entry."""
    streams = artifact.streaming.get(entry)
    specs = artifact.inputs[entry]
    fits = [each for each in goldens if streams or holds(specs, len(each.features))]
    chosen = [fits[0], fits[-1]][-len(fits) :] if few else fits
    return tuple(call for golden in chosen for call in _calls(artifact, entry, golden))


def judged(feed: Sequence[Call], answers: Sequence[NDArray[np.float32]], goldens: Sequence[Golden]) -> tuple[float, int, int]:
    """The worst utterance's signal-to-noise ratio in dB, frames with the right best token, and all frames."""
    right = {golden.identity: golden.logits for golden in goldens}
    given: dict[str, list[NDArray[np.float32]]] = {}
    for call, answer in zip(feed, answers, strict=True):
        given.setdefault(call.utterance, []).append(answer[: call.frames])
    worst, agreeing, frames = IDENTICAL_DB if given else NONSENSE_DB, 0, 0
    for identity, pieces in given.items():
        logits = np.concatenate(pieces)
        worst = min(worst, snr_db(right[identity], logits))
        finite = np.isfinite(logits).all(axis=-1)
        agreeing += int(((logits.argmax(axis=-1) == right[identity].argmax(axis=-1)) & finite).sum())
        frames += len(logits)
    return worst, agreeing, frames


def _calls(artifact: Artifact, entry: str, golden: Golden) -> list[Call]:
    recorder, streaming = _Recorder(artifact), artifact.streaming.get(entry)
    stream = Stream(recorder, artifact, entry)
    calls: list[Call] = []
    caches = set(streaming.states) if streaming else set()
    for piece in stream.pieces(taken(golden, artifact.inputs[entry])):
        frames = len(stream.accept(piece))
        if frames == 0:
            continue  # nothing is behind the last whole frame
        given = recorder.given[-1]
        begins = not calls
        inputs = given if begins else {name: value for name, value in given.items() if name not in caches}
        calls.append(Call(inputs, begins, golden.identity, frames))
    return calls

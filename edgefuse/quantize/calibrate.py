"""Ranges of a folded model's values, from speech: of whole utterances, and of chunks with their real caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgefuse import checkpoint as checkpoints
from edgefuse.errors import BadCalibration
from edgefuse.lower.graph import DeploymentGraph, StreamingGraph
from edgefuse.lower.program import caches_of
from edgefuse.model import Context, Encoder
from edgefuse.quantize.equalize import equalized
from edgefuse.quantize.observe import Hearing, Histogram, Range, observe, products
from edgefuse.quantize.plan import require_one_pass
from edgefuse.quantize.scheme import Clipping, require_blocks_apart
from edgefuse.recognize import Heard, frontend_of, hear
from edgefuse.speech import TestSet, read_speech
from edgefuse.values import FoldedModel, Mode, Program, Streaming

FEWEST_SECONDS = 10.0  # of speech: below this a range is an accident
SILENT = 1e-4  # the peak of a recording in which nobody speaks
CLIPPED = 0.01  # the share of samples at full scale in a recording that was too loud
FULL_SCALE = 0.999
RANGES = "ranges.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was seen while a folded model heard speech.

    Attributes:
        modes: per kind of mode (see `kind_of`), a histogram of each point.
        equalized: the same of the equalized model, whose channels have other units.
        speech: digest of the speech.
        recordings: SHA-256 of each recording: none of them may be tested on.
        parent: digest of the folded model.
        listen: hears the speech again, with the model or the equalized one: of each point, E[x x^T] over its channels, all modes
            as much as another. None where only ranges are at hand.
    """

    modes: Mapping[str, Mapping[str, Histogram]]
    equalized: Mapping[str, Mapping[str, Histogram]]
    speech: str
    recordings: frozenset[str]
    parent: str
    listen: Callable[[bool], Mapping[str, Tensor]] | None = field(default=None, compare=False)

    @property
    def peaks(self) -> dict[str, Tensor]:
        """The largest magnitude of each channel, in any mode: what the units of the equalized model are made of."""
        return {path: torch.tensor([each.peaks for each in seen]).amax(0) for path, seen in _by_point(self.modes).items()}

    def means(self, *, equalized: bool) -> dict[str, Tensor]:
        """The mean of each channel over all modes, one as much as another: entries share their biases."""
        modes = self.equalized if equalized else self.modes
        return {
            path: torch.tensor([each.means for each in seen], dtype=torch.float64).mean(0)
            for path, seen in _by_point(modes).items()
        }

    def products(self, *, equalized: bool) -> Mapping[str, Tensor]:
        """Of each point that linears take, E[x x^T] over its channels; a `BadCalibration` if there is no speech to hear."""
        if self.listen is None:
            raise BadCalibration(
                'rounding = "gptq" hears the speech itself, not ranges that were taken from it.',
                hint="Name the speech with: --calibration SPEECH",
            )
        return self.listen(equalized)

    def ranges(self, kind: str, clipping: Clipping, *, equalized: bool = False) -> dict[str, Range]:
        """The range of each point in one kind of mode; a `BadCalibration` if it was not calibrated."""
        if kind not in self.modes:
            raise BadCalibration(
                f"The ranges are of {' and '.join(self.modes)}, not of {kind}.",
                hint="Take them again with the same --seconds, --chunk-ms, --left-context-ms and --look-ahead-ms.",
            )
        seen = (self.equalized if equalized else self.modes)[kind]
        return {path: each.range(clipping) for path, each in seen.items()}


def kind_of(mode: Mode) -> str:
    """What ranges are of: "offline", or a streaming entry and the past that it sees."""
    return f"{mode.name} after {mode.streaming.left_context_ms} ms" if mode.streaming else mode.name


def calibrate(folded: FoldedModel, program: Program, speech: TestSet) -> Calibration:
    """Let a folded model hear speech in every mode of a program, and then once more, equalized.

    Raises:
        BadCalibration: speech that no range should be taken from.
        BadScheme: a model whose blocks are shared.
    """
    require_one_pass(folded.checkpoint.config)
    require_blocks_apart(folded.checkpoint.config)
    heard = hear(speech, frontend_of(folded.checkpoint))
    _require_speech(heard, speech)
    modes = _observed(folded, program, heard)
    seen = Calibration(modes, {}, speech.digest, _recordings(speech), folded.digest)
    evened = equalized(folded, seen.peaks)

    @cache
    def listen(equalized: bool) -> Mapping[str, Tensor]:  # noqa: FBT001 - a key of the cache
        encoder = checkpoints.encoder_of((evened if equalized else folded).checkpoint)
        modes = [products(_hearing(encoder, mode, heard)) for mode in program.modes]
        return {path: torch.stack([each[path] for each in modes]).mean(0) for path in modes[0]}

    return replace(seen, equalized=_observed(evened, program, heard), listen=listen)


def _require_apart(recordings: frozenset[str], test_set: TestSet) -> None:
    """Raise `BadCalibration` if a recording is in both."""
    if both := [each.identity for each in test_set.utterances if each.sha256 in recordings]:
        raise BadCalibration(
            f"{len(both)} recordings of the calibration are tested on as well, {both[0]} for one.",
            hint="Calibrate on other speech, for example on: demo_app/shared/calibration",
        )


def write_ranges(folder: Path, calibration: Calibration) -> None:
    """`ranges.json` in a folder."""
    fields = {
        "parent": calibration.parent,
        "speech": calibration.speech,
        "recordings": sorted(calibration.recordings),
        "modes": _written(calibration.modes),
        "equalized": _written(calibration.equalized),
    }
    told = json.dumps(fields, allow_nan=False)
    (folder / RANGES).write_text(json.dumps({"digest": _digest(told), **fields}) + "\n", encoding="utf-8")


def has_ranges(folder: Path) -> bool:
    """Whether a folder was written by `edgefuse calibrate`."""
    return (folder / RANGES).is_file()


def read_ranges(folder: Path) -> Calibration:
    """What `write_ranges` wrote; a `BadCalibration` if it did not."""
    path = folder / RANGES
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        digest = fields.pop("digest")
        if digest != _digest(json.dumps(fields)):
            raise BadCalibration(f"{path} has changed since it was written.", hint="Take the ranges again.")
        modes, equalized_modes = _read(fields["modes"]), _read(fields["equalized"])
        return Calibration(modes, equalized_modes, fields["speech"], frozenset(fields["recordings"]), fields["parent"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCalibration(
            f"{path} cannot be read: {error}.", hint="Make it with: edgefuse calibrate CHECKPOINT --speech SPEECH -o RANGES"
        ) from error


def calibration_of(place: Path, folded: FoldedModel, program: Program, test_set: TestSet) -> Calibration:
    """From a folder of speech, or of ranges that were taken from one; what is calibrated on is never tested on."""
    if not has_ranges(place):
        speech = read_speech(place)
        _require_apart(_recordings(speech), test_set)
        return calibrate(folded, program, speech)
    calibration = read_ranges(place)
    _require_apart(calibration.recordings, test_set)
    if calibration.parent != folded.digest:
        raise BadCalibration(f"The ranges in {place} are of another model.", hint="Take them again of this one.")
    return calibration


def _observed(folded: FoldedModel, program: Program, heard: Sequence[Heard]) -> dict[str, dict[str, Histogram]]:
    encoder = checkpoints.encoder_of(folded.checkpoint)
    return {kind_of(mode): observe(partial(_hearing, encoder, mode, heard)) for mode in program.modes}


def _by_point(modes: Mapping[str, Mapping[str, Histogram]]) -> dict[str, list[Histogram]]:
    """What was seen at each point that has channels, in every mode."""
    first = next(iter(modes.values()))
    return {path: [seen[path] for seen in modes.values()] for path, each in first.items() if each.peaks}


def _written(modes: Mapping[str, Mapping[str, Histogram]]) -> dict[str, Any]:
    return {mode: {path: asdict(each) for path, each in seen.items()} for mode, seen in modes.items()}


def _read(modes: Mapping[str, Any]) -> dict[str, dict[str, Histogram]]:
    return {mode: {path: _histogram(each) for path, each in seen.items()} for mode, seen in modes.items()}


def _histogram(fields: Mapping[str, Any]) -> Histogram:
    counts, means, peaks = (tuple(fields[name]) for name in ("counts", "means", "peaks"))
    return Histogram(fields["low"], fields["high"], counts, means, peaks)


def _hearing(encoder: Encoder, mode: Mode, heard: Sequence[Heard]) -> Iterator[Hearing]:
    """A graph of the mode with each utterance: without padding, whose values no range should hold."""
    chunks = _Chunks(encoder, mode.streaming).eval() if mode.streaming else None
    for each in heard:
        frames = len(each.features) // encoder.config.reduction
        features = torch.from_numpy(each.features)[None, : frames * encoder.config.reduction]
        if chunks is not None:
            if frames >= chunks.window:
                yield chunks, features
        elif 0 < frames <= encoder.config.max_frames:
            yield DeploymentGraph(encoder, frames).eval(), features, torch.tensor([float(frames)])


class _Chunks(nn.Module):
    """An utterance, chunk after chunk with the caches of the one before; what fills no window is left out."""

    length: torch.Tensor

    def __init__(self, encoder: Encoder, streaming: Streaming) -> None:
        super().__init__()
        context = Context(streaming.chunk, streaming.left, streaming.ahead)
        self.graph, self.window = StreamingGraph(encoder, context), context.window
        self.hop, self.takes = (frames * encoder.config.reduction for frames in (streaming.chunk, self.window))
        self.register_buffer("length", torch.tensor([float(self.window)]))
        self.silence = tuple(torch.zeros(spec.shape) for spec in caches_of(encoder, streaming.left))

    def forward(self, features: Tensor) -> None:
        """features (1, T, mels)."""
        caches = self.silence
        for start in range(0, features.shape[1] - self.takes + 1, self.hop):
            _, *renewed = self.graph(features[:, start : start + self.takes], self.length, *caches)
            caches = tuple(renewed)


def _recordings(speech: TestSet) -> frozenset[str]:
    return frozenset(each.sha256 for each in speech.utterances)


def _require_speech(heard: Sequence[Heard], speech: TestSet) -> None:
    """Raise `BadCalibration` for what is silent, clipped or too short."""
    for each in heard:
        peak = float(np.abs(each.samples).max(initial=0.0))
        if peak < SILENT:
            raise BadCalibration(f"{each.identity} of {speech.folder} is silent.", hint="Take it out of the calibration.")
        if float((np.abs(each.samples) >= FULL_SCALE).mean()) > CLIPPED:
            raise BadCalibration(f"{each.identity} of {speech.folder} is clipped.", hint="Record it again with less gain.")
    seconds = sum(each.seconds for each in speech.utterances)
    if seconds < FEWEST_SECONDS:
        raise BadCalibration(
            f"{speech.folder} holds {seconds:.1f} s of speech; ranges need {FEWEST_SECONDS:.0f} s.", hint="Add recordings."
        )


def _digest(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()

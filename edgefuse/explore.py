"""Schemes tried on speech, and what each layer of one costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgefuse import checkpoint as checkpoints
from edgefuse.bench.layers import layer_latencies_ms
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError
from edgefuse.foreign import in_words
from edgefuse.lower import Chunks, lower
from edgefuse.pipeline import Tell, by_scheme, require_honoured, silent
from edgefuse.quantize.calibrate import Calibration, calibrate, calibration_of, has_ranges
from edgefuse.quantize.prepare import prepare
from edgefuse.quantize.scheme import Scheme
from edgefuse.quantize.sensitivity import Sensitivity, extents, sensitivities
from edgefuse.quantize.trial import Trial, Trials
from edgefuse.recognize import Heard, frontend_of, hear
from edgefuse.refold import fold_exactly
from edgefuse.speech import parted, read_speech
from edgefuse.target import find
from edgefuse.values import FoldedModel, Program

HELD_OUT = 3  # every third utterance of the calibration is tried on, not calibrated on, if no other speech is named


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What is asked about.

    Attributes:
        checkpoint: the model.
        target: the runtime.
        calibration: speech that ranges come from, or ranges taken from it.
        speech: what schemes are tried on; a part of the calibration, which is not calibrated on then, if None.
        seconds: longest utterance.
        chunks: or chunks, instead.
    """

    checkpoint: Path
    target: str
    calibration: Path
    speech: Path | None = None
    seconds: float | None = None
    chunks: Chunks | None = None


@dataclass(frozen=True, slots=True)
class Ground:
    """What schemes are tried on.

    Attributes:
        folded: the model.
        inquiry: what is asked about.
        program: its float graph, with one entry.
        calibration: where ranges come from.
        heard: speech that was not calibrated on.
        speech: digest of it.
    """

    folded: FoldedModel
    inquiry: Inquiry
    program: Program
    calibration: Calibration
    heard: tuple[Heard, ...]
    speech: str

    def trials(self, most: int | None = None) -> Trials:
        """Schemes, tried in PyTorch, on so many utterances at most."""
        every = 1 if most is None else -(-len(self.heard) // most)
        return Trials(self.program, self.quantized, self.heard[::every], Tokens(self.folded.checkpoint.tokens))

    def quantized(self, scheme: Scheme) -> Program:
        """The program by a scheme."""
        prepared = prepare(self.folded, scheme, self.program.entries[0].graph, self.calibration)
        program = replace(_lowered(prepared, self.inquiry), parent=self.program.parent)
        return by_scheme(program, scheme, self.calibration)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a scheme costs.

    Attributes:
        exact: what the float model says of the speech that was tried on.
        whole: what the scheme as it is says.
        parts: each layer of it, and each line, on its own.
        latency_ms: of each layer in float on the target; empty where artifacts are evaluated here, not run.
        weights: how many all layers have, those included that the scheme leaves float.
    """

    exact: Trial
    whole: Trial
    parts: tuple[Sensitivity, ...]
    latency_ms: Mapping[str, float]
    weights: int


def sensitivity(inquiry: Inquiry, scheme: Scheme, tell: Tell = silent) -> Costs:
    """What each layer of a scheme costs a checkpoint: of its accuracy in PyTorch, of its latency on a target.

    Raises:
        Refused: the target cannot honour the scheme.
    """
    target = find(inquiry.target)
    ground = stand(inquiry, tell)
    require_honoured(ground.quantized(scheme), {inquiry.target: target})
    (entry,) = ground.program.entries
    with tell(f"Timing the layers on {inquiry.target}"), in_words(inquiry.target, "could not time its layers"):
        layers = extents(entry)
        latency_ms = layer_latencies_ms(target, entry, layers)
    trials, weights = ground.trials(), sum(each.weights for each in layers.values())
    return Costs(trials.exact, trials.of(scheme), tuple(sensitivities(trials, scheme, entry, tell)), latency_ms, weights)


def stand(inquiry: Inquiry, tell: Tell) -> Ground:
    """Fold a checkpoint, calibrate it, and hear what is tried on.

    Raises:
        UsageError: ranges, which are no speech, and no speech to try on.
        BadCalibration: what is calibrated on is tried on.
    """
    with tell("Folding"):
        checkpoint = checkpoints.read(inquiry.checkpoint)
        folded, _ = fold_exactly(inquiry.checkpoint, checkpoint)
    program = _lowered(folded, inquiry)
    place = inquiry.calibration
    with tell("Calibrating"):
        if inquiry.speech is not None:
            tried = read_speech(inquiry.speech)
            calibration = calibration_of(place, folded, program, tried)
        elif has_ranges(place):
            raise UsageError(f"{place} holds ranges, no speech to try schemes on.", hint="Name some with: --speech SPEECH")
        else:
            rest, tried = parted(read_speech(place), HELD_OUT)
            calibration = calibrate(folded, program, rest)
        heard = hear(tried, frontend_of(checkpoint))
    return Ground(folded, inquiry, program, calibration, heard, tried.digest)


def _lowered(folded: FoldedModel, inquiry: Inquiry) -> Program:
    lengths = () if inquiry.seconds is None else (inquiry.seconds,)
    return lower(folded, lengths, "fp32", () if inquiry.chunks is None else (inquiry.chunks,))

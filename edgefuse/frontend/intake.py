"""What an entry hears: features, the samples themselves, or what the first pass of a cascade gave; and how it counts them."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.model.config import FEATURE_HOP_MS
from edgefuse.values import ENCODED, TensorSpec

FEATURES, SAMPLES = "features", "samples"  # names of tensors
LEAD = KALDI_80.frame_samples - KALDI_80.hop_samples  # samples before those of the first encoder frame
OVERLAP = "overlap"  # the cache of samples whose frames end in the next chunk


@dataclass(frozen=True, slots=True)
class Intake:
    """How an entry counts what it hears.

    Attributes:
        tensor: the name of its first input.
        frame_ms: one encoder frame, in milliseconds.
        per_frame: how many make one more encoder frame.
        lead: how many an utterance has before these begin to count.
        per_length: how many make 1 of its second input, `length`.
    """

    tensor: str
    frame_ms: int
    per_frame: int
    lead: int
    per_length: int

    @property
    def hears_samples(self) -> bool:
        """Whether it is samples that it hears."""
        return self.tensor == SAMPLES

    @property
    def hears_encoded(self) -> bool:
        """Whether it is what a first pass gave that it hears."""
        return self.tensor == ENCODED

    def frames(self, count: int) -> int:
        """Whole encoder frames of an utterance of so many."""
        return max(0, count - self.lead) // self.per_frame

    def count(self, frames: int) -> int:
        """The fewest that give so many encoder frames; these are at least 1."""
        return self.lead + frames * self.per_frame


def of_features(frame_ms: int) -> Intake:
    """What hears features, for encoder frames of so many milliseconds."""
    reduction = frame_ms // FEATURE_HOP_MS
    return Intake(FEATURES, frame_ms, per_frame=reduction, lead=0, per_length=reduction)


def of_samples(frame_ms: int) -> Intake:
    """What hears samples."""
    per_frame = frame_ms // FEATURE_HOP_MS * KALDI_80.hop_samples
    return Intake(SAMPLES, frame_ms, per_frame=per_frame, lead=LEAD, per_length=1)


def of_encoded(frame_ms: int) -> Intake:
    """What hears encoder frames."""
    return Intake(ENCODED, frame_ms, per_frame=1, lead=0, per_length=1)


def intake_of(specs: Sequence[TensorSpec]) -> Intake:
    """The intake of an entry with these inputs."""
    heard = specs[0]
    if heard.name == ENCODED:
        return of_encoded(heard.frame_ms)
    return of_samples(heard.frame_ms) if heard.name == SAMPLES else of_features(heard.frame_ms)

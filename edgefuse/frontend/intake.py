"""What an entry hears: features, or the samples themselves; and how it counts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.model.config import SUBSAMPLING
from edgefuse.values import Input, TensorSpec


@dataclass(frozen=True, slots=True)
class Intake:
    """How an entry counts what it hears.

    Attributes:
        tensor: the name of its first input.
        per_frame: how many make one more encoder frame of 40 ms.
        lead: how many an utterance has before these begin to count.
        per_length: how many make 1 of its second input, `length`.
    """

    tensor: str
    per_frame: int
    lead: int
    per_length: int

    def frames(self, count: int) -> int:
        """Whole encoder frames of an utterance of so many."""
        return max(0, count - self.lead) // self.per_frame

    def count(self, frames: int) -> int:
        """The fewest that give so many encoder frames; these are at least 1."""
        return self.lead + frames * self.per_frame


FEATURES = Intake("features", per_frame=SUBSAMPLING, lead=0, per_length=SUBSAMPLING)
SAMPLES = Intake(
    "samples", per_frame=SUBSAMPLING * KALDI_80.hop_samples, lead=KALDI_80.frame_samples - KALDI_80.hop_samples, per_length=1
)
OVERLAP = "overlap"  # the cache of samples whose frames end in the next chunk
INTAKES: Mapping[Input, Intake] = MappingProxyType({"features": FEATURES, "pcm": SAMPLES})


def intake_of(specs: Sequence[TensorSpec]) -> Intake:
    """The intake of an entry with these inputs."""
    return next(intake for intake in INTAKES.values() if intake.tensor == specs[0].name)

"""What a checkpoint is: its architecture, its size, what it costs, and what the fold will do with each of its sites."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.fold import plan
from edgefuse.model.cost import cost, parameters
from edgefuse.values import Checkpoint, Fold, Refusal

SECONDS = 5.12  # the length of utterance that the attention is counted for


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint and its plan; sizes and costs are derived."""

    checkpoint: Checkpoint
    plan: tuple[Fold | Refusal, ...]

    @property
    def parameters(self) -> int:
        """Trained values: weights, biases, gains; no statistics. Those of shared blocks count once, as they are stored."""
        return parameters(self.checkpoint.config).stored

    @property
    def parameters_run(self) -> int:
        """The same, those of shared blocks as often as they are run."""
        return parameters(self.checkpoint.config).run

    @property
    def macs_per_second(self) -> int:
        """Multiply-accumulates per second of audio, in utterances of 5.12 s."""
        return cost(self.checkpoint.config).macs_per_second(SECONDS)

    @property
    def folds(self) -> int:
        """How many sites disappear."""
        return sum(isinstance(site, Fold) for site in self.plan)

    @property
    def refusals(self) -> int:
        """How many sites stay."""
        return len(self.plan) - self.folds

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        config = self.checkpoint.config
        return {
            "model": config.name,
            "config": config.to_json(),
            "digest": self.checkpoint.digest,
            "parameters": self.parameters,
            "parameters_run": self.parameters_run,
            "macs_per_second": self.macs_per_second,
            "seconds": SECONDS,
            "plan": store.plan_to_json(self.plan),
        }


def inspect(folder: Path) -> Inspection:
    """Read and check a checkpoint and plan its fold; nothing is changed."""
    checkpoint = checkpoints.read(folder)
    written = store.read_plan(folder, checkpoint) if checkpoint.config.folded else None
    return Inspection(checkpoint, written.plan if written else plan(checkpoints.encoder_of(checkpoint)))

"""Everything that a training is told; the same recipe trains a FusionFormer and its LayerNorm twin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgefuse.errors import UsageError
from edgefuse.model import EncoderConfig
from edgefuse.model.architecture import encoder_config
from edgefuse.model.config import Norm
from edgefuse.train.augment import Augmentation

CHUNK_MS = (160, 1280)  # the chunks that a device would stream with
LEFT_MS = (640, 3840)
PIECES = 512  # of words; most of what the synthetic corpus says is then one token a word
ARCHITECTURE = (
    "preset",
    "norm",
    "architecture",
    "vocabulary_size",
)  # what a fine-tuning has from the checkpoint that it begins with
PRETRAINED = "pretrained.json"  # beside the weights of a checkpoint that knows no words yet; see pretrain.py


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a training."""

    preset: str = "tiny"
    norm: Norm = "batch"
    architecture: Mapping[str, Any] = field(default_factory=dict)  # fields of the encoder's config that are not the preset's
    vocabulary_size: int | None = None  # tokens; None: those of the checkpoint to begin with, or PIECES
    epochs: int = 7
    epoch_batches: int | None = None  # how many of the corpus an epoch draws; None: all
    seed: int = 0
    batch_seconds: float = 56.0  # of speech, in each process; about 16 utterances of a voice assistant
    accumulate: int = 1  # how many such batches each process hears for one step
    peak_learning_rate: float = 2e-3
    last_learning_rate: float = 2e-5
    warm_up_share: float = 0.08  # of all steps
    weight_decay: float = 1e-2
    largest_gradient: float = 5.0
    dropout: float = 0.0  # the augmentation regularizes a small network enough, and costs a tenth of dropout's time
    average_decay: float = 0.999
    character_share: float = 0.3  # of the loss: CTC over characters, from a second head; see module.py
    characters_first: float = 0.12  # of the steps: characters alone; see module.py
    chunked_share: float = 0.0  # of the steps: attention in chunks, for one network that serves whole and streamed speech
    second_pass_share: float = 0.5  # of the loss of a cascade over the vocabulary: what its second pass answers
    sampled_depth: bool = False  # each step runs so many layers as it draws: Layer Consistency [R abstract]; see module.py
    teacher_share: float = 0.0  # of the loss of a fine-tuning: how far it is from what it answered before; see module.py
    patience: int | None = None  # end after so many epochs without a better dev WER, and keep the best average, not the last
    workers: int = 0  # processes that make the batches, the same ones, for a GPU that would wait for them; 0: the training itself
    checkpoint_minutes: float = 10.0  # between two checkpoints at most, besides those after every epoch; 0: after every step
    unified_warm_up: int = (
        4000  # iterations before Unified Normalization trusts its window [R]; in a shorter training it never does
    )
    outlier_filtration: bool = False  # of Unified Normalization: off, as for text [R]; `skip_counter` counts what it left out
    stream_share: float = 0.0  # beside the loss of a conversion: how far each block is from the teacher's; see convert_norm.py
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, in words."""
        if self.epochs < 1:
            raise UsageError(f"{self.epochs} epochs train nothing.", hint="Pass --epochs 1 or more.")
        if not 0 <= self.chunked_share <= 1:
            raise UsageError(f"{self.chunked_share} is no share of the steps.", hint="Pass --chunked-share 0 to 1.")
        if not 0 <= self.second_pass_share <= 1:
            raise UsageError(f"{self.second_pass_share} is no share of a loss.", hint="Set second_pass_share to 0 .. 1.")
        for count, option in ((self.accumulate, "accumulate"), (self.patience, "patience")):
            if count is not None and count < 1:
                raise UsageError(f"{count} is too few for --{option}.", hint=f"Pass --{option} 1 or more.")
        if self.workers < 0:
            raise UsageError(f"{self.workers} workers make no batch.", hint="Pass --workers 0 or more.")
        if not self.checkpoint_minutes >= 0:
            raise UsageError(f"{self.checkpoint_minutes} minutes are no time.", hint="Pass --checkpoint-minutes 0 or more.")
        if not self.batch_seconds > 0:
            raise UsageError(f"A batch of {self.batch_seconds} s holds no utterance.", hint="Pass --batch-seconds 10 or more.")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)

    def to_json_from(self, digest: str) -> dict[str, Any]:
        """The same of a training that begins with a checkpoint, by its digest, which decides on the architecture."""
        return {"from": digest} | {name: value for name, value in self.to_json().items() if name not in ARCHITECTURE}

    @property
    def pieces(self) -> int:
        """How many tokens are learnt, where some are."""
        return self.vocabulary_size or PIECES

    def encoder(self, vocabulary_size: int) -> EncoderConfig:
        """The encoder that is trained."""
        return encoder_config(self.preset, self.norm, vocabulary_size, {"dropout": self.dropout, **self.architecture})

    def character_share_at(self, step: int, steps: int) -> float:
        """The share of the loss over characters at a step."""
        return 1.0 if step < self.characters_first * steps else self.character_share

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a share of the peak: a linear warm-up, then half a cosine to the last rate."""
        warm_up = max(1, round(self.warm_up_share * steps))
        if step < warm_up:
            return (step + 1) / warm_up
        last = self.last_learning_rate / self.peak_learning_rate
        done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


FINE_TUNING = Recipe(
    epochs=4,
    epoch_batches=100,
    peak_learning_rate=2e-4,  # with 8e-4 the loss of 4 bits rose from the first steps on [M]
    last_learning_rate=2e-6,
    warm_up_share=0.1,
    weight_decay=0.0,
    average_decay=0.99,
    character_share=0.0,
    characters_first=0.0,
    chunked_share=0.3,
    teacher_share=1.0,  # 4 bits, unseen, 200 steps of 28 s: 25.6 % before, 20.4 % with the teacher, 25.4 % with CTC alone [M]
)
CONVERSION = Recipe(
    epochs=40,
    epoch_batches=100,
    peak_learning_rate=1e-3,
    last_learning_rate=1e-5,
    warm_up_share=0.05,
    average_decay=0.99,
    character_share=0.0,
    characters_first=0.0,
    chunked_share=0.3,
    teacher_share=1.0,
    stream_share=1.0,
)

"""Pre-training: speech without transcripts in, a checkpoint out whose encoder `edgefuse train --from` begins with.

A checkpoint has a CTC head, and tokens: this one's head is untrained, and its tokens are the English characters, so that it can
be read, folded and measured as any other. `pretrained.json` beside its weights says so, and a training that begins with it
learns characters first, as one does that begins with nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Generator, Tensor

from edgefuse import checkpoint as checkpoints
from edgefuse.decode.tokens import character_tokens
from edgefuse.errors import EmptyAudio, UsageError
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.reestimate import reestimate
from edgefuse.train import ranks
from edgefuse.train.augment import Augmentation
from edgefuse.train.corpora import TRAIN
from edgefuse.train.loop import EpochBatches, Precision, require_free_run, run, usual_precision
from edgefuse.train.masked import Masking, Pretraining, hide
from edgefuse.train.recipe import PRETRAINED, Recipe
from edgefuse.train.speech import EVALUATION_BATCH_SECONDS, Speech, clean_speech, open_speech
from edgefuse.values import Checkpoint

TOKENS = character_tokens()
PRETRAINING = Recipe(
    vocabulary_size=len(TOKENS),
    character_share=0.0,
    characters_first=0.0,
    augmentation=Augmentation(pause_share=0.0, noise_share=0.0, frequency_masks=0, time_masks=0),  # what is to be said is speech
)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a pre-training leaves behind; losses are L1 per log-mel value in hidden frames of the development set.

    Attributes:
        folder: the checkpoint.
        before: of the fresh network.
        after: of the network that is written.
        mean: of who says the mean of all speech, of every frame.
    """

    folder: Path
    before: float
    after: float
    mean: float


class UnlabelledBatches(EpochBatches):
    """Training batches alone: the word errors of what knows no words are not counted."""

    def val_dataloader(self) -> Any:  # noqa: ANN401 - Lightning takes an empty list for no validation
        """Nothing."""
        return []


def pretrain(
    speech: Path,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    threads: int = 1,
    precision: Precision | None = None,
    features: Path | None = None,
) -> Pretrained | None:
    """Train an encoder on the cuts ``train`` of a corpus folder, their transcripts unread; measure it on ``dev``.

    ``features`` keeps the log-mel frames, ``speech``/features by default. ``resume`` goes on from the last step that was kept in
    ``output``; without it a used ``output`` is refused. Of several processes the first returns what was trained.

    Raises:
        UsageError: a cascade.
        EmptyAudio: no recording is as long as an encoder frame, or all are longer than the encoder reaches.
    """
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    config = recipe.encoder(len(TOKENS))
    if config.second_pass:
        raise UsageError(
            "The second pass of a cascade would learn nothing: it is behind the head of the first.",
            hint="Pre-train without second_pass, or train the cascade with transcripts.",
        )
    with ranks.joined():
        heard = open_speech(speech, features)
        corpus = audible(heard.load(TRAIN), config)
        dev = audible(heard.dev(statistics=corpus.store), config)
        output.mkdir(parents=True, exist_ok=True)
        L.seed_everything(recipe.seed, workers=True, verbose=False)
        batches = UnlabelledBatches(corpus, dev, TOKENS, recipe)
        training = Pretraining(Encoder(config), TOKENS, recipe, batches.steps)
        before, _ = _measure(training, corpus, dev)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # of the validation
            run(training, batches, output, resume=resume, precision=precision or usual_precision())
    if not ranks.is_first():
        return None
    after, mean = _measure(training, corpus, dev)
    reestimate(training.averaged, clean_speech(corpus, TOKENS, recipe.seed))
    written = output / "checkpoint"
    checkpoint = checkpoints.of_encoder(training.averaged.eval(), corpus.store.mean, corpus.store.istd, TOKENS.symbols)
    checkpoints.write(written, checkpoint)
    pretrained = Pretrained(written, before, after, mean)
    _describe(pretrained, checkpoint, recipe, training.masking)
    return pretrained


def audible(spoken: Speech, config: EncoderConfig) -> Speech:
    """What of a set an encoder can hear: at least a frame, and no more than it reaches; transcripts are left out."""
    counts = {name: utterance.count // config.reduction for name, utterance in spoken.store.utterances.items()}
    cuts = spoken.cuts.filter(lambda cut: 0 < counts[cut.id] <= config.max_frames).to_eager()
    if not len(cuts):
        raise EmptyAudio(
            f"No recording has between 1 and {config.max_frames} frames of {config.frame_ms} ms.",
            hint="Cut the speech into utterances, or name another --speech.",
        )
    silent = {name: replace(utterance, text="") for name, utterance in spoken.store.utterances.items()}
    return replace(spoken, cuts=cuts, store=replace(spoken.store, utterances=silent))


def _measure(training: Pretraining, corpus: Speech, dev: Speech) -> tuple[float, float]:
    """The losses of the averaged encoder, its statistics those of clean speech with holes."""
    encoder = training.averaged.cpu()
    training.head.cpu()
    reestimate(encoder, _with_holes(clean_speech(corpus, TOKENS, training.recipe.seed), encoder.config, training))
    return training.measure(encoder.eval(), dev.batches(TOKENS, EVALUATION_BATCH_SECONDS, learnt=False))


def _with_holes(
    batches: Iterator[tuple[Tensor, Tensor]], config: EncoderConfig, training: Pretraining
) -> Iterator[tuple[Tensor, Tensor]]:
    draw = Generator().manual_seed(training.recipe.seed)
    for features, lengths in batches:
        yield hide(features, lengths, config.reduction, training.masking, draw).features, lengths


def _describe(pretrained: Pretrained, checkpoint: Checkpoint, recipe: Recipe, masking: Masking) -> None:
    """`pretrained.json`: what this checkpoint is, and what it is not."""
    told = {
        "what": "An encoder that has heard speech without transcripts; its CTC head is untrained.",
        "next": f"edgefuse train --from {pretrained.folder}",
        "digest": checkpoint.digest,
        "loss": {"before": pretrained.before, "after": pretrained.after, "of the mean": pretrained.mean},
        "masking": asdict(masking),
        "recipe": recipe.to_json(),
    }
    (pretrained.folder / PRETRAINED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

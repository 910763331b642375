"""Conversion: a trained LayerNorm Conformer in, by a short training a checkpoint out whose norms fold.

LayerNorm, Swish and GLU give way to RepBN (BN(x) + alpha x, SLAB [R code]) and ReLU at once: every layer begins as a regression
of what it was (see closeness.py), and then the network is taught by what it was. SLAB goes from one norm to the other by a
mixture, lambda LN(x) + (1 - lambda) RepBN(x) [R code]. Here that ended in a cliff: however small lambda is, LayerNorm normalizes
each frame, and the network leans on it. Of `conformer-tiny`, with lambda from 1 to 0 in 810 steps of 300 s, word errors on `dev`
were 2.4 % after 700 steps, 91 % after 800, and 88 to 100 % until 1500, where it was given up [M].
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from edgefuse import checkpoint as checkpoints
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError
from edgefuse.model import Context, Encoder
from edgefuse.model.normalization import StatisticsNorm
from edgefuse.model.streaming import valid_frames
from edgefuse.train import ranks
from edgefuse.train.batches import Batch
from edgefuse.train.closeness import converted_config, successor
from edgefuse.train.corpora import TRAIN
from edgefuse.train.loop import EpochBatches, Precision, require_free_run, run, usual_precision
from edgefuse.train.metrics import WHOLE, Trained, contexts_of, spell_spaceless, test, write_metrics
from edgefuse.train.module import Taught
from edgefuse.train.recipe import Recipe
from edgefuse.train.speech import Speech, fitting, heard_by, open_speech, training_speech
from edgefuse.values import Checkpoint

START_SECONDS = 900.0  # of speech, augmented, that the start is fitted to: 22,500 encoder frames
START_BATCH_SECONDS = 60.0
START_SEED = 0  # whatever a run's is: runs that begin alike have a mean
BEFORE = ", before"  # behind a test set: what the LayerNorm Conformer heard in it


class Conversion(Taught):
    """The steps of a successor; its teacher is the LayerNorm Conformer.

    Its norms keep the statistics that they begin with: statistics of each batch only blur what is close already. From one start,
    after 60 and 120 steps of 150 s, word errors on `dev` were 11.9 and 7.4 % with them, 6.5 and 3.9 % without [M].
    """

    def __init__(self, encoder: Encoder, teacher: Encoder, tokens: Tokens, recipe: Recipe, steps: int) -> None:
        """``steps`` is the length of the training."""
        super().__init__(encoder, teacher, tokens, recipe, steps)
        for norm in self.encoder.modules():
            if isinstance(norm, StatisticsNorm):
                norm.eval()  # Lightning leaves every module in its mode
        self._learnt: list[Tensor] = []  # behind each block, of the batch at hand
        self._taught: list[Tensor] = []
        for each, kept in ((self.encoder, self._learnt), (self.teacher, self._taught)):
            for block in each.blocks:
                block.register_forward_hook(partial(_keep, kept))

    def loss(self, batch: Batch, context: Context) -> Tensor:
        """That of the answers, and how far the residual stream is from the teacher's behind each block, averaged over them.

        Of one block: sum of (learnt - taught)^2 / sum of taught^2, over valid frames.
        """
        answers = super().loss(batch, context)
        if not self._taught:  # without a share the teacher was not asked
            self.teacher(batch.features, batch.lengths, context)
        lengths = batch.lengths // self.encoder.config.reduction
        distances = [
            _distance(learnt, taught, lengths * (shape.frames // shape.stride))
            for (_, shape), learnt, taught in zip(self.encoder.layers, self._learnt, self._taught, strict=True)
        ]
        self._learnt.clear()
        self._taught.clear()
        return answers + self.recipe.stream_share * torch.stack(distances).mean()


def _keep(kept: list[Tensor], _: nn.Module, __: object, output: Tensor) -> None:
    """Only in training: a validation needs none."""
    if torch.is_grad_enabled():
        kept.append(output)


def _distance(learnt: Tensor, taught: Tensor, lengths: Tensor) -> Tensor:
    """Relative, squared: both (B, T, d)."""
    valid = valid_frames(lengths, learnt.shape[1])
    learnt, taught = learnt[valid].float(), taught[valid].float()
    return (learnt - taught).square().sum() / taught.square().sum()


def convert_norm(
    start: Path,
    speech: Path,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    threads: int = 1,
    precision: Precision | None = None,
    features: Path | None = None,
) -> Trained | None:
    """Convert the LayerNorm Conformer `start` on a corpus folder; its word errors before and after.

    Raises:
        UsageError: a checkpoint that is folded, or no LayerNorm Conformer.
    """
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    before = _read(start)
    tokens = Tokens(before.tokens)
    with ranks.joined():
        heard = open_speech(speech, features)
        corpus = fitting(heard_by(before, heard.load(TRAIN)), tokens, before.config)
        dev = heard.dev()
        output.mkdir(parents=True, exist_ok=True)
        training = fit(before, corpus, dev, output, recipe, resume=resume, precision=precision or usual_precision())
    if not ranks.is_first():
        return None
    encoder = training.averaged.cpu().eval().requires_grad_(requires_grad=False)
    written = output / "checkpoint"
    mean, istd = before.frontend_mean, before.frontend_istd
    checkpoints.write(written, checkpoints.of_encoder(encoder, mean, istd, before.tokens))
    spoken = (heard, corpus.store, tokens)
    given = {f"{name}{BEFORE}": e for name, e in test(checkpoints.encoder_of(before), *spoken, WHOLE).items()}
    errors = given | test(encoder, *spoken, contexts_of(encoder.config))
    write_metrics(output, recipe.to_json_from(before.digest), errors)
    return Trained(written, errors, characters=spell_spaceless(tokens))


def fit(
    before: Checkpoint,
    corpus: Speech,
    dev: Speech,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    precision: Precision = "fp32",
) -> Conversion:
    """Run the epochs, from the start or from ``last.ckpt``; the same seed gives the same weights either way (on a CPU)."""
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    tokens = Tokens(before.tokens)
    batches = EpochBatches(corpus, dev, tokens, recipe)
    teacher = checkpoints.encoder_of(before)
    # what was found at the start of a run that goes on is in its last.ckpt
    spoken = {"seconds": START_SECONDS, "batch_seconds": START_BATCH_SECONDS}
    heard = training_speech(corpus, tokens, replace(recipe, seed=START_SEED), before.config.frame_ms, **spoken)
    encoder = Encoder(converted_config(before.config)) if resume else successor(teacher, heard, ranks.say)
    training = Conversion(encoder.train(), teacher, tokens, recipe, batches.steps)
    run(training, batches, output, resume=resume, precision=precision)
    return training


def _read(start: Path) -> Checkpoint:
    checkpoint = checkpoints.read(start)
    config = checkpoint.config
    if config.folded:
        raise UsageError(
            f"{start} is folded: what its LayerNorms gave to their neighbours cannot be taken back.",
            hint="Convert what it was folded from.",
        )
    if config.norm != "layer" or config.activation != "swish":
        raise UsageError(
            f"{start} is a {config.name} with {config.activation}, not a LayerNorm Conformer with Swish and GLU.",
            hint=f"It needs no conversion if its norms fold: edgefuse inspect {start}",
        )
    return checkpoint

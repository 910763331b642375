"""The training step, as Lightning wants it.

The loss of a `Training` is CTC over the vocabulary and, from a second head on the same frames, CTC over characters (multi-task
CTC, Sanabria and Metze 2018). It hears characters alone at first: with word pieces in its loss an encoder stays for thousands of
steps where CTC begins, with the same few words for every utterance. The second head belongs to the training and is no part
of the checkpoint.

A step may be shared by several processes, and may take several backward passes (`Recipe.accumulate`): each part of its batch
has a loss that counts for as much as the part has utterances, the mean of all parts is the loss of the batch, and schedules
count steps. Of a batch norm each part has statistics of its own, where the norm does not gather those of all processes; how far
the running ones move is corrected, so that a step moves them as far as one batch would. Averages, statistics, losses and the
optimizer stay in float32 where the layers compute in bf16.

A `Taught` training has a teacher instead, the same encoder as it was before it lost its bits or its LayerNorms
(self-distillation, Hinton et al. 2015). Its loss is per frame; parts of a batch weigh there by their utterances all the same.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.spaceless import units
from edgefuse.decode.tokens import BLANK_ID, Tokens
from edgefuse.errors import TrainingDiverged
from edgefuse.model import FULL, SUBSAMPLING, Context, Encoder
from edgefuse.model.streaming import valid_frames
from edgefuse.quantize.encoder import Rounding
from edgefuse.train import ranks
from edgefuse.train.batches import Batch
from edgefuse.train.diagnosis import culprit
from edgefuse.train.pieces import characters_in
from edgefuse.train.recipe import CHUNK_MS, LEFT_MS, Recipe
from edgefuse.verify.wer import WordErrors, count_word_errors, total

Answer = Callable[[Tensor, Tensor, Context], tuple[Tensor, Tensor]]  # as an encoder answers


class Steps(L.LightningModule, ABC):
    """The steps of an encoder down its loss, and the moving average of its weights that becomes the checkpoint.

    Every step seeds itself, from the recipe's seed and its own number: a training that was interrupted draws the same
    dropout and the same chunks as one that was not.
    """

    def __init__(self, encoder: Encoder, tokens: Tokens, recipe: Recipe, steps: int) -> None:
        """``steps`` is the length of the learning rate schedule."""
        super().__init__()
        self.encoder, self.tokens, self.recipe, self.steps = encoder, tokens, recipe, steps
        decay = recipe.average_decay
        self.average = AveragedModel(encoder, multi_avg_fn=lambda a, w, n: _average_in(a, w, n, decay))
        self.average.requires_grad_(requires_grad=False)
        self.step_loss, self.gradient_norm = math.nan, math.nan  # of the last whole step, of all its parts
        self._losses: list[float] = []
        self._latest: tuple[Batch, Context] | None = None
        self._norms = [(m, m.momentum) for m in encoder.modules() if isinstance(m, nn.BatchNorm1d) and m.momentum is not None]
        self._errors: list[WordErrors] = []

    @abstractmethod
    def loss(self, batch: Batch, context: Context) -> Tensor:
        """What a step makes smaller."""

    def answer(self, encoder: Encoder, features: Tensor, lengths: Tensor, context: Context = FULL) -> tuple[Tensor, Tensor]:
        """Logits and lengths, as the encoder will answer once it is deployed."""
        return encoder(features, lengths, context)  # type: ignore[no-any-return]

    @property
    def averaged(self) -> Encoder:
        """The encoder with the moving average of the weights."""
        return cast("Encoder", self.average.module)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a part of a batch, for its share."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.global_step + batch.part * 1_000_000_007)
        self._correct_momenta(len(self._losses))
        self._latest = batch, draw_context(self.recipe, self.global_step, self.encoder.config.frame_ms)
        loss = batch.share * self.loss(*self._latest)
        mean = float(ranks.summed(loss.detach().clone())) / ranks.world()  # all processes stop where one has to
        if not math.isfinite(mean):
            raise self._diverged(f"The loss of step {self.global_step} is {mean}")
        self._losses.append(mean)
        return loss

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - Lightning's
        """A step, and one of the average towards the new weights."""
        super().optimizer_step(*arguments, **options)
        self.average.update_parameters(self.encoder)
        self.step_loss = sum(self._losses) / len(self._losses)
        self._losses = []

    def _correct_momenta(self, done: int) -> None:
        """Let the running statistics of a step of N parts move as far as those of one batch with momentum m would.

        With m_i = (m / N) / (1 - (N - 1 - i) m / N) for part i from 0, running <- (1 - m) running + m mean over the parts:
        each weighs m / N, as it should. Means are then those of one batch; variances are so but for the variance between the
        means of parts, which vanishes as parts grow.
        """
        parts = self.recipe.accumulate
        if parts > 1:
            for norm, momentum in self._norms:
                norm.momentum = momentum / parts / (1 - (parts - 1 - done) * momentum / parts)

    def _diverged(self, what: str) -> TrainingDiverged:
        """The error that names the layer; every process looks, since norms may gather statistics of all."""
        told = culprit(self, lambda: self._latest and self.loss(*self._latest))
        return TrainingDiverged(
            f"{what}: {told}.",
            hint="Go on from the last checkpoint with --resume and a lower --learning-rate, or look for broken recordings.",
        )

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of the last validation."""
        self._errors = []

    def validation_step(self, batch: Batch, _: int) -> None:
        """Count the word errors of the average."""
        if batch.share:
            self._errors.append(batch_errors(partial(self.answer, self.averaged), batch, self.tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the word error rate, of what all processes have heard."""
        counts = ranks.summed(torch.tensor(astuple(total(self._errors)), device=self.device))
        self.log("dev_wer_percent", WordErrors(*counts.tolist()).wer_percent)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine; vectors (biases, norms) do not decay."""
        recipe, parameters = self.recipe, [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.peak_learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        schedule = LambdaLR(optimizer, lambda step: recipe.learning_rate_factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: object, **__: object) -> None:  # noqa: ARG002
        """Clip by the norm of the whole gradient; Lightning's own refuses fused optimizers, for a scaler that we lack."""
        parameters = [p for p in self.encoder.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.gradient_norm = float(norm)
        if not math.isfinite(self.gradient_norm):  # clipping would spread it over all layers
            raise self._diverged(f"The norm of the gradient of step {self.global_step} is {self.gradient_norm}")
        torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.largest_gradient, norm)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Move a batch; Lightning itself refuses to move frozen dataclasses."""
        return batch.to(device)


class Training(Steps):
    """CTC training, of pieces and characters."""

    def __init__(self, encoder: Encoder, tokens: Tokens, recipe: Recipe, steps: int) -> None:
        """``steps`` is the length of the learning rate schedule."""
        super().__init__(encoder, tokens, recipe, steps)
        self._encoded: list[Tensor] = []
        self.spelled = -(-encoder.config.reduction // SUBSAMPLING)  # characters per frame: speech has more than one in 80 ms
        self.characters = nn.Linear(encoder.config.dimension, self.spelled * len(characters_in(tokens)))
        encoder.ctc.register_forward_pre_hook(lambda _, inputs: self._encoded.append(inputs[0]))

    def loss(self, batch: Batch, context: Context) -> Tensor:
        """(1 - share) CTC(vocabulary) + share CTC(characters), per token.

        CTC(vocabulary) of a cascade is (1 - w) CTC(first pass) + w CTC(second pass) [I], the second over what the first gives in
        the context of the step, w the recipe's `second_pass_share`; the characters are read from the first pass.
        """
        heads, lengths = self._heads(batch, context)
        again = self.recipe.second_pass_share
        shares = (1 - again, again) if self.encoder.config.second_pass else (1.0,)
        share, encoded = self.recipe.character_share_at(self.global_step, self.steps), self._encoded.pop()
        loss = torch.zeros(())
        if share < 1:
            losses = [ctc_loss(logits, lengths, batch.targets, batch.target_lengths) for logits in heads]
            loss = (1 - share) * torch.stack([part * each for part, each in zip(shares, losses, strict=True)]).sum()
        if share > 0:
            spelling: Tensor = self.characters(encoded).unflatten(-1, (self.spelled, -1)).flatten(1, 2)
            loss = loss + share * ctc_loss(spelling, lengths * self.spelled, batch.characters, batch.character_lengths)
        return loss

    def _heads(self, batch: Batch, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
        """The logits of every head, and their lengths."""
        if self.encoder.config.second_pass:
            return self.encoder.answers(batch.features, batch.lengths, context), batch.lengths // self.encoder.config.reduction
        depth = draw_depth(self.recipe, self.encoder.config.layers, self.global_step)
        logits, lengths = self.encoder(batch.features, batch.lengths, context, depth)
        return (logits,), lengths


class Taught(Steps):
    """Training with a teacher beside the transcripts, or instead of them."""

    def __init__(self, encoder: Encoder, teacher: Encoder, tokens: Tokens, recipe: Recipe, steps: int) -> None:
        """The teacher is copied, and stays as it is."""
        super().__init__(encoder, tokens, recipe, steps)
        self.teacher = copy.deepcopy(teacher).requires_grad_(requires_grad=False)

    def loss(self, batch: Batch, context: Context) -> Tensor:
        """(1 - share) CTC per token + share KL(teacher || encoder) per frame."""
        logits, lengths = self.answer(self.encoder, batch.features, batch.lengths, context)
        share = self.recipe.teacher_share
        loss = torch.zeros(())
        if share < 1:
            loss = (1 - share) * ctc_loss(logits, lengths, batch.targets, batch.target_lengths)
        if share > 0:
            taught, _ = self.teacher(batch.features, batch.lengths, context)
            loss = loss + share * divergence(taught, logits, lengths)
        return loss


class FineTuning(Taught):
    """Training of a folded encoder for the bits that it will have."""

    def __init__(self, encoder: Encoder, rounding: Rounding, tokens: Tokens, recipe: Recipe, steps: int) -> None:
        """The encoder as it is now becomes the teacher."""
        super().__init__(encoder, encoder, tokens, recipe, steps)
        self.rounding = rounding

    def answer(self, encoder: Encoder, features: Tensor, lengths: Tensor, context: Context = FULL) -> tuple[Tensor, Tensor]:
        """With fewer bits."""
        return self.rounding.answer(encoder, features, lengths, context)


def divergence(taught: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    """Mean over all valid frames of KL(p || q), p and q the distributions of two batches of logits (B, T', V)."""
    valid = valid_frames(lengths, logits.shape[1])
    return F.kl_div(logits[valid].log_softmax(-1), taught[valid].log_softmax(-1), reduction="batchmean", log_target=True)


def ctc_loss(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Mean over the batch of the negative log-likelihood per token, in float32; logits (B, T', V)."""
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, targets, lengths, target_lengths, blank=BLANK_ID, zero_infinity=True)


def draw_context(recipe: Recipe, step: int, frame_ms: int) -> Context:
    """Full attention, or for ``chunked_share`` of the steps chunks with some past, as WeNet trains U2 (dynamic chunks)."""
    draw = Generator().manual_seed(recipe.seed * 1_000_003 + step)
    if float(torch.rand((), generator=draw)) >= recipe.chunked_share:
        return FULL
    spans = ((fewest // frame_ms, most // frame_ms + 1) for fewest, most in (CHUNK_MS, LEFT_MS))
    chunk, left = (int(torch.randint(max(1, fewest), most, (), generator=draw)) for fewest, most in spans)
    return Context(chunk, left)


def draw_depth(recipe: Recipe, layers: int, step: int) -> int | None:
    """N ~ Uniform{1..layers}, so many layers are run in a step (Layer Consistency, arXiv 2105.00812 [R abstract]); None: all."""
    if not recipe.sampled_depth:
        return None
    draw = Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return int(torch.randint(1, layers + 1, (), generator=draw))


@torch.no_grad()
def batch_errors(answer: Answer, batch: Batch, tokens: Tokens, context: Context = FULL) -> WordErrors:
    """Word errors of greedy search over one batch."""
    logits, lengths = answer(batch.features, batch.lengths, context)
    texts = [greedy_text(row[:count].float().cpu(), tokens) for row, count in zip(logits, lengths.tolist(), strict=True)]
    return count_word_errors(*units(batch.texts, texts))


def evaluate(answer: Answer, batches: Iterable[Batch], tokens: Tokens, context: Context = FULL) -> WordErrors:
    """Word errors of greedy search over a test set."""
    return total(batch_errors(answer, batch, tokens, context) for batch in batches)


def _average_in(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int, decay: float) -> None:
    """average <- average + (1 - d)(weight - average), with d rising to ``decay`` so that the start is soon forgotten."""
    number = float(count)
    torch._foreach_lerp_([*averages], [*weights], 1 - min(decay, (1 + number) / (10 + number)))

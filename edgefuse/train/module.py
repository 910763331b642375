"""The training step, as Lightning wants it.

The loss of a `Training` is CTC over the vocabulary and, from a second head on the same frames, CTC over characters (multi-task
CTC, Sanabria and Metze 2018). It hears characters alone at first: with word pieces in its loss an encoder stays for thousands of
steps where CTC begins, with the same few words for every utterance. The second head belongs to the training and is no part
of the checkpoint.

A `Taught` training has a teacher instead, the same encoder as it was before it lost its bits or its LayerNorms
(self-distillation, Hinton et al. 2015).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.tokens import BLANK_ID, Tokens, character_tokens
from edgefuse.errors import TrainingDiverged
from edgefuse.model import FULL, SUBSAMPLING, Context, Encoder
from edgefuse.model.streaming import valid_frames
from edgefuse.quantize.encoder import Rounding
from edgefuse.train.batches import Batch
from edgefuse.train.recipe import CHUNK_FRAMES, LEFT_FRAMES, Recipe
from edgefuse.verify.wer import WordErrors, count_word_errors

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
        """The loss of a batch."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.global_step)
        loss = self.loss(batch, draw_context(self.recipe, self.global_step))
        if not math.isfinite(float(loss.detach())):
            raise TrainingDiverged(
                f"The loss of step {self.global_step} is {float(loss.detach())}.",
                hint="Resume from the last epoch with a lower --learning-rate, or look for broken recordings.",
            )
        self.log("loss", loss.detach(), batch_size=len(batch.texts))
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Move the average towards the new weights."""
        self.average.update_parameters(self.encoder)

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of the last validation."""
        self._errors = []

    def validation_step(self, batch: Batch, _: int) -> None:
        """Count the word errors of the average."""
        self._errors.append(batch_errors(partial(self.answer, self.averaged), batch, self.tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the word error rate."""
        errors = sum(self._errors, WordErrors(0, 0, 0, 0, 0))
        self.log("dev_wer_percent", errors.wer_percent)

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
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.recipe.largest_gradient)

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
        self.characters = nn.Linear(encoder.config.dimension, self.spelled * len(character_tokens()))
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


def draw_context(recipe: Recipe, step: int) -> Context:
    """Full attention, or for ``chunked_share`` of the steps chunks with some past, as WeNet trains U2 (dynamic chunks)."""
    draw = Generator().manual_seed(recipe.seed * 1_000_003 + step)
    if float(torch.rand((), generator=draw)) >= recipe.chunked_share:
        return FULL
    chunk, left = (int(torch.randint(fewest, most + 1, (), generator=draw)) for fewest, most in (CHUNK_FRAMES, LEFT_FRAMES))
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
    return count_word_errors(batch.texts, texts)


def evaluate(answer: Answer, batches: Iterable[Batch], tokens: Tokens, context: Context = FULL) -> WordErrors:
    """Word errors of greedy search over a test set."""
    return sum((batch_errors(answer, batch, tokens, context) for batch in batches), WordErrors(0, 0, 0, 0, 0))


def _average_in(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int, decay: float) -> None:
    """average <- average + (1 - d)(weight - average), with d rising to ``decay`` so that the start is soon forgotten."""
    number = float(count)
    torch._foreach_lerp_([*averages], [*weights], 1 - min(decay, (1 + number) / (10 + number)))

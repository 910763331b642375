"""What happens beside the steps: checkpoints, an early end, curves for TensorBoard, lines for logs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from edgefuse.train import ranks
from edgefuse.train.module import Steps

CURVE_STEPS, LINE_STEPS = 20, 100
SECONDS = 60


class AtomicFile(TorchCheckpointIO):
    """A checkpoint that is on the disk whole before it takes the place of the one before it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:  # noqa: ARG002
        """Write beside the place, flush, rename; a power cut at any moment leaves one whole file."""
        place = Path(path)
        part = place.with_name(f"{place.name}.part")
        with part.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(place)


class Keep(Callback):
    """Write a checkpoint after every epoch, and between two steps whenever the last one is so many minutes old."""

    def __init__(self, training: Steps, place: Path, minutes: float) -> None:
        """The first is due so long after now."""
        self.training = training
        self.place, self.seconds = place, minutes * SECONDS
        self._written = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, _: object, __: object, batch_idx: int) -> None:
        """Between two steps: all counters of the last one are whole, and nothing of the next one is."""
        if batch_idx and batch_idx % self.training.recipe.accumulate == 0:
            due = time.monotonic() - self._written >= self.seconds
            if trainer.strategy.reduce_boolean_decision(due, all=False):
                self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, _: object) -> None:
        """After the epoch's word error rate is known."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.place)
        self._written = time.monotonic()


class Patience(Callback):
    """End after so many epochs without a better word error rate of the development set, and go back to the best average.

    Its state, the best average included, is part of every checkpoint.
    """

    def __init__(self, training: Steps, epochs: int) -> None:
        """Nothing is the best yet."""
        self.training, self.epochs = training, epochs
        self._best: float | None = None
        self._waited = 0
        self._weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training has to know."""
        return {"best": self._best, "waited": self._waited, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know it."""
        self._best, self._waited, self._weights = state["best"], state["waited"], state["weights"]

    def on_train_start(self, trainer: L.Trainer, _: object) -> None:
        """A training that had ended does not begin again."""
        trainer.should_stop = self._waited >= self.epochs

    def on_validation_end(self, trainer: L.Trainer, _: object) -> None:
        """Compare."""
        wer = float(trainer.callback_metrics["dev_wer_percent"])
        if self._best is None or wer < self._best:
            self._best, self._waited = wer, 0
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in self.training.averaged.state_dict().items()}
            return
        self._waited += 1
        if self._waited >= self.epochs:
            trainer.should_stop = True
            ranks.say(f"no better dev WER than {self._best:.2f} % for {self._waited} epochs")

    def restore(self) -> None:
        """Give the average the weights that it had at its best."""
        if self._weights:
            self.training.averaged.load_state_dict(self._weights)


class Curves(Callback):
    """Loss, learning rate, norm of the gradient, seconds per step and word error rate, for TensorBoard."""

    def __init__(self, training: Steps, folder: Path) -> None:
        """Nothing is written before the first step."""
        self.training, self.folder = training, folder
        self._writer: SummaryWriter | None = None
        self._since = (0.0, 0)

    def on_train_start(self, trainer: L.Trainer, _: object) -> None:
        """Begin, or go on: what an interrupted training has drawn behind its checkpoint is drawn again."""
        self._since = time.monotonic(), trainer.global_step
        if ranks.is_first():
            self._writer = SummaryWriter(str(self.folder), purge_step=trainer.global_step or None)

    def on_train_batch_end(self, trainer: L.Trainer, _: object, __: object, ___: object, batch_idx: int) -> None:
        """Draw a point now and then."""
        step = trainer.global_step
        if self._writer is None or (batch_idx + 1) % self.training.recipe.accumulate or step % CURVE_STEPS:
            return
        (began, first), now = self._since, time.monotonic()
        self._since = now, step
        self._draw("loss", self.training.step_loss, step)
        self._draw("learning rate", trainer.optimizers[0].param_groups[0]["lr"], step)
        self._draw("gradient norm", self.training.gradient_norm, step)
        self._draw("seconds per step", (now - began) / max(1, step - first), step)

    def on_validation_end(self, trainer: L.Trainer, _: object) -> None:
        """Draw the word error rate."""
        if self._writer is not None:
            self._draw("dev WER %", float(trainer.callback_metrics["dev_wer_percent"]), trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Close the file, however the training ended."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _draw(self, name: str, value: float, step: int) -> None:
        cast("SummaryWriter", self._writer).add_scalar(name, value, step)


class Lines(Callback):
    """Progress as lines, for logs: every hundred steps the loss, the rate and the time that is left."""

    def __init__(self, training: Steps) -> None:
        """The time that is left is counted from the first step on."""
        self.training, self.steps = training, training.steps
        self._began: tuple[float, int] | None = None
        self._losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, _: object, __: object, ___: object, batch_idx: int) -> None:
        """Print a line now and then."""
        if (batch_idx + 1) % self.training.recipe.accumulate:
            return
        self._losses.append(self.training.step_loss)
        now, step = time.monotonic(), trainer.global_step
        began, first = self._began = self._began or (now, step)
        if step % LINE_STEPS or step == first:
            return
        pace = (now - began) / (step - first)
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        left = max(0, self.steps - step) * pace / SECONDS
        ranks.say(
            f"epoch {trainer.current_epoch} step {step}/{self.steps} loss {loss:.3f} lr {rate:.2e} "
            f"{pace:.3f} s/step {left:.0f} min left"
        )

    def on_validation_end(self, trainer: L.Trainer, _: object) -> None:
        """Print the word error rate."""
        wer = float(trainer.callback_metrics.get("dev_wer_percent", float("nan")))
        ranks.say(f"epoch {trainer.current_epoch} dev WER {wer:.2f} %")

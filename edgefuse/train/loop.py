"""The training loop: batches, epochs, processes, and what is kept to go on from.

The same command trains on one CPU, on one GPU, and on many of either, where ``torchrun`` starts a process for each::

    torchrun --nproc-per-node 8 -m edgefuse train --speech CORPUS -o RUN
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 -m edgefuse train --speech CORPUS -o RUN

Each step then has as many times the speech, as if one process had so many times ``batch_seconds``. The first process alone
computes features, writes, prints, and tests at the end; only to resume do all have to find ``last.ckpt``. A training that was
killed at any moment ends, resumed on CPUs with as many processes, with the very weights of one that was not.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from edgefuse.decode.tokens import Tokens
from edgefuse.errors import MissingFile, OutputExists
from edgefuse.train import ranks
from edgefuse.train.batches import Batch, Batches, Share, made_ahead
from edgefuse.train.callbacks import AtomicFile, Curves, Keep, Lines, Patience
from edgefuse.train.module import Steps
from edgefuse.train.recipe import Recipe
from edgefuse.train.speech import EVALUATION_BATCH_SECONDS, Speech

LAST = "last.ckpt"
FOREIGN_WARNINGS = (
    ".*does not have many workers",  # one core has none to spare, and the features are in memory
    "Your `IterableDataset` has `__len__` defined",  # and its workers share its batches
    "You're resuming from a checkpoint that ended before the epoch ended",  # and our batches begin where it ended
    "Found .* in eval mode",  # a teacher is
    "You have overridden `transfer_batch_to_device`",  # in the module, as it should be
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 calls what PyTorch 2.13 renames
)
Precision = Literal["fp32", "bf16"]


def require_free_run(output: Path, *, resume: bool) -> None:
    """Raise an error where there is nothing to resume, or something that would be trained over."""
    if resume and not (output / LAST).is_file():
        raise MissingFile(f"There is no {output / LAST} to resume from.", hint="Leave --resume away.")
    if not resume and (output / LAST).exists():
        raise OutputExists(f"{output} holds a training already.", hint="Go on with --resume, or choose another folder.")


def run(training: Steps, batches: EpochBatches, output: Path, *, resume: bool, precision: Precision) -> None:
    """Take every step, or those that are left behind ``last.ckpt``."""
    recipe, place = training.recipe, output / LAST
    patience = Patience(training, recipe.patience) if recipe.patience else None
    beside = [patience] if patience else []
    with _quiet():
        trainer = L.Trainer(
            **_machines(),
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=recipe.epochs,
            limit_train_batches=recipe.epoch_batches and recipe.epoch_batches * recipe.accumulate,
            accumulate_grad_batches=recipe.accumulate,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty() and ranks.is_first(),
            enable_checkpointing=False,
            logger=False,
            plugins=[AtomicFile()],
            callbacks=[
                *beside,
                Lines(training),
                Curves(training, output / "curves"),
                Keep(training, place, recipe.checkpoint_minutes),
            ],
            default_root_dir=output,
        )
        trainer.fit(training, datamodule=batches, ckpt_path=place if resume else None, weights_only=False)
    if patience:
        patience.restore()


class EpochBatches(L.LightningDataModule):
    """Training batches of the current epoch, and the development set."""

    def __init__(self, corpus: Speech, dev: Speech, tokens: Tokens, recipe: Recipe) -> None:
        """The development set is normalized as the training speech is."""
        super().__init__()
        self.corpus, self.tokens, self.recipe = corpus, tokens, recipe
        self.dev = replace(dev, store=replace(dev.store, mean=corpus.store.mean, istd=corpus.store.istd))
        self._done = (0, 0)  # an epoch, and how many of its batches

    @property
    def steps(self) -> int:
        """Of the whole training, if every epoch is as long as the first; they differ by a few, unless the recipe limits them."""
        first = len(self._batches(0)) // self.recipe.accumulate
        return self.recipe.epochs * min(first, self.recipe.epoch_batches or first)

    def train_dataloader(self) -> DataLoader[Batch] | Batches:
        """The batches of this epoch; of one that was interrupted, those that are left."""
        epoch = cast("L.Trainer", self.trainer).current_epoch
        return made_ahead(self._batches(epoch, skip=self._done[1] if epoch == self._done[0] else 0), self.recipe.workers)

    def val_dataloader(self) -> Batches:
        """The development set, in order; every process hears a part of each batch."""
        share = Share(ranks.world(), (ranks.rank(),))
        return self.dev.batches(self.tokens, EVALUATION_BATCH_SECONDS, learnt=False, share=share)

    def state_dict(self) -> dict[str, Any]:
        """The epoch that is under way, and how many of its batches are done."""
        trainer = cast("L.Trainer", self.trainer)
        return {"done": (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.completed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._done = state["done"]

    def _batches(self, epoch: int, skip: int = 0) -> Batches:
        """One after another, the parts of each batch that fall to this process."""
        recipe, world = self.recipe, ranks.world()
        return self.corpus.batches(
            self.tokens,
            recipe.batch_seconds,
            seed=recipe.seed,
            epoch=epoch,
            augmentation=recipe.augmentation,
            share=Share(world * recipe.accumulate, range(ranks.rank(), world * recipe.accumulate, world), skip),
        )


def usual_precision() -> Precision:
    """bf16 where it is fast: on a GPU, and on a CPU that multiplies it; others take six times as long as with fp32 [M, AVX2]."""
    cpu = torch.cpu.get_capabilities()
    multiplied = any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16" if torch.cuda.is_available() or multiplied else "fp32"


def _machines() -> dict[str, Any]:
    """What Lightning is told of the processes that torchrun has started; without it, one CPU or one GPU.

    A head that has no share of the loss yet has no gradient, in any process.
    """
    if ranks.world() == 1:
        return {"accelerator": "auto", "devices": 1}
    local = ranks.local_world()
    strategy = DDPStrategy(find_unused_parameters=True)
    return {"accelerator": "auto", "devices": local, "num_nodes": ranks.world() // local, "strategy": strategy}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advertising, and without its warnings about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield

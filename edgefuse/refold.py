"""A checkpoint in, a folded model out, its batch statistics estimated again on the way if that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.errors import UsageError
from edgefuse.fold import Exactness, exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.lower import Chunks
from edgefuse.model import FULL, Context
from edgefuse.model.reestimate import reestimate
from edgefuse.recognize import frontend_of, hear
from edgefuse.speech import TestSet, read_speech
from edgefuse.values import Checkpoint, FoldedModel

BATCH_FRAMES = 12_000  # two minutes of speech: what differs from one utterance to the next must be inside a batch


def refold(
    folder: Path, output: Path, *, speech: Path | None = None, chunks: Chunks | None = None, overwrite: bool = False
) -> tuple[FoldedModel, Exactness]:
    """Fold a checkpoint and write the folded model; with `speech`, its batch statistics are estimated again before.

    They are those of whole utterances, or of the `chunks` in which the model will be fed.
    """
    checkpoint = checkpoints.read(folder)
    if speech is None and chunks is not None:
        raise UsageError("Chunks change nothing but the statistics.", hint="Say on which speech: --reestimate SPEECH")
    if speech is not None:
        checkpoint = reestimated(
            checkpoint, read_speech(speech), Context(*chunks.frames(checkpoint.config.frame_ms)) if chunks else FULL
        )
    folded, exact = fold_exactly(folder, checkpoint)
    store.write_folded(output, folded, exact, overwrite=overwrite)
    return folded, exact


def fold_exactly(folder: Path, checkpoint: Checkpoint) -> tuple[FoldedModel, Exactness]:
    """The fold of a checkpoint that was read from `folder`, and how exact it is; above the bound it is a `FoldInexact`.

    What `edgefuse fold` has written keeps the plan and the parent that it was written with.
    """
    written = store.read_plan(folder, checkpoint) if checkpoint.config.folded else None
    folded = written or fold(checkpoint)
    exact = exactness(checkpoint, folded, *probe(checkpoint.config.mel_bins))
    exact.require()
    return folded, exact


def reestimated(checkpoint: Checkpoint, speech: TestSet, context: Context = FULL) -> Checkpoint:
    """The same weights with batch statistics of this speech; a checkpoint without batch norms is a `UsageError`."""
    if not any(name.endswith("running_var") for name in checkpoint.weights):
        raise UsageError("There are no batch statistics in this checkpoint.", hint="Fold it without --reestimate.")
    encoder = checkpoints.encoder_of(checkpoint)
    config = checkpoint.config
    longest = config.max_frames * config.reduction
    heard = [each.features for each in hear(speech, frontend_of(checkpoint)) if len(each.features) <= longest]
    reestimate(encoder, _batches(heard), context)
    return checkpoints.of_encoder(encoder, checkpoint.frontend_mean, checkpoint.frontend_istd, checkpoint.tokens)


def _batches(heard: Sequence[NDArray[np.float32]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Utterances (T, mel_bins) of similar length together, padded: a norm that is measured sees one batch at a time."""
    batch: list[Tensor] = []
    for features in sorted(heard, key=len):
        batch.append(torch.from_numpy(features))
        if len(batch) * len(features) >= BATCH_FRAMES:
            yield _padded(batch)
            batch = []
    if batch:
        yield _padded(batch)


def _padded(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(batch, batch_first=True), torch.tensor([len(features) for features in batch])

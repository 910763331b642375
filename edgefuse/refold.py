"""A checkpoint in, a folded model out, its batch statistics estimated again on the way if that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.depth import depends_on_depth, lowest
from edgefuse.errors import UsageError
from edgefuse.fold import Exactness, exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.lower import Chunks
from edgefuse.model import FULL, Context
from edgefuse.model.reestimate import reestimate
from edgefuse.recognize import frontend_of, hear
from edgefuse.speech import TestSet, read_speech
from edgefuse.values import Checkpoint, FoldedModel, Origin

BATCH_FRAMES = 12_000  # two minutes of speech: what differs from one utterance to the next must be inside a batch


def refold(
    folder: Path,
    output: Path,
    *,
    depth: int | None = None,
    speech: Path | None = None,
    chunks: Chunks | None = None,
    overwrite: bool = False,
) -> tuple[FoldedModel, Exactness]:
    """Fold a checkpoint, or its lowest `depth` blocks, and write the folded model.

    With `speech`, its batch statistics are estimated again before. They are those of whole utterances, or of the `chunks` in
    which the model will be fed.
    """
    if speech is None and chunks is not None:
        raise UsageError("Chunks change nothing but the statistics.", hint="Say on which speech: --reestimate SPEECH")
    checkpoint, origin = to_fold(folder, depth, None if speech is None else read_speech(speech), chunks)
    folded, exact = fold_exactly(folder, checkpoint)
    folded = replace(folded, origin=origin or folded.origin)
    store.write_folded(output, folded, exact, overwrite=overwrite)
    return folded, exact


def to_fold(
    folder: Path, depth: int | None, speech: TestSet | None, chunks: Chunks | None = None
) -> tuple[Checkpoint, Origin | None]:
    """Read a checkpoint, take its lowest `depth` blocks if it has more, estimate its statistics on `speech` if there is some.

    Beside it, what it was cut from.

    Raises:
        UsageError: a depth that there is not, or at which its statistics would be wrong.
    """
    whole = checkpoints.read(folder)
    checkpoint = whole if depth is None else lowest(whole, depth)
    is_cut = checkpoint.config.layers < whole.config.layers
    if is_cut and speech is None and depends_on_depth(whole):
        raise UsageError(
            f"The batch statistics of {folder} are those of {whole.config.layers} layers, not of {depth}.",
            hint="Say on which speech they are estimated again: --reestimate SPEECH",
        )
    if speech is not None:
        context = chunks.context(checkpoint.config.frame_ms) if chunks else FULL
        checkpoint = reestimated(checkpoint, speech, context)
    return checkpoint, Origin(whole.digest, whole.config.layers, speech.digest if speech else "") if is_cut else None


def fold_exactly(folder: Path, checkpoint: Checkpoint) -> tuple[FoldedModel, Exactness]:
    """The fold of a checkpoint that was read from `folder`, and how exact it is; above the bound it is a `FoldInexact`.

    What `edgefuse fold` has written keeps the plan and the parent that it was written with.
    """
    written = store.read_plan(folder, checkpoint) if checkpoint.config.folded else None
    folded = written or fold(checkpoint)
    exact = exactness(checkpoint, folded, *probe(checkpoint.config.mel_bins))
    exact.require()
    return folded, exact


def has_statistics(checkpoint: Checkpoint) -> bool:
    """Whether it has norms with statistics of batches."""
    return any(name.endswith("running_var") for name in checkpoint.weights)


def require_apart(speech: TestSet, test_set: TestSet) -> None:
    """Raise a `UsageError` where statistics would be estimated on what is tested on."""
    if tested := {each.sha256 for each in test_set.utterances} & {each.sha256 for each in speech.utterances}:
        raise UsageError(
            f"{len(tested)} recordings of {speech.folder} are in the test set, too: what is estimated on is never tested on.",
            hint="Name other speech with --reestimate.",
        )


def reestimated(checkpoint: Checkpoint, speech: TestSet, context: Context = FULL) -> Checkpoint:
    """The same weights with batch statistics of this speech; a checkpoint without batch norms is a `UsageError`."""
    if not has_statistics(checkpoint):
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

"""Batch statistics of a finished network, measured again.

Averaged weights do not have the averaged statistics of the networks that they are an average of, and statistics from
training are those of augmented speech. Both shift a norm, and the fold would make the shift permanent. Batch norms and RepBN have
means and variances, Unified Normalization second moments.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from edgefuse.errors import EmptyAudio
from edgefuse.model.fusionformer import Encoder
from edgefuse.model.normalization import SMALLEST_VARIANCE, BatchNorm, UnifiedNorm
from edgefuse.model.streaming import FULL, Context


@torch.no_grad()
def reestimate(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]], context: Context = FULL) -> int:
    """Set every running mean, variance and second moment to its average over the valid frames of ``batches``, in place.

    Each batch is (features (B, T, 80), normalized; lengths (B,), in feature frames). A batch weighs as much as it has
    valid frames: with n of N frames so far, running = (1 - n/N) running + n/N batch. Dropout is off, and the mode of the
    encoder is what it was. Of several processes each estimates for itself. Without such norms nothing is read. Returns the
    number of feature frames that were used.
    """
    norms = [m for m in encoder.modules() if isinstance(m, BatchNorm | UnifiedNorm)]
    if not norms:
        return 0
    was_training, momenta = encoder.training, [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.estimating = True
    frames = _accumulate(encoder, norms, batches, context)
    encoder.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.estimating = momentum, False
        assert norm.running_var is not None, "running statistics are always tracked"  # noqa: S101 - see `BatchNorm`
        norm.running_var.clamp_min_(SMALLEST_VARIANCE)
    return frames


def _accumulate(
    encoder: Encoder, norms: list[BatchNorm | UnifiedNorm], batches: Iterable[tuple[Tensor, Tensor]], context: Context
) -> int:
    frames = 0
    for features, lengths in batches:
        now = int(lengths.sum())
        frames += now
        for norm in norms:
            norm.momentum = now / frames
        encoder.answers(features, lengths, context)  # every head's norm hears them
    if not frames:
        raise EmptyAudio("There is no speech to estimate the batch statistics from.", hint="Pass more to --reestimate.")
    return frames

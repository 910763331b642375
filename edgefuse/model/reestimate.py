"""Batch statistics of a finished network, measured again.

Averaged weights do not have the averaged statistics of the networks that they are an average of, and statistics from
training are those of augmented speech. Both shift a batch norm, and the fold would make the shift permanent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from edgefuse.errors import EmptyAudio
from edgefuse.model.fusionformer import Encoder
from edgefuse.model.streaming import FULL, Context

SMALLEST_VARIANCE = 1e-8  # behind a ReLU that never opens a channel is constant; any positive variance says the same


@torch.no_grad()
def reestimate(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]], context: Context = FULL) -> int:
    """Set every running mean and variance to its average over the valid frames of ``batches``, in place.

    Each batch is (features (B, T, 80), normalized; lengths (B,), in feature frames). A batch weighs as much as it has
    valid frames: with n of N frames so far, running = (1 - n/N) running + n/N batch. Dropout is off, and the mode of the
    encoder is what it was. Without batch norms nothing is read. Returns the number of feature frames that were used.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    if not norms:
        return 0
    was_training, momenta = encoder.training, [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    frames = _accumulate(encoder, norms, batches, context)
    encoder.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        cast("Tensor", norm.running_var).clamp_min_(SMALLEST_VARIANCE)
    return frames


def _accumulate(encoder: Encoder, norms: list[nn.BatchNorm1d], batches: Iterable[tuple[Tensor, Tensor]], context: Context) -> int:
    frames = 0
    for features, lengths in batches:
        now = int(lengths.sum())
        frames += now
        for norm in norms:
            norm.momentum = now / frames
        encoder(features, lengths, context)
    if not frames:
        raise EmptyAudio("There is no speech to estimate the batch statistics from.", hint="Pass more to --reestimate.")
    return frames

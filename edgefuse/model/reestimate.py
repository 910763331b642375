"""Batch statistics of a finished network, measured again.

Averaged weights do not have the averaged statistics of the networks that they are an average of. That shifts a norm, and the fold
would make the shift permanent. Batch norms and RepBN have means and variances, Unified Normalization second moments.

What they are measured on should be what the network was trained on. One that has learnt from loud, faint and noisy speech has
learnt where clean speech lies among it, and takes clean speech alone for something else: of fusionformer-tiny 1.1 % of the words
became 1.8 % wrong in known voices, and 8.4 became 10.7 % in an unknown one [M].

A norm of a block that is shared runs once per layer, and has one mean and one variance for all of them: those of everything that
it sees at any depth, the differences between the depths included, which no average of variances has. Running statistics of a
training are none of these: the last depth of the last step weighs the most in them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edgefuse.errors import EmptyAudio
from edgefuse.model.fusionformer import Encoder
from edgefuse.model.normalization import SMALLEST_VARIANCE, BatchNorm, UnifiedNorm
from edgefuse.model.streaming import FULL, Context

Heard = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Context]


@torch.no_grad()
def reestimate(encoder: Encoder, batches: Iterable[Heard], context: Context = FULL) -> int:
    """Set every running mean, variance and second moment to its average over the valid frames of ``batches``, in place.

    Each batch is (features (B, T, 80), normalized; lengths (B,), in feature frames; how far attention looks in it, where that
    is not ``context``). A batch weighs as much as it has
    valid frames: with n of N frames so far, running = (1 - n/N) running + n/N batch; in shared blocks every frame at every depth
    weighs the same. Dropout is off, and the mode of the
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
    mixtures = _mixtures(encoder)
    frames = _accumulate(encoder, norms, batches, context)
    for mixture in mixtures:
        mixture.settle()
    encoder.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.estimating = momentum, False
        assert norm.running_var is not None, "running statistics are always tracked"  # noqa: S101 - see `BatchNorm`
        norm.running_var.clamp_min_(SMALLEST_VARIANCE)
    return frames


def _accumulate(encoder: Encoder, norms: list[BatchNorm | UnifiedNorm], batches: Iterable[Heard], context: Context) -> int:
    frames = 0
    for features, lengths, *own in batches:
        now = int(lengths.sum())
        frames += now
        for norm in norms:
            norm.momentum = now / frames
        encoder.answers(features, lengths, *(own or (context,)))  # every head's norm hears them
    if not frames:
        raise EmptyAudio("There is no speech to estimate the batch statistics from.", hint="Pass more to --reestimate.")
    return frames


def _mixtures(encoder: Encoder) -> list[_Mixture]:
    """What listens to each norm that runs several times."""
    shared = (
        [m for m in encoder.blocks.modules() if isinstance(m, BatchNorm | UnifiedNorm)] if encoder.config.shared_blocks else []
    )
    return [_Mixture(norm) for norm in shared]


class _Mixture:
    """Moments of all valid frames that a norm sees, in whichever run: mean = sum x / n, var = sum x^2 / n - mean^2."""

    def __init__(self, norm: BatchNorm | UnifiedNorm) -> None:
        """Listen from now on."""
        self._norm, self._count = norm, 0
        self._sum, self._squares = (torch.zeros_like(norm.weight, dtype=torch.float64) for _ in range(2))
        self._handle = norm.register_forward_pre_hook(self._hear)

    def settle(self) -> None:
        """Write them into the norm, and listen no more."""
        self._handle.remove()
        if not self._count:
            return
        mean, second = self._sum / self._count, self._squares / self._count
        running = self._norm.running_var
        assert running is not None, "running statistics are always tracked"  # noqa: S101 - see `BatchNorm`
        if isinstance(self._norm, BatchNorm) and self._norm.running_mean is not None:
            self._norm.running_mean.copy_(mean)
            running.copy_(second - mean.square())
        else:
            running.copy_(second)

    def _hear(self, _: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        x, valid = inputs
        rows = x[valid].double()
        rows = rows.reshape(-1, rows.shape[-1])
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._squares += rows.square().sum(0)

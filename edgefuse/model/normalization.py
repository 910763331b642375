"""Normalizations that count valid frames only, never padding.

All with statistics of the batch are a `StatisticsNorm`: in evaluation each is one multiplication and one addition per channel,
which the fold absorbs. Where several processes train together, a batch is what they hold together.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.weak import WeakIdKeyDictionary

from edgefuse.model.unified import WARM_UP, WINDOW, Step, unified_norm

EPSILON = 1e-5
SMALLEST_VARIANCE = 1e-8  # behind a ReLU that never opens a channel is constant; any positive variance says the same
FEWEST_FOR_COLUMNS = 100_000  # rows, on a GPU: 800,000 of 48 channels take it 20 ms, and 2 ms as one long (1, C, N) [M, H200]
COUNTERS = ("num_batches_tracked", "skip_counter")  # integers
STATISTICS = ("running_mean", "running_var", "ema_gz", "buffer_x2", "buffer_gz", *COUNTERS)  # what no optimizer moves


class StatisticsNorm(nn.Module):
    """A norm whose statistics are those of the valid frames of a batch in training, and running ones in evaluation.

    Attributes:
        momentum: share of the newest batch in the running statistics.
        estimating: statistics are measured again: batch by batch as they come, and by each process for itself.
    """

    momentum: float | None
    estimating = False

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Normalize (B, T, ..., C), channels last; `valid` is a (B, T) boolean mask. Padding becomes zeros in training."""
        if not self.training:
            return self.normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        frames = x.flatten(0, 1)
        index = _places(valid)
        rows = frames.index_select(0, index)
        rows = self.normalize(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return torch.zeros_like(frames, dtype=rows.dtype).index_copy(0, index, rows).reshape(x.shape)

    def normalize(self, rows: Tensor) -> Tensor:
        """(N, C), every row a valid frame."""
        raise NotImplementedError

    @property
    def together(self) -> bool:
        """Whether the statistics are those of several processes."""
        return not self.estimating and distributed.is_available() and distributed.is_initialized() and _processes() > 1


class BatchNorm(StatisticsNorm, nn.BatchNorm1d):  # type: ignore[misc]  # channels are last here, and there is a mask
    """y = gamma * (x - mu) / sqrt(var + eps) + beta, per channel.

    In training mu and var are over the valid frames of the batch (WeNet's padding would otherwise enter them); in evaluation
    they are the running statistics, and the norm is one multiplication and one addition that the fold absorbs.
    """

    def normalize(self, rows: Tensor) -> Tensor:
        """(N, C), as `nn.BatchNorm1d` does it."""
        assert self.num_batches_tracked is not None, "running statistics are always tracked"  # noqa: S101 - see __init__
        if self.training:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        if self.training and self.together:
            return self._normalize_together(rows, momentum)
        state = (self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps)
        if rows.is_cuda and len(rows) > FEWEST_FOR_COLUMNS:
            return F.batch_norm(rows.T[None], *state)[0].T
        return F.batch_norm(rows, *state)

    def _normalize_together(self, rows: Tensor, momentum: float) -> Tensor:
        """With the mean and variance of the rows of all processes: sum, sum of squares and count, of what is left of the mean.

        The sums are of x - running mean, which all processes share: squares of the deviation lose nothing to a large mean.
        """
        assert self.running_mean is not None and self.running_var is not None, "as above"  # noqa: S101, PT018
        wide = rows.to(self.running_mean.dtype) - self.running_mean
        count = wide.new_full((1,), len(wide))
        sums: Tensor = AllReduce.apply(torch.cat((wide.sum(0), wide.square().sum(0), count)))  # type: ignore[no-untyped-call]
        first, second = (sums[:-1] / sums[-1]).chunk(2)
        var = (second - first.square()).clamp_min(0.0)
        with torch.no_grad():
            self.running_var.lerp_(var * (sums[-1] / (sums[-1] - 1)), momentum)
            self.running_mean.add_(first, alpha=momentum)
        normalized = (wide - first) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return normalized.to(rows.dtype)


class RepBatchNorm(BatchNorm):
    """RepBN(x) = BN(x) + alpha x, alpha one number for all channels that begins as 1 (SLAB [R code])."""

    def __init__(self, channels: int) -> None:
        """A batch norm with a way around it."""
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def normalize(self, rows: Tensor) -> Tensor:
        """(N, C)."""
        return super().normalize(rows) + self.alpha.to(rows.dtype) * rows


class UnifiedNorm(StatisticsNorm):
    """Unified Normalization (arXiv 2208.01313): y = gamma * x / sqrt(sigma2 + eps) + beta, per channel, nothing subtracted.

    sigma2 is the running second moment in evaluation. In training it is the batch's own until the warm-up is over, then the
    geometric mean over a window of the last batches; the backward pass is the window's too. See `edgefuse.model.unified`.

    Every forward pass in training is one iteration of the warm-up and of the windows. With gradients accumulated over several
    batches each of them is an iteration, as for a batch norm, and each backward pass ends the iteration of its own forward
    pass, whatever came between. All state is in float32 buffers (float64 in a float64 model), so that a resumed training
    goes on exactly.
    """

    running_var: Tensor
    ema_gz: Tensor
    num_batches_tracked: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(self, channels: int, window: int = WINDOW, warm_up: int = WARM_UP, *, outlier_filtration: bool = False) -> None:
        """`window` batches forward and backward, after `warm_up` iterations; filtration is off, as for text [R]."""
        super().__init__()
        self.window, self.warm_up, self.outlier_filtration = window, warm_up, outlier_filtration
        self.eps, self.momentum = EPSILON, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("buffer_x2", torch.zeros(window, channels))
        self.register_buffer("buffer_gz", torch.zeros(window, channels))
        for name in COUNTERS:
            self.register_buffer(name, torch.tensor(0))

    def normalize(self, rows: Tensor) -> Tensor:
        """(N, C)."""
        if not self.training:
            return rows * (self.weight * torch.rsqrt(self.running_var + self.eps)) + self.bias
        x2 = self.mean(rows.detach().to(self.running_var.dtype).square()).clamp_min(SMALLEST_VARIANCE)
        if self.estimating:
            step = Step(x2, torch.ones_like(x2), plain=True, skip=False, slot=0)
            self.running_var.lerp_(x2, self.momentum or 0.0)
        else:
            step = self._advance(x2)
        return unified_norm(rows, self, step)

    def mean(self, rows: Tensor) -> Tensor:
        """(N, C) to (C,): over the frames of all processes."""
        if not self.together:
            return rows.mean(0)
        sums = torch.cat((rows.sum(0), rows.new_full((1,), len(rows))))
        distributed.all_reduce(sums)
        return sums[:-1] / sums[-1]

    def restart(self) -> None:
        """Warm up again, as a training that begins with trained weights should [R]."""
        self.num_batches_tracked.zero_()

    def reset_running_stats(self) -> None:
        """Forget all statistics."""
        for name in STATISTICS:
            if name != "running_mean":
                getattr(self, name).zero_()
        self.running_var.fill_(1.0)

    def _advance(self, x2: Tensor) -> Step:
        """One iteration: the batch's second moment into the window, and what the passes compute with (steps 1 to 8 [R])."""
        self.num_batches_tracked.add_(1)
        iteration = int(self.num_batches_tracked)
        slot = iteration % self.window
        recorded = self.buffer_x2.sqrt().var()
        self.buffer_x2[slot] = x2
        skip = self.window <= 1 or self._is_outlier(iteration, recorded)
        if skip and self.window > 1:
            self.buffer_x2[slot] = self.running_var
            self.skip_counter.add_(1)
        plain = skip or iteration <= self.window or iteration < self.warm_up
        var = x2 if plain else self._geometric_mean()
        ratio = torch.ones_like(var)
        if not skip and iteration > max(FEWEST_BEFORE_RATIO, self.warm_up):
            ratio = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        self.running_var.lerp_(var, self.momentum or 0.0)
        return Step(var, ratio, plain=plain, skip=skip, slot=slot)

    def _is_outlier(self, iteration: int, recorded: Tensor) -> bool:
        """Whether AM - GM of the new window exceeds M times the variance of the roots of the one before, in any channel."""
        if not self.outlier_filtration or iteration < self.warm_up:
            return False
        gap = self.buffer_x2.mean(0) - self._geometric_mean()
        return bool((gap > recorded * self.window).any())

    def _geometric_mean(self) -> Tensor:
        """Of the window; slots that no batch has filled yet are as good as empty."""
        return self.buffer_x2.clamp_min(SMALLEST_VARIANCE).log().mean(0).exp()


FEWEST_BEFORE_RATIO, LARGEST_RATIO = 1000, 5.0  # iterations before the backward scale is more than 1, and its clamp [R]


class LayerNorm(nn.LayerNorm):
    """Layer normalization over channels; takes and ignores the mask, so that norms are interchangeable."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG002 - see above
        """Normalize (B, T, C) over its last axis."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class NoNorm(nn.Module):
    """Where another configuration has a norm."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # noqa: ARG002 - see `LayerNorm`
        """Return x."""
        return x


class AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient, that of the sum of their losses."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004 - autograd's form
        """The sum."""
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # noqa: ARG004 - as above
        """The sum of what each process has to say."""
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


def _places(valid: Tensor) -> Tensor:
    """Where a mask is True, flat. All norms of a step ask for the same few masks, and a GPU keeps one waiting for each answer."""
    if valid not in _PLACES:
        _PLACES[valid] = valid.flatten().nonzero().squeeze(1)
    return cast("Tensor", _PLACES[valid])


_PLACES = WeakIdKeyDictionary()


def _processes() -> int:
    return int(distributed.get_world_size())

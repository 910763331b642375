"""Batch normalization that counts valid frames only, never padding."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5


class BatchNorm(nn.BatchNorm1d):
    """y = gamma * (x - mu) / sqrt(var + eps) + beta, per channel.

    In training mu and var are over the valid frames of the batch (WeNet's padding would otherwise enter them); in evaluation
    they are the running statistics, and the norm is one multiplication and one addition that the fold absorbs.
    """

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize (B, T, ..., C), channels last; `valid` is a (B, T) boolean mask."""
        if not self.training:
            return self._normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        frames = x.flatten(0, 1)
        index = valid.flatten().nonzero().squeeze(1)
        rows = frames.index_select(0, index)
        rows = self._normalize(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return torch.zeros_like(frames, dtype=rows.dtype).index_copy(0, index, rows).reshape(x.shape)

    def _normalize(self, rows: Tensor) -> Tensor:
        """(N, C), as `nn.BatchNorm1d` does it."""
        if self.training:
            cast("Tensor", self.num_batches_tracked).add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(cast("Tensor", self.num_batches_tracked))
        return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps)


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

"""The passes of Unified Normalization (arXiv 2208.01313; its repository, read in full [R]).

With x2 the mean of x^2 per channel over the valid frames of a batch, var what the forward pass divides by, and r the ratio of
this scale to the running one:

    forward     z = x / sqrt(var + eps),  y = gamma z + beta
    backward    g = dY gamma r,  gz = mean of g z over the valid frames
                dX = (g - psi z) / sqrt(var + eps),  dgamma = sum of dY r z,  dbeta = sum of dY

psi is a moving average of gz, itself averaged over a window; a batch that was filtered out as an outlier has its own gz. So dX
is no derivative of y after the warm-up: it is the one that the paper trains with. r never enters the forward pass. In
the repository padding enters gz; here it does not [I].
"""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from edgefuse.model.normalization import UnifiedNorm

WINDOW, WARM_UP = 4, 4000  # batches, iterations [R]


class Step(NamedTuple):
    """What one iteration computes with.

    Attributes:
        var: (C,) what the forward pass divides by, squared.
        ratio: (C,) r.
        plain: the statistics are the batch's own, not the window's.
        skip: the batch was filtered out.
        slot: its place in the windows.
    """

    var: Tensor
    ratio: Tensor
    plain: bool
    skip: bool
    slot: int


def unified_norm(rows: Tensor, norm: "UnifiedNorm", step: Step) -> Tensor:
    """(N, C) valid frames, normalized; the backward pass moves the gradient statistics of `norm`."""
    return cast("Tensor", _UnifiedNorm.apply(rows, norm.weight, norm.bias, norm, step))  # type: ignore[no-untyped-call]


class _UnifiedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, norm: "UnifiedNorm", step: Step) -> Tensor:  # noqa: ANN401 - autograd's form
        scale = torch.rsqrt(step.var + norm.eps)
        z = rows.to(scale.dtype) * scale
        ctx.norm, ctx.step = norm, step
        ctx.save_for_backward(z, weight, scale)
        return (z * weight + bias).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: ANN401
        z, weight, scale = ctx.saved_tensors
        step: Step = ctx.step
        wide = gradient.to(z.dtype)
        g = wide * (weight * step.ratio)
        psi = _gradient_statistic(ctx.norm, step, ctx.norm.mean(g * z))
        rows = (g - psi * z) * scale
        return rows.to(gradient.dtype), (wide * z).sum(0) * step.ratio, wide.sum(0), None, None


def _gradient_statistic(norm: "UnifiedNorm", step: Step, gz: Tensor) -> Tensor:
    """psi: the batch's gz into the window, its mean into the moving average."""
    norm.buffer_gz[step.slot] = norm.ema_gz if step.skip else gz
    mean_gz = gz if step.plain else norm.buffer_gz.mean(0)
    norm.ema_gz.lerp_(mean_gz, norm.momentum or 0.0)
    return mean_gz if step.skip else norm.ema_gz.clone()

"""Where a conversion begins: each module's successor as close to it as it can be, on what it is given in the Conformer.

Fitted from the bottom up instead, each on what comes out of those that were fitted before it, the network is no closer (KL 4.2
against 4.0 on an earlier Conformer) [M].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder
from edgefuse.model.normalization import LayerNorm, RepBatchNorm
from edgefuse.train.annealed import MixedReLU, ShiftedReLU

GAINS = (0.05, 2.0)  # within which c stays: a channel that almost never opens would say anything
FLAT = 1e-8  # variance of a channel that says nothing
GATE_STEPS, GATE_ROWS, GATE_RATES = 300, 1024, (5e-3, 1e-3)  # frames a step; the rate of the first two thirds and the last


@dataclass
class _Seen:
    """What a module took and gave, (N, C): valid frames of all batches."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def begin_close(encoder: Encoder, before: Encoder, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit every successor in `encoder`, in place, to what its module in the Conformer `before` gives.

    Over speech: (features (B, T, mels), lengths (B,)).
    """
    found: dict[str, _Seen] = {}
    now: list[Tensor] = []  # the mask of the frames that run through the encoder

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, LayerNorm):
            now[:] = [inputs[1]]
        seen = found.setdefault(name, _Seen([], []))
        seen.inputs.append(inputs[0][now[0]])
        seen.outputs.append(output[now[0]])

    before.eval()
    modules = (each for each in before.named_modules() if isinstance(each[1], LayerNorm | nn.SiLU | nn.GLU))
    handles = [module.register_forward_hook(partial(watch, name)) for name, module in modules]
    for features, lengths in batches:
        before.answers(features, lengths)
    for handle in handles:
        handle.remove()
    for name, seen in found.items():
        _fit(encoder.get_submodule(name), torch.cat(seen.inputs), torch.cat(seen.outputs))


def _fit(successor: nn.Module, x: Tensor, y: Tensor) -> None:
    """Of what a module takes, (N, C), what its successor should give."""
    if isinstance(successor, RepBatchNorm):
        mean, var, slope, offset = _line(x, y)
        successor.weight.copy_(slope * (var + successor.eps).sqrt())
        successor.bias.copy_(offset + slope * mean)
        cast("Tensor", successor.running_mean).copy_(mean)
        cast("Tensor", successor.running_var).copy_(var)
    if isinstance(successor, ShiftedReLU):
        mean, _, slope, _ = _line(F.relu(x), y)
        successor.gain.copy_(slope.clamp(*GAINS))
        successor.offset.copy_(y.mean(0) - successor.gain * mean)
    if isinstance(successor, MixedReLU):
        _descend(successor, x, y)


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of x, slope and offset of the regression of y on x, per channel."""
    x, y = x.double(), y.double()
    mean, var = x.mean(0), x.var(0, unbiased=False).clamp_min(FLAT)
    slope = ((x - mean) * (y - y.mean(0))).mean(0) / var
    return mean, var, slope, y.mean(0) - slope * mean


@torch.enable_grad()
def _descend(gate: MixedReLU, z: Tensor, y: Tensor) -> None:
    """M, n and m that leave the least of (relu(M z + n) - m - y)^2, each channel in units of its own deviation.

    The norm behind the depthwise convolution takes m away.
    """
    offset = torch.zeros_like(gate.mix.bias).requires_grad_()
    scale = y.var(0).clamp_min(FLAT).rsqrt()
    optimizer = torch.optim.Adam([*gate.mix.parameters(), offset], lr=GATE_RATES[0])
    draw = torch.Generator().manual_seed(0)
    for step in range(GATE_STEPS):
        optimizer.param_groups[0]["lr"] = GATE_RATES[3 * step >= 2 * GATE_STEPS]
        rows = torch.randint(0, len(z), (GATE_ROWS,), generator=draw)
        loss = ((F.relu(gate.mix(z[rows])) - offset - y[rows]) * scale).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()

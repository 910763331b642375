"""A deployment graph that computes with fewer bits, written with the operators that exporters know: quantize and dequantize.

A static layer is dequantize -> layer -> quantize with weights that are dequantized too; runtimes make one integer kernel of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.lower.sites import Layer, network_of
from edgefuse.quantize.observe import Range, scale_and_zero
from edgefuse.quantize.plan import Plan
from edgefuse.quantize.scheme import LayerPrecision, Rounding

OPERATORS = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)
BITS = {"int4-weights": 4}
WINDOW = ("stride", "padding", "dilation", "groups")
EIGHT_BITS = 127  # the largest integer of a weight
DYNAMIC: frozenset[LayerPrecision] = frozenset({"int8-dynamic", "int4-weights"})  # where what a linear takes is rounded too
SMALLEST_SCALE = 2.0**-24
SHRINKS = torch.linspace(1.0, 0.5, 51).tolist()  # of the largest weight of a row: where mse lets the grid end


def quantized(graph: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a graph that computes as planned."""
    copied = copy.deepcopy(graph)
    network = network_of(copied)
    for path, span in plan.values.items():
        network.set_submodule(path, Rounded(span))
    for layer, precision in plan.layers.items():
        if precision != "fp32":
            module = network.get_submodule(layer)
            assert isinstance(module, nn.Linear | nn.Conv2d), "a site is a layer"  # noqa: S101 - `sites_of` says so
            network.set_submodule(layer, QuantizedLayer(module, BITS.get(precision, 8), dynamic=precision in DYNAMIC))
    return copied.eval().requires_grad_(requires_grad=False)


class Rounded(nn.Module):
    """A value with 256 levels."""

    def __init__(self, span: Range) -> None:
        """Take the range that they cover."""
        super().__init__()
        self.scale, self.zero = scale_and_zero(span)

    def forward(self, x: Tensor) -> Tensor:
        """Round, and go back to float."""
        integers = OPERATORS.quantize_per_tensor.default(x, self.scale, self.zero, *INT8)
        return OPERATORS.dequantize_per_tensor.default(integers, self.scale, self.zero, *INT8)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of few bits.

    Attributes:
        integers: of the shape of the weights, int8 whatever the bits.
        scale: (rows,) of each output channel.
        most: the largest integer; the smallest is its negative.
    """

    integers: Tensor
    scale: Tensor
    most: int


def round_weights(weight: Tensor, bits: int = 8, rounding: Rounding = "max") -> Weights:
    """W = diag(scale) integers: symmetric, one scale per output channel, and the largest weight of a row at the grid's end.

    scale = max |row| / (2^(bits - 1) - 1), or with "mse" the share of it whose squared rounding error is smallest.
    """
    most = 2 ** (bits - 1) - 1
    largest = weight.abs().flatten(1).amax(1).clamp(min=SMALLEST_SCALE) / most
    tried = [_on_grid(weight, largest * share, most) for share in (SHRINKS if rounding == "mse" else SHRINKS[:1])]
    errors = torch.stack([(weight - dequantized(each)).flatten(1).square().sum(1) for each in tried])
    best = errors.argmin(0)
    integers = torch.stack([each.integers for each in tried])[best, torch.arange(len(weight))]
    return Weights(integers, torch.stack([each.scale for each in tried])[best, torch.arange(len(weight))], most)


def dequantized(weights: Weights) -> Tensor:
    """Their values: on the grid, where every runtime that takes the scale from the largest one finds the same integers."""
    return weights.integers * _rows(weights.scale, weights.integers)


def _on_grid(weight: Tensor, scale: Tensor, most: int) -> Weights:
    return Weights((weight / _rows(scale, weight)).round().clamp(-most, most).to(torch.int8), scale, most)


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


class QuantizedLayer(nn.Module):
    """A linear or a convolution with few bits per weight."""

    integers: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, source: Layer, bits: int, *, dynamic: bool) -> None:
        """Round the weights; the bias stays."""
        super().__init__()
        weights = round_weights(source.weight.detach(), bits)
        self.most, self.dynamic, self.bias = weights.most, dynamic and isinstance(source, nn.Linear), source.bias
        self.register_buffer("integers", weights.integers)
        self.register_buffer("scale", weights.scale)
        self.register_buffer("zero", torch.zeros(len(weights.scale), dtype=torch.int64))
        convolution = isinstance(source, nn.Conv2d)
        self.window: dict[str, Any] | None = {name: getattr(source, name) for name in WINDOW} if convolution else None

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the layer does."""
        least = -self.most - (self.most < EIGHT_BITS)  # by which ExecuTorch tells weights of 4 bits
        weight = OPERATORS.dequantize_per_channel.default(self.integers, self.scale, self.zero, 0, least, self.most, torch.int8)
        x = _rounded_as_it_comes(x) if self.dynamic else x
        return F.linear(x, weight, self.bias) if self.window is None else F.conv2d(x, weight, self.bias, **self.window)


def _rounded_as_it_comes(x: Tensor) -> Tensor:
    scale, zero = OPERATORS.choose_qparams.tensor(x, -128, 127, torch.finfo(torch.float32).eps, torch.int8)
    integers = OPERATORS.quantize_per_tensor.tensor(x, scale, zero, *INT8)
    return OPERATORS.dequantize_per_tensor.tensor(integers, scale, zero, *INT8)  # type: ignore[no-any-return]

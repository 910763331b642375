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

from edgefuse.lower.sites import Layer, network_of, positions_of
from edgefuse.quantize.observe import Range, scale_and_zero
from edgefuse.quantize.palette import PALETTE, palettized
from edgefuse.quantize.plan import Plan
from edgefuse.quantize.scheme import LayerPrecision

OPERATORS = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)
BITS = {"int4-weights": 4}
WINDOW = ("stride", "padding", "dilation", "groups")
EIGHT_BITS = 127  # the largest integer of a weight
DYNAMIC: frozenset[LayerPrecision] = frozenset({"int8-dynamic", "int4-weights"})  # where what a linear takes is rounded too
SMALLEST_SCALE = 2.0**-24  # of half precision
FAINT = 7 * SMALLEST_SCALE  # the largest weight of a block of 4 bits that has it
SHRINKS = torch.linspace(1.0, 0.5, 51).tolist()  # of the largest weight of a row: where the grid may end


def quantized(graph: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a graph that computes as planned."""
    copied = copy.deepcopy(graph)
    network = network_of(copied)
    for path, span in plan.values.items():
        network.set_submodule(path, Rounded(span))
    for layer, precision in plan.layers.items():
        if precision == PALETTE:
            weight = network.get_parameter(f"{layer}.weight")
            weight.data = palettized(weight.detach())[0]
        elif precision != "fp32":
            module = network.get_submodule(layer)
            assert isinstance(module, nn.Linear | nn.Conv2d), "a site is a layer"  # noqa: S101 - `sites_of` says so
            bits, block = BITS.get(precision, 8), block_of(precision, plan)
            source = Filled(module, block) if block and isinstance(module, nn.Linear) else module
            network.set_submodule(layer, QuantizedLayer(source, bits, block, dynamic=precision in DYNAMIC))
    if plan.positions == "int8":
        for path, positions in positions_of(copied).items():
            network.set_submodule(path, RoundedPositions(positions.p))
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


class RoundedPositions(nn.Module):
    """The positions of an attention as integers with one scale, max |p| / 127."""

    integers: Tensor

    def __init__(self, p: Tensor) -> None:
        """Round them."""
        super().__init__()
        rounded = round_weights(p)
        self.scale = float(rounded.scale)
        self.register_buffer("integers", rounded.integers)

    def forward(self) -> Tensor:
        """Go back to float."""
        return OPERATORS.dequantize_per_tensor.default(self.integers, self.scale, 0, *INT8)  # type: ignore[no-any-return]


class Filled(nn.Linear):
    """A linear with zeros behind its inputs, as many as make whole blocks of them.

    A block of nothing but zeros gets one weight of 4e-7, because LiteRT takes no scale that is 0.
    """

    def __init__(self, source: nn.Linear, block: int) -> None:
        """Fill the weights up; the bias is the source's."""
        self.more = -source.in_features % block
        super().__init__(source.in_features + self.more, source.out_features)
        weight = F.pad(source.weight.detach(), (0, self.more))
        blocks = weight.view(len(weight), -1, block)
        blocks[:, :, 0] = torch.where(blocks.abs().amax(2) < FAINT, FAINT, blocks[:, :, 0])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the source does."""
        return super().forward(F.pad(x, (0, self.more)) if self.more else x)


def filled(graph: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a graph, in float, whose layers of 4 bits have whole blocks of inputs."""
    copied = copy.deepcopy(graph)
    network = network_of(copied)
    for layer, precision in plan.layers.items():
        module = network.get_submodule(layer)
        if isinstance(module, nn.Linear) and (block := block_of(precision, plan)):
            network.set_submodule(layer, Filled(module, block))
    return copied.eval()


def block_of(precision: LayerPrecision, plan: Plan) -> int:
    """How many inputs share a scale; 0: all of them."""
    return plan.block if precision in BITS else 0


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of few bits.

    Attributes:
        integers: of the shape of the weights, int8 whatever the bits.
        scale: (rows,) of each output channel, or (rows, blocks) of each block of its inputs.
        most: the largest integer; the smallest is its negative.
    """

    integers: Tensor
    scale: Tensor
    most: int


def round_weights(weight: Tensor, bits: int = 8, block: int = 0, *, clipped: bool = False) -> Weights:
    """W = diag(scale) integers: symmetric, one scale per output channel, and the largest weight of a row at the grid's end.

    scale = max |row| / (2^(bits - 1) - 1), or if `clipped` the share of it whose squared rounding error is smallest. With blocks,
    the same for each `block` inputs of a row; the scale is rounded to the 8 significant bits that XNNPACK keeps of it and to half
    precision, in which LiteRT stores it.
    """
    most = 2 ** (bits - 1) - 1
    rows = weight.reshape(len(weight), -1, block) if block else weight.flatten(1).unsqueeze(1)
    largest = rows.abs().amax(2).clamp(min=SMALLEST_SCALE) / most
    tried = [_stored(largest * share, block) for share in (SHRINKS if clipped else SHRINKS[:1])]
    errors = torch.stack([(rows - _on_grid(rows, scale, most) * scale.unsqueeze(2)).square().sum(2) for scale in tried])
    scale = torch.stack(tried).gather(0, errors.argmin(0)[None])[0]
    integers = _on_grid(rows, scale, most).to(torch.int8).reshape(weight.shape)
    return Weights(integers, scale if block else scale.flatten(), most)


def dequantized(weights: Weights) -> Tensor:
    """Their values: on the grid, where every runtime that takes the scale from the largest one finds the same integers."""
    scale = weights.scale.reshape(len(weights.scale), -1, 1)
    return (weights.integers.reshape(*scale.shape[:2], -1) * scale).reshape(weights.integers.shape)


def in_whole_blocks(weight: Tensor, block: int) -> Tensor:
    """Zeros behind the inputs (rows, columns) of each row, as many as make whole blocks of them."""
    return F.pad(weight, (0, -weight.shape[1] % block)) if block else weight


def _on_grid(rows: Tensor, scale: Tensor, most: int) -> Tensor:
    return (rows / scale.unsqueeze(2)).round().clamp(-most, most)


def _stored(scale: Tensor, block: int) -> Tensor:
    return scale.bfloat16().half().to(scale.dtype).clamp(min=SMALLEST_SCALE) if block else scale


class QuantizedLayer(nn.Module):
    """A linear or a convolution with few bits per weight."""

    integers: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, source: Layer, bits: int, block: int = 0, *, dynamic: bool) -> None:
        """Round the weights; the bias stays."""
        super().__init__()
        weights = round_weights(source.weight.detach(), bits, block)
        self.most, self.dynamic, self.bias = weights.most, dynamic and isinstance(source, nn.Linear), source.bias
        self.block, self.more = block, source.more if isinstance(source, Filled) else 0
        self.register_buffer("integers", weights.integers)
        self.register_buffer("scale", weights.scale)
        self.register_buffer("zero", torch.zeros(weights.scale.shape, dtype=torch.int64))
        convolution = isinstance(source, nn.Conv2d)
        self.window: dict[str, Any] | None = {name: getattr(source, name) for name in WINDOW} if convolution else None

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the layer does."""
        x = F.pad(x, (0, self.more)) if self.more else x
        x = rounded_as_it_comes(x) if self.dynamic else x
        weight = self._weight()
        return F.linear(x, weight, self.bias) if self.window is None else F.conv2d(x, weight, self.bias, **self.window)

    def _weight(self) -> Tensor:
        span = (-self.most - (self.most < EIGHT_BITS), self.most, torch.int8)  # -8 to 7, by which ExecuTorch tells 4 bits
        told = (self.integers, self.scale, self.zero)
        if self.block:
            return OPERATORS.dequantize_per_channel_group.default(*told, *span, self.block, torch.float32)  # type: ignore[no-any-return]
        return OPERATORS.dequantize_per_channel.default(*told, 0, *span)  # type: ignore[no-any-return]


def rounded_as_it_comes(x: Tensor) -> Tensor:
    """Each frame of x (..., frames, channels) with the 256 levels of its own range, as runtimes do."""
    scale, zero = OPERATORS.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    integers = OPERATORS.quantize_per_token.default(x, scale, zero, *INT8)
    return OPERATORS.dequantize_per_token.default(integers, scale, zero, *INT8, torch.float32)  # type: ignore[no-any-return]

"""Fewer bits for Core ML: a graph whose weights are rounded already, with buffers beside them that say how.

Core ML Tools read such buffers, `_COREML_/weight/...`, and write a weight as its integers and scales, or as its indices and
lookup tables [R: their guide, "Converting compressed PyTorch models"]. So each layer is rounded as the plan says, by its name;
nothing is searched for in the converted program. Scales and tables are exact in half precision, in which the program computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from edgefuse.lower.sites import network_of, positions_of
from edgefuse.quantize.graph import BITS, SMALLEST_SCALE, Rounded, block_of, filled, round_weights
from edgefuse.quantize.palette import PALETTE, palettized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from edgefuse.quantize.plan import Plan
    from edgefuse.quantize.scheme import LayerPrecision

SCALE = "quantization_scale"
TABLES, INTEGERS = 2, 3  # how a weight is compressed, by the numbers of Core ML Tools


def compressed(graph: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a graph that computes as planned, in the words of Core ML Tools."""
    copied = filled(graph, plan)
    network = network_of(copied)
    for path, span in plan.values.items():
        network.set_submodule(path, Rounded(span))
    for path, precision in plan.layers.items():
        if precision != "fp32":
            layer = network.get_submodule(path)
            weight = layer.get_parameter("weight")
            weight.data, beside = _told(weight.detach(), precision, block_of(precision, plan))
            _tell(layer, "weight", beside)
    if plan.positions == "int8":
        for positions in positions_of(copied).values():
            rounded, beside = _told(positions.p, "int8", block=0)
            del positions.p  # Core ML Tools compress parameters, not buffers
            positions.register_parameter("p", nn.Parameter(rounded, requires_grad=False))
            _tell(positions, "p", beside | {SCALE: beside[SCALE][None]})
    return copied


def _tell(module: nn.Module, name: str, beside: Mapping[str, Tensor]) -> None:
    """Put what is told of a module's parameter beside it."""
    for kind, value in beside.items():
        module.register_buffer(f"_COREML_/{name}/{kind}", value)


def _told(weight: Tensor, precision: LayerPrecision, block: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight that is rounded, and what tells Core ML Tools how."""
    if precision == PALETTE:
        rounded, tables = palettized(weight)
        return rounded, {"compression_type": torch.tensor([TABLES]), "lut": tables}
    bits = BITS.get(precision, 8)
    rounded, scales = in_halves(weight, bits, block)
    return rounded, {
        "compression_type": torch.tensor([INTEGERS]),
        "quantization_n_bits": torch.tensor(bits),
        SCALE: scales,
    }


def in_halves(weight: Tensor, bits: int, block: int = 0) -> tuple[Tensor, Tensor]:
    """The integers of `round_weights`, and its scales (channels, blocks) in half precision: the rounded weight, and these."""
    whole = round_weights(weight, bits, block)
    scales = whole.scale.half().float().clamp(min=SMALLEST_SCALE).reshape(len(weight), -1, 1)
    rounded = whole.integers.reshape(len(weight), scales.shape[1], -1) * scales
    return rounded.reshape(weight.shape), scales.squeeze(2)

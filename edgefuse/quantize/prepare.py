"""Other weights before a runtime rounds them: in better units, on the grid, and with biases that undo the mean of the error.

What `equalize`, `bias_correction` and `rounding` of a scheme do. Everything is computed in float64 and before any runtime sees a
weight, so that all of them, and all entries of a program, round to the same integers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgefuse.checkpoint import ISTD, MEAN, assemble
from edgefuse.lower.sites import sites_of, source_of
from edgefuse.quantize.compensate import compensated
from edgefuse.quantize.equalize import equalized
from edgefuse.quantize.graph import BITS, dequantized, in_whole_blocks, round_weights
from edgefuse.quantize.palette import PALETTE, palettized
from edgefuse.quantize.plan import asked, require_one_pass
from edgefuse.quantize.scheme import require_blocks_apart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgefuse.quantize.calibrate import Calibration
    from edgefuse.quantize.scheme import LayerPrecision, Scheme
    from edgefuse.values import FoldedModel

LINEAR = 2  # dimensions of a linear's weight


def prepare(folded: FoldedModel, scheme: Scheme, graph: nn.Module, calibration: Calibration | None) -> FoldedModel:
    """The model whose weights a scheme rounds; `graph` is any deployment graph of it, and says which layer is rounded.

    What it answers in float is no longer what `folded` answers: parity and words are judged against `folded`.
    """
    require_one_pass(folded.checkpoint.config)
    checkpoint = folded.checkpoint
    require_blocks_apart(checkpoint.config)
    source = equalized(folded, calibration.peaks).checkpoint if calibration and scheme.equalize else checkpoint
    means = calibration.means(equalized=scheme.equalize) if calibration and scheme.bias_correction else {}
    heard = calibration.products(equalized=scheme.equalize) if calibration and scheme.rounding == "gptq" else {}
    weights = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in source.weights.items()}
    takes, layers = {site.layer: site.takes for site in sites_of(graph)}, asked(graph, scheme)[0]
    for layer in (layer for layer, precision in layers.items() if precision != "fp32"):
        name = source_of(layer)
        weight = weights[f"{name}.weight"]
        rounded = _rounded(weight, layers[layer], scheme, _covariance(heard.get(takes[layer]), means.get(takes[layer])))
        if means:
            lost = weight - rounded
            weights[f"{name}.bias"] = corrected(weights[f"{name}.bias"], lost, means[takes[layer]])
        weights[f"{name}.weight"] = weight if layers[layer] == PALETTE else rounded  # a palette is no grid to be found again
    tensors = {**weights, MEAN: checkpoint.frontend_mean, ISTD: checkpoint.frontend_istd}
    return dataclasses.replace(folded, checkpoint=assemble(checkpoint.config, tensors, checkpoint.tokens))


def _rounded(weight: Tensor, precision: LayerPrecision, scheme: Scheme, covariance: Tensor | None) -> Tensor:
    """A weight as a scheme rounds it; zeros that fill the last block up are cut off again."""
    if precision == PALETTE:
        return palettized(weight.float())[0].double()
    bits, block = BITS.get(precision, 8), scheme.block if precision in BITS else 0
    filled = in_whole_blocks(weight, block)
    if covariance is not None and weight.ndim == LINEAR:
        more = filled.shape[1] - weight.shape[1]
        rounded = compensated(filled, F.pad(covariance, (0, more, 0, more)), bits, block)
    else:
        rounded = dequantized(round_weights(filled, bits, block, clipped=scheme.rounding != "max"))
    return rounded[:, : weight.shape[1]]


def _covariance(product: Tensor | None, mean: Tensor | None) -> Tensor | None:
    """E[x x^T], or where the bias takes the mean of the error E[x x^T] - E[x] E[x]^T."""
    return product if product is None or mean is None else product - torch.outer(mean, mean)


def corrected(bias: Tensor, lost: Tensor, mean: Tensor) -> Tensor:
    """b' = b + (W - W^) E[x], with `lost` = W - W^ of a linear or a convolution and E[x] of each channel that it takes.

    (Nagel et al. 2019, as in `edgefuse.quantize.equalize` [R].) A depthwise convolution takes one channel per row.
    """
    taps = lost.flatten(2).sum(2) if lost.ndim > 2 else lost  # noqa: PLR2004 - rows, columns, then what is inside a window
    return bias + (taps[:, 0] * mean if taps.shape[1] != len(mean) else taps @ mean)

"""Which layer costs what: each one quantized alone, and each one left float alone.

Errors of layers are nearly independent, so the power of the logits' error with several layers quantized is about the sum of
theirs: a layer's share of it says where bits are missing. With the layer left float the error must fall by that share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgefuse.lower.sites import Layer, network_of, sites_of
from edgefuse.quantize.scheme import OWN_LINES, LayerPrecision, Scheme

if TYPE_CHECKING:
    from edgefuse.quantize.trial import Tell, Trial, Trials
    from edgefuse.values import Entry

ALL_FLOAT: Mapping[str, Any] = dict.fromkeys(OWN_LINES, "fp32")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of an entry a layer is.

    Attributes:
        macs: multiply-accumulates of one run.
        weights: how many it has.
        takes: shape of what it is given.
        makes: shape of what it gives.
    """

    macs: int
    weights: int
    takes: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What the quantization of one layer, or of one line of the scheme, costs.

    Attributes:
        name: the layer, or the line.
        precision: what it is quantized to.
        alone: with everything else in float.
        without: with everything quantized as the scheme says, but for it.
        extent: how much of the entry it is; None for a line.
    """

    name: str
    precision: LayerPrecision
    alone: Trial
    without: Trial
    extent: Extent | None


def alone(scheme: Scheme, layer: str, precision: LayerPrecision) -> Scheme:
    """Only one layer, in the ranges that the scheme chooses."""
    return replace(scheme, name=layer, layers="fp32", table={layer: precision}, **ALL_FLOAT)


def sensitivities(trials: Trials, scheme: Scheme, entry: Entry, tell: Tell) -> Iterator[Sensitivity]:
    """Each layer that a scheme quantizes, and each line that is no end of a layer, one after another."""
    parts = extents(entry)
    quantized = {layer: each for layer, each in trials.plan(scheme).layers.items() if each != "fp32"}
    for module, layers in groupby(quantized, key=module_of):
        with tell(f"Listening with each layer of {module} quantized alone, and with each left float alone"):
            for layer in layers:
                only, without = alone(scheme, layer, quantized[layer]), _without(scheme, layer)
                yield Sensitivity(layer, quantized[layer], trials.of(only), trials.of(without), parts[layer])
    for line in OWN_LINES:
        if getattr(scheme, line) == "int8":
            float_line: dict[str, Any] = {line: "fp32"}
            only = replace(scheme, name=line, layers="fp32", table={}, **{**ALL_FLOAT, line: "int8"})
            yield Sensitivity(line, "int8", trials.of(only), trials.of(replace(scheme, **float_line)), None)


def _without(scheme: Scheme, layer: str) -> Scheme:
    """The layer in float, by the last line of the table: that is the one that counts."""
    others = {pattern: precision for pattern, precision in scheme.table.items() if pattern != layer}
    return replace(scheme, table={**others, layer: "fp32"})


def module_of(layer: str) -> str:
    """The block that a layer is in, or what else it is a part of."""
    parent = layer.rpartition(".")[0]
    return parent.rpartition(".")[0] or parent


@torch.no_grad()
def extents(entry: Entry) -> dict[str, Extent]:
    """How much each layer of an entry is, in the order in which they run."""
    network, found = network_of(entry.graph), {}

    def measure(path: str, layer: Layer, taken: Tensor, made: Tensor) -> None:
        per_output = layer.weight[0].numel()
        found[path] = Extent(made.numel() * per_output, layer.weight.numel(), tuple(taken.shape), tuple(made.shape))

    layers = {site.layer: network.get_submodule(site.layer) for site in sites_of(entry.graph)}
    hooks = [
        layer.register_forward_hook(lambda module, given, made, path=path: measure(path, module, given[0], made))
        for path, layer in layers.items()
    ]
    try:
        entry.graph(*entry.example())
    finally:
        for hook in hooks:
            hook.remove()
    return found

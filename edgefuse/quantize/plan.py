"""A scheme, laid out on the layers and the points of one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from edgefuse.errors import BadCalibration, UsageError
from edgefuse.lower.sites import Site, network_of, points_of, sites_of
from edgefuse.model import EncoderConfig
from edgefuse.quantize.observe import Range
from edgefuse.quantize.scheme import INNER_LINES, STATIC, LayerPrecision, Scheme, ValuePrecision

FOR_LINEARS: Mapping[LayerPrecision, str] = MappingProxyType(
    {
        "int8-dynamic": "XNNPACK rounds what a linear takes as it comes, not what a convolution takes",
        "int4-weights": "the runtimes have weights of 4 bits for linears only",
        "palette4-weights": "convolutions have few weights, and lose most by a lookup table",
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a graph is asked to be.

    Attributes:
        sites: its layers and the points beside them.
        layers: the precision of each layer.
        kept: why a layer has another precision than the scheme says, in words.
        values: the range of each point that is quantized; the wider of them has 16 bits where a neighbour is `int8-a16`.
        wide: the points of 16 bits.
        block: how many inputs of a layer of 4 bits share a scale; 0: all that make an output.
        positions: the precision of the constants that attention adds to its keys.
    """

    sites: tuple[Site, ...]
    layers: Mapping[str, LayerPrecision]
    kept: Mapping[str, str]
    values: Mapping[str, Range]
    wide: frozenset[str]
    block: int = 0
    positions: ValuePrecision = "fp32"


def require_one_pass(config: EncoderConfig) -> None:
    """Raise `UsageError` for a cascade: the layers of its two passes go by the same paths in its graphs."""
    if config.second_pass:
        raise UsageError(
            "A cascade is not quantized: a scheme lies on one network, and a cascade is two.",
            hint="Export the cascade with --precision fp32 or fp16.",
        )


def plan(graph: nn.Module, scheme: Scheme, ranges: Mapping[str, Range]) -> Plan:
    """Lay a scheme out on a graph; `ranges` are those of its points.

    Raises:
        BadScheme: the scheme names a layer that is none.
        BadCalibration: a point that must have a range has none.
    """
    sites, points = sites_of(graph), points_of(graph)
    layers, kept = asked(graph, scheme)
    beside = {path: _beside(path, sites, layers) for path in points}
    chosen = [
        path
        for path, point in points.items()
        if beside[path] or (point.line in INNER_LINES and getattr(scheme, point.line) == "int8")
    ]
    if missing := [path for path in chosen if path not in ranges]:
        raise BadCalibration(
            f"The ranges have none for {missing[0]}.", hint="Take them again with: edgefuse calibrate CHECKPOINT --speech SPEECH"
        )
    wide = frozenset(path for path in chosen if "int8-a16" in beside[path])
    return Plan(sites, layers, kept, {path: ranges[path] for path in chosen}, wide, scheme.block, scheme.positions)


def asked(graph: nn.Module, scheme: Scheme) -> tuple[dict[str, LayerPrecision], dict[str, str]]:
    """The precision of each layer, and why one has another than the scheme says."""
    sites, points, network = sites_of(graph), points_of(graph), network_of(graph)
    wanted = scheme.precisions(tuple(site.layer for site in sites))
    kept: dict[str, str] = {}
    for site in sites:
        if wanted[site.layer] in FOR_LINEARS and isinstance(network.get_submodule(site.layer), nn.Conv2d):
            kept[site.layer] = FOR_LINEARS[wanted[site.layer]]
        for path in (site.takes, site.makes):
            line = points[path].line
            if wanted[site.layer] in STATIC and line and getattr(scheme, line) == "fp32":
                kept[site.layer] = f"its {line} are fp32 in the scheme, and a static layer needs both ends quantized"
    return {layer: "fp32" if layer in kept else wanted[layer] for layer in wanted}, kept


def _beside(path: str, sites: Sequence[Site], layers: Mapping[str, LayerPrecision]) -> set[LayerPrecision]:
    """The static precisions beside a point."""
    return {layers[site.layer] for site in sites if path in (site.takes, site.makes)} & STATIC

"""Where a deployment graph can be quantized: its layers, and the points between them, by path."""

from dataclasses import dataclass

from torch import nn

from edgefuse.lower.graph import DeploymentGraph, Point, Positions, StreamingGraph

HEAD = "head.ctc"
CONVOLUTIONS = ("conv1", "conv2", "depthwise")
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Site:
    """One layer, by paths.

    Attributes:
        layer: itself.
        takes: the point that it takes.
        makes: the point that it makes.
    """

    layer: str
    takes: str
    makes: str


def network_of(graph: nn.Module) -> nn.Module:
    """The network inside an entry's graph, without its front end and its held caches; else the graph itself."""
    return next((each for each in graph.modules() if isinstance(each, DeploymentGraph | StreamingGraph)), graph)


def sites_of(graph: nn.Module) -> tuple[Site, ...]:
    """Every layer of the network with the points beside it; a layer with a norm behind it, which is not folded, is none."""
    network = network_of(graph)
    takes: dict[str, str] = {}
    makes: dict[str, str] = {}
    for path, point in points_of(network).items():
        parent = path.rpartition(".")[0]
        takes |= {f"{parent}.{layer}": path for layer in point.into}
        makes |= {f"{parent}.{point.of}": path} if point.of else {}
    layers = (path for path, each in network.named_modules() if isinstance(each, nn.Linear | nn.Conv2d))
    return tuple(Site(layer, takes[layer], makes[layer]) for layer in layers if layer in makes)


def points_of(graph: nn.Module) -> dict[str, Point]:
    """Every point of the network."""
    return {path: each for path, each in network_of(graph).named_modules() if isinstance(each, Point)}


def positions_of(graph: nn.Module) -> dict[str, Positions]:
    """The positions of every attention of the network."""
    return {path: each for path, each in network_of(graph).named_modules() if isinstance(each, Positions)}


def source_of(layer: str) -> str:
    """The path in the encoder of a layer of its deployment graph."""
    if layer == HEAD:
        return "ctc"
    return f"{layer}.{'conv' if layer.endswith(CONVOLUTIONS) else 'linear'}"

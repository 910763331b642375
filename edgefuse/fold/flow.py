"""A traced model: which module feeds which, and where its channels are."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgefuse.model.normalization import StatisticsNorm

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
AFFINE_NORMS = (StatisticsNorm, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - the one common base of BatchNorm1d and 2d
NORMS = (*AFFINE_NORMS, nn.LayerNorm)
IDENTITIES = (nn.Dropout, nn.Identity)  # in evaluation
MOVES = ("permute", "transpose")  # methods that only move axes
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


class _Tracer(fx.Tracer):
    """Keeps norms whole and sees buffers."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(m, NORMS) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Flow:
    """The graph of a model in evaluation, with the shape of every value."""

    graph: fx.Graph
    modules: dict[str, nn.Module]

    def norms(self) -> dict[str, list[fx.Node]]:
        """Every norm that runs, in the order in which they run first, and each of its calls."""
        names = (str(node.target) for node in self.graph.nodes if isinstance(self.module(node), NORMS))
        return {name: self.calls(name) for name in dict.fromkeys(names)}

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, if it is a module."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def calls(self, name: str) -> list[fx.Node]:
        """Every call of a module."""
        return [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]

    @staticmethod
    def users(node: fx.Node) -> list[fx.Node]:
        """What computes with the value of a node, and not only with its shape."""
        return [user for user in node.users if user.target is not getattr and user.target != "size"]

    def passes(self, node: fx.Node) -> bool:
        """Whether a node does nothing to the channels of its first argument but move them, or leave out other things."""
        if node.op == "call_method" and node.target in MOVES:
            return True
        if node.target is operator.getitem:
            return isinstance(node.args[1], tuple) and all(isinstance(each, slice) for each in node.args[1])
        return isinstance(self.module(node), IDENTITIES)

    def channels(self, node: fx.Node) -> int:
        """The axis of the channels that a layer's or a norm's call gives."""
        last = isinstance(self.module(node), (nn.Linear, StatisticsNorm, nn.LayerNorm))
        return _rank(node) - 1 if last else 1

    def layer_behind(self, norm: fx.Node) -> fx.Node | None:
        """The linear or convolution whose output channels are the norm's channels, if only axes move in between."""
        source, axis = norm.args[0], self.channels(norm)
        while isinstance(source, fx.Node) and source.op == "call_method" and source.target in MOVES:
            axis = axis_before(source, axis)
            source = source.args[0]
        if not isinstance(source, fx.Node) or not isinstance(self.module(source), LAYERS):
            return None
        return source if axis == self.channels(source) else None

    def used_twice(self, name: str, uses: set[fx.Node]) -> str | None:
        """Whether a layer also runs elsewhere than in those calls, or shares its weight with another layer."""
        weight = self.modules[name].weight
        others = [n for n, m in self.modules.items() if n != name and isinstance(m, LAYERS) and m.weight is weight]
        if others:
            return f"the weight of {name} is used twice: {', '.join(others)} has it too"
        calls = self.calls(name)
        if set(calls) <= uses:
            return None
        return f"the weight of {name} is used twice: the layer runs {len(calls)} times, not always with this norm"


def trace(model: nn.Module, *example: object, method: str = "forward") -> Flow:
    """The graph of any traceable model; `example` is what its `method` takes."""
    tracer = _Tracer()
    tracer.traced_func_name = method
    graph = tracer.trace(model.eval())
    for placeholder in graph.find_nodes(op="placeholder"):
        placeholder.args = ()  # default values: the example has a value for each
    traced = fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    ShapeProp(traced).propagate(*example)
    return Flow(graph, dict(model.named_modules()))


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """From a node along its only user to another, that one left out; it ends where there is more than one user."""
    while first is not last:
        yield first
        following = Flow.users(first)
        if len(following) != 1:
            return
        first = following[0]


def axis_before(node: fx.Node, axis: int) -> int:
    """Where an axis came from: the inverse of one permute or transpose."""
    return _moved(node)[axis] if node.target in MOVES else axis


def axis_after(node: fx.Node, axis: int) -> int:
    """Where an axis goes."""
    return _moved(node).index(axis) if node.target in MOVES else axis


def _moved(node: fx.Node) -> list[int]:
    """By axis, the axis that it was."""
    given = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    dims = [int(d) % _rank(node) for d in given]  # type: ignore[arg-type]  # integers, in a graph without symbols
    if node.target == "permute":
        return dims
    axes = [*range(_rank(node))]
    axes[dims[0]], axes[dims[1]] = axes[dims[1]], axes[dims[0]]
    return axes


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)

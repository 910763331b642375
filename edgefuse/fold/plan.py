"""The plan: every norm and every constant factor of a model, as a `Fold` or as a `Refusal` with its reason.

The plan is read from the traced graph, not from the names of the model's parts: a norm folds into a layer when the graph shows
that it may. So the same rules judge whatever a later model does with its norms.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgefuse.model.attention import Attention
from edgefuse.model.fusionformer import Block, Encoder, Subsampling
from edgefuse.model.normalization import BatchNorm
from edgefuse.model.streaming import FULL
from edgefuse.values import Fold, Refusal

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)  # noqa: SLF001 - the one common base of BatchNorm1d and 2d
MOVES = ("permute", "transpose")  # methods that only move axes
AFFINE = ".affine"  # behind the name of a layer norm: its gain and its shift
PROBE_FRAMES = 4  # encoder frames to trace with


class _Tracer(fx.Tracer):
    """Keeps norms whole and sees buffers."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(m, NORMS) or super().is_leaf_module(m, module_qualified_name)


def plan(encoder: Encoder) -> tuple[Fold | Refusal, ...]:
    """Every site of an encoder: its norms in the order in which they run, then its constant factors.

    A folded encoder comes out of the fold as it went in: what is left in it stays.
    """
    frames = PROBE_FRAMES * encoder.config.reduction
    features = torch.zeros(1, frames, encoder.config.mel_bins, dtype=encoder.ctc.weight.dtype)
    norms = plan_norms(encoder, features, torch.tensor([frames]), FULL, method="answers")
    if encoder.config.folded:
        return tuple(site for site in norms if isinstance(site, Refusal))
    return (*norms, *_constants(encoder))


def plan_norms(model: nn.Module, *example: object, method: str = "forward") -> tuple[Fold | Refusal, ...]:
    """Every norm of any traceable model, judged by its place in the graph; `example` is what its `method` takes."""
    tracer = _Tracer()
    tracer.traced_func_name = method
    graph = tracer.trace(model.eval())
    for placeholder in graph.find_nodes(op="placeholder"):
        placeholder.args = ()  # default values: the example has a value for each
    traced = fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    ShapeProp(traced).propagate(*example)
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module" and isinstance(modules[node.target], NORMS)]
    return tuple(site for node in nodes for site in _judge(node, modules, graph))


def _judge(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> Iterator[Fold | Refusal]:
    if isinstance(modules[str(node.target)], nn.LayerNorm):
        yield from _layer_norm(node, modules, graph)
    else:
        yield _batch_norm(node, modules, graph)


def _layer_norm(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> Iterator[Fold | Refusal]:
    """A layer norm stays; its gain and shift are those of the layers behind it, where only linears take it."""
    site, consumers = str(node.target), list(node.users)
    problem = _not_before(consumers, modules, graph)
    if problem is None:
        yield Fold(f"{site}{AFFINE}", tuple(str(c.target) for c in consumers), "affine before")
    stays = "a LayerNorm computes mean and variance of each frame when it runs; no constant can replace it"
    yield Refusal(site, f"{stays}; its gain and shift stay too, because {problem}" if problem else stays)


def _batch_norm(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> Fold | Refusal:
    site, norm = str(node.target), modules[str(node.target)]
    layer = _layer_behind(node, norm, modules)
    if layer is not None:
        problem = _not_after(layer, node, modules, graph)
        return Refusal(site, problem) if problem else Fold(site, (str(layer.target),), "norm after")
    consumers = list(_consumers(node))
    problem = _not_before(consumers, modules, graph)
    return Refusal(site, problem) if problem else Fold(site, tuple(str(c.target) for c in consumers), "norm before")


def _layer_behind(node: fx.Node, norm: nn.Module, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The linear or convolution whose output channels are the norm's channels, if only axes move in between."""
    source = node.args[0]
    axis = _rank(node) - 1 if isinstance(norm, BatchNorm) else 1
    while isinstance(source, fx.Node) and source.op == "call_method" and source.target in MOVES:
        axis = _axis_before(source, axis)
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    layer = modules[str(source.target)]
    channels = _rank(source) - 1 if isinstance(layer, nn.Linear) else 1
    return source if isinstance(layer, LAYERS) and axis == channels else None


def _not_after(layer: fx.Node, norm: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> str | None:
    """Why a norm cannot be folded into the layer in front of it."""
    if twice := _used_twice(str(layer.target), modules, graph):
        return twice
    node = layer
    while node is not norm:
        if len(node.users) != 1:
            return f"the output of {layer.target} is also used without the norm"
        node = next(iter(node.users))
    return None


def _not_before(consumers: list[fx.Node], modules: dict[str, nn.Module], graph: fx.Graph) -> str | None:
    """Why a norm cannot be folded into what consumes it."""
    for consumer in consumers:
        module = modules.get(str(consumer.target)) if consumer.op == "call_module" else None
        if consumer.target in (torch._C._nn.pad, nn.functional.pad) or _pads(module):  # noqa: SLF001 - what F.pad traces as
            return "zeros are padded after the norm and before a convolution; folding would shift the edge"
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return f"it stands before the convolution {consumer.target}; only linears absorb a norm in front of them"
        if module is not None and not isinstance(module, nn.Linear) and len(consumers) == 1:
            return f"it stands before {consumer.target}, which cannot absorb it"
        if not isinstance(module, nn.Linear):
            return "it stands on the residual stream: its output is the skip path as well, which has no weights to absorb it"
        if twice := _used_twice(str(consumer.target), modules, graph):
            return twice
    return None if consumers else "nothing consumes it"


def _used_twice(name: str, modules: dict[str, nn.Module], graph: fx.Graph) -> str | None:
    """Whether a layer runs twice, or shares its weight with another."""
    weight = modules[name].weight
    sharing = [n for n, m in modules.items() if isinstance(m, LAYERS) and m.weight is weight]
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in sharing]
    others = [n for n in sharing if n != name]
    if others:
        return f"the weight of {name} is used twice: {', '.join(others)} has it too"
    return f"the weight of {name} is used twice: the layer runs {len(calls)} times" if len(calls) > 1 else None


def _consumers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node, looking through moved axes."""
    for user in node.users:
        if user.op == "call_method" and user.target in MOVES:
            yield from _consumers(user)
        else:
            yield user


def _pads(module: nn.Module | None) -> bool:
    """Whether a convolution pads by itself."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding not in ("valid", (0,), (0, 0))


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _axis_before(node: fx.Node, axis: int) -> int:
    """Where an axis came from: the inverse of one permute or transpose."""
    dims = [_integer(d) for d in (node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])]
    if node.target == "permute":
        return dims[axis]
    first, second = (d % _rank(node) for d in dims)
    return {first: second, second: first}.get(axis, axis)


def _integer(value: Any) -> int:  # noqa: ANN401 - an argument of an fx node
    return int(value)


def _constants(encoder: Encoder) -> Iterator[Fold]:
    """The constant factors and offsets of a model that is not folded yet."""
    if encoder.config.folded:
        return
    for name, module in encoder.named_modules():
        if isinstance(module, Subsampling) and module.scale != 1.0:
            yield Fold(f"{name}.scale", (f"{name}.linear.linear",), "embedding scale")
        if isinstance(module, Block):
            yield Fold(f"{name}.half_step", (f"{name}.macaron.w2.linear", f"{name}.feed_forward.w2.linear"), "half step")
        if isinstance(module, Attention):
            yield Fold(f"{name}.scale", (f"{name}.query.linear",), "query")
            if module.relative:
                yield Fold(f"{name}.v", (f"{name}.w",), "key bias")

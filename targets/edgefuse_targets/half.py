"""A deployment graph in half precision, for runtimes whose arithmetic follows the types in the graph."""

import copy

from torch import Tensor, nn
from torch.export import ExportedProgram

from edgefuse.lower import PcmGraph

NETWORK = "network"  # the attribute of a `PcmGraph` that hears features


class HalfPrecision(nn.Module):
    """The same graph with fp16 weights and fp16 arithmetic between casts: float32 in, float32 out."""

    def __init__(self, graph: nn.Module) -> None:
        """Copy the graph; the original stays as it is."""
        super().__init__()
        self.deployed = copy.deepcopy(graph).half()
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Answer as the graph does."""
        outputs = self.deployed(*(tensor.half() for tensor in inputs))
        return outputs.float() if isinstance(outputs, Tensor) else tuple(tensor.float() for tensor in outputs)


def halved(graph: nn.Module) -> nn.Module:
    """The same graph in half precision, but for a front end: the power of loud speech is beyond fp16."""
    return graph.around(HalfPrecision(graph.network)).eval() if isinstance(graph, PcmGraph) else HalfPrecision(graph)


def before_the_network(exported: ExportedProgram) -> frozenset[str]:
    """Names of the values that the front end of an exported `PcmGraph` computes; none where features come in."""
    stacks = {node.name: node.meta.get("nn_module_stack") for node in exported.graph.nodes if node.op == "call_function"}
    paths = {name: {path for path, _ in stack.values()} for name, stack in stacks.items() if stack}
    inside = {name for name, through in paths.items() if NETWORK in through}
    return frozenset(paths) - inside if inside else frozenset()

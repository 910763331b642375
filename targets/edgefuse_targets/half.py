"""A deployment graph in half precision, for runtimes whose arithmetic follows the types in the graph."""

import copy

from torch import Tensor, nn


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

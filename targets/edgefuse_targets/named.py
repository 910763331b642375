"""A deployment graph whose inputs and outputs go by the names of an entry's specs."""

from torch import Tensor, nn

from edgefuse.values import Entry


class Named(nn.Module):
    """An entry's graph that takes keywords and returns a dict: LiteRT's converter names a signature's tensors after these."""

    def __init__(self, entry: Entry) -> None:
        """Keep the graph; its weights are not copied."""
        super().__init__()
        self.deployed = entry.graph  # not "graph": an exported module has an attribute of that name
        self.inputs = [spec.name for spec in entry.inputs]
        self.outputs = [spec.name for spec in entry.outputs]
        self.eval()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Answer as the graph does."""
        outputs = self.deployed(*(inputs[name] for name in self.inputs))
        return dict(zip(self.outputs, (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))

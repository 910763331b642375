"""The reference: PyTorch itself runs the exported graph; no runtime, no package beyond those of edgefuse.

A safetensors file holds the constants, each once, and in its header the operators of every entry as JSON. Nothing in it is
code: an operator is a name in PyTorch's own `aten` namespace, an argument a number, a type, a list or another operator's result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgefuse.errors import ChangedBundle, Refused
from edgefuse.values import Structure
from edgefuse_targets.foreign import exporting, reading
from edgefuse_targets.programs import artifact_of, holding, refusals_of, tally, unable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.quantize.scheme import LayerPrecision
    from edgefuse.target import Opened
    from edgefuse.values import Artifact, Program
    from edgefuse_targets.aten import Graph

SUFFIX = ".safetensors"
SUMMARY = "PyTorch itself, for tests and for comparison: the exported graph as a list of operators"

NAME = "reference"
RUNTIME = "PyTorch"
LACKING: Mapping[LayerPrecision, str] = {
    "palette4-weights": "its operators have no lookup tables for weights",
    "int8-a16": "a quantized graph of its operators has values of 8 bits",
}


def missing() -> Sequence[str]:
    """Nothing: what it needs, edgefuse needs."""
    return []


def refusals(program: Program) -> Sequence[str]:
    """What any target refuses, caches that are held, and weights or values that PyTorch's own operators do not have."""
    return [*refusals_of(program), *holding(program, RUNTIME), *unable(program, RUNTIME, LACKING)]


def export(program: Program, folder: Path, name: str) -> Artifact:
    """Write `folder/name.safetensors`.

    Raises:
        Refused: the program cannot be honoured.
        ExportFailed: PyTorch could not export an entry, or an operator's arguments cannot be written as JSON.
    """
    with exporting(RUNTIME, refusals(program)):
        from edgefuse_targets.aten import written

        content = written(program)
    path = folder / f"{name}{SUFFIX}"
    path.write_bytes(content)
    return artifact_of(program, NAME, path)


def ready(threads: int = 1) -> None:  # noqa: ARG001 - PyTorch is told before each call
    """Import PyTorch."""
    import edgefuse_targets.aten  # noqa: F401 - that it is imported is all


def open(artifact: Artifact, threads: int = 1, *, warm: bool = True) -> Opened:  # noqa: A001, ARG001 - the protocol's
    """Read it; nothing is left to the first call.

    Raises:
        NotABundle: there is no file.
        ChangedBundle: it is damaged, or lacks an entry.
    """
    return _Session(artifact, _graphs(artifact), threads)


def profile(  # the protocol's arguments
    artifact: Artifact,  # noqa: ARG001
    entry: str,  # noqa: ARG001
    inputs: Mapping[str, NDArray[np.float32]],  # noqa: ARG001
    threads: int = 1,  # noqa: ARG001
) -> Profile:
    """Refuse: nobody ships this."""
    raise Refused(f"{NAME} is for tests and has no profile.", hint="Profile what is shipped: -t executorch -t tflite")


def structure(artifact: Artifact) -> Structure:
    """Operators of all entries together, as they answer to zeros; nothing delegates."""
    import torch

    from edgefuse_targets.aten import WEIGHTED

    read = _graphs(artifact)
    zeros = {entry: [torch.zeros(spec.shape) for spec in specs] for entry, specs in artifact.inputs.items()}
    found = [(graph, operator) for name, graph in read.items() for operator in graph.operators(zeros[name])]
    return Structure(
        precisions=tally((operator.name, operator.precision) for _, operator in found),
        normalizations=tuple(words for graph in read.values() for words in graph.normalizations()),
        weighted=tally((graph.layer(operator), operator.precision) for graph, operator in found if operator.name in WEIGHTED),
    )


def _graphs(artifact: Artifact) -> Mapping[str, Graph]:
    with reading(RUNTIME, artifact.path):
        from edgefuse_targets.aten import graphs

        read = graphs(artifact.path.read_bytes())
    if absent := set(artifact.inputs) - set(read):
        raise ChangedBundle(f"{artifact.path} lacks the entries {', '.join(sorted(absent))}.", hint="Export it again.")
    return read


class _Session:
    """The graphs, and how many threads they may use."""

    how = "run on this host"

    def __init__(self, artifact: Artifact, graphs: Mapping[str, Graph], threads: int) -> None:
        self._artifact, self._graphs, self._threads = artifact, graphs, threads

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once."""
        self.give(entry, inputs)
        self.call(entry)
        return self.answers(entry)

    def give(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Make tensors of the inputs."""
        import numpy as np
        import torch

        self._given = [torch.from_numpy(np.array(inputs[spec.name], np.float32)) for spec in self._artifact.inputs[entry]]

    def call(self, entry: str) -> None:
        """Run the operators."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            self._answers = self._graphs[entry].run(self._given)
        finally:
            torch.set_num_threads(before)

    def answers(self, entry: str) -> Mapping[str, NDArray[np.float32]]:
        """The outputs, which are made anew in each call."""
        return {spec.name: answer.numpy() for spec, answer in zip(self._artifact.outputs[entry], self._answers, strict=True)}

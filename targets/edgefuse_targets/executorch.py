"""ExecuTorch with XNNPACK: one .pte with one method per entry; the methods share their weights inside the file.

The whole graph of a folded encoder is one XNNPACK partition. With fp16 the partition computes in half precision, on machines
without fp16 arithmetic too, slowly; the casts of inputs and outputs stand outside it. A front end before an fp16 network stays
in float32, as a partition of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefuse.errors import ChangedBundle
from edgefuse.values import Structure
from edgefuse_targets.foreign import exporting, quiet, reading
from edgefuse_targets.programs import artifact_of, deployed, lacking, refusals_of, tally, unable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import ModuleType
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.quantize.scheme import LayerPrecision
    from edgefuse.target import Opened
    from edgefuse.values import Artifact, Program

SUFFIX = ".pte"
SUMMARY = "ExecuTorch with XNNPACK, for Android, iOS and Linux: one method per length, in one file"

NAME = "executorch"
RUNTIME = "ExecuTorch"
LACKING: Mapping[LayerPrecision, str] = {
    "int8-weights": "XNNPACK has no such kernels through ExecuTorch; int8-dynamic has the same size",
    "palette4-weights": "XNNPACK has no lookup tables for weights",
    "int8-a16": "XNNPACK has no integers of 16 bits",
}
PACKAGES = {"executorch": "executorch==1.5.1", "torchao": "torchao==0.18.0"}


def missing() -> Sequence[str]:
    """ExecuTorch, and torchao, without which it cannot be imported."""
    return lacking(PACKAGES)


def refusals(program: Program) -> Sequence[str]:
    """What any target refuses, and precisions that XNNPACK has no kernels for."""
    return [*refusals_of(program), *unable(program, RUNTIME, LACKING)]


def export(program: Program, folder: Path, name: str) -> Artifact:
    """Write `folder/name.pte`.

    Raises:
        Refused: the program cannot be honoured.
        ExportFailed: PyTorch or ExecuTorch could not lower an entry.
    """
    with exporting(RUNTIME, refusals(program)):
        content = _lower(program)
    path = folder / f"{name}{SUFFIX}"
    path.write_bytes(content)
    return artifact_of(program, NAME, path)


def ready(threads: int = 1) -> None:
    """Import ExecuTorch, and PyTorch with it, and make its pool of threads."""
    with quiet():
        _POOL.resize(threads, binding())


def binding() -> ModuleType:
    """ExecuTorch's binding itself: `portable_lib`, the official way to the same names, imports the whole exporter for seconds."""
    import torch  # noqa: F401 - the binding needs its libraries
    from executorch.extension.pybindings import _C

    return _C  # type: ignore[no-any-return]  # it has no types


def open(artifact: Artifact, threads: int = 1, *, warm: bool = True) -> Opened:  # noqa: A001 - the protocol's name
    """Load every method: XNNPACK packs its weights then.

    Raises:
        NotABundle: there is no file.
        ChangedBundle: ExecuTorch cannot load it, or it lacks an entry.
    """
    import numpy as np

    with reading(RUNTIME, artifact.path):
        session = _Session(artifact, threads)
        for entry, specs in artifact.inputs.items() if warm else ():
            session.run(entry, {spec.name: np.zeros(spec.shape, np.float32) for spec in specs})
    return session


def profile(artifact: Artifact, entry: str, inputs: Mapping[str, NDArray[np.float32]], threads: int = 1) -> Profile:
    """What ExecuTorch's ETDump tells of a method, in it XNNPACK's own operators."""
    ready(threads)
    with reading(RUNTIME, artifact.path):
        from edgefuse_targets.profile_executorch import profiled

        return profiled(artifact, entry, inputs)


def structure(artifact: Artifact) -> Structure:
    """Operators inside and outside the delegates, of all methods together; delegates of the method that has most of them."""
    with reading(RUNTIME, artifact.path):
        from edgefuse_targets.pte import WEIGHTED, Method, methods

        read: Sequence[Method] = methods(artifact.path.read_bytes())
        outside = Counter(operator.name for method in read for operator in method.outside)
        found = [(operator.name, operator.precision) for method in read for operator in method.operators()]
        return Structure(
            precisions=tally(found),
            normalizations=tuple(words for method in read for words in method.normalizations()),
            partitions=max(len(method.delegates) for method in read),
            outside=dict(sorted(outside.items())),
            weighted=tally((name, precision) for name, precision in found if name in WEIGHTED),
        )


def _lower(program: Program) -> bytes:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes
    from executorch.exir import to_edge_transform_and_lower

    graphs = {
        entry.name: torch.export.export(deployed(program, entry), entry.example(), strict=False) for entry in program.entries
    }
    edge = to_edge_transform_and_lower(graphs, partitioner=[XnnpackPartitioner()], transform_passes=get_transform_passes())
    return bytes(edge.to_executorch().buffer)


@dataclass(slots=True)
class _Pool:
    """ExecuTorch's one pool of threads.

    A loaded method keeps a pointer into the pool with which it was loaded, so that after a change of the pool every method
    must be loaded again before it runs.
    """

    threads: int = 0
    generation: int = 0

    def resize(self, threads: int, runtime: ModuleType) -> None:
        if self.threads != threads:
            with quiet():
                runtime._unsafe_reset_threadpool(threads)  # noqa: SLF001 - there is no other way to set it
            self.threads, self.generation = threads, self.generation + 1


_POOL = _Pool()


class _Session:
    """A loaded .pte."""

    how = "run on this host"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._artifact, self._threads = artifact, threads
        self._generation = -1
        self._load()

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once."""
        self.give(entry, inputs)
        self.call(entry)
        return self.answers(entry)

    def give(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Hand over the inputs, which ExecuTorch reads where they are."""
        import numpy as np
        import torch

        if _POOL.threads != self._threads or self._generation != _POOL.generation:
            self._load()
        arrays = (np.array(inputs[spec.name], np.float32, order="C") for spec in self._artifact.inputs[entry])
        self._given = [torch.from_numpy(array) for array in arrays]  # kept: the method only has their addresses
        self._methods[entry].set_inputs(self._given)

    def call(self, entry: str) -> None:
        """Execute the method."""
        self._methods[entry].execute()

    def answers(self, entry: str) -> Mapping[str, NDArray[np.float32]]:
        """Copies of the outputs."""
        answers = self._methods[entry].get_outputs()
        return {spec.name: answer.numpy() for spec, answer in zip(self._artifact.outputs[entry], answers, strict=True)}

    def _load(self) -> None:
        with quiet():
            runtime = binding()
            _POOL.resize(self._threads, runtime)
            program = runtime._load_program(  # noqa: SLF001 - there is no public way to a program of several methods
                str(self._artifact.path), program_verification=runtime.Verification.InternalConsistency
            )
            absent = set(self._artifact.inputs) - {program.get_method_name(each) for each in range(program.num_methods())}
            if absent:
                raise ChangedBundle(
                    f"{self._artifact.path} lacks the entries {', '.join(sorted(absent))}.", hint="Export it again."
                )
            self._methods: Mapping[str, Any] = {entry: program.load_method(entry) for entry in self._artifact.inputs}
        self._generation = _POOL.generation

"""LiteRT, the runtime of TFLite: one .tflite with one signature per entry; LiteRT's converter lets them share their weights.

Inputs and outputs of a signature have the names of the entry's specs. With fp16 the weights of linears and convolutions are
stored in half precision; on a CPU the arithmetic stays in float32 unless the application asks XNNPACK for fp16, which it must not
where a front end is inside: the power of loud speech is beyond fp16. The front end's own weights stay in float32.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgefuse.errors import ChangedBundle
from edgefuse.values import Structure
from edgefuse_targets.foreign import exporting, quiet, reading
from edgefuse_targets.programs import artifact_of, holding, lacking, refusals_of, tally, unable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.quantize.scheme import LayerPrecision
    from edgefuse.target import Opened
    from edgefuse.values import Artifact, Program

SUFFIX = ".tflite"
SUMMARY = "LiteRT (TFLite) with XNNPACK, for Android, iOS, Linux and browsers: one signature per length, in one file"

NAME = "tflite"
RUNTIME = "LiteRT"
LACKING: Mapping[LayerPrecision, str] = {"palette4-weights": "it has no lookup tables for weights"}
FRONT_END = "LogMel"  # in the names of what a front end computes: its matrices stay float32
PACKAGES = {
    "litert_torch": "litert-torch==0.10.0",
    "ai_edge_litert": "ai-edge-litert==2.3.0",
    "ai_edge_quantizer": "ai-edge-quantizer==0.10.0",
}


def missing() -> Sequence[str]:
    """The converter, the runtime and the quantizer, which stores the weights of fp16."""
    return lacking(PACKAGES)


def refusals(program: Program) -> Sequence[str]:
    """What any target refuses, caches that are held, lookup tables, and integers where XNNPACK would leave LiteRT alone."""
    return [*refusals_of(program), *holding(program, RUNTIME), *unable(program, RUNTIME, LACKING), *_line_refusals(program)]


def export(program: Program, folder: Path, name: str) -> Artifact:
    """Write `folder/name.tflite`.

    Raises:
        Refused: the program cannot be honoured.
        ExportFailed: PyTorch or LiteRT's converter could not convert an entry.
    """
    with exporting(RUNTIME, refusals(program)):
        if program.quantization is not None:
            from edgefuse_targets.tflite_quantize import filled, quantized

            whole = filled(program)
            content = quantized(_convert(whole), whole)
        else:
            content = _convert(program)
        if program.precision == "fp16":
            content = _weights_to_half(content)
    path = folder / f"{name}{SUFFIX}"
    path.write_bytes(content)
    return artifact_of(program, NAME, path)


def ready(threads: int = 1) -> None:  # noqa: ARG001 - threads belong to an interpreter
    """Import LiteRT's interpreter."""
    with quiet():
        import ai_edge_litert.interpreter  # noqa: F401 - that it is imported is all


def open(artifact: Artifact, threads: int = 1, *, warm: bool = True) -> Opened:  # noqa: A001 - the protocol's name
    """Load it, and make room for every signature: XNNPACK packs its weights then.

    Raises:
        NotABundle: there is no file.
        ChangedBundle: LiteRT cannot load it, or it lacks an entry.
    """
    import numpy as np

    with reading(RUNTIME, artifact.path):
        session = _Session(artifact, threads)
        for entry, specs in artifact.inputs.items() if warm else ():
            session.run(entry, {spec.name: np.zeros(spec.shape, np.float32) for spec in specs})
    return session


def profile(artifact: Artifact, entry: str, inputs: Mapping[str, NDArray[np.float32]], threads: int = 1) -> Profile:
    """What LiteRT's profiler tells of a signature, in it XNNPACK's own operators."""
    with reading(RUNTIME, artifact.path):
        from edgefuse_targets.profile_tflite import profiled

        return profiled(artifact, entry, inputs, threads)


def structure(artifact: Artifact) -> Structure:
    """Operators of all signatures together, and those that XNNPACK leaves; partitions of the signature that has most of them."""
    with reading(RUNTIME, artifact.path):
        from edgefuse_targets.flatbuffer import delegation, graphs

        content = artifact.path.read_bytes()
        read = graphs(content)
        taken = [delegation(content, number) for number in range(len(read))]
        return Structure(
            precisions=tally((operator.name, operator.precision) for graph in read for operator in graph.operators),
            normalizations=tuple(words for graph in read for words in graph.normalizations()),
            partitions=max(partitions for partitions, _ in taken),
            outside=dict(sorted(sum((outside for _, outside in taken), Counter()).items())),
            weighted=tally(layer for graph in read for layer in graph.layers),
        )


def _line_refusals(program: Program) -> Iterator[str]:
    from edgefuse.quantize.scheme import INNER_LINES

    if program.quantization is not None:
        for line in INNER_LINES:
            if getattr(program.quantization.scheme, line) != "fp32":
                yield f"{RUNTIME} has no fast kernels for {line} in int8: leave it fp32 in the scheme."


def _convert(program: Program) -> bytes:
    import litert_torch

    from edgefuse_targets.named import Named

    converter = litert_torch
    for entry in program.entries:
        example = dict(zip((spec.name for spec in entry.inputs), entry.example(), strict=True))
        converter = converter.signature(entry.name, Named(entry), sample_kwargs=example)
    return bytes(converter.convert().model_content())


def _weights_to_half(content: bytes) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer

    half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    caster = quantizer.Quantizer(bytearray(content))
    caster.update_quantization_recipe(
        regex=f"^(?!.*{FRONT_END})",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        algorithm_key="float_casting",
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        ),
    )
    return bytes(caster.quantize().quantized_model)


class _Session:
    """A loaded .tflite."""

    how = "run on this host"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        with quiet():
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(
                model_path=str(artifact.path), num_threads=threads, experimental_default_delegate_latest_features=True
            )
            absent = set(artifact.inputs) - set(interpreter.get_signature_list())
            if absent:
                raise ChangedBundle(f"{artifact.path} lacks the entries {', '.join(sorted(absent))}.", hint="Export it again.")
            self._signatures = {entry: _Signature(interpreter, entry) for entry in artifact.inputs}

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once."""
        self.give(entry, inputs)
        self.call(entry)
        return self.answers(entry)

    def give(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy the inputs into the interpreter."""
        signature = self._signatures[entry]
        for name, value in inputs.items():
            signature.wrapper.SetTensor(signature.inputs[name], value, signature.graph)

    def call(self, entry: str) -> None:
        """Invoke the signature's subgraph."""
        self._signatures[entry].wrapper.Invoke(self._signatures[entry].graph)

    def answers(self, entry: str) -> Mapping[str, NDArray[np.float32]]:
        """Copies of the outputs."""
        signature = self._signatures[entry]
        return {name: signature.wrapper.GetTensor(tensor, signature.graph) for name, tensor in signature.outputs.items()}


class _Signature:
    """A signature of an interpreter.

    LiteRT's own `SignatureRunner` prepares, copies, invokes and copies in one go at every call; it is taken apart here.
    """

    def __init__(self, interpreter: Any, entry: str) -> None:  # noqa: ANN401 - LiteRT ships no types
        runner = interpreter.get_signature_runner(entry)
        self.wrapper = runner._interpreter_wrapper  # noqa: SLF001 - see above
        self.graph: int = runner._subgraph_index  # noqa: SLF001
        self.inputs: Mapping[str, int] = dict(runner._inputs)  # noqa: SLF001
        self.outputs: Mapping[str, int] = dict(runner._outputs)  # noqa: SLF001
        self.wrapper.AllocateTensors(self.graph)

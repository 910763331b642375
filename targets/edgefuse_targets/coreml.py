"""Core ML: an ML program for iOS 18 and macOS 15, one function per entry; the functions share their weights.

With fp16 everything computes in half precision, but for a front end, which stays in float32. So does a quantized program: the
Neural Engine has no float32, and states are half precision. What a scheme leaves fp32 is fp16 here. Weights of few bits are
widened when a layer computes; layers that are `int8` stand between quantize and dequantize, with our ranges. Which of these the
Neural Engine computes with integers, only a Mac or a phone can tell (the A17 Pro and the M4 are said to [R]).

The package is sealed: dates and random identifiers are taken out, and the identifiers in its manifest are derived from its
contents. The same program gives the same bytes, and a package that was changed or cut short is noticed when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tempfile
import traceback
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefuse.errors import ChangedBundle, NotABundle, Refused
from edgefuse.values import Structure
from edgefuse_targets.foreign import exporting, quiet, reading
from edgefuse_targets.programs import artifact_of, lacking, plan_of, refusals_of, tally, unable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from edgefuse.measurement import Profile
    from edgefuse.quantize.plan import Plan
    from edgefuse.quantize.scheme import LayerPrecision
    from edgefuse.target import Opened, Session
    from edgefuse.values import Artifact, Entry, Precision, Program

SUFFIX = ".mlpackage"
SUMMARY = "Core ML, for iOS 18 and macOS 15: an ML program with one function per length, in one package"

NAME = "coreml"
RUNTIME = "Core ML"
PACKAGES = {"coremltools": "coremltools==9.0"}
LACKING: Mapping[LayerPrecision, str] = {
    "int8-dynamic": "its quantize takes a scale that is known when the program is exported; int8-weights has the same size",
    "int8-a16": "its quantize makes integers of 8 bits",
}
AS_THEY_COME = "Core ML rounds no values by a scale that is known only when they come"
AUTHOR = "edgefuse"
STATE_WIDTH = 32  # the Neural Engine fails on a state whose width is no multiple of it (coremltools #2631)
CRASHING = ("common::canonicalize_inplace_pattern", "common::prefer_state_in_downstream")  # on several states (coremltools 9.0)
MOST_DIMENSIONS = 5  # of a Core ML tensor
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # what MIL takes as a name without changing it
MANIFEST = "Manifest.json"
MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"  # inside Data
PARTS = {  # name and description, as Core ML Tools write them
    MODEL: ("model.mlmodel", "CoreML Model Specification"),
    WEIGHTS: ("weights", "CoreML Model Weights"),
}


def missing() -> Sequence[str]:
    """Core ML Tools."""
    return lacking(PACKAGES)


def refusals(program: Program) -> Sequence[str]:
    """What any target refuses, and names, tensors, states, integers and lengths that Core ML cannot have."""
    entries = (sentence for entry in program.entries for sentence in _entry_refusals(entry))
    integers = (*unable(program, RUNTIME, LACKING, _asked), *_length_refusals(program))
    return [*refusals_of(program), *entries, *_state_refusals(program), *integers]


def export(program: Program, folder: Path, name: str) -> Artifact:
    """Write `folder/name.mlpackage`, whose default function is the first entry.

    Raises:
        Refused: the program cannot be honoured.
        ExportFailed: PyTorch or Core ML Tools could not convert an entry.
    """
    package = folder / f"{name}{SUFFIX}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as workshop:
        with exporting(RUNTIME, refusals(program)):
            sealed = _seal(_convert(program, Path(workshop)), program, Path(workshop, "sealed"))
        if package.exists():
            package.rename(Path(workshop, "before"))
        sealed.rename(package)
    return artifact_of(program, NAME, package, _asked)


def ready(threads: int = 1) -> None:  # noqa: ARG001 - Core ML chooses its own threads
    """Import Core ML Tools."""
    with quiet():
        import coremltools  # noqa: F401 - that it is imported is all


def open(artifact: Artifact, threads: int = 1, *, warm: bool = True) -> Opened:  # noqa: A001, ARG001 - the protocol's
    """Load a package: natively on a Mac, where Core ML chooses its own threads; elsewhere it is evaluated.

    Raises:
        NotABundle: there is no package.
        ChangedBundle: it was changed or cut short since the export.
        Refused: it has an operator that cannot be evaluated away from a Mac.
    """
    _check_seal(artifact.path)
    with reading(RUNTIME, artifact.path / MANIFEST):
        if platform.system() == "Darwin":
            return _Opened(_Native(artifact))
        from edgefuse_targets.mil import Evaluation

        return _Opened(Evaluation(artifact.path, threads))


def profile(  # the protocol's arguments
    artifact: Artifact,  # noqa: ARG001
    entry: str,  # noqa: ARG001
    inputs: Mapping[str, NDArray[np.float32]],  # noqa: ARG001
    threads: int = 1,  # noqa: ARG001
) -> Profile:
    """Refuse: Core ML Tools do not tell."""
    raise Refused(
        f"{RUNTIME} tells nobody but Xcode where its time goes.", hint="Open the package in Xcode, tab Performance, on a Mac."
    )


def structure(artifact: Artifact) -> Structure:
    """Operators, normalizations and layers of all functions together; Core ML partitions a program on the device, not here."""
    _check_seal(artifact.path)
    with reading(RUNTIME, artifact.path / MANIFEST):
        from coremltools.models.utils import load_spec

        from edgefuse_targets.mil_structure import WEIGHTED, normalizations, precisions

        spec = load_spec(str(artifact.path))
        found = list(precisions(spec))
        return Structure(
            precisions=tally(found),
            normalizations=tuple(normalizations(spec)),
            weighted=tally((name, precision) for name, precision in found if name in WEIGHTED),
        )


def digest(package: Path) -> str:
    """SHA-256 over a canonical listing: the path and the SHA-256 of every file, in the order of the paths."""
    files = sorted(path for path in package.rglob("*") if path.is_file())
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(package).as_posix()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Opened:
    """A session that takes, computes and answers in one go: the whole of it counts as the call."""

    def __init__(self, session: Session) -> None:
        self.how, self.run = session.how, session.run

    def give(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> None:  # noqa: ARG002 - the protocol's arguments
        """Keep the inputs."""
        self._given = inputs

    def call(self, entry: str) -> None:
        """Answer once."""
        self._answers = self.run(entry, self._given)

    def answers(self, entry: str) -> Mapping[str, NDArray[np.float32]]:  # noqa: ARG002
        """What it answered."""
        return self._answers


class _Native:
    """Core ML itself, on a Mac."""

    how = "run on this host"

    def __init__(self, artifact: Artifact) -> None:
        import coremltools

        self._functions = {
            entry: coremltools.models.MLModel(str(artifact.path), function_name=entry) for entry in artifact.inputs
        }
        holding = (name for name, how in artifact.streaming.items() if how.held)
        self._states = {entry: self._functions[entry].make_state() for entry in holding}

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once."""
        state = {"state": self._states[entry]} if entry in self._states else {}
        answer: Mapping[str, NDArray[np.float32]] = self._functions[entry].predict(dict(inputs), **state)
        return answer


def _asked(program: Program, entry: Entry) -> Plan:
    """What a scheme asks; a layer that is an exception in taking rounded values as they come takes them as they are."""
    plan = plan_of(program, entry)
    if program.quantization is None or program.quantization.scheme.layers == "int8-dynamic":
        return plan
    floats = [layer for layer, precision in plan.layers.items() if precision == "int8-dynamic"]
    layers: dict[str, LayerPrecision] = {**plan.layers, **dict.fromkeys(floats, "int8-weights")}
    return replace(plan, layers=layers, kept={**plan.kept, **dict.fromkeys(floats, AS_THEY_COME)})


def _entry_refusals(entry: Entry) -> Iterator[str]:
    specs = (*entry.inputs, *entry.outputs)
    for name in (entry.name, *(spec.name for spec in specs)):
        if not IDENTIFIER.fullmatch(name):
            yield f"Core ML names are letters, digits and underscores; {name!r} of entry {entry.name!r} is not."
    for spec in specs:
        if not 1 <= len(spec.shape) <= MOST_DIMENSIONS:
            yield (
                f"A Core ML tensor has 1 to {MOST_DIMENSIONS} dimensions; "
                f"{spec.name!r} of entry {entry.name!r} has {len(spec.shape)}."
            )


def _state_refusals(program: Program) -> Iterator[str]:
    held = [(entry, name) for entry in program.entries if entry.streaming for name in entry.streaming.held]
    if held and program.precision == "fp32":
        yield "Core ML holds states in half precision only, and the program is fp32: use --precision fp16."
    for entry, name in held:
        width = next(buffer.shape[-1] for path, buffer in entry.graph.named_buffers() if path.split(".")[-1] == name)
        if width % STATE_WIDTH:
            yield f"The Neural Engine wants states a multiple of {STATE_WIDTH} wide; {name!r} of entry {entry.name!r} is {width}."


def _length_refusals(program: Program) -> Iterator[str]:
    """A float program of such a length is none; a quantized one is float32 until it comes here."""
    from edgefuse.lower.program import LONGEST_FP16

    for entry in program.entries if program.quantization else ():
        how = entry.streaming
        frames = entry.outputs[0].shape[1] + (how.left + how.ahead if how else 0)
        if frames > LONGEST_FP16:
            yield (
                f"Core ML computes what is quantized in half precision, which counts frames up to {LONGEST_FP16}; "
                f"entry {entry.name!r} has {frames}."
            )


def _convert(program: Program, workshop: Path) -> Path:
    """Convert each entry, and put them into one package as functions; the package is as Core ML Tools make it."""
    import coremltools

    functions = coremltools.utils.MultiFunctionDescriptor()
    for entry in program.entries:
        single = str(workshop / f"{entry.name}{SUFFIX}")
        _convert_entry(program, entry).save(single)
        functions.add_function(single, src_function_name="main", target_function_name=entry.name)
    functions.default_function_name = program.entries[0].name
    package = workshop / f"functions{SUFFIX}"
    coremltools.utils.save_multifunction(functions, str(package))
    return package


def _convert_entry(program: Program, entry: Entry) -> Any:  # noqa: ANN401 - an MLModel; coremltools ships no types
    import coremltools
    import numpy as np
    import torch

    asked = _compressed(program, entry)
    graph = torch.export.export(asked, entry.example(), strict=False).run_decompositions({})
    passes = coremltools.PassPipeline()
    passes.remove_passes(CRASHING)
    try:
        return coremltools.convert(
            graph,
            pass_pipeline=passes,
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=_arithmetic(graph, entry, program.precision),
            inputs=[coremltools.TensorType(name=spec.name, shape=spec.shape, dtype=np.float32) for spec in entry.inputs],
            outputs=[coremltools.TensorType(name=spec.name, dtype=np.float32) for spec in entry.outputs],
            skip_model_load=True,
        )
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold a temporary folder, which should go now, not some day
        raise


def _compressed(program: Program, entry: Entry) -> nn.Module:
    """The graph of an entry in float32, its weights and values rounded as planned."""
    if program.quantization is None:
        return entry.graph
    from edgefuse_targets.coreml_quantize import compressed

    return compressed(entry.graph, _asked(program, entry))


def _arithmetic(graph: Any, entry: Entry, precision: Precision) -> Any:  # noqa: ANN401 - an exported program; coremltools' own
    """What is computed in fp16: everything, but for a front end and the samples that it hears."""
    import coremltools

    from edgefuse_targets.half import before_the_network

    if precision == "fp32":
        return coremltools.precision.FLOAT32
    outputs = zip(entry.outputs, graph.graph_signature.user_outputs, strict=True)
    whole = before_the_network(graph)
    whole |= {spec.name for spec, name in outputs if name in whole}  # what goes out has the name of its spec by then
    return coremltools.transform.FP16ComputePrecision(
        op_selector=lambda operation: whole.isdisjoint(output.name for output in operation.outputs)
    )


def _seal(raw: Path, program: Program, sealed: Path) -> Path:
    """Write the same package again, described, without dates, in a fixed order, with a manifest that is made from it."""
    from coremltools.models.utils import load_spec

    spec = load_spec(str(raw))
    _describe(spec.description, program)
    model = sealed / "Data" / MODEL
    model.parent.mkdir(parents=True)
    model.write_bytes(spec.SerializeToString(deterministic=True))
    for source in sorted((raw / "Data" / WEIGHTS).glob("*")):
        weights = sealed / "Data" / WEIGHTS / source.name
        weights.parent.mkdir(exist_ok=True)
        weights.write_bytes(source.read_bytes())
    manifest = json.dumps(_manifest(sealed), indent=4, sort_keys=True)  # Core ML Tools write it so again when they read it
    (sealed / MANIFEST).write_text(f"{manifest}\n", encoding="utf-8")
    return sealed


def _describe(description: Any, program: Program) -> None:  # noqa: ANN401 - a protobuf message
    lengths = ", ".join(entry.name for entry in program.entries)
    description.metadata.Clear()
    description.metadata.author = AUTHOR
    description.metadata.shortDescription = f"Speech encoder with a CTC head, {program.precision}: {lengths}"
    description.metadata.userDefined["edgefuse.precision"] = program.precision
    description.metadata.userDefined["edgefuse.parent"] = program.parent
    meanings = {(entry.name, spec.name): spec.meaning for entry in program.entries for spec in (*entry.inputs, *entry.outputs)}
    for function in description.functions:
        for feature in (*function.input, *function.output):
            feature.shortDescription = meanings[function.name, feature.name]


def _manifest(package: Path) -> dict[str, Any]:
    """The manifest of a package: Core ML wants an identifier per part, and ours is derived from what the part contains."""
    paths = {part: package / "Data" / part for part in PARTS}
    identifiers = {part: _identifier(path) for part, path in paths.items() if path.exists()}  # few constants: no weights
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifier: {"author": "com.apple.CoreML", "description": PARTS[part][1], "name": PARTS[part][0], "path": part}
            for part, identifier in identifiers.items()
        },
        "rootModelIdentifier": identifiers[MODEL],
    }


def _identifier(part: Path) -> str:
    """A UUID of a file's or a folder's contents."""
    contents = hashlib.sha256(part.read_bytes()).hexdigest() if part.is_file() else digest(part)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{part.name} {contents}"))


def _check_seal(package: Path) -> None:
    """Compare the manifest with the contents."""
    if not (package / MANIFEST).is_file() or not (package / "Data" / MODEL).is_file():
        raise NotABundle(f"{package} is not a Core ML package.", hint="Export it again.")
    try:
        same = json.loads((package / MANIFEST).read_text(encoding="utf-8")) == _manifest(package)
    except ValueError:
        same = False
    if not same:
        raise ChangedBundle(f"{package} has changed since the export, or is not whole.", hint="Export it again.")

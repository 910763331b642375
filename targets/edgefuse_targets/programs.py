"""What every target asks of a program, and what it says of the artifact."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import TYPE_CHECKING

from edgefuse.values import FLOAT, PRECISIONS, Artifact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from edgefuse.quantize.plan import Plan
    from edgefuse.quantize.scheme import LayerPrecision
    from edgefuse.values import Entry, Program


NUMBERS = {"int4": "int4", "int8": "int8", "int16": "int16", "float16": "fp16", "float32": "fp32"}  # the coarsest first


def lacking(packages: Mapping[str, str]) -> list[str]:
    """The requirements of modules that are not installed; nothing is imported."""
    return [requirement for module, requirement in packages.items() if importlib.util.find_spec(module) is None]


def refusals_of(program: Program) -> Iterator[str]:
    """Reasons for which no target can honour a program."""
    if not program.entries:
        yield "The program has no entry."
    if program.precision not in PRECISIONS:
        yield f"The precision is {program.precision}; {', '.join(PRECISIONS)} can be exported."
    if (program.quantization is None) != (program.precision in FLOAT):
        yield f"The precision is {program.precision}, and the program says nothing of how it is quantized."
    names = [entry.name for entry in program.entries]
    yield from (f"The entry {name!r} is there twice." for name in sorted({n for n in names if names.count(n) > 1}))
    for entry in program.entries:
        yield from _entry_refusals(entry)


def holding(program: Program, runtime: str) -> Iterator[str]:
    """Refusals of a runtime that forgets everything between two calls."""
    for entry in program.entries:
        if entry.streaming and entry.streaming.held:
            yield f"{runtime} holds nothing between two calls, and {entry.name!r} wants its caches held: use --state explicit."


def unable(
    program: Program, runtime: str, reasons: Mapping[LayerPrecision, str], plan: Callable[[Program, Entry], Plan] | None = None
) -> Iterator[str]:
    """Refusals of a runtime that lacks some precisions, with the reason for each; `plan` is what it makes of a scheme."""
    plans = ((plan or plan_of)(program, entry) for entry in program.entries if program.quantization)
    wanted = {precision for each in plans for precision in each.layers.values()}
    yield from (f"{runtime} cannot do {name}: {reason}." for name, reason in reasons.items() if name in wanted)


def plan_of(program: Program, entry: Entry) -> Plan:
    """What a quantized program asks of an entry."""
    from edgefuse.quantize.plan import plan

    assert program.quantization is not None, "the caller looked"  # noqa: S101 - a float program has no plan
    return plan(entry.graph, program.quantization.scheme, program.quantization.ranges.get(entry.name, {}))


def deployed(program: Program, entry: Entry) -> nn.Module:
    """The graph of an entry at the precision of its program."""
    from edgefuse.quantize.graph import quantized
    from edgefuse_targets.half import halved

    if program.quantization is not None:
        return quantized(entry.graph, plan_of(program, entry))
    return halved(entry.graph) if program.precision == "fp16" else entry.graph


def precision_of(taken: str, stored: str, *, widened: bool) -> str:
    """What a layer is, by the types of what it takes and of its weights; `widened` ones are made float before they are used."""
    if stored.startswith("float"):
        return f"{NUMBERS.get(stored, stored)}-weights" if widened else arithmetic([taken, stored])
    if stored == "int4":
        return "int4-weights"
    if taken.startswith("float"):
        return f"{stored}-{'weights' if widened else 'dynamic'}"
    return {"int8": stored, "int16": f"{stored}-a16"}.get(taken, f"{stored} by {taken}")


def arithmetic(types: Sequence[str]) -> str:
    """What an operator computes with: the coarsest number among the types of what it takes and makes; else the last of them."""
    return next((told for kind, told in NUMBERS.items() if kind in types), types[-1] if types else "unknown")


def tally(found: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How often each precision occurs beside each name, sorted."""
    counts: dict[str, Counter[str]] = {}
    for name, precision in found:
        counts.setdefault(name, Counter())[precision] += 1
    return {name: dict(sorted(each.items())) for name, each in sorted(counts.items())}


def artifact_of(program: Program, target: str, path: Path, plan: Callable[[Program, Entry], Plan] | None = None) -> Artifact:
    """What stands at `path`; `plan` is what the target made of a scheme."""
    asked = (plan or plan_of)(program, program.entries[0]) if program.quantization else None
    return Artifact(
        target=target,
        path=path,
        precision=program.precision,
        inputs={entry.name: entry.inputs for entry in program.entries},
        outputs={entry.name: entry.outputs for entry in program.entries},
        parent=program.parent,
        streaming=program.streaming,
        layers=asked.layers if asked else {},
        kept=asked.kept if asked else {},
    )


def _entry_refusals(entry: Entry) -> Iterator[str]:
    if entry.graph.training:
        yield f"The entry {entry.name!r} is in training mode; its norms and its dropout would not be those of evaluation."
    tensors = (*entry.graph.parameters(), *entry.graph.buffers())
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()} - {"float32"}
    if others:
        yield f"The entry {entry.name!r} holds {' and '.join(sorted(others))}; a program's graphs are float32 at every precision."

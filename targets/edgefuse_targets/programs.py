"""What every target asks of a program, and what it says of the artifact."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from edgefuse.values import PRECISIONS, Artifact

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgefuse.values import Entry, Program


def lacking(packages: Mapping[str, str]) -> list[str]:
    """The requirements of modules that are not installed; nothing is imported."""
    return [requirement for module, requirement in packages.items() if importlib.util.find_spec(module) is None]


def refusals_of(program: Program) -> Iterator[str]:
    """Reasons for which no target can honour a program."""
    if not program.entries:
        yield "The program has no entry."
    if program.precision not in PRECISIONS:
        yield f"The precision is {program.precision}; {' and '.join(PRECISIONS)} can be exported."
    names = [entry.name for entry in program.entries]
    yield from (f"The entry {name!r} is there twice." for name in sorted({n for n in names if names.count(n) > 1}))
    for entry in program.entries:
        yield from _entry_refusals(entry)


def holding(program: Program, runtime: str) -> Iterator[str]:
    """Refusals of a runtime that forgets everything between two calls."""
    for entry in program.entries:
        if entry.streaming and entry.streaming.held:
            yield f"{runtime} holds nothing between two calls, and {entry.name!r} wants its caches held: use --state explicit."


def artifact_of(program: Program, target: str, path: Path) -> Artifact:
    """What stands at `path`."""
    return Artifact(
        target=target,
        path=path,
        precision=program.precision,
        inputs={entry.name: entry.inputs for entry in program.entries},
        outputs={entry.name: entry.outputs for entry in program.entries},
        parent=program.parent,
        streaming=program.streaming,
    )


def _entry_refusals(entry: Entry) -> Iterator[str]:
    if entry.graph.training:
        yield f"The entry {entry.name!r} is in training mode; its norms and its dropout would not be those of evaluation."
    tensors = (*entry.graph.parameters(), *entry.graph.buffers())
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()} - {"float32"}
    if others:
        yield f"The entry {entry.name!r} holds {' and '.join(sorted(others))}; a program's graphs are float32 at every precision."

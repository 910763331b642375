"""FusionFormer against what it replaces: folded, not folded, and the LayerNorm Conformer, on each runtime.

All are built by the same lowering with the same layouts and sizes, and the Conformer's constant factors are folded as well, so
that the ratios are those of the norms and activations.
Weights are random: latency does not depend on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import target as targets
from edgefuse.bench.contender import contender
from edgefuse.bench.routine import Routine, Samples, interleave
from edgefuse.fold import fold
from edgefuse.lower import Chunks, program_of
from edgefuse.model import Encoder, preset
from edgefuse.target import Session, Target
from edgefuse.values import Artifact, Checkpoint, Mode, Program

VOCABULARY = 29
LAYER_NORM, UNFOLDED, FOLDED = "LN", "unfolded", "folded"
HELD = "folded, held"  # its caches inside the artifact, where the runtime can hold them
Tell = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """A ratio of latencies and the bar that it is held against.

    Attributes:
        target: the runtime.
        streaming: of chunks, or of whole utterances.
        name: the faster one.
        to: the one that it is divided by.
        bar: the ratio must not be above it.
    """

    target: str
    streaming: bool
    name: str
    to: str
    bar: float


ROWS = (
    Row("executorch", streaming=False, name=FOLDED, to=LAYER_NORM, bar=0.92),
    Row("executorch", streaming=False, name=FOLDED, to=UNFOLDED, bar=0.95),
    Row("tflite", streaming=False, name=FOLDED, to=LAYER_NORM, bar=0.96),
    Row("executorch", streaming=True, name=FOLDED, to=LAYER_NORM, bar=0.93),
    Row("tflite", streaming=True, name=FOLDED, to=LAYER_NORM, bar=0.93),
)  # `small`, fp32, one thread: offline 5.12 s; chunks of 640 ms after 2,560 ms; LN in the same best layout


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured on one target in one mode."""

    target: str
    mode: Mode
    samples: Samples


def compare(
    size: str,
    names: Sequence[str],
    routine: Routine,
    *,
    seconds: Sequence[float] = (),
    chunks: Sequence[Chunks] = (),
    threads: int = 1,
    tell: Tell,
) -> list[Comparison]:
    """Export the contenders of a preset to each target and time them interleaved, in each mode.

    Raises:
        UsageError: a target that cannot be timed here.
        MissingPackage: a target that is not installed.
    """
    shelf = {name: targets.find(name) for name in names}
    contenders = _checkpoints(size)
    programs = {kind: program_of(each, seconds, "fp32", chunks) for kind, each in contenders.items()}
    if chunks:
        programs[HELD] = program_of(contenders[FOLDED], seconds, "fp32", [replace(each, held=True) for each in chunks])
    with tempfile.TemporaryDirectory() as folder:
        return [
            comparison
            for name, target in shelf.items()
            for comparison in _measure(name, target, programs, Path(folder), routine, threads, tell)
        ]


def _checkpoints(size: str) -> dict[str, Checkpoint]:
    layer_norm, unfolded = (_random(size, norm) for norm in ("layer", "batch"))
    return {LAYER_NORM: fold(layer_norm).checkpoint, UNFOLDED: unfolded, FOLDED: fold(unfolded).checkpoint}


def _random(size: str, norm: str) -> Checkpoint:
    torch.manual_seed(0)
    config = preset(size, norm="batch" if norm == "batch" else "layer", vocabulary_size=VOCABULARY)
    tokens = ["<blk>", *(f"<{i}>" for i in range(1, VOCABULARY))]
    return checkpoints.of_encoder(Encoder(config), torch.zeros(config.mel_bins), torch.ones(config.mel_bins), tokens)


def _measure(
    name: str, target: Target, programs: Mapping[str, Program], folder: Path, routine: Routine, threads: int, tell: Tell
) -> Iterator[Comparison]:
    loaded: dict[str, tuple[Session, Artifact]] = {}
    honoured = {kind: program for kind, program in programs.items() if kind != HELD or not target.refusals(program)}
    for kind, program in honoured.items():
        with tell(f"Exporting {kind} for {name}"):
            artifact = target.export(program, folder, f"{name}-{kind}")
            loaded[kind] = target.open(artifact, threads), artifact
    for mode in programs[FOLDED].modes:
        with tell(f"Timing {', '.join(loaded)} on {name} in turns, {mode.name}"):
            samples = interleave({kind: contender(*each, mode) for kind, each in loaded.items()}, routine)
        yield Comparison(name, mode, samples)

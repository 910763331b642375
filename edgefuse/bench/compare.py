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
from torch import Tensor

from edgefuse import checkpoint as checkpoints
from edgefuse import target as targets
from edgefuse.bench.contender import contender
from edgefuse.bench.plain import plain_entry
from edgefuse.bench.routine import Routine, Samples, interleave
from edgefuse.checkpoint import encoder_of
from edgefuse.fold import fold
from edgefuse.lower import Chunks, program_of
from edgefuse.model import Encoder, EncoderConfig, preset
from edgefuse.model.cost import cost
from edgefuse.recognize import capacity
from edgefuse.target import Session, Target
from edgefuse.values import ENCODER_HOP_MS, Artifact, Checkpoint, Mode, Program

VOCABULARY = 29
LAYER_NORM, UNFOLDED, FOLDED = "LN", "unfolded", "folded"
HELD = "folded, held"  # its caches inside the artifact, where the runtime can hold them
PLAIN = "LN, usual layout"  # see plain.py
GEMM = "GEMM"  # one matrix product of as many multiply-accumulates as the folded network has: what the machine could do
AUDIO = "audio"  # the speech itself: a ratio to it is a real-time factor
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
        least: the ratio must not be below it instead.
    """

    target: str
    streaming: bool
    name: str
    to: str
    bar: float
    least: bool = False

    def kept(self, ratio: float) -> bool:
        """Whether the bar holds."""
        return ratio >= self.bar if self.least else ratio <= self.bar


ROWS = (
    Row("executorch", streaming=False, name=FOLDED, to=LAYER_NORM, bar=0.92),
    Row("executorch", streaming=False, name=FOLDED, to=UNFOLDED, bar=0.95),
    Row("tflite", streaming=False, name=FOLDED, to=LAYER_NORM, bar=0.96),
    Row("executorch", streaming=True, name=FOLDED, to=LAYER_NORM, bar=0.93),
    Row("tflite", streaming=True, name=FOLDED, to=LAYER_NORM, bar=0.93),
    Row("executorch", streaming=True, name=FOLDED, to=PLAIN, bar=0.84),
    Row("tflite", streaming=True, name=FOLDED, to=PLAIN, bar=0.86),
    Row("tflite", streaming=True, name=GEMM, to=FOLDED, bar=0.68, least=True),
    Row("executorch", streaming=True, name=FOLDED, to=AUDIO, bar=0.02),
    Row("tflite", streaming=True, name=FOLDED, to=AUDIO, bar=0.02),
)  # `small`, fp32, one thread: offline 5.12 s; chunks of 640 ms after 2,560 ms; "LN" is in the same best layout
PAIRS = (
    (FOLDED, LAYER_NORM),
    (FOLDED, UNFOLDED),
    (FOLDED, PLAIN),
    (HELD, FOLDED),
    (GEMM, FOLDED),
    (FOLDED, AUDIO),
)  # what is reported, with a bar or without


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
        programs[PLAIN] = _plain(size, programs[FOLDED])
        programs[HELD] = program_of(contenders[FOLDED], seconds, "fp32", [replace(each, held=True) for each in chunks])
    with tempfile.TemporaryDirectory() as folder:
        return [
            comparison
            for name, target in shelf.items()
            for comparison in _measure(name, target, programs, contenders[FOLDED].config, Path(folder), routine, tell)
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
    name: str,
    target: Target,
    programs: Mapping[str, Program],
    config: EncoderConfig,
    folder: Path,
    routine: Routine,
    tell: Tell,
) -> Iterator[Comparison]:
    loaded: dict[str, tuple[Session, Artifact]] = {}
    honoured = {kind: program for kind, program in programs.items() if kind != HELD or not target.refusals(program)}
    for kind, program in honoured.items():
        with tell(f"Exporting {kind} for {name}"):
            artifact = target.export(program, folder, f"{name}-{kind}")
            loaded[kind] = target.open(artifact, routine.threads), artifact
    for mode in programs[FOLDED].modes:
        able = {kind: each for kind, each in loaded.items() if next(iter(mode.inputs)) in each[1].inputs}
        frames, keys = _extent(mode)
        with tell(f"Timing {', '.join(able)} on {name} in turns, {mode.name}"):
            contenders = {kind: contender(*each, mode) for kind, each in able.items()}
            samples = interleave({**contenders, GEMM: _matrix_product(cost(config).macs(frames, keys), routine.threads)}, routine)
        audio = {AUDIO: (frames * ENCODER_HOP_MS * 1_000_000,) * routine.rounds}
        yield Comparison(name, mode, Samples({**samples.latency_ns, **audio}))


def _extent(mode: Mode) -> tuple[int, int]:
    """The frames of a mode's shortest entry, and how many each may attend to."""
    frames = capacity(next(iter(mode.inputs.values())))
    return frames, frames + (mode.streaming.left if mode.streaming else 0)


def _matrix_product(macs: int, threads: int) -> Callable[[], object]:
    """A square product of about so many multiply-accumulates, by PyTorch."""
    side = round(macs ** (1 / 3))
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=draw) for _ in range(2))

    def multiply() -> Tensor:
        torch.set_num_threads(threads)
        return left @ right

    return multiply


def _plain(size: str, best: Program) -> Program:
    """The Conformer in the usual layout, one entry for each that streams."""
    encoder = encoder_of(_random(size, "layer"))
    streaming = best.streaming.items()
    return Program(tuple(plain_entry(encoder, how.chunk, how.left, name) for name, how in streaming), "fp32", parent=best.parent)

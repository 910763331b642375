"""FusionFormer against what it replaces: folded, not folded, and the LayerNorm Conformer, on each runtime.

All are built by the same lowering with the same layouts and sizes, and the Conformer's constant factors and gains are folded as
well, so that the ratios are those of the norms and activations. With fewer bits, the folded one and the Conformer are timed in
turns with themselves in fp32.
Weights are random, and ranges are those of noise: latency depends on neither.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from edgefuse import target as targets
from edgefuse.ablation.plain import plain_entry
from edgefuse.bench.contender import contender, noise
from edgefuse.bench.turns import Timed, Turns, interleave
from edgefuse.checkpoint import encoder_of
from edgefuse.errors import Refused
from edgefuse.fold import fold
from edgefuse.lower import Chunks, program_of
from edgefuse.model import EncoderConfig, preset
from edgefuse.model.cost import cost
from edgefuse.new import untrained
from edgefuse.quantize.observe import Range, observe
from edgefuse.quantize.scheme import Clipping, Scheme
from edgefuse.recognize import capacity
from edgefuse.target import Session, Target
from edgefuse.values import Artifact, Checkpoint, Entry, Mode, Precision, Program, Quantization

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


ROWS: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "small": (
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
        ),
        "base": tuple(
            Row(target, streaming=False, name=f"{FOLDED} int8", to=to, bar=bar)
            for target in ("executorch", "tflite")
            for to, bar in ((FOLDED, 0.34), (LAYER_NORM, 0.31), (f"{LAYER_NORM} int8", 0.90))
        ),
    }
)  # one thread, offline 5.12 s, chunks of 640 ms after 2,560 ms; fp32 where a name says no bits; "LN" is in the same best layout


def pairs(precision: Precision) -> tuple[tuple[str, str], ...]:
    """What is reported, with a bar or without."""
    if precision == "fp32":
        return (
            (FOLDED, LAYER_NORM),
            (FOLDED, UNFOLDED),
            (FOLDED, PLAIN),
            (HELD, FOLDED),
            (GEMM, FOLDED),
            (FOLDED, AUDIO),
        )
    few, twin = f"{FOLDED} {precision}", f"{LAYER_NORM} {precision}"
    return (few, FOLDED), (few, LAYER_NORM), (few, twin), (twin, LAYER_NORM), (FOLDED, LAYER_NORM), (few, AUDIO)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured of a preset on one target in one mode."""

    preset: str
    precision: Precision
    target: str
    mode: Mode
    samples: Timed


def compare(
    size: str,
    names: Sequence[str],
    turns: Turns,
    *,
    precision: Precision | Scheme = "fp32",
    seconds: Sequence[float] = (),
    chunks: Sequence[Chunks] = (),
    tell: Tell,
) -> list[Comparison]:
    """Export the contenders of a preset to each target and time them interleaved, in each mode.

    Raises:
        UsageError: a target that cannot be timed here.
        MissingPackage: a target that is not installed.
        Refused: a target that lacks the precision.
    """
    shelf = {name: targets.find(name) for name in names}
    with tell("Building the contenders"):
        programs = _programs(size, precision, seconds, chunks)
    for target in shelf.values():
        _require_honoured(target, programs)
    with tempfile.TemporaryDirectory() as folder:
        return [
            Comparison(size, _bits(precision), name, mode, samples)
            for name, target in shelf.items()
            for mode, samples in _measure(name, target, programs, _config(size, "batch"), Path(folder), turns, tell)
        ]


def _programs(size: str, precision: Precision | Scheme, seconds: Sequence[float], chunks: Sequence[Chunks]) -> dict[str, Program]:
    layer_norm, unfolded = (untrained(_config(size, norm)) for norm in ("layer", "batch"))
    folded = {LAYER_NORM: fold(layer_norm).checkpoint, FOLDED: fold(unfolded).checkpoint}
    programs = {kind: program_of(each, seconds, "fp32", chunks) for kind, each in folded.items()}
    if precision != "fp32":
        return programs | {f"{kind} {_bits(precision)}": _at(precision, program) for kind, program in programs.items()}
    programs[UNFOLDED] = program_of(unfolded, seconds, "fp32", chunks)
    if chunks:
        programs[PLAIN] = _plain(layer_norm, programs[FOLDED])
        programs[HELD] = program_of(folded[FOLDED], seconds, "fp32", [replace(each, held=True) for each in chunks])
    return programs


def _bits(precision: Precision | Scheme) -> Precision:
    return precision.precision if isinstance(precision, Scheme) else precision


def _at(precision: Precision | Scheme, program: Program) -> Program:
    """The same program at another precision; a scheme's ranges are those of noise."""
    if not isinstance(precision, Scheme):
        return replace(program, precision=precision)
    ranges = {entry.name: _ranges(entry, precision.clipping) for entry in program.entries} if precision.calibrated else {}
    return replace(program, precision=precision.precision, quantization=Quantization(precision, ranges, ""))


def _ranges(entry: Entry, clipping: Clipping) -> dict[str, Range]:
    heard = tuple(torch.from_numpy(each) for each in noise(entry.inputs).values())
    return {path: seen.range(clipping) for path, seen in observe(lambda: [(entry.graph, *heard)]).items()}


def _require_honoured(target: Target, programs: Mapping[str, Program]) -> None:
    """Raise `Refused` before anything is exported; where a runtime holds no caches, nobody does."""
    for kind, program in programs.items():
        if kind != HELD and (sentences := target.refusals(program)):
            raise Refused(" ".join(sentences), hint="Time another precision, or other targets.")


def _config(size: str, norm: Literal["batch", "layer"]) -> EncoderConfig:
    return preset(size, norm=norm, vocabulary_size=VOCABULARY)


def _measure(
    name: str,
    target: Target,
    programs: Mapping[str, Program],
    config: EncoderConfig,
    folder: Path,
    turns: Turns,
    tell: Tell,
) -> Iterator[tuple[Mode, Timed]]:
    loaded: dict[str, tuple[Session, Artifact]] = {}
    honoured = {kind: program for kind, program in programs.items() if kind != HELD or not target.refusals(program)}
    for kind, program in honoured.items():
        with tell(f"Exporting {kind} for {name}"):
            artifact = target.export(program, folder, f"{name}-{kind}")
            loaded[kind] = target.open(artifact, turns.threads), artifact
    for mode in programs[FOLDED].modes:
        able = {kind: each for kind, each in loaded.items() if next(iter(mode.inputs)) in each[1].inputs}
        frames, keys = _extent(mode)
        with tell(f"Timing {', '.join(able)} on {name} in turns, {mode.name}"):
            contenders = {kind: contender(*each, mode) for kind, each in able.items()}
            samples = interleave({**contenders, GEMM: _matrix_product(cost(config).macs(frames, keys), turns.threads)}, turns)
        audio = {AUDIO: (frames * config.frame_ms * 1_000_000,) * turns.rounds}
        yield mode, Timed({**samples.latency_ns, **audio})


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


def _plain(conformer: Checkpoint, best: Program) -> Program:
    """The Conformer in the usual layout, one entry for each that streams."""
    encoder = encoder_of(conformer)
    streaming = best.streaming.items()
    return Program(tuple(plain_entry(encoder, how.chunk, how.left, name) for name, how in streaming), "fp32", parent=best.parent)

"""What the rows cost, whatever they have learnt: sizes, operations, latencies and training steps in turns, instructions.

Weights are random: none of these depends on them. Each line of the table is timed in turns with the LayerNorm Conformer and all
others, in one run, so that whatever else the machine does is done to all alike.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from edgefuse import device as devices
from edgefuse import target as targets
from edgefuse.bench.contender import contender, noise
from edgefuse.bench.turns import Timed, Turns, interleave
from edgefuse.errors import DeviceError, EdgefuseError
from edgefuse.fold import fold
from edgefuse.inspection import SECONDS
from edgefuse.lower import Chunks, program_of
from edgefuse.measurement import Call, Job, Routine
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.cost import cost
from edgefuse.new import untrained
from edgefuse.recognize import capacity
from edgefuse.store import size_bytes
from edgefuse.study.rows import BASE, Plan, Row, config_at_depth, require_built
from edgefuse.study.train import CHUNK_MS, FIRST, LEFT_MS
from edgefuse.train.module import ctc_loss
from edgefuse.values import OFFLINE, Artifact, Mode, Program, Refusal

if TYPE_CHECKING:
    from edgefuse.device import Connection
    from edgefuse.target import Session

TARGETS = ("executorch", "tflite")
STREAMING = "streaming"
COUNTER = "arm64:cortex-a53"
COUNTED = "executorch"  # whose instructions are counted
STEP_UTTERANCES, STEP_FRAMES, STEP_TOKENS = 8, 256, 16  # a training step's batch: 20 s of noise
Tell = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: a row, or a part of one that costs something of its own.

    Attributes:
        key: of its costs.
        config: of its encoder.
        sampled_depth: its training steps run some of its layers only.
    """

    key: str
    config: EncoderConfig
    sampled_depth: bool = False


def key_of(row: str, part: str) -> str:
    """What a part of a row is called among the costs."""
    return f"{row}, {part}" if part else row


def lines_of(plan: Plan, row: Row) -> Iterator[Line]:
    """The lines of a row."""
    recipe = plan.recipe_of(row, 0)
    config = recipe.encoder(recipe.pieces)
    yield Line(row.name, config, recipe.sampled_depth)
    for depth in row.depths:
        yield Line(key_of(row.name, f"{depth} layers"), config_at_depth(config, depth))
    if config.second_pass:
        first = dataclasses.replace(config, layers=config.layers - config.second_pass, second_pass=0)
        yield Line(key_of(row.name, FIRST), first)


def renewed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of before, with those that were measured now in their places; what could be measured now is not refused any more."""
    lines = {*now.get("sizes", ()), *now.get("refused", ())}
    stays = {key: why for key, why in before.get("refused", {}).items() if key.split(",")[0] not in lines}
    return _merged({**before, "refused": stays}, now)


def _merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(before)
    for name, value in now.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


def measure(plan: Plan, rows: Sequence[Row], names: Sequence[str], turns: Turns, *, tell: Tell) -> dict[str, Any]:
    """The costs of the lines of some rows, as JSON; what cannot be built, exported or counted says why.

    `sizes`, `refused` and `instructions` are by line; `latency` is by runtime, mode and line; `step` by line.
    """
    lines = [line for row in rows for line in lines_of(plan, row)]
    with tempfile.TemporaryDirectory() as folder:
        with tell("Building the rows"):
            built, sizes, refused = _built(lines)
        artifacts = {name: _exported(name, built, Path(folder), refused, tell) for name in names}
        latency = {name: _timed(name, made, turns, tell) for name, made in artifacts.items()}
        for key, artifact in artifacts.get(COUNTED, {}).items():
            sizes[key]["pte_bytes"] = size_bytes(artifact.path)
        instructions = _counted(artifacts.get(COUNTED, {}), tell)
    with tell("Timing training steps in turns"):
        step = _steps([line for line in lines if line.key in sizes], turns)
    return {
        "host": {"machine": platform.machine(), "cpu": _cpu(), "threads": turns.threads, "rounds": turns.rounds},
        "sizes": sizes,
        "refused": refused,
        "latency": latency,
        "step": step,
        "instructions": instructions,
    }


def _built(lines: Sequence[Line]) -> tuple[dict[str, Program], dict[str, dict[str, Any]], dict[str, str]]:
    programs, sizes, refused = {}, {}, {}
    for line in lines:
        try:
            encoder = require_built(line.config)
            folded = fold(untrained(line.config))
            sizes[line.key] = _sizes(line.config, encoder, [site.site for site in folded.plan if isinstance(site, Refusal)])
            chunks = (Chunks(CHUNK_MS, LEFT_MS),)
            programs[line.key] = program_of(folded.checkpoint, (SECONDS,), "fp32", chunks)
        except (EdgefuseError, RuntimeError, ValueError, KeyError, TypeError) as error:
            refused[line.key] = error.sentence if isinstance(error, EdgefuseError) else f"It cannot be lowered: {error}."
    return programs, sizes, refused


def _sizes(config: EncoderConfig, encoder: Encoder, stays: Sequence[str]) -> dict[str, Any]:
    """Stored values, those that are shared counted once; multiply-accumulates; sites that no fold removes."""
    return {
        "parameters": sum(each.numel() for each in encoder.parameters()),
        "block_parameters": sum(each.numel() for each in encoder.blocks.parameters()),
        "macs_per_second": cost(config).macs_per_second(SECONDS),
        "stays": len(stays),
    }


def _exported(
    name: str, programs: Mapping[str, Program], folder: Path, refused: dict[str, str], tell: Tell
) -> dict[str, Artifact]:
    target, made = targets.find(name), {}
    for number, (key, program) in enumerate(programs.items()):
        with tell(f"Exporting {key} for {name}"):
            try:
                made[key] = target.export(program, folder, f"{name}-{number}")
            except (EdgefuseError, RuntimeError, ValueError) as error:
                refused[f"{key}, {name}"] = error.sentence if isinstance(error, EdgefuseError) else f"{name}: {error}."
    return made


def _timed(name: str, artifacts: Mapping[str, Artifact], turns: Turns, tell: Tell) -> dict[str, Any]:
    """By mode and line: the median, and the ratio to the base with its quartiles."""
    target = targets.find(name)
    sessions: dict[str, Session] = {key: target.open(artifact, turns.threads) for key, artifact in artifacts.items()}
    found: dict[str, Any] = {}
    for streaming, told in ((False, OFFLINE), (True, STREAMING)):
        modes = {key: mode for key, artifact in artifacts.items() if (mode := _mode(artifact, streaming=streaming))}
        with tell(f"Timing {len(modes)} lines on {name} in turns, {told}"):
            contenders = {key: contender(sessions[key], artifacts[key], mode) for key, mode in modes.items()}
            found[told] = _ratios(interleave(contenders, turns)) if BASE in contenders else {}
    return found


def _mode(artifact: Artifact, *, streaming: bool) -> Mode | None:
    return next((mode for mode in artifact.modes if (mode.streaming is not None) == streaming), None)


def _ratios(samples: Timed) -> dict[str, dict[str, float]]:
    told = {}
    for key in samples.latency_ns:
        low, high = samples.ratio_quartiles(key, BASE)
        told[key] = {
            "p50_ms": round(samples.p50_ms(key), 4),
            "ratio": round(samples.ratio(key, BASE), 4),
            "ratio_low": round(low, 4),
            "ratio_high": round(high, 4),
        }
    return told


def _steps(lines: Sequence[Line], turns: Turns) -> dict[str, dict[str, float]]:
    """Seconds of a training step of each line; where the depth is sampled, the mean over all depths, which are timed apart."""
    torch.set_num_threads(turns.threads)
    parts: dict[str, tuple[str, ...]] = {}
    contenders: dict[str, Callable[[], object]] = {}
    for line in lines:
        depths: list[int | None] = [*range(1, line.config.layers + 1)] if line.sampled_depth else [None]
        trained = _Trained(Encoder(line.config).train())
        parts[line.key] = tuple(f"{line.key}/{depth}" for depth in depths)
        contenders |= {f"{line.key}/{depth}": trained.step(depth) for depth in depths}
    samples = interleave(contenders, turns)
    seconds = {key: statistics.fmean(samples.p50_ms(part) for part in each) / 1000 for key, each in parts.items()}
    base = seconds.get(BASE)
    return {key: {"p50_s": round(each, 5), **({"ratio": round(each / base, 4)} if base else {})} for key, each in seconds.items()}


class _Trained:
    """An encoder and its optimizer; a step is forward, CTC, backward and update on one batch of noise."""

    def __init__(self, encoder: Encoder) -> None:
        draw = Generator().manual_seed(0)
        self.encoder = encoder
        self.features = torch.randn(STEP_UTTERANCES, STEP_FRAMES, encoder.config.mel_bins, generator=draw)
        shape = (STEP_UTTERANCES, STEP_TOKENS)
        self.targets = torch.randint(1, encoder.config.vocabulary_size, shape, generator=draw).flatten()
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)

    def step(self, depth: int | None) -> Callable[[], Tensor]:
        lengths = torch.full((STEP_UTTERANCES,), STEP_FRAMES)
        counts = torch.full((STEP_UTTERANCES,), STEP_TOKENS)

        def run() -> Tensor:
            logits, valid, *_ = self.encoder(self.features, lengths, depth=depth)
            loss = ctc_loss(logits, valid, self.targets, counts)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            return loss

        return run


def _counted(artifacts: Mapping[str, Artifact], tell: Tell) -> dict[str, Any]:
    """Exact arm64 instructions of one utterance and of one chunk, where the emulator is set up; else why not."""
    if not artifacts:
        return {}
    try:
        with devices.connect(COUNTER) as connection:
            counts = {key: _count(connection, key, each, tell) for key, each in artifacts.items()}
            return {"device": COUNTER, "counts": counts, "lacks": ""}
    except DeviceError as error:
        return {"device": COUNTER, "lacks": error.sentence}


def _count(connection: Connection, key: str, artifact: Artifact, tell: Tell) -> dict[str, int]:
    counts: dict[str, int] = {}
    for streaming, told in ((False, OFFLINE), (True, STREAMING)):
        if mode := _mode(artifact, streaming=streaming):
            entry = next(iter(mode.inputs))
            inputs = noise(artifact.inputs[entry])
            feed = (Call(inputs, begins=True, utterance="noise", frames=capacity(artifact.inputs[entry])),)
            with tell(f"{COUNTER}: {key}, {told}"):
                run = connection.run(Job(artifact, entry, feed, Routine("counted", processes=1)))
            counts[told] = run.samples.values[0]
    return counts


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())

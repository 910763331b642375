"""A budget: what an artifact may cost at most, in a TOML file that lives beside the code.

    [[budget]]
    device = "arm64:cortex-a76"
    target = "executorch"
    entry = "stream_640ms"
    instructions = 1_234_567

A budget says of which artifacts and devices it speaks (`FILTERS`, each may be left out) and one limit or several (`LIMITS`).
A limit speaks of every measurement that it can speak of, and a number that is not there is never taken for one that is kept.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgefuse.bench.match import one_call
from edgefuse.bench.summary import summary_of
from edgefuse.errors import BadBudget, MissingFile
from edgefuse.values import OFFLINE, SECOND, Check
from edgefuse.verify.wer import rates_by_part

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.bundle import Bundle, Export
    from edgefuse.measurement import Clock, Measurement

FILTERS = ("device", "model", "target", "precision", "entry")
WALL: tuple[Clock, ...] = ("host", "device")
LIMITS: Mapping[str, tuple[Clock, ...]] = MappingProxyType(  # and the clocks that can tell; none: it is the artifact's own
    {
        "instructions": ("instructions",),
        "latency_p50_ms": WALL,
        "latency_p90_ms": WALL,
        "latency_p99_ms": WALL,
        "peak_mb": (*WALL, "virtual"),
        "size_mb": (),
        "partitions": (),
        "outside_percent": (),
        "wer_percent": (),
    }
)
LOWER = 0.01  # a count that is so far below its budget shows that the budget can be lowered
EXAMPLE = 'A budget is, for example: [[budget]] target = "executorch", size_mb = 12.5'
Known = float | str  # a number, or why there is none


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be at most so much; `part` is of the test set, "" its worst."""

    what: str
    most: float
    part: str = ""

    @property
    def called(self) -> str:
        """Its name in a sentence."""
        return f"{self.what} ({self.part})" if self.part else self.what


@dataclass(frozen=True, slots=True)
class Line:
    """One budget of a file: where it stands, of what it speaks, and its limits."""

    number: int
    filters: Mapping[str, str]
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """A file of budgets."""

    path: Path
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class _Thing:
    """What budgets may speak of: by which names, by which clock (None: no device ran it), and what is known of it."""

    names: Mapping[str, str]
    streaming: bool
    clock: Clock | None
    known: Mapping[str, Known]
    wer_percent: Mapping[str, float]


def read_budget(path: Path) -> Budget:
    """Read a file of budgets.

    Raises:
        MissingFile: there is none.
        BadBudget: it cannot be read, or says what no budget can say.
    """
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.", hint=EXAMPLE)
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadBudget(f"{path} cannot be read: {error}.", hint=EXAMPLE) from error
    for name in told:
        if name != "budget":
            raise BadBudget(f"{path} says {name!r}, which is no budget.", hint=EXAMPLE)
    budgets = told.get("budget")
    if not isinstance(budgets, list) or not budgets or not all(isinstance(each, dict) for each in budgets):
        raise BadBudget(f"{path} has no [[budget]].", hint=EXAMPLE)
    return Budget(path, tuple(_line(path, number, each) for number, each in enumerate(budgets, 1)))


def check(budget: Budget, measurements: Sequence[Measurement]) -> tuple[Check, ...]:
    """Hold measurements against a budget, limit by limit.

    Raises:
        BadBudget: a budget speaks of nothing that was measured.
    """
    return _checked(budget, [_measured(each) for each in measurements], "Give a result that holds it, or correct the budget.")


def check_exports(budget: Budget, bundle: Bundle, exports: Sequence[Export]) -> tuple[Check, ...]:
    """Hold what is known of artifacts without any device against a budget: size, partitions, operators outside, WER.

    Raises:
        BadBudget: a budget speaks of something else, or of no artifact that is there.
    """
    things = [thing for export in exports for thing in _exported(bundle, export)]
    return _checked(budget, things, "Only a device measures it: edgefuse bench BUNDLE --device ... --budget FILE")


def _line(path: Path, number: int, told: Mapping[str, Any]) -> Line:
    for name, value in told.items():
        if name not in FILTERS and name not in LIMITS:
            raise BadBudget(
                f"{path}, budget {number}: there is nothing called {name!r}.",
                hint=f"It may say of what it speaks ({', '.join(FILTERS)}), and limits: {', '.join(LIMITS)}",
            )
        if name in FILTERS and not isinstance(value, str):
            raise BadBudget(f"{path}, budget {number}: {name} = {value!r} is no text.", hint=EXAMPLE)
    limits = tuple(limit for name, value in told.items() if name in LIMITS for limit in _limits(path, number, name, value))
    if not limits:
        raise BadBudget(f"{path}, budget {number} has no limit.", hint=f"The limits are: {', '.join(LIMITS)}")
    return Line(number, {name: value for name, value in told.items() if name in FILTERS}, limits)


def _limits(path: Path, number: int, name: str, value: object) -> Iterator[Limit]:
    parts: Mapping[str, object] = {"": value}
    if name == "wer_percent" and isinstance(value, dict) and value:
        parts = value
    for part, most in parts.items():
        if isinstance(most, bool) or not isinstance(most, int | float) or not math.isfinite(most) or most < 0:
            raise BadBudget(f"{path}, budget {number}: {name} = {value!r}.", hint="A limit is a number that is not negative.")
        yield Limit(name, float(most), part)


def _checked(budget: Budget, things: Sequence[_Thing], mend: str) -> tuple[Check, ...]:
    checks: dict[Check, None] = {}
    for line in budget.lines:
        meant = [thing for thing in things if _is_meant(line.filters, thing)]
        if not meant:
            raise BadBudget(
                f"{budget.path}, budget {line.number} speaks of nothing that is there: {_told(line.filters)}.",
                hint=f"There are: {'; '.join(dict.fromkeys(', '.join(thing.names.values()) for thing in things)) or 'none'}",
            )
        for limit in line.limits:
            clocks = LIMITS[limit.what]
            able = [thing for thing in meant if not clocks or thing.clock in clocks]
            told = _told(line.filters)
            if not able:
                raise BadBudget(
                    f"{budget.path}, budget {line.number} limits {limit.called}, which was not measured of {told}.",
                    hint=mend,
                )
            checks.update(dict.fromkeys(_check(line.number, limit, thing) for thing in able))
    return tuple(checks)


def _is_meant(filters: Mapping[str, str], thing: _Thing) -> bool:
    """Whether every filter holds; a way in may be named by its mode as well."""
    return all(
        thing.names.get(name) == value or (name == "entry" and value == OFFLINE and _is_offline(thing))
        for name, value in filters.items()
    )


def _is_offline(thing: _Thing) -> bool:
    return not thing.streaming and not thing.names["entry"].startswith(SECOND)


def _check(number: int, limit: Limit, thing: _Thing) -> Check:
    known = _worst(thing, limit.part) if limit.what == "wer_percent" else thing.known[limit.what]
    which = (
        FILTERS if LIMITS[limit.what] else ("model", "target", "precision", *(["entry"] if limit.what == "wer_percent" else []))
    )
    name = f"budget {number}: {limit.called} of {', '.join(thing.names[each] for each in which)}"
    required = f"<= {_number(limit.most)}"
    if isinstance(known, str):
        return Check(name, f"not measured: {known}", required, passed=False)
    spare = limit.what == "instructions" and known < (1 - LOWER) * limit.most
    told = f", {100 * (1 - known / limit.most):.1f} % below: the budget can be lowered" if spare else ""
    return Check(name, f"{_number(known)}{told}", required, passed=known <= limit.most)


def _worst(thing: _Thing, part: str) -> Known:
    told = {name: value for name, value in thing.wer_percent.items() if math.isfinite(value)}  # NaN: nobody said a word
    if part:
        return told.get(part, f"the test set has no part {part!r}, only {', '.join(told) or 'none'}")
    return max(told.values(), default="no word was said in the test set")


def _measured(measurement: Measurement) -> _Thing:
    device, subject, summary = measurement.device, measurement.subject, summary_of(measurement)
    call, memory = one_call(measurement), measurement.memory
    nothing = why_no_number(measurement)
    tails = {"p50": summary.p50, "p90": summary.p90, "p99": summary.p99} if summary else {}
    few = f"{summary.count} samples are too few" if summary else nothing
    return _Thing(
        {name: device.spec if name == "device" else str(getattr(subject, name)) for name in FILTERS},
        subject.streaming,
        device.clock,
        {
            "instructions": nothing if call is None else call,
            **{f"latency_{name}_ms": few if value is None else value / 1e6 for name, value in tails.items()},
            **({} if tails else dict.fromkeys(("latency_p50_ms", "latency_p90_ms", "latency_p99_ms"), nothing)),
            "peak_mb": memory.peak_bytes / 1e6 if memory else _why_no_memory(measurement),
            **_structure(subject.size_bytes, subject.partitions, subject.operators, subject.outside),
        },
        subject.wer_percent,
    )


def why_no_number(measurement: Measurement) -> str:
    """Why no process of a measurement counts, in one of the words that were said of it."""
    void = [visit.void for visit in measurement.visits if visit.void]
    failed = [each.reason for each in measurement.failures if each.want == "latency"]
    refused = measurement.refusals.get("latency")
    return next(iter([*([refused] if refused else []), *failed, *void]), "it was not run")


def _why_no_memory(measurement: Measurement) -> str:
    failed = [each.reason for each in measurement.failures if each.want == "memory"]
    return measurement.refusals.get("memory") or next(iter(failed), "nobody looked at the memory")


def _exported(bundle: Bundle, export: Export) -> Iterator[_Thing]:
    """Each way into an artifact; no device has run it."""
    artifact, structure = export.artifact, export.structure
    operators, outside = sum(structure.operators.values()), sum(structure.outside.values())
    model = bundle.folder.resolve().name
    for mode in artifact.modes:
        wer = rates_by_part(export.findings[mode.name].words, bundle.references[mode.name].parts)
        for entry in mode.inputs:
            names = {"model": model, "target": artifact.target, "precision": artifact.precision, "entry": entry}
            known = _structure(export.size_bytes, structure.partitions, operators, outside)
            yield _Thing(names, mode.streaming is not None, None, known, wer)


def _structure(size_bytes: int, partitions: int | None, operators: int, outside: int) -> dict[str, Known]:
    alone = "the runtime does not delegate"
    return {
        "size_mb": size_bytes / 1e6,
        "partitions": alone if partitions is None else float(partitions),
        "outside_percent": alone if partitions is None else 100 * outside / max(1, operators),
    }


def _told(filters: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in filters.items()) or "any artifact"


def _number(value: float) -> str:
    """Whole numbers whole, others with what tells them apart."""
    return f"{value:.0f}" if value == round(value) or value >= 1e5 else f"{value:.4g}"  # noqa: PLR2004 - counts, not parts

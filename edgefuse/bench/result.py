"""A result on disk: one JSON object a line, written as they come, each sealed with the digest of all that stands before it.

A device that vanishes, a power cut, a Ctrl-C: what was measured is there, and `--resume` goes on behind it. A line that was
edited, or a file that was cut off inside a line, is told by its seal.

The lines have a `kind`: `begin` (schema, tools, routine, what was asked for), `subject`, `device`, `visit`, `failure`, `refusal`,
`memory`, `profile`, `absence`, and `end`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from edgefuse.atomic import failures_in_words
from edgefuse.errors import ChangedResult, MissingFile, NotAResult, NotWritable, OutputExists, UsageError
from edgefuse.measurement import (
    TYPES,
    WANTS,
    Absence,
    DeviceInfo,
    Failure,
    Measurement,
    Memory,
    OperatorTime,
    Profile,
    Routine,
    Subject,
    Visit,
    clock_of,
)

if TYPE_CHECKING:
    from io import BufferedWriter

    from edgefuse.measurement import Want

SCHEMA = 1
SUFFIX = ".jsonl"
MEASURE = "Measure with: edgefuse bench BUNDLE --device host"
Key = tuple[str, str]  # a device's specification, and a subject's key


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: a result that is resumed must have been asked for the same.

    Attributes:
        devices: specifications.
        subjects: keys.
        routine: how.
        wants: what is looked at.
    """

    devices: tuple[str, ...]
    subjects: tuple[str, ...]
    routine: Routine
    wants: tuple[Want, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A result as it was read.

    Attributes:
        path: where it is.
        digest: of all its lines.
        tools: versions of what measured.
        order: what was asked for.
        measurements: one per device and subject, in the order in which they were begun.
        absences: devices that were not there, or went away before everything was done.
        ended: whether it came to its end; otherwise it was interrupted.
        devices: those that answered, by the specification that was asked for, which may be shorter than their own.
    """

    path: Path
    digest: str
    tools: Mapping[str, str]
    order: Order
    measurements: tuple[Measurement, ...]
    absences: tuple[Absence, ...]
    ended: bool
    devices: Mapping[str, DeviceInfo] = field(default_factory=dict)


def key_of(subject: Subject) -> str:
    """What tells a subject from all others: its artifact, its way in, and by what name it goes."""
    return f"{subject.model}/{subject.artifact[:16]}/{subject.entry}"


def read_result(path: Path) -> Result:
    """Read a result, every line of it checked.

    Raises:
        MissingFile: there is none.
        NotAResult: something else, or of another version.
        ChangedResult: truncated or edited.
    """
    lines, digest, rest = _lines(path)
    if rest:
        raise ChangedResult(
            f"{path} is cut off in line {len(lines) + 1}.",
            hint="If it was interrupted, go on with the same edgefuse bench and --resume: only that line is measured again.",
        )
    return _result(path, lines, digest)


@dataclass(slots=True)
class Writer:
    """A result that is being written; what was written before is `result`."""

    path: Path
    result: Result | None
    _digest: str
    _stream: BufferedWriter = field(repr=False)

    def write(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - the fields of the kind
        """Add a line, to the disk."""
        with failures_in_words(self.path):
            line, self._digest = _sealed({"kind": kind, **fields}, self._digest)
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def __enter__(self) -> Self:
        """Nothing to do: it is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._stream.close()


def begin_result(path: Path, order: Order, tools: Mapping[str, str], *, resume: bool, overwrite: bool) -> Writer:
    """Begin a result, or go on with one that was interrupted.

    Raises:
        OutputExists: it is there, and neither resumed nor replaced.
        MissingFile: there is nothing to resume.
        UsageError: what is resumed was asked for otherwise.
        NotAResult, ChangedResult: what is resumed or replaced is no result, or was edited; it stays as it is.
        NotWritable: the disk does not let us write, or another benchmark writes there at this moment.
    """
    if resume:
        return _resume(path, order)
    if os.path.lexists(path):
        if not overwrite:
            raise OutputExists(
                f"{path} exists already.", hint="Go on with it: --resume; replace it: --overwrite; or choose another -o."
            )
        _require_ours(path)
        with path.open("rb") as before:
            _alone(before, path)
    with failures_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        line, digest = _sealed({"kind": "begin", "schema": SCHEMA, "tools": dict(tools), "order": _order_json(order)}, "")
        draft.write_bytes(line)
        draft.replace(path)
        stream = path.open("ab")
        _alone(stream, path)
        return Writer(path, None, digest, stream)


def visit_json(visit: Visit) -> dict[str, Any]:
    """A visit, its samples with their clock."""
    fields = {each.name: getattr(visit, each.name) for each in dataclasses.fields(visit) if each.name != "samples"}
    return {**fields, "clock": clock_of(visit.samples), "samples": list(visit.samples.values)}


def _resume(path: Path, order: Order) -> Writer:
    _require_file(path)
    with failures_in_words(path), ExitStack() as held:
        stream = held.enter_context(path.open("r+b"))
        _alone(stream, path)
        lines, digest, rest = _lines(path)
        result = _result(path, lines, digest)
        if result.order != order:
            raise UsageError(
                f"{path} was asked for {_difference(result.order, order)}.",
                hint="Give the same bundles, devices and options, or choose another -o.",
            )
        stream.seek(-len(rest) if rest else 0, os.SEEK_END)
        stream.truncate()
        held.pop_all()
    return Writer(path, result, digest, stream)  # type: ignore[arg-type]  # a BufferedRandom writes as well


def _alone(stream: IO[bytes], path: Path) -> None:
    """Nobody else writes there while the stream is open: two would break each other's seals.

    Raises:
        NotWritable: somebody does.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NotWritable(
            f"Another benchmark is writing {path}.", hint="Wait until it has ended, or choose another -o."
        ) from error
    except OSError:
        return  # a filesystem without locks cannot tell


def _difference(before: Order, now: Order) -> str:
    """What a result was asked for that is asked for otherwise now."""
    for each in dataclasses.fields(Order):
        then, new = getattr(before, each.name), getattr(now, each.name)
        if then != new:
            return f"other {each.name}: {_told(then)}, not {_told(new)}"
    return "the same"


def _told(value: object) -> str:
    if isinstance(value, Routine):
        return f"{value.name} ({value.processes} processes, {value.calls} calls, {value.threads} threads)"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _require_ours(path: Path) -> None:
    """Only a result may be replaced, whole or not."""
    ours = False
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as stream:
            ours = stream.readline().startswith(b'{"kind": "begin"')
    if not ours:
        raise OutputExists(f"{path} was not written by edgefuse and is not replaced.", hint="Choose another -o.")


def _lines(path: Path) -> tuple[list[dict[str, Any]], str, bytes]:
    """The sealed lines, the last seal, and what stands behind them without an end."""
    _require_file(path)
    *whole, rest = path.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    digest = ""
    for number, line in enumerate(whole, 1):
        try:
            fields = json.loads(line)
            seal = fields.pop("seal")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _not_ours(path, number) from None
        again, digest = _sealed(fields, digest)
        if seal != digest or again != line + b"\n":
            raise _not_ours(path, number, like_one=lines != [] or fields.get("kind") == "begin")
        lines.append(fields)
    if not lines or lines[0].get("kind") != "begin":
        raise NotAResult(f"{path} is no result of edgefuse bench.", hint=MEASURE)
    if lines[0]["schema"] != SCHEMA:
        raise NotAResult(
            f"{path} has schema {lines[0]['schema']!r}; this edgefuse reads {SCHEMA}.",
            hint="Read it with the edgefuse that wrote it, or measure again.",
        )
    return lines, digest, rest


def _require_file(path: Path) -> None:
    if not path.exists():
        raise MissingFile(f"There is no result at {path}.", hint=MEASURE)
    if not path.is_file():
        raise NotAResult(f"{path} is no result of edgefuse bench.", hint=MEASURE)


def _not_ours(path: Path, number: int, *, like_one: bool = False) -> NotAResult | ChangedResult:
    if number == 1 and not like_one:
        return NotAResult(f"{path} is no result of edgefuse bench.", hint=MEASURE)
    return ChangedResult(
        f"{path} was changed: line {number} does not bear its seal.", hint="Take an unchanged copy, or measure again."
    )


def _sealed(fields: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    told = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    seal = hashlib.sha256(f"{before}{told}".encode()).hexdigest()
    return (json.dumps({**fields, "seal": seal}, ensure_ascii=False, allow_nan=False) + "\n").encode(), seal


def _order_json(order: Order) -> dict[str, Any]:
    return dataclasses.asdict(order)


def _result(path: Path, lines: Sequence[Mapping[str, Any]], digest: str) -> Result:
    try:
        told = lines[0]["order"]
        order = Order(tuple(told["devices"]), tuple(told["subjects"]), _routine(told["routine"]), tuple(told["wants"]))
        measurements, absences = _measurements(lines[1:], order.routine), _absences(lines[1:])
        ended = lines[-1]["kind"] == "end"
        return Result(path, digest, lines[0]["tools"], order, measurements, absences, ended, _devices(lines[1:]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotAResult(f"{path} cannot be read: {error!r}.", hint=MEASURE) from error


def _measurements(lines: Sequence[Mapping[str, Any]], routine: Routine) -> tuple[Measurement, ...]:
    devices: dict[str, DeviceInfo] = {}
    subjects: dict[str, Subject] = {}
    found: dict[Key, dict[str, Any]] = {}
    for line in lines:
        kind = line["kind"]
        if kind == "device":
            devices[line["device"]["spec"]] = DeviceInfo(**line["device"])
        elif kind == "subject":
            subjects[line["key"]] = Subject(**line["subject"])
        elif kind not in ("absence", "end"):
            each = found.setdefault((line["device"], line["subject"]), {"visits": {}, "failures": {}, "refusals": {}})
            _take(each, kind, line)
    return tuple(
        Measurement(
            devices[spec],
            subjects[key],
            routine,
            visits=tuple(each["visits"][number] for number in sorted(each["visits"])),
            failures=tuple(each["failures"].values()),
            memory=each.get("memory"),
            profile=each.get("profile"),
            refusals=each["refusals"],
        )
        for (spec, key), each in found.items()
    )


def _devices(lines: Sequence[Mapping[str, Any]]) -> dict[str, DeviceInfo]:
    return {_asked(line): DeviceInfo(**line["device"]) for line in lines if line["kind"] == "device"}


def _asked(line: Mapping[str, Any]) -> str:
    """By which specification a device was asked for: `arm64` is the device `arm64:cortex-a76`."""
    return str(line.get("asked", line["device"]["spec"]))


def _absences(lines: Sequence[Mapping[str, Any]]) -> tuple[Absence, ...]:
    """The last word on each device that was not there; one that has come since is not missing."""
    found: dict[str, Absence] = {}
    for line in lines:
        if line["kind"] == "absence":
            found[line["absence"]["spec"]] = Absence(**line["absence"])
        elif line["kind"] == "device":
            found.pop(_asked(line), None)
    return tuple(found.values())


def _take(each: dict[str, Any], kind: str, line: Mapping[str, Any]) -> None:
    """Put a line where it belongs; what was tried again and went well has not failed."""
    if kind == "visit":
        visit = _visit(line["visit"])
        each["visits"][visit.round] = visit
        each["failures"].pop(("latency", visit.round), None)
    elif kind == "failure":
        failure = Failure(**line["failure"])
        each["failures"][failure.want, failure.round] = failure
    elif kind == "refusal":
        each["refusals"][WANTS[WANTS.index(line["want"])]] = line["reason"]
    elif kind == "memory":
        each["memory"] = Memory(**line["memory"])
        each["failures"].pop(("memory", 0), None)
    elif kind == "profile":
        operators = tuple(OperatorTime(**operator) for operator in line["profile"]["operators"])
        each["profile"] = Profile(operators, line["profile"]["call_ns"])
        each["failures"].pop(("profile", 0), None)
    else:
        raise ValueError(f"a line of kind {kind!r}")


def _visit(fields: Mapping[str, Any]) -> Visit:
    others = {name: value for name, value in fields.items() if name not in ("clock", "samples", "conditions")}
    conditions = {name: (before, after) for name, (before, after) in fields["conditions"].items()}
    return Visit(samples=TYPES[fields["clock"]](tuple(fields["samples"])), conditions=conditions, **others)


def _routine(fields: Mapping[str, Any]) -> Routine:
    return Routine(**{**fields, "cores": tuple(fields["cores"])})

"""Results of `edgefuse bench` as tables of words; all arithmetic of their reports is here, all rendering is elsewhere.

Numbers of different clocks never stand in one column: a table is of one clock, and says so.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.bench.budget import why_no_number
from edgefuse.bench.doubts import doubts
from edgefuse.bench.match import models_in_turns, one_call, precisions_in_turns
from edgefuse.bench.summary import PER_PERCENTILE, real_time_factor, summary_of
from edgefuse.measurement import CLOCKS, TYPES
from edgefuse.report.terminal import megabytes
from edgefuse.values import SECOND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgefuse.bench.compare import Compared, Ratio
    from edgefuse.bench.result import Result
    from edgefuse.measurement import Clock, Measurement, Profile, Visit

NONE = "-"
REST = "not accounted for"  # of a call's time, by any operator
MOST_OPERATORS = 40  # of one call, that are shown one by one
UNIT = 1e6  # nanoseconds in a millisecond, and instructions in a million
SUBJECT = ("model", "target", "precision", "entry")
COMPARED = ("device", "clock", "target", "precision", "entry", "base", "new", "base call", "new call", "ratio", "interval", "")
CLOCK_NAMES: Mapping[Clock, str] = MappingProxyType(
    {"host": "Host wall time", "device": "Device wall time", "virtual": "Virtual time", "instructions": "Instructions"}
)
CLOCK_MEANINGS: Mapping[Clock, str] = MappingProxyType(
    {
        "host": "Time that passed on the machine that ran edgefuse: what somebody waits for there.",
        "device": "Time that passed on another device, by its own clock: what somebody waits for there.",
        "virtual": "Time by an emulator's clock, which counts instructions: it repeats, but it is no device's latency.",
        "instructions": "Instructions executed, counted by an emulator: exact, but no device's latency.",
    }
)
WORDS: Mapping[str, str] = MappingProxyType(
    {"FASTER": "faster", "SLOWER": "slower", "SAME": "the same within 2 %", "CANNOT_TELL": "cannot be told"}
)
COUNTED: Mapping[str, str] = MappingProxyType(
    {"FASTER": "fewer", "SLOWER": "more", "SAME": "the same", "CANNOT_TELL": "cannot be told"}
)
WANTED: Mapping[str, str] = MappingProxyType({"latency": "time", "memory": "peak memory", "profile": "time by operator"})


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is ready to be shown.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: their cells.
        notes: sentences about all of it.
        doubts: of each row what is to be said beside it, or "".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a row that is longer or shorter than the others: its numbers would stand below other names."""
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title} has a row with another number of cells")


@dataclass(frozen=True, slots=True)
class Place:
    """What one device measured in one result, by its one clock."""

    result: Result
    clock: Clock
    measurements: tuple[Measurement, ...]

    @property
    def spec(self) -> str:
        """Of the device."""
        return self.measurements[0].device.spec

    @property
    def entries(self) -> Mapping[str, tuple[Measurement, ...]]:
        """By way in, those for whole utterances first: calls of different lengths are not held against each other."""
        ordered = sorted(self.measurements, key=lambda each: (each.subject.streaming, each.subject.audio_ms))
        names = dict.fromkeys(each.subject.entry for each in ordered)
        return {name: tuple(each for each in self.measurements if each.subject.entry == name) for name in names}


def places(results: Sequence[Result]) -> Mapping[Clock, tuple[Place, ...]]:
    """By clock; a ValueError where a sample is of another clock than its device."""
    found: dict[Clock, list[Place]] = {clock: [] for clock in CLOCKS}
    for result in results:
        for spec in dict.fromkeys(each.device.spec for each in result.measurements):
            those = tuple(each for each in result.measurements if each.device.spec == spec)
            clock = those[0].device.clock
            if any(type(visit.samples) is not TYPES[clock] for each in those for visit in each.visits):
                raise ValueError(f"{spec} is timed by {clock}, and has samples of another clock")
            found[clock].append(Place(result, clock, those))
    return {clock: tuple(those) for clock, those in found.items() if those}


def result_tables(result: Result) -> list[Table]:
    """What a terminal shows of a result: one table per clock."""
    return [short_table(clock, those) for clock, those in places([result]).items()]


def short_table(clock: Clock, those: Sequence[Place]) -> Table:
    """What matters most, of all devices of one clock."""
    return Table(
        CLOCK_NAMES[clock], _short_columns(clock), tuple(_short_row(each) for place in those for each in place.measurements)
    )


def comparisons(place: Place, base: str | None) -> Mapping[str, tuple[Compared, ...]]:
    """What can be divided on one device: models that took turns, and precisions of one checkpoint."""
    found = {
        "Models against each other": models_in_turns(place.measurements, base),
        "Fewer bits against fp32": precisions_in_turns(place.measurements),
    }
    return {title: compared for title, compared in found.items() if compared}


def failure_lines(result: Result) -> list[str]:
    """Everything that was not measured, or does not count, as sentences."""
    lines = [
        f"{device}: {', '.join(each for each in what if each)}: {reason}{f' ({hint})' if hint else ''}"
        for device, *what, reason, hint in trouble_table([result]).rows
    ]
    return list(dict.fromkeys(lines))


def compared_rows(compared: Sequence[Compared]) -> list[tuple[str, ...]]:
    """One row per pair, in the order of `COMPARED`; its numbers bear their units."""
    return [
        (
            each.new.device.spec,
            each.new.device.clock,
            each.new.subject.target,
            each.new.subject.precision,
            each.new.subject.entry,
            each.base.subject.model,
            each.new.subject.model,
            _short(one_call(each.base), each.base.device.clock),
            _short(one_call(each.new), each.new.device.clock),
            *ratio_cells(each.ratio)[:2],
            each.ratio.word if each.ratio else "no number",
        )
        for each in compared
    ]


def compared_table(title: str, compared: Sequence[Compared]) -> Table:
    """The same of one device on a page."""
    rows = tuple(
        (
            each.new.subject.model,
            each.new.subject.target,
            each.new.subject.precision,
            each.new.subject.entry,
            name_beside(each.base, each.new),
            _one_call(each.base),
            _one_call(each.new),
            *ratio_cells(each.ratio),
        )
        for each in compared
    )
    notes = (
        "The ratio is this one's time (or count) over that of what it is compared with: below 1 is less.",
        "Of times it is the median over the processes, which took turns: not quite the ratio of the two calls beside it.",
        "The interval holds the true ratio in 99 of 100 cases; a counted ratio is exact and has none.",
        *_once(f"No ratio for {subject_of(each.new)}: {_why_no_ratio(each)}" for each in compared if each.ratio is None),
    )
    return Table(
        title, (*SUBJECT, "compared with", "that one's call", "this one's call", "ratio", "99 % interval", ""), rows, notes
    )


def ratio_cells(ratio: Ratio | None) -> tuple[str, str, str]:
    """A ratio, its interval, and the word for it."""
    if ratio is None:
        return NONE, NONE, "no number"
    words = COUNTED if ratio.counted else WORDS
    interval = "exact" if ratio.counted else f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio.low else "too few processes"
    return f"{ratio.median:.3f}", interval, words[ratio.word]


def name_beside(base: Measurement, new: Measurement) -> str:
    """What tells a base from what is held against it."""
    one, other = base.subject, new.subject
    return ", ".join([one.model, *([one.precision] if one.precision != other.precision else [])])


def latency_table(place: Place) -> Table:
    """How long a call takes, or how many instructions, with the doubts beside it; those that all have are told once."""
    told = [doubts(each) for each in place.measurements]
    common = [doubt for doubt in told[0] if len(told) > 1 and all(doubt in each for each in told)]
    return Table(
        "One call",
        (*SUBJECT, *_latency_columns(place.clock), "speech per call"),
        tuple((*_names(each), *_latency_cells(each), _audio(each)) for each in place.measurements),
        (*(f"Doubt, of all of them: {doubt}" for doubt in common), *_latency_notes(place)),
        tuple(" ".join(doubt for doubt in each if doubt not in common) for each in told),
    )


def loading_table(place: Place) -> Table:
    """What happens before the usual call, and what it costs besides time."""
    shown = unit(place.clock)
    columns = (
        *SUBJECT,
        f"cold load, {shown}",
        f"warm load, {shown}",
        f"first call, {shown}",
        "peak memory",
        "before loading",
        "file size",
    )
    rows = tuple(
        (
            *_names(each),
            *(_scaled(_middle(each, what), place.clock) for what in (_cold, _warm, _first)),
            *((megabytes(each.memory.peak_bytes), megabytes(each.memory.before_bytes)) if each.memory else (NONE, NONE)),
            megabytes(each.subject.size_bytes),
        )
        for each in place.measurements
    )
    notes = (
        "Medians of all processes that count. Cold: the file was not in the system's memory, where the device can see to that.",
        *_reasons(place, "memory"),
    )
    return Table("Loading, first call, memory, size", columns, rows, notes)


def answer_table(place: Place) -> Table:
    """Whether the answers were right, and how well the artifact recognizes."""
    parts = tuple(dict.fromkeys(part for each in place.measurements for part in each.subject.wer_percent))
    columns = (
        *SUBJECT,
        "processes that count",
        "worst SNR",
        "same best token",
        "WER, worst part",
        *(f"WER, {part}" for part in parts),
    )
    rows = tuple(
        (
            *_names(each),
            f"{len(each.valid)} of {len(each.visits)}",
            snr(each),
            _agreement(each),
            percent(worst_wer(each)),
            *(percent(each.subject.wer_percent.get(part)) for part in parts),
        )
        for each in place.measurements
    )
    notes = (
        "SNR and tokens: the answers of these very runs against the golden vectors of the bundle.",
        "WER: of the artifact on the test set, as its bundle says.",
    )
    return Table("Answers", columns, rows, notes)


def operator_table(place: Place) -> Table:
    """Where the operators of each artifact run."""
    rows = {
        (
            each.subject.model,
            each.subject.target,
            each.subject.precision,
            str(each.subject.operators),
            *_outside(each),
        ): None
        for each in place.measurements
    }
    columns = ("model", "target", "precision", "operators", "delegated pieces", "outside every delegate", "share outside")
    return Table(
        "Where operators run",
        columns,
        tuple(rows),
        ("Of the whole artifact, all its entries; - where the runtime has no delegates.",),
    )


def profile_table(each: Measurement, profile: Profile) -> Table:
    """What every operator takes of a call, the longest first; of very many only the longest, and the others together."""
    clock, ordered = each.device.clock, sorted(profile.operators, key=lambda operator: -operator.time_ns)
    rows = [
        (operator.name, operator.kind, operator.where, str(operator.count), operator.time_ns)
        for operator in ordered[:MOST_OPERATORS]
    ]
    if others := ordered[MOST_OPERATORS:]:
        count, time_ns = (sum(getattr(other, what) for other in others) for what in ("count", "time_ns"))
        rows.append((f"{len(others)} more", "", "", str(count), time_ns))
    columns = ("operator", "kind", "runs in", "count", f"time, {unit(clock)}", "share of the call")
    told = tuple((*names, _scaled(time_ns, clock), _share(time_ns, profile.call_ns)) for *names, time_ns in rows)
    return Table(subject_of(each), columns, told)


def kinds_of(profile: Profile) -> dict[str, float]:
    """The time of one call by kind of operator; what no operator accounts for is the rest."""
    found: dict[str, float] = {}
    for operator in profile.operators:
        found[operator.kind] = found.get(operator.kind, 0.0) + operator.time_ns
    rest = profile.call_ns - sum(found.values())
    return {**dict(sorted(found.items(), key=lambda each: -each[1])), **({REST: rest} if rest > 0 else {})}


def kind_table(place: Place) -> Table:
    """The time of a call by kind of operator, in shares; one column per kind."""
    profiled = [(each, kinds_of(each.profile)) for each in place.measurements if each.profile]
    kinds = tuple(dict.fromkeys(kind for _, found in profiled for kind in found))
    rows = tuple(
        (*_names(each), *(_share(found.get(kind, 0.0), sum(found.values())) for kind in kinds)) for each, found in profiled
    )
    return Table("Time by kind of operator", (*SUBJECT, *kinds), rows, tuple(_reasons(place, "profile")))


def classes_of(each: Measurement) -> dict[str, float]:
    """Instructions of one call by class, of the first process that counts."""
    if not each.valid or not each.valid[0].classes:
        return {}
    visit = each.valid[0]
    calls = len(visit.samples.values)
    return {name: count / calls for name, count in sorted(visit.classes.items(), key=lambda pair: -pair[1])}


def class_table(place: Place) -> Table:
    """Instructions by class, one column per class."""
    found = [(each, classes) for each in place.measurements if (classes := classes_of(each))]
    names = tuple(dict.fromkeys(name for _, classes in found for name in classes))
    rows = tuple(
        (*_names(each), *(_share(classes.get(name, 0.0), sum(classes.values())) for name in names)) for each, classes in found
    )
    return Table("Instructions by class", (*SUBJECT, *names), rows)


def trouble_table(results: Sequence[Result]) -> Table:
    """Devices that were not there, what cannot run, what failed, and what was wrong: each with its reason, and what to do."""
    rows = [
        (each.spec, "", "everything that is not in this report", each.reason, each.hint)
        for result in results
        for each in result.absences
    ]
    for place in (place for those in places(results).values() for place in those):
        found: dict[tuple[str, str, str], list[str]] = {}
        for each in place.measurements:
            for told in _troubles(each):
                found.setdefault(told, []).append(subject_of(each))
        rows += [(place.spec, _which(names, len(place.measurements)), *told) for told, names in found.items()]
    return Table("What was not measured, or does not count", ("device", "artifact", "what", "reason", "what to do"), tuple(rows))


def doubt_table(results: Sequence[Result]) -> Table:
    """Every doubt, beside what it is about."""
    rows = tuple(
        (each.device.spec, subject_of(each), doubt)
        for result in results
        for each in result.measurements
        for doubt in doubts(each)
    )
    return Table("Doubts", ("device", "artifact", "doubt"), rows)


def device_table(place: Place) -> Table:
    """The record of a device."""
    device = place.measurements[0].device
    told = [("named by", device.spec), ("name", device.name), ("clock", CLOCK_NAMES[place.clock].lower()), *device.facts.items()]
    return Table("The device", ("", ""), tuple(told))


def condition_table(place: Place) -> Table:
    """What the device said of its state, of all processes together."""
    visits = [visit for each in place.measurements for visit in each.visits]
    names = dict.fromkeys(name for visit in visits for name in visit.conditions)
    rows = tuple(
        (name, *(_several([visit.conditions[name][side] for visit in visits if name in visit.conditions]) for side in (0, 1)))
        for name in names
    )
    return Table("Its state, before and after processes", ("", "before", "after"), rows)


def lineage_table(results: Sequence[Result]) -> Table:
    """Whose numbers these are: from the checkpoint to the result."""
    rows = {
        (*_names(each)[:3], each.subject.checkpoint, each.subject.folded, each.subject.artifact, result.digest): None
        for result in results
        for each in result.measurements
    }
    return Table(
        "Where the numbers come from",
        ("model", "target", "precision", "checkpoint", "folded model", "artifact", "result"),
        tuple(rows),
    )


def routine_table(results: Sequence[Result]) -> Table:
    """Every value of the routine, one column per result."""
    names = [each.name for each in dataclasses.fields(results[0].order.routine)]
    rows = tuple((name, *(_setting(getattr(result.order.routine, name)) for result in results)) for name in names)
    return Table("How it was measured", ("", *(result.path.name for result in results)), rows)


def result_table(results: Sequence[Result]) -> Table:
    """The results that a report was made of."""
    rows = tuple(
        (
            result.path.name,
            "complete" if result.ended else "interrupted",
            str(len(result.measurements)),
            result.digest,
            ", ".join(f"{name} {version}" for name, version in result.tools.items()),
        )
        for result in results
    )
    return Table("Results", ("file", "state", "measurements", "digest", "tools"), rows)


def device_of(place: Place) -> str:
    """How a device is named, and what people call it."""
    device = place.measurements[0].device
    return device.spec if device.name == device.spec else f"{device.spec} ({device.name})"


def subject_of(each: Measurement) -> str:
    """A subject in one line."""
    return ", ".join(_names(each))


def labels(those: Sequence[Measurement]) -> list[str]:
    """Subjects by what tells them apart, in a picture whose title says the rest."""
    named = [_names(each) for each in those]
    differing = [index for index in range(len(SUBJECT)) if len({names[index] for names in named}) > 1] or [0]
    return [", ".join(names[index] for index in differing) for names in named]


def about(those: Sequence[Measurement]) -> str:
    """What one way in takes."""
    subject = those[0].subject
    if subject.entry.startswith(SECOND):
        return f"the second pass, over what the first gave of up to {subject.audio_ms / 1000:g} s"
    return f"chunks of {subject.audio_ms} ms" if subject.streaming else f"whole utterances of up to {subject.audio_ms / 1000:g} s"


def amount(value: float | None, clock: Clock) -> str:
    """A number of a clock with its unit."""
    return NONE if value is None else f"{_scaled(value, clock)} {unit(clock)}"


def figures(value: float, digits: int = 3) -> str:
    """As many figures as tell something, never an exponent."""
    if not value:
        return "0"
    return f"{value:.{min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))}f}"


def percent(value: float | None) -> str:
    """A rate, or none."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f} %"


def worst_wer(each: Measurement) -> float | None:
    """Of the worst part of the test set."""
    return max((value for value in each.subject.wer_percent.values() if math.isfinite(value)), default=None)


def snr(each: Measurement) -> str:
    """The worst of the processes that count; of all of them where none does."""
    worst = min((visit.snr_db for visit in each.valid or each.visits), default=None)
    return NONE if worst is None else f"{worst:.1f} dB"


def process_medians(each: Measurement) -> list[float]:
    """The median call of each process that counts."""
    return [statistics.median(visit.samples.values) for visit in each.valid]


def _names(each: Measurement) -> tuple[str, str, str, str]:
    subject = each.subject
    return subject.model, subject.target, subject.precision, subject.entry


def unit(clock: Clock) -> str:
    """In which its numbers are shown."""
    return {"host": "ms", "device": "ms", "virtual": "virtual ms", "instructions": "million instructions"}[clock]


def _scaled(value: float | None, clock: Clock) -> str:
    if value is None:
        return NONE
    return figures(value / UNIT, 5 if clock == "instructions" else 3)


def _one_call(each: Measurement) -> str:
    return amount(one_call(each), each.device.clock)


def _audio(each: Measurement) -> str:
    return f"{each.subject.audio_ms} ms"


def _short_columns(clock: Clock) -> tuple[str, ...]:
    numbers = (
        ("a call", "least", "most")
        if clock == "instructions"
        else ("p50", "p90", *(["RTF"] if clock in ("host", "device") else []))
    )
    return ("device", *SUBJECT, *numbers, "cold load", "peak memory", "SNR", "WER", "doubts")


def _short_row(each: Measurement) -> tuple[str, ...]:
    clock, summary, factor = each.device.clock, summary_of(each), real_time_factor(each)
    if clock == "instructions":
        numbers = [one_call(each), *((summary.minimum, summary.maximum) if summary else (None, None))]
    else:
        numbers = [summary.p50, summary.p90] if summary else [None, None]
    cells = [_short(value, clock) for value in numbers]
    if clock in ("host", "device"):
        cells.append(NONE if factor is None else figures(factor))
    memory = megabytes(each.memory.peak_bytes) if each.memory else NONE
    return (each.device.spec, *_names(each), *cells, _short(_middle(each, _cold), clock), memory, *_quality(each))


def _quality(each: Measurement) -> tuple[str, str, str]:
    return snr(each), percent(worst_wer(each)), str(len(doubts(each)))


def _short(value: float | None, clock: Clock) -> str:
    """With a unit that fits into a terminal."""
    return NONE if value is None else f"{_scaled(value, clock)} {'M' if clock == 'instructions' else 'ms'}"


def _latency_columns(clock: Clock) -> tuple[str, ...]:
    shown = unit(clock)
    if clock == "instructions":
        return (f"on average, {shown}", f"least, {shown}", f"most, {shown}", "calls", "processes")
    named = tuple(f"{name}, {shown}" for name in ("p50", "p90", "p99", "least", "most"))
    return (*named, *(["RTF"] if clock in ("host", "device") else []), "samples", "processes")


def _latency_cells(each: Measurement) -> tuple[str, ...]:
    clock, summary, factor = each.device.clock, summary_of(each), real_time_factor(each)
    if summary is None:
        return (*[NONE] * (len(_latency_columns(clock)) - 2), "0", "0")
    if clock == "instructions":
        count, numbers = each.valid[0].calls, [one_call(each), summary.minimum, summary.maximum]
    else:
        count, numbers = summary.count, [summary.p50, summary.p90, summary.p99, summary.minimum, summary.maximum]
    cells = [_scaled(value, clock) for value in numbers]
    return (*cells, *([figures(factor)] if factor is not None else []), str(count), str(len(each.valid)))


def _latency_notes(place: Place) -> Iterator[str]:
    if place.clock == "instructions":
        yield "One pass through the speech, counted; every process repeats it, and a doubt says so where the counts differ."
    elif any(summary and None in (summary.p90, summary.p99) for summary in map(summary_of, place.measurements)):
        yield (
            f"p90 and p99 are - where fewer than {PER_PERCENTILE} samples lie beyond them: "
            f"a p90 takes {10 * PER_PERCENTILE} samples, a p99 {100 * PER_PERCENTILE}."
        )
    if place.clock in ("host", "device"):
        yield "RTF, the real-time factor: seconds of computing per second of speech, of the median call."
    for each in place.measurements:
        if not each.valid:
            yield f"No number for {subject_of(each)}: {why_no_number(each)}"


def _cold(visit: Visit) -> int | None:
    return visit.cold_load


def _warm(visit: Visit) -> int | None:
    return visit.warm_load


def _first(visit: Visit) -> int | None:
    return visit.first


def _middle(each: Measurement, what: Callable[[Visit], int | None]) -> float | None:
    found = [value for visit in each.valid if (value := what(visit)) is not None]
    return statistics.median(found) if found else None


def _agreement(each: Measurement) -> str:
    visits = each.valid or each.visits
    frames = sum(visit.frames for visit in visits)
    return f"{100 * sum(visit.agreeing_frames for visit in visits) / frames:.2f} %" if frames else NONE


def _outside(each: Measurement) -> tuple[str, str, str]:
    subject = each.subject
    if subject.partitions is None:
        return NONE, NONE, NONE
    return str(subject.partitions), str(subject.outside), _share(subject.outside, subject.operators)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NONE


def _reasons(place: Place, want: str) -> list[str]:
    """Why something was not looked at, once per reason."""
    told = [(each, reason) for each in place.measurements for name, reason in each.refusals.items() if name == want]
    return _once(f"No {WANTED[want]}: {reason}" for _, reason in told)


def _troubles(each: Measurement) -> Iterator[tuple[str, str, str]]:
    """What, why, and what to do; of one reason once, however many processes it ended."""
    for want, reason in each.refusals.items():
        yield ("cannot be run" if want == "latency" else f"no {WANTED[want]}"), reason, ""
    failed = [(failure.want, failure.reason, failure.hint) for failure in each.failures]
    for (want, reason, hint), count in Counter(failed).items():
        yield (f"{_processes(count)} failed" if want == "latency" else f"no {WANTED[want]}"), reason, hint
    for void, count in Counter(visit.void for visit in each.visits if visit.void).items():
        yield f"{_processes(count)} did not count", void, "See which layers differ with: edgefuse verify BUNDLE"


def _which(names: Sequence[str], every: int) -> str:
    """Artifacts that share a trouble."""
    return f"all {every}" if len(names) == every > 1 else "; ".join(names)


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _why_no_ratio(each: Compared) -> str:
    return " ".join(f"{subject_of(one)} has no number." for one in (each.base, each.new) if not one.valid)


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "not bound"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _several(told: Sequence[str]) -> str:
    """What was said, once each; of many different things the first and how many."""
    found = _once(told)
    return ", ".join(found) if len(found) <= 3 else f"{found[0]} ... {found[-1]} ({len(found)} different)"  # noqa: PLR2004 - a cell


def _once(sentences: Iterator[str] | Sequence[str]) -> list[str]:
    return list(dict.fromkeys(sentences))

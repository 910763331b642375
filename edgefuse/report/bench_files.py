"""Results of `edgefuse bench` as Markdown for a pull request, as CSV for a spreadsheet, and as JSON with everything."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgefuse.bench.compare import LEVEL
from edgefuse.bench.doubts import doubts
from edgefuse.bench.match import one_call
from edgefuse.bench.result import key_of, visit_json
from edgefuse.bench.summary import real_time_factor, summary_of
from edgefuse.measurement import CLOCKS
from edgefuse.report import bench_rows as rows
from edgefuse.report.bench_summary import summary

if TYPE_CHECKING:
    from edgefuse.bench.compare import Compared
    from edgefuse.bench.match import Pairs
    from edgefuse.bench.result import Result
    from edgefuse.measurement import Clock, Measurement, Visit
    from edgefuse.report.bench_rows import Table
    from edgefuse.values import Check

SCHEMA = 1
NAMES = ("model", "target", "precision", "entry", "audio_ms", "streaming", "size_bytes", "partitions", "operators", "outside")
LINEAGE = ("checkpoint", "folded", "artifact")
STATISTICS = ("p50", "p90", "p99", "mean", "trimmed_mean", "minimum", "maximum", "cold_load", "warm_load", "first_call")
UNITS: Mapping[Clock, str] = {"host": "_ns", "device": "_ns", "virtual": "_ns", "instructions": ""}


def markdown(results: Sequence[Result], base: str | None = None) -> str:
    """Compact tables for a pull request."""
    parts = ["<!-- a report of edgefuse -->", "# Benchmark"]
    for heading, lines in summary(results, base).items():
        parts.append("\n".join([f"**{_plain(heading)}**", "", *(f"- {_plain(line)}" for line in lines)]))
    for clock, those in rows.places(results).items():
        parts.append(f"## {rows.CLOCK_NAMES[clock]}\n\n{rows.CLOCK_MEANINGS[clock]}")
        parts.append(_table(rows.short_table(clock, those)))
        for place in those:
            for title, compared in rows.comparisons(place, base).items():
                parts += [f"### {_plain(f'{place.spec}: {title}')}", _table(rows.compared_table(title, compared))]
    for table in (rows.trouble_table(results), rows.doubt_table(results)):
        if table.rows:
            parts += [f"## {table.title}", _table(table)]
    parts.append(f"<details><summary>Lineage</summary>\n\n{_table(rows.lineage_table(results))}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def comma_separated(results: Sequence[Result]) -> str:
    """One row per device and subject, raw numbers; each clock has its own columns, and is told by them."""
    lines = [_csv_fields(result, each) for result in results for each in result.measurements]
    parts = dict.fromkeys(name for line in lines for name in line if name.startswith("wer_percent"))
    columns = [*_csv_columns(), *parts, "doubts"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def everything(results: Sequence[Result], base: str | None = None) -> str:
    """All of it for programs: samples, statistics, doubts, ratios."""
    told = {
        "edgefuse_report": SCHEMA,
        "summary": summary(results, base),
        "results": [_result(result) for result in results],
        "ratios": [
            _ratio(each, place.result)
            for those in rows.places(results).values()
            for place in those
            for compared in rows.comparisons(place, base).values()
            for each in compared
        ],
    }
    return json.dumps(_finite(told), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def result_json(result: Result, checks: Sequence[Check]) -> dict[str, Any]:
    """What `edgefuse bench` says, for programs; samples stand in the result itself."""
    told: dict[str, Any] = _finite({**_result(result, samples=False), "budget": [dataclasses.asdict(each) for each in checks]})
    return told


def compared_json(pairs: Pairs) -> dict[str, Any]:
    """What `edgefuse compare` says, for programs."""
    told: dict[str, Any] = _finite({"compared": [_ratio(each) for each in pairs.compared], "remarks": pairs.remarks})
    return told


def _csv_columns() -> list[str]:
    clocks = [f"{clock}_{name}{UNITS[clock]}" for clock in CLOCKS if clock != "instructions" for name in STATISTICS]
    counted = [f"instructions_{name}" for name in ("per_call", "least", "most", *STATISTICS[-3:])]
    known = ("samples", "processes", "void", "failures", "real_time_factor", "peak_bytes", "before_bytes", "snr_db")
    return ["device", "clock", *NAMES, *known, *clocks, *counted, *LINEAGE, "result"]


def _csv_fields(result: Result, each: Measurement) -> dict[str, Any]:
    summary, clock = summary_of(each), each.device.clock
    numbers = _numbers(each)
    if clock == "instructions":
        numbers["per_call"] = one_call(each)
        numbers["least"], numbers["most"] = (summary.minimum, summary.maximum) if summary else (None, None)
    named = {f"{clock}_{name}{UNITS[clock]}": value for name, value in numbers.items()}
    return {
        "device": each.device.spec,
        "clock": clock,
        **{name: getattr(each.subject, name) for name in (*NAMES, *LINEAGE)},
        "samples": summary.count if summary else 0,
        "processes": len(each.valid),
        "void": len(each.visits) - len(each.valid),
        "failures": len(each.failures),
        "real_time_factor": real_time_factor(each),
        "peak_bytes": each.memory.peak_bytes if each.memory else None,
        "before_bytes": each.memory.before_bytes if each.memory else None,
        "snr_db": min((visit.snr_db for visit in each.valid), default=None),
        **{name: value for name, value in named.items() if name in _csv_columns()},
        **{f"wer_percent_{part}": value for part, value in each.subject.wer_percent.items() if math.isfinite(value)},
        "doubts": " ".join(doubts(each)),
        "result": result.digest,
    }


def _numbers(each: Measurement) -> dict[str, float | None]:
    """Statistics by the names of `STATISTICS`."""
    summary = summary_of(each)
    told = {name: getattr(summary, name) if summary else None for name in STATISTICS[:-3]}
    loads: Mapping[str, Callable[[Visit], int | None]] = {
        "cold_load": lambda visit: visit.cold_load,
        "warm_load": lambda visit: visit.warm_load,
        "first_call": lambda visit: visit.first,
    }
    for name, what in loads.items():
        found = [value for visit in each.valid if (value := what(visit)) is not None]
        told[name] = statistics.median(found) if found else None
    return told


def _result(result: Result, *, samples: bool = True) -> dict[str, Any]:
    return {
        "path": result.path.name,
        "digest": result.digest,
        "ended": result.ended,
        "tools": dict(result.tools),
        "routine": dataclasses.asdict(result.order.routine),
        "asked": {"devices": result.order.devices, "subjects": result.order.subjects, "wants": result.order.wants},
        "absences": [dataclasses.asdict(each) for each in result.absences],
        "measurements": [_measurement(each, samples=samples) for each in result.measurements],
    }


def _measurement(each: Measurement, *, samples: bool) -> dict[str, Any]:
    return {
        "device": dataclasses.asdict(each.device),
        "subject": {"key": key_of(each.subject), **dataclasses.asdict(each.subject)},
        "clock": each.device.clock,
        "unit": "instructions" if each.device.clock == "instructions" else "ns",
        "one_call": one_call(each),
        "statistics": {"samples": sum(len(visit.samples.values) for visit in each.valid), **_numbers(each)},
        "real_time_factor": real_time_factor(each),
        "doubts": doubts(each),
        "visits": [_visit(visit, samples=samples) for visit in each.visits],
        "failures": [dataclasses.asdict(failure) for failure in each.failures],
        "refusals": dict(each.refusals),
        "memory": dataclasses.asdict(each.memory) if each.memory else None,
        "profile": dataclasses.asdict(each.profile) if each.profile else None,
    }


def _visit(visit: Visit, *, samples: bool) -> dict[str, Any]:
    return {name: value for name, value in visit_json(visit).items() if samples or name != "samples"}


def _ratio(each: Compared, result: Result | None = None) -> dict[str, Any]:
    base, new, ratio = each.base, each.new, each.ratio
    return {
        **({"result": result.digest} if result else {}),
        "device": new.device.spec,
        "clock": new.device.clock,
        "base": {name: getattr(base.subject, name) for name in NAMES[:4]},
        "new": {name: getattr(new.subject, name) for name in NAMES[:4]},
        "base_one_call": one_call(base),
        "new_one_call": one_call(new),
        "ratio": ratio.median if ratio else None,
        f"interval_{100 * LEVEL:.0f}_percent": [ratio.low, ratio.high] if ratio and ratio.low else None,
        "counted": ratio.counted if ratio else None,
        "word": ratio.word if ratio else None,
    }


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON may hold
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    told = "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)
    notes = "\n".join(f"- {_plain(note)}" for note in table.notes)
    return f"{told}\n\n{notes}" if notes else told


def _plain(words: str) -> str:
    """Words that Markdown takes for words."""
    escaped = "".join(f"\\{letter}" if letter in "\\|*`<[" else letter for letter in words)
    return escaped.replace("\n", " ").replace("_", r"\_")

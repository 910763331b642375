"""Results of `edgefuse bench` on one page for people: without scripts, and without anything from the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.bench.match import one_call
from edgefuse.bench.summary import summary_of
from edgefuse.report import bench_rows as rows
from edgefuse.report import plots
from edgefuse.report.bench_summary import summary

if TYPE_CHECKING:
    from edgefuse.bench.compare import Compared
    from edgefuse.bench.result import Result
    from edgefuse.measurement import Clock, Measurement
    from edgefuse.report.bench_rows import Place, Table

HUES = 8  # colours of bench_page.css, and behind them a grey
KINDS: tuple[str, ...] = (
    "linear",
    "convolution",
    "attention product",
    "softmax",
    "conversion",
    "layout",
    "elementwise",
    "runtime",
)
LONG, DIGEST = 48, 40  # letters of a cell that is a sentence, or a digest
NUMBER = re.compile(r"|-|-?[\d.]+( \S{1,2})?( (of|to) [\d.]+)?")  # a cell that stands to the right
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "trouble": "What was not measured, or does not count",
        "doubts": "Doubts",
        "lineage": "Where the numbers come from",
        "method": "How it was measured",
    }
)


def page(results: Sequence[Result], base: str | None = None) -> str:
    """The page; `base` is the model that others are held against, where it is not the slowest."""
    by_clock = rows.places(results)
    hues = _hues([each.subject.model for result in results for each in result.measurements])
    sections = [_clock(clock, those, hues, base) for clock, those in by_clock.items()]
    clocks: dict[str, str] = {clock: rows.CLOCK_NAMES[clock] for clock in by_clock}
    contents = {"summary": "In short", **clocks, **TITLES}
    title = f"Benchmark: {', '.join(result.path.stem for result in results)}"
    return Template(_file("bench_page.html")).substitute(
        title=escape(title),
        style=_file("bench_page.css").rstrip(),
        contents="".join(f'<a href="#{name}">{escape(told)}</a>' for name, told in contents.items()),
        summary="\n".join(_said(heading, lines) for heading, lines in summary(results, base).items()),
        sections="\n".join([*sections, *_about(results)]),
    )


def _said(heading: str, lines: Sequence[str]) -> str:
    return f"<h3>{escape(heading)}</h3>\n<ul>\n" + "\n".join(f"<li>{escape(line)}" for line in lines) + "\n</ul>"


def _about(results: Sequence[Result]) -> Iterator[str]:
    """What is of all clocks."""
    yield _section("trouble", _table(rows.trouble_table(results), "Everything that was asked for was measured, and counts."))
    yield _section("doubts", _table(rows.doubt_table(results), "There are none."))
    yield _section("lineage", _table(rows.lineage_table(results)), _table(rows.result_table(results)))
    yield _section("method", _table(rows.routine_table(results)))


def _clock(clock: Clock, those: Sequence[Place], hues: Mapping[str, int], base: str | None) -> str:
    parts = [f"<p>{escape(rows.CLOCK_MEANINGS[clock])}</p>", *(_place(place, hues, base) for place in those)]
    return f'<section id="{clock}">\n<h2>{rows.CLOCK_NAMES[clock]}</h2>\n' + "\n".join(parts) + "\n</section>"


def _place(place: Place, hues: Mapping[str, int], base: str | None) -> str:
    return "\n".join(
        [
            f"<h3>{escape(rows.device_of(place))}</h3>",
            _fold(
                "The device, and its state while it was measured",
                *map(_table, (rows.device_table(place), rows.condition_table(place))),
            ),
            *_compared(place, base),
            *(_distribution(entry, those, hues, place.clock) for entry, those in place.entries.items()),
            _titled(rows.latency_table(place)),
            *(_pareto(entry, those, hues, place.clock) for entry, those in place.entries.items()),
            _titled(rows.answer_table(place)),
            _titled(rows.loading_table(place)),
            _titled(rows.operator_table(place)),
            *_profiles(place),
            *_classes(place),
        ]
    )


def _compared(place: Place, base: str | None) -> Iterator[str]:
    """Models against each other, and precisions against floats."""
    for title, compared in rows.comparisons(place, base).items():
        yield _titled(rows.compared_table(title, compared))
        yield _intervals(title, compared)


def _intervals(title: str, compared: Sequence[Compared]) -> str:
    told = [(each, each.ratio) for each in compared if each.ratio]
    if not told:
        return ""
    drawn = [
        plots.Interval(
            rows.subject_of(each.new),
            ratio.median,
            ratio.low if ratio.low and not ratio.counted else None,
            ratio.high if ratio.low and not ratio.counted else None,
            f"{ratio.median:.3f} of {rows.name_beside(each.base, each.new)}: {rows.ratio_cells(ratio)[2]}",
        )
        for each, ratio in told
    ]
    return plots.intervals(drawn, f"{title}: ratio, and where it lies with 99 % certainty")


def _distribution(entry: str, those: Sequence[Measurement], hues: Mapping[str, int], clock: Clock) -> str:
    """How long calls take: every call, and the median of every process."""
    counted = [(each, label) for each, label in zip(those, rows.labels(those), strict=True) if each.valid]
    if not counted or clock == "instructions":
        return ""
    drawn = [
        plots.Strip(
            label,
            [value / rows.UNIT for visit in each.valid for value in visit.samples.values],
            [value / rows.UNIT for value in rows.process_medians(each)],
            (one_call(each) or 0.0) / rows.UNIT,
            f"p50 {rows.amount(one_call(each), clock)}, {summary.count} calls, {len(each.valid)} processes",
            hues[each.subject.model],
        )
        for each, label in counted
        if (summary := summary_of(each))
    ]
    title = f"{entry} ({rows.about(those)}): all calls as a histogram, below it a ring for the median of each process"
    return plots.strips(drawn, rows.unit(clock), title)


def _pareto(entry: str, those: Sequence[Measurement], hues: Mapping[str, int], clock: Clock) -> str:
    """Word error rate over latency; one point alone shows nothing."""
    points = [
        plots.Point(
            f"{label}: {rows.amount(call, clock)}, WER {rows.percent(wer)}", call / rows.UNIT, wer, hues[each.subject.model]
        )
        for each, label in zip(those, rows.labels(those), strict=True)
        if (call := one_call(each)) is not None and (wer := rows.worst_wer(each)) is not None
    ]
    if len(points) < 2:  # noqa: PLR2004 - as the docstring says
        return ""
    title = f"{entry} ({rows.about(those)}): what a call takes and how many words come out wrong; the lower left is best"
    return plots.pareto(points, f"one call, {rows.unit(clock)}", "WER of the worst part of the test set, %", title)


def _profiles(place: Place) -> Iterator[str]:
    """Where the time of a call goes."""
    profiled = [each for each in place.measurements if each.profile]
    for entry, those in place.entries.items():
        kinds = [(each, rows.kinds_of(each.profile)) for each in those if each.profile]
        if kinds:
            named = dict.fromkeys([*KINDS, *(kind for _, found in kinds for kind in found)])
            hues = {kind: HUES if kind == rows.REST else index % HUES for index, kind in enumerate(named)}
            bars = [
                plots.Bar(
                    rows.subject_of(each),
                    {kind: value / rows.UNIT for kind, value in found.items()},
                    rows.amount(sum(found.values()), place.clock),
                )
                for each, found in kinds
            ]
            title = f"{entry}: where the time of one call goes, while it was profiled"
            yield plots.bars(bars, rows.unit(place.clock), title, hues)
    if profiled:
        tables = [_titled(rows.profile_table(each, each.profile)) for each in profiled if each.profile]
        yield _fold("In numbers, and every operator", _titled(rows.kind_table(place)), *tables)


def _classes(place: Place) -> Iterator[str]:
    """Of which instructions a call consists."""
    for entry, those in place.entries.items():
        found = [(each, classes) for each in those if (classes := rows.classes_of(each))]
        if found:
            names = dict.fromkeys(name for _, classes in found for name in classes)
            bars = [
                plots.Bar(
                    rows.subject_of(each),
                    {name: value / rows.UNIT for name, value in classes.items()},
                    rows.amount(sum(classes.values()), place.clock),
                )
                for each, classes in found
            ]
            hues = {name: index % (HUES + 1) for index, name in enumerate(names)}
            yield plots.bars(bars, rows.unit(place.clock), f"{entry}: instructions of one call by class", hues)
    table = rows.class_table(place)
    if table.rows:
        yield _fold("In numbers", _titled(table))


def _section(name: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{TITLES[name]}</h2>\n' + "\n".join(parts) + "\n</section>"


def _fold(title: str, *parts: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def _titled(table: Table) -> str:
    return f"<h4>{escape(table.title)}</h4>\n{_table(table)}"


def _table(table: Table, without: str = "") -> str:
    """A table that scrolls where it is too wide; `without` stands where it would be empty."""
    if not table.rows:
        return f"<p>{escape(without)}</p>" if without else ""
    numeric = [all(NUMBER.fullmatch(row[index]) for row in table.rows) for index in range(len(table.columns))]
    whole = len(rows.SUBJECT) if table.columns[: len(rows.SUBJECT)] == rows.SUBJECT else 0
    names = ("artifact", *table.columns[whole:]) if whole else table.columns
    numeric = [False, *numeric[whole:]] if whole else numeric
    head = "".join(f"<th{' class=n' if number else ''}>{escape(name)}" for name, number in zip(names, numeric, strict=True))
    lines = []
    for row, doubt in zip(table.rows, table.doubts or [""] * len(table.rows), strict=True):
        first = [f"<td><b>{escape(row[0])}</b><br>{escape(', '.join(row[1:whole]))}"] if whole else []
        cells = zip(row[whole:], numeric[len(first) :], strict=True)
        told = (f"<td{_class(cell, number=number)}>{escape(cell)}" for cell, number in cells)
        lines.append(f"<tr>{''.join((*first, *told))}{_doubt(doubt, len(names))}")
    notes = "".join(f'\n<p class="note">{escape(note)}</p>' for note in table.notes)
    heading = f"<tr>{head}\n" if any(names) else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n{heading}{body}\n</table></div>{notes}'


def _doubt(doubt: str, columns: int) -> str:
    """A row of its own, below the one that it is about, in sight wherever the table was scrolled to."""
    return f'\n<tr class="doubt"><td colspan="{columns}"><div>Doubt: {escape(doubt)}</div>' if doubt else ""


def _class(cell: str, *, number: bool) -> str:
    if number:
        return " class=n"
    if len(cell) >= DIGEST and " " not in cell:
        return " class=digest"
    return " class=long" if len(cell) > LONG else ""


def _hues(models: Sequence[str]) -> dict[str, int]:
    return {model: index % HUES for index, model in enumerate(dict.fromkeys(models))}


def _file(name: str) -> str:
    return resources.files("edgefuse.report").joinpath(name).read_text(encoding="utf-8")

"""What a benchmark says, in plain sentences: the first thing on every report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.bench.doubts import doubts
from edgefuse.bench.match import one_call
from edgefuse.bench.summary import real_time_factor
from edgefuse.report import bench_rows as rows

if TYPE_CHECKING:
    from edgefuse.bench.compare import Compared
    from edgefuse.bench.result import Result
    from edgefuse.measurement import Clock, Measurement
    from edgefuse.report.bench_rows import Place

LESS: Mapping[Clock, str] = MappingProxyType(
    {"host": "faster", "device": "faster", "virtual": "faster in virtual time", "instructions": "done in fewer instructions"}
)
LEAST: Mapping[Clock, str] = MappingProxyType(
    {"host": "the quickest is", "device": "the quickest is", "virtual": "the quickest is", "instructions": "the fewest has"}
)
MORE: Mapping[Clock, str] = MappingProxyType(
    {"host": "slower", "device": "slower", "virtual": "slower in virtual time", "instructions": "done in more instructions"}
)


COST: Mapping[Clock, str] = MappingProxyType(
    {"host": "time", "device": "time", "virtual": "time", "instructions": "instructions"}
)


def summary(results: Sequence[Result], base: str | None = None) -> dict[str, list[str]]:
    """By heading: what was measured, whether it is right and whole, and of each device what is faster, if that can be told."""
    by_clock = rows.places(results)
    every = [each for result in results for each in result.measurements]
    return {
        "What was measured": [*_scope(every, by_clock)],
        "Whether it is right, and whole": [*_answers(every), *_missing(results), *_doubtful(every)],
        **{
            f"{rows.CLOCK_NAMES[clock]}: {rows.device_of(place)}": [*_compared(place, base), *_quickest(place)]
            for clock, those in by_clock.items()
            for place in those
        },
    }


def _scope(every: Sequence[Measurement], by_clock: Mapping[Clock, Sequence[Place]]) -> Iterator[str]:
    if not every:
        yield "Nothing was measured."
        return
    subjects = [each.subject for each in every]
    told = (_some("model", [each.model for each in subjects]), _some("runtime", [each.target for each in subjects]))
    devices = _some("device", [each.device.spec for each in every])
    yield f"{' and '.join(told)}, in {_listed([each.precision for each in subjects])}, on {devices}."
    if len(by_clock) > 1:
        clocks = _listed([rows.CLOCK_NAMES[clock].lower() for clock in by_clock])
        yield f"By {len(by_clock)} clocks: {clocks}. Numbers of different clocks cannot be held against each other."


def _quickest(place: Place) -> Iterator[str]:
    """The best of each way in."""
    for entry, those in place.entries.items():
        timed = {value: each for each in those if (value := one_call(each)) is not None}
        if not timed:
            yield f"{entry}: no number counts."
            continue
        best = min(timed)
        factor = real_time_factor(timed[best])
        pace = f", {rows.figures(1 / factor, 2)} times as fast as speech" if factor else ""
        which = f"{LEAST[place.clock]} " if len(those) > 1 else ""
        call = rows.amount(best, place.clock)
        yield f"For {rows.about(those)}: {which}{rows.subject_of(timed[best])}, with {call} a call{pace}."


def _compared(place: Place, base: str | None) -> Iterator[str]:
    """Every comparison of one device, together where it is of the same two."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for compared in rows.comparisons(place, base).values():
        for each in compared:
            groups.setdefault((rows.name_beside(each.new, each.base), rows.name_beside(each.base, each.new)), []).append(each)
    for (new, other), grouped in groups.items():
        yield f"{new} against {other}: {_verdict(grouped, place.clock)}."


def _verdict(compared: Sequence[Compared], clock: Clock) -> str:
    """How often it is faster, by how much, and how often nobody can tell."""
    told: list[str] = []
    words = {"FASTER": LESS[clock], "SLOWER": MORE[clock], "SAME": "the same within 2 %", "CANNOT_TELL": "it cannot be told"}
    for word, said in words.items():
        ratios = [each.ratio.median for each in compared if each.ratio and each.ratio.word == word]
        if ratios:
            span = f", taking {_span(ratios)} of its {COST[clock]}" if word in ("FASTER", "SLOWER") else ""
            often = f" in {len(ratios)} of {len(compared)} comparisons" if len(compared) > 1 else ""
            told.append(f"{said}{often}{span}")
    without = sum(each.ratio is None for each in compared)
    return "; ".join([*told, *([f"no number in {without} of {len(compared)} comparisons"] if without else [])])


def _span(ratios: Sequence[float]) -> str:
    low, high = f"{100 * min(ratios):.0f}", f"{100 * max(ratios):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _answers(every: Sequence[Measurement]) -> Iterator[str]:
    visits = [visit for each in every for visit in each.visits]
    void = [each for each in every if len(each.valid) < len(each.visits)]
    if void:
        wrong = sum(len(each.visits) - len(each.valid) for each in void)
        whose = _listed(map(rows.subject_of, void))
        yield f"NOT ALL ANSWERS WERE RIGHT: {wrong} of {len(visits)} processes do not count, of {whose}."
    elif visits:
        worst = min((each for each in every if each.visits), key=lambda each: min(visit.snr_db for visit in each.visits))
        yield (
            f"All answers of all {len(visits)} processes were right: against the golden vectors of the bundle, the worst SNR is "
            f"{rows.snr(worst)} ({rows.subject_of(worst)})."
        )


def _missing(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        if not result.ended:
            yield f"{result.path.name} was interrupted: what follows is not everything that was asked for."
        for absence in result.absences:
            yield f"Not measured, or not to the end: {absence.reason}"
        refused: dict[tuple[str, str], list[Measurement]] = {}
        for each in result.measurements:
            if reason := each.refusals.get("latency"):
                refused.setdefault((each.device.spec, reason), []).append(each)
        for (spec, reason), those in refused.items():
            yield f"Cannot be run on {spec}: {_listed(map(rows.subject_of, those))}. {reason}"
        failed = [each for each in result.measurements if each.failures]
        if failed:
            processes = sum(len(each.failures) for each in failed)
            yield f"{processes} process{'es' if processes > 1 else ''} failed, of {_listed(map(rows.subject_of, failed))}."


def _doubtful(every: Sequence[Measurement]) -> Iterator[str]:
    doubtful = sum(bool(doubts(each)) for each in every)
    if doubtful:
        yield f"{doubtful} of {len(every)} measurements come with doubts, which stand beside their numbers."
    elif every:
        yield "No measurement comes with a doubt."


def _some(noun: str, names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return f"{len(different)} {noun}{'s' if len(different) > 1 else ''} ({_listed(different)})"


def _listed(names: Iterable[str]) -> str:
    """Each once; of many, the first few and how many more."""
    different = list(dict.fromkeys(names))
    few = different[:4]
    more = [f"{len(different) - len(few)} more"] if len(different) > len(few) else []
    *head, last = [*few, *more] or [""]
    return (
        f"{'; '.join(head)} and {last}"
        if head and any("," in each for each in different)
        else " and ".join([", ".join(head), last] if head else [last])
    )

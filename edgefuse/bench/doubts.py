"""Why a number may not be what it seems, in sentences: a number arrives with its doubts."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgefuse.bench.summary import PER_PERCENTILE, summary_of, typical
from edgefuse.measurement import NOT_TOLD, Measurement

if TYPE_CHECKING:
    from edgefuse.measurement import Visit

FEWEST = 10 * PER_PERCENTILE  # samples that a p90 needs
THIRDS = 30  # samples of a process; below this a third of them says nothing of drift
FEWEST_PROCESSES = 8  # below this no interval of 99 % exists
DRIFT = 0.05  # last third of a process against its first third, median over the processes
SPREAD = 0.10  # of the processes' medians, largest against smallest
BUSY = 1.0  # load beyond what we cause ourselves: as many as there are threads
HOTTER_C = 10.0
COOL = {"none", "0", "no warning", "CPU at 100 % of its speed", NOT_TOLD}  # what systems say that do not throttle
FROM_DISK = "from the disk"  # what a runner tells of a cold load that was one


def doubts(measurement: Measurement) -> tuple[str, ...]:
    """Every reason to doubt a measurement; none of them voids it."""
    return tuple(_doubts(measurement))


def _doubts(measurement: Measurement) -> Iterator[str]:
    visits, summary = measurement.valid, summary_of(measurement)
    void = len(measurement.visits) - len(visits)
    if void:
        yield f"{void} of {len(measurement.visits)} processes do not count: {_first(measurement)}"
    if summary is None:
        return
    if measurement.device.clock == "instructions":
        yield from _counted(measurement)
        return
    if summary.count < FEWEST:
        yield f"Too few samples: {summary.count}; a p90 needs {FEWEST}."
    if len(visits) < FEWEST_PROCESSES:
        yield f"Only {len(visits)} processes: too few for an interval of 99 %."
    if any(visit.capped for visit in visits):
        yield "A cap ended a process before its count and duration were reached."
    if warm := {visit.told["cold load"] for visit in visits if "cold load" in visit.told} - {FROM_DISK}:
        yield f"A cold load was not cold: it was {', '.join(sorted(warm))}."
    yield from _drift(visits)
    yield from _spread(visits)
    yield from _conditions(visits, measurement.routine.threads)


def _counted(measurement: Measurement) -> Iterator[str]:
    passes = {visit.samples.values for visit in measurement.valid}
    if len(passes) > 1:
        yield f"The counts differ: {len(passes)} different ones in {len(measurement.valid)} processes."


def _first(measurement: Measurement) -> str:
    return next(visit.void for visit in measurement.visits if visit.void)


def _drift(visits: tuple[Visit, ...]) -> Iterator[str]:
    """The last third of each process against its first."""
    changes = [drift(visit) for visit in visits if len(visit.samples.values) >= THIRDS]
    change = statistics.median(changes) if changes else 0.0
    if abs(change) > DRIFT:
        how = "slower" if change > 0 else "faster"
        yield f"Drift: the last third of a process is {100 * abs(change):.0f} % {how} than its first."


def drift(visit: Visit) -> float:
    """How much longer a call takes in the last third of a process than in the first; negative where it takes less."""
    values = visit.samples.values
    third = len(values) // 3
    begun = statistics.median(values[:third])
    return statistics.median(values[-third:]) / begun - 1 if begun else 0.0  # a coarse clock may see nothing


def _spread(visits: tuple[Visit, ...]) -> Iterator[str]:
    medians = [typical(visit) for visit in visits]
    spread = max(medians) / min(medians) - 1 if min(medians) else 0.0
    if spread > SPREAD:
        yield f"Spread: the medians of the processes differ by {100 * spread:.0f} %."


def _conditions(visits: tuple[Visit, ...], threads: int) -> Iterator[str]:
    """What the device said of itself before and after."""
    names = dict.fromkeys(name for visit in visits for name in visit.conditions)
    for name in names:
        told = [visit.conditions[name] for visit in visits if name in visit.conditions]
        before = [value for value in (_number(each[0]) for each in told) if value is not None]
        after = [value for value in (_number(each[1]) for each in told) if value is not None]
        if name == "load" and before and statistics.median(before) > BUSY + threads:
            yield f"The machine is busy: its load is {statistics.median(before):.1f}."
        if "temperature" in name and before and after and max(after) - min(before) > HOTTER_C:
            yield f"It became hotter while it was measured: {name} {min(before):.0f} to {max(after):.0f}."
        if "thermal" in name and (hot := {each for pair in told for each in pair} - COOL):
            yield f"It throttles: {name} is {', '.join(sorted(hot))}."
        if "governor" in name and {each for pair in told for each in pair} - {"performance", NOT_TOLD}:
            yield f"The {name} is {told[0][0]}, not performance: the clock rate follows the load."


def _number(told: str) -> float | None:
    found = re.search(r"-?\d+(\.\d+)?", told)
    return float(found.group()) if found else None

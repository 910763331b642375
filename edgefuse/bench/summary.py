"""Statistics of samples: derived whenever they are asked for, never stored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgefuse.measurement import Measurement, Visit

TRIMMED = 0.1  # of the samples at each end
PER_PERCENTILE = 10  # samples that a percentile has beyond it, or it rests on hardly any


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all samples of all processes that count, in the clock's unit; a percentile that too few samples support is None."""

    count: int
    minimum: float
    p50: float
    p90: float | None
    p99: float | None
    mean: float
    trimmed_mean: float
    maximum: float


def summarize(values: Sequence[int]) -> Summary:
    """min, p50, p90, p99, mean, 10-90 % trimmed mean, max; a ValueError without values."""
    ordered = sorted(values)
    cut = int(len(ordered) * TRIMMED)
    return Summary(
        count=len(ordered),
        minimum=ordered[0],
        p50=statistics.median(ordered),
        p90=_supported(ordered, 90),
        p99=_supported(ordered, 99),
        mean=statistics.fmean(ordered),
        trimmed_mean=statistics.fmean(ordered[cut : len(ordered) - cut]),
        maximum=ordered[-1],
    )


def summary_of(measurement: Measurement) -> Summary | None:
    """Of all processes that count; None where none does."""
    values = [value for visit in measurement.valid for value in visit.samples.values]
    return summarize(values) if values else None


def percentile(ordered: Sequence[int], percent: float) -> float:
    """The smallest value that is not below so many of a hundred (nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def typical(visit: Visit) -> float:
    """The median call of one process."""
    return statistics.median(visit.samples.values)


def exact(visit: Visit) -> int:
    """Of a clock that counts: one whole pass through the feed."""
    return sum(visit.samples.values[: visit.calls])


def real_time_factor(measurement: Measurement) -> float | None:
    """Computing per second of speech, of the median call; None where no wall clock ran."""
    summary = summary_of(measurement)
    if summary is None or measurement.device.clock not in ("host", "device"):
        return None
    return summary.p50 / (measurement.subject.audio_ms * 1e6)


def _supported(ordered: Sequence[int], percent: float) -> float | None:
    beyond = len(ordered) * (100 - percent) / 100
    return percentile(ordered, percent) if beyond >= PER_PERCENTILE else None

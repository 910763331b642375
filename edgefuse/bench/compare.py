"""Whether something became faster: an interval for the ratio of two latencies, and a word for it.

What is compared are processes: calls of one process are alike, and two processes of the same file can differ by more than what
one is after. The intervals hold for any distribution:

- of processes that took turns (one result): the ratios new_i / base_i, sorted; from the k-th smallest to the k-th largest, where
  k - 1 is the largest w with P(W <= w) <= alpha / 2, and W is the sign test's statistic: of 12 the second and the eleventh;
- of processes of two results: the ratios new_i / base_j of all pairs, and Mann and Whitney's statistic instead.

(Hollander, Wolfe, Chicken: Nonparametric Statistical Methods, 3.6 and 4.3.) Instructions are counted, not sampled: their ratio is
exact.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgefuse.bench.summary import exact, typical
from edgefuse.errors import Slower, UsageError
from edgefuse.measurement import DeviceTime, HostTime, Instructions, S, Samples, VirtualTime, clock_of

if TYPE_CHECKING:
    from edgefuse.measurement import Measurement, Visit

Word = Literal["FASTER", "SLOWER", "SAME", "CANNOT_TELL"]
LEVEL = 0.99  # of the interval: an A/A comparison is wrong once in a hundred times
ALIKE = 0.02  # an interval within 1 - ALIKE and 1 + ALIKE is "the same"


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long the new one takes as the base.

    Attributes:
        median: of the ratios.
        low: the interval's end; 0 where the processes are too few for any.
        high: the same; infinity.
        counted: whether it is exact.
    """

    median: float
    low: float
    high: float
    counted: bool = False

    @property
    def word(self) -> Word:
        """FASTER or SLOWER where the interval says so, SAME where it stays within 2 %, CANNOT_TELL otherwise."""
        if self.low > 1 - ALIKE and self.high < 1 + ALIKE and not (self.counted and self.median != 1):
            return "SAME"
        if self.high < 1:
            return "FASTER"
        return "SLOWER" if self.low > 1 else "CANNOT_TELL"


@dataclass(frozen=True, slots=True)
class Compared:
    """Two measurements of one clock on one kind of device, and their ratio; None where one of them has no number."""

    base: Measurement
    new: Measurement
    ratio: Ratio | None


def compare(base: Measurement, new: Measurement, *, in_turns: bool) -> Compared:
    """The ratio of two measurements; `in_turns` says that they were interleaved in one run.

    Raises:
        ValueError: they were not timed by one clock on one device.
    """
    if (base.device.spec, base.device.clock) != (new.device.spec, new.device.clock):
        raise ValueError(f"{base.device.spec} and {new.device.spec} have nothing in common")
    if not all(each.valid and min(map(typical, each.valid)) for each in (base, new)):  # a coarse clock may see nothing
        return Compared(base, new, None)
    if isinstance(base.valid[0].samples, Instructions):
        return Compared(base, new, _counted(base.valid[0], new.valid[0]))
    if in_turns:
        rounds = {visit.round: visit for visit in base.valid}
        pairs = [(each, rounds[each.round]) for each in new.valid if each.round in rounds]
        ratios = [divided(one.samples, other.samples) for one, other in pairs]
        return Compared(base, new, paired(ratios) if ratios else None)
    return Compared(base, new, unpaired([typical(each) for each in new.valid], [typical(each) for each in base.valid]))


def require_not_slower(compared: Sequence[Compared], percent: float) -> None:
    """Raise `Slower` where a comparison says SLOWER, and by more than so much.

    A `UsageError` where none can say so: nothing could be compared, a number is lost, or the processes are too few for intervals.
    """
    if not any(each.ratio for each in compared):
        raise UsageError(
            "Nothing could be compared, so that nobody can say whether something is slower.",
            hint="Compare results of the same devices, targets, precisions and entries.",
        )
    worse = [each for each in compared if each.ratio and each.ratio.word == "SLOWER" and each.ratio.median > 1 + percent / 100]
    if worse:
        subject, ratio = worse[0].new.subject, worse[0].ratio
        assert ratio is not None  # noqa: S101 - those without are not among them
        more = f", and {len(worse) - 1} more" if len(worse) > 1 else ""
        raise Slower(
            f"{subject.model}, {subject.target}, {subject.precision}, {subject.entry} on {worse[0].new.device.spec} takes "
            f"{ratio.median:.3f} times as long as its base{more}; {percent:g} % are allowed.",
            hint="See where the time goes with: edgefuse profile BUNDLE",
        )
    for each in compared:
        if (each.ratio is None and each.base.valid and not each.new.valid) or (each.ratio and math.isinf(each.ratio.high)):
            subject, few = each.new.subject, f"{len(each.base.valid)} and {len(each.new.valid)} processes are too few"
            raise UsageError(
                f"Nobody can say whether {subject.model}, {subject.target}, {subject.precision}, {subject.entry} on "
                f"{each.new.device.spec} is slower than its base: {few if each.new.valid else 'it has no number any more'}.",
                hint="Measure again, with more processes than --quick has.",
            )


def ratio_of(new: S, base: S) -> float:
    """The median call of a process over that of another, by one clock."""
    return statistics.median(new.values) / statistics.median(base.values)


def divided(new: Samples, base: Samples) -> float:
    """The same where the clocks are not known beforehand; a ValueError where they are two."""
    if isinstance(new, HostTime) and isinstance(base, HostTime):
        return ratio_of(new, base)
    if isinstance(new, DeviceTime) and isinstance(base, DeviceTime):
        return ratio_of(new, base)
    if isinstance(new, VirtualTime) and isinstance(base, VirtualTime):
        return ratio_of(new, base)
    raise ValueError(f"{clock_of(new)} and {clock_of(base)} do not divide")


def paired(ratios: Sequence[float]) -> Ratio:
    """The interval of ratios of processes that took turns."""
    return _ratio(ratios, _signs(len(ratios)))


def unpaired(new: Sequence[float], base: Sequence[float]) -> Ratio:
    """The interval of the ratio of processes of two runs."""
    return _ratio([a / b for a in new for b in base], _rank_sums(len(new), len(base)))


def _counted(base: Visit, new: Visit) -> Ratio:
    ratio = (exact(new) / new.calls) / (exact(base) / base.calls)
    return Ratio(ratio, ratio, ratio, counted=True)


def _ratio(ratios: Sequence[float], ways: Sequence[int]) -> Ratio:
    ordered, rank = sorted(ratios), _rank(ways)
    low, high = (ordered[rank - 1], ordered[-rank]) if rank else (0.0, math.inf)
    return Ratio(statistics.median(ordered), low, high)


def _rank(ways: Sequence[int]) -> int:
    """Which value from its end an interval begins with: k of the module's docstring; 0 where there is none of that level."""
    total, below = sum(ways), 0
    for value, count in enumerate(ways):
        below += count
        if below / total > (1 - LEVEL) / 2:
            return value
    return len(ways)


def _signs(n: int) -> list[int]:
    """In how many ways so many of n ratios are above 1 when each is as likely to be below."""
    return [math.comb(n, above) for above in range(n + 1)]


def _rank_sums(m: int, n: int) -> list[int]:
    """In how many ways m new and n old values give each count of pairs in which the new one is larger."""
    row = [[1] for _ in range(n + 1)]  # of no new values
    for new in range(1, m + 1):
        before, row = row, [[1]]
        for old in range(1, n + 1):
            shifted = [0] * old + before[old]
            fewer = row[old - 1] + [0] * new
            row.append([a + b for a, b in zip(shifted, fewer, strict=True)])
    return row[n]

"""How contenders are timed: warm, in turns, and with every sample kept."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turns:
    """What is run.

    Attributes:
        rounds: measured rounds; each contender runs once per round.
        warm_up: rounds before them that are not measured.
        threads: of each contender.
    """

    rounds: int = 40
    warm_up: int = 3
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Timed:
    """Latencies of each contender in nanoseconds; the same index is the same round."""

    latency_ns: Mapping[str, tuple[int, ...]]

    def p50_ms(self, name: str) -> float:
        """The median latency in milliseconds."""
        return statistics.median(self.latency_ns[name]) / 1e6

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of one contender's latency divided by another's in the same round."""
        pairs = zip(self.latency_ns[name], self.latency_ns[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def ratio_quartiles(self, name: str, to: str) -> tuple[float, float]:
        """Between which ratios half of the rounds lie."""
        pairs = zip(self.latency_ns[name], self.latency_ns[to], strict=True)
        low, _, high = statistics.quantiles((a / b for a, b in pairs), n=4)
        return low, high


def interleave(contenders: Mapping[str, Callable[[], object]], turns: Turns) -> Timed:
    """Run every contender once per round, the order turned by one and reversed from round to round.

    Each is run twice in its turn and the second run counts: the first brings back the caches and the thread pool that the
    contender before it has pushed out.
    """
    names = list(contenders)
    latency_ns: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(turns.warm_up + turns.rounds):
        start = turn % len(names)
        order = names[start:] + names[:start]
        for name in reversed(order) if turn % 2 else order:
            contenders[name]()
            before = time.perf_counter_ns()
            contenders[name]()
            elapsed = time.perf_counter_ns() - before
            if turn >= turns.warm_up:
                latency_ns[name].append(elapsed)
    return Timed({name: tuple(samples) for name, samples in latency_ns.items()})

"""How profiles are taken: many calls, of which the fastest quarter counts, the least disturbed; one row per name of operators.

Sums are honest: what an operator takes is averaged over the same calls as the call itself, so that all operators and what is in
none of them add up to the call. Runtimes that count whole microseconds cut off half of one per operator; it is in the last row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgefuse.measurement import OperatorTime, Profile

WARM_UP = 3  # calls
LEAST, MOST, LONG_ENOUGH_NS = 8, 40, 10_000_000_000  # calls; calls that take long are fewer
OUTSIDE, XNNPACK = "outside", "XNNPACK"
REST, RUNTIME = "the runtime and its binding", "runtime"
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention product": ("batch matrix multiply", "batch_matmul", "bmm", "attention"),
        "softmax": ("softmax",),
        "convolution": ("conv_", "convolution", "depthwise"),
        "linear": ("fully connected", "fully_connected", "linear", "addmm", "::mm"),
        "conversion": ("convert", "quantize", "cast", "_to_copy", "to_dim_order"),
        "layout": (
            *("transpose", "reshape", "permute", "view", "expand", "squeeze"),
            *("copy", "concat", "::cat", "slice", "split", "pad", "select", "gather", "broadcast"),
        ),
    }
)  # the first kind that has a word of an operator's name; what has none is elementwise


@dataclass(frozen=True, slots=True)
class Event:
    """One operator in one call, as a runtime tells it."""

    name: str
    where: str
    time_ns: int


def kind_of(name: str) -> str:
    """What an operator computes, by the runtime's name of it."""
    folded = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in folded for word in words)), "elementwise")


def timed(call: Callable[[], object], after: Callable[[], object] = lambda: None) -> list[int]:
    """Nanoseconds of calls behind some that warm up; what is to be done `after` each of them all is not in it."""
    taken: list[int] = []
    while len(taken) < WARM_UP + LEAST or (len(taken) < WARM_UP + MOST and sum(taken[WARM_UP:]) < LONG_ENOUGH_NS):
        before = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - before)
        after()
    return taken[WARM_UP:]


def profile_of(calls: Sequence[tuple[int, Sequence[Event]]]) -> Profile:
    """Calls with their nanoseconds and events, as a profile: the most expensive operator first, last what is in none."""
    fastest = sorted(calls, key=lambda each: each[0])[: -(-len(calls) // 4)]
    call_ns = round(sum(taken for taken, _ in fastest) / len(fastest))
    total: Counter[tuple[str, str]] = Counter()
    count: Counter[tuple[str, str]] = Counter()
    for _, events in fastest:
        for each in events:
            total[each.name, each.where] += each.time_ns
            count[each.name, each.where] += 1
    operators = [
        OperatorTime(name, kind_of(name), where, round(count[name, where] / len(fastest)), round(taken / len(fastest)))
        for (name, where), taken in total.most_common()
    ]
    rest = max(0, call_ns - sum(each.time_ns for each in operators))
    return Profile((*operators, OperatorTime(REST, RUNTIME, OUTSIDE, 1, rest)), call_ns)

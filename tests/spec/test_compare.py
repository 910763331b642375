"""FASTER, SLOWER, SAME or CANNOT_TELL: said of processes, by intervals that hold, and never across clocks."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from edgefuse.bench.compare import _rank, _rank_sums, _signs, compare, divided, paired, require_not_slower, unpaired
from edgefuse.bench.doubts import doubts
from edgefuse.bench.summary import summarize
from edgefuse.errors import Slower, UsageError
from edgefuse.measurement import (
    TYPES,
    USUAL,
    DeviceInfo,
    DeviceTime,
    HostTime,
    Instructions,
    Measurement,
    Subject,
    VirtualTime,
    Visit,
)

SUBJECT = Subject("model", "tflite", "fp32", "offline_640ms", 640, False, "c", "f", "a", 1000, 1, 9, 0, {})


def a_measurement(processes, clock="host", model="model", **more):
    """One process for each list of samples."""
    visits = tuple(
        Visit(round_, TYPES[clock](tuple(samples)), 9, None, 9, 3, False, 2, 120.0, 1, 1, 0, **more)
        for round_, samples in enumerate(processes)
    )
    subject = dataclasses.replace(SUBJECT, model=model)
    return Measurement(DeviceInfo("somewhere", "a device", clock), subject, USUAL, visits)


def noisy(seed: int, factor: float = 1.0, processes: int = 12, noise: float = 0.02):
    """Processes whose medians scatter by so much, as those of a real machine do."""
    draw = np.random.default_rng(seed)
    return [[round(factor * 1e6 * math.exp(noise * draw.standard_normal()))] * 5 for _ in range(processes)]


def test_ranks_are_those_of_the_published_tables():
    assert [_rank(_signs(n)) for n in range(7, 16)] == [0, 1, 1, 1, 1, 2, 2, 2, 3]  # sign test, 1 %: -, 0, 0, 0, 0, 1, 1, 1, 2
    assert [_rank(_rank_sums(n, n)) for n in range(4, 11)] == [0, 1, 3, 5, 8, 12, 17]  # Mann-Whitney, 1 %: -, 0, 2, 4, 7, 11, 16


def test_rank_sums_are_counted_rightly():
    m, n = 3, 4
    counted = Counter(
        sum(a > b for a in chosen for b in set(range(m + n)) - set(chosen)) for chosen in itertools.combinations(range(m + n), m)
    )
    assert _rank_sums(m, n) == [counted[u] for u in range(m * n + 1)]


def test_a_comparison_with_itself_says_a_difference_at_most_once_in_a_hundred_times():
    words = Counter(
        compare(a_measurement(noisy(seed)), a_measurement(noisy(seed + 10_000)), in_turns=in_turns).ratio.word
        for seed in range(400)
        for in_turns in (True, False)
    )
    assert words["FASTER"] + words["SLOWER"] <= 0.02 * 800
    assert words["SAME"] + words["CANNOT_TELL"] >= 0.98 * 800


@pytest.mark.parametrize(("factor", "word"), [(1.05, "SLOWER"), (0.95, "FASTER")])
def test_five_percent_are_told_where_processes_scatter_by_one(factor, word):
    words = [
        compare(a_measurement(noisy(s, noise=0.01)), a_measurement(noisy(s + 999, factor, noise=0.01)), in_turns=True).ratio.word
        for s in range(50)
    ]
    assert words.count(word) >= 49


def test_what_hardly_differs_is_the_same():
    same = compare(a_measurement(noisy(1, noise=0.001)), a_measurement(noisy(2, noise=0.001)), in_turns=True)
    assert same.ratio.word == "SAME"


def test_an_outlier_does_not_move_the_interval():
    ratios = [1.001, 0.999, 1.0, 1.002, 0.998, 1.001, 0.999, 1.0, 1.0, 1.001, 1.0, 9.0]
    assert paired(ratios).high < 1.01


def test_too_few_processes_cannot_tell_whatever_they_say():
    assert paired([0.5] * 7).word == "CANNOT_TELL"
    assert unpaired([1.0] * 4, [2.0] * 4).word == "CANNOT_TELL"
    assert paired([0.5] * 8).word == "FASTER"


def test_counted_instructions_are_exact():
    one, same, more = ([[100, 200]], [[100, 200]], [[100, 201]])
    base = a_measurement(one, "instructions")
    assert compare(base, a_measurement(same, "instructions"), in_turns=False).ratio.word == "SAME"
    slower = compare(base, a_measurement(more, "instructions"), in_turns=False).ratio
    assert (slower.word, slower.median) == ("SLOWER", pytest.approx(301 / 300))


def test_a_number_whose_answers_were_wrong_is_not_compared():
    void = a_measurement(noisy(1), void="Its answers are wrong.")
    assert compare(void, a_measurement(noisy(2)), in_turns=True).ratio is None


def test_what_a_coarse_clock_has_not_seen_is_not_divided_by():
    nothing = a_measurement([[0, 0, 0]] * 12)
    assert (
        compare(nothing, nothing, in_turns=True).ratio is compare(nothing, a_measurement(noisy(1)), in_turns=False).ratio is None
    )


@pytest.mark.parametrize("clocks", [*itertools.permutations([HostTime, DeviceTime, VirtualTime, Instructions], 2)])
def test_two_clocks_do_not_divide(clocks):
    one, other = (clock((1, 2, 3)) for clock in clocks)
    with pytest.raises(ValueError, match="do not divide"):
        divided(one, other)
    assert one != other


def test_two_devices_are_not_compared():
    one, other = a_measurement(noisy(1)), a_measurement(noisy(1))
    other = dataclasses.replace(other, device=dataclasses.replace(other.device, spec="elsewhere"))
    with pytest.raises(ValueError, match="nothing in common"):
        compare(one, other, in_turns=False)


def test_slower_than_allowed_fails_and_less_does_not():
    compared = [compare(a_measurement(noisy(1, noise=0.001)), a_measurement(noisy(2, 1.05, noise=0.001)), in_turns=True)]
    require_not_slower(compared, 6.0)
    with pytest.raises(Slower, match=r"1\.05\d times as long"):
        require_not_slower(compared, 3.0)


def test_where_nothing_was_compared_nobody_can_say_that_nothing_is_slower():
    void = a_measurement(noisy(1), void="Its answers are wrong.")
    for compared in ((), (compare(void, void, in_turns=False),)):
        with pytest.raises(UsageError, match="Nothing could be compared"):
            require_not_slower(compared, 5.0)


@pytest.mark.parametrize(
    ("new", "why"),
    [({"processes": [[900] * 40] * 3}, "12 and 3 processes are too few"), ({"void": "It is wrong."}, "no number any more")],
)
def test_a_gate_that_cannot_fail_does_not_pass(new, why):
    base = a_measurement(noisy(1))
    whole, other = (compare(base, each, in_turns=True) for each in (base, a_measurement(**{"processes": noisy(1), **new})))
    require_not_slower([whole], 5.0)
    with pytest.raises(UsageError, match=why):
        require_not_slower([whole, other], 5.0)


def test_a_percentile_that_too_few_samples_support_is_not_told():
    assert summarize(range(50)).p90 is None
    assert summarize(range(1, 101)).p90 == 90
    assert summarize(range(1, 101)).p99 is None
    assert summarize(range(1, 1001)).p99 == 990
    assert summarize([1] * 9 + [100]).trimmed_mean == 1


@pytest.mark.parametrize(
    ("processes", "more", "sentence"),
    [
        ([[100] * 50] * 2, {}, "Only 2 processes"),
        ([[100]] * 10, {}, "Too few samples: 10"),
        ([[100] * 20 + [100] * 20 + [110] * 20] * 10, {}, "Drift: the last third of a process is 10 % slower"),
        ([[100] * 40] * 9 + [[120] * 40], {}, "Spread: the medians of the processes differ by 20 %"),
        ([[100] * 40] * 10, {"capped": True}, "A cap ended a process"),
        ([[100] * 40] * 10, {"conditions": {"load": ("3.5", "3.5")}}, "The machine is busy: its load is 3.5"),
        ([[100] * 40] * 10, {"conditions": {"temperature": ("40.0 C", "61.0 C")}}, "It became hotter"),
        ([[100] * 40] * 10, {"conditions": {"thermal status": ("none", "severe")}}, "It throttles: thermal status is severe"),
        ([[100] * 40] * 10, {"conditions": {"governor": ("powersave", "powersave")}}, "not performance"),
        ([[100] * 40] * 10, {"told": {"cold load": "from the memory"}}, "A cold load was not cold: it was from the memory"),
        ([[100] * 40] * 10, {"void": "Its answers are wrong."}, "10 of 10 processes do not count"),
    ],
)
def test_a_number_arrives_with_its_doubts(processes, more, sentence):
    capped = more.pop("capped", None)
    measurement = a_measurement(processes, **more)
    if capped:
        visits = tuple(dataclasses.replace(visit, capped=True) for visit in measurement.visits)
        measurement = dataclasses.replace(measurement, visits=visits)
    assert any(sentence in doubt for doubt in doubts(measurement))


def test_a_clock_that_sees_nothing_sees_no_drift():
    assert not any("Drift" in doubt for doubt in doubts(a_measurement([[0] * 40 + [5] * 20] * 10)))


@pytest.mark.parametrize("calm", ["none", "no warning", "CPU at 100 % of its speed", "not told"])
def test_what_is_not_held_down_does_not_throttle(calm):
    assert doubts(a_measurement([[100] * 40] * 10, conditions={"thermal": (calm, calm)})) == ()


def test_the_load_of_our_own_threads_makes_no_machine_busy():
    busy = a_measurement([[100] * 40] * 10, conditions={"load": ("3.5", "3.5")})
    assert doubts(dataclasses.replace(busy, routine=dataclasses.replace(busy.routine, threads=4))) == ()


def test_a_calm_measurement_has_no_doubts():
    assert doubts(a_measurement([[100] * 40] * 10, conditions={"load": ("0.2", "0.9"), "governor": ("performance",) * 2})) == ()


def test_counts_that_differ_are_doubted():
    assert any("differ" in doubt for doubt in doubts(a_measurement([[100, 100], [100, 101]], "instructions")))

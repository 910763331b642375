"""Timing: every contender in every round, ratios of pairs."""

import pytest

from edgefuse.bench import Routine, Samples, interleave


def test_every_contender_is_measured_once_in_every_round_after_the_warm_up():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleave(contenders, Routine(rounds=4, warm_up=2))
    assert {len(latencies) for latencies in samples.latency_ns.values()} == {4}
    assert all(calls.count(name) == 2 * 6 for name in "abc")  # twice a turn: the second run counts


def test_no_contender_always_runs_behind_the_same_neighbour():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(contenders, Routine(rounds=6, warm_up=0))
    turns = ["".join(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
    assert len(set(turns)) > 3


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    samples = Samples({"slow": (20, 40, 90), "fast": (10, 10, 30)})
    assert samples.ratio("slow", to="fast") == 3.0
    assert samples.p50_ms("slow") == pytest.approx(40e-6)


def test_quartiles_enclose_the_ratio():
    samples = Samples({"a": tuple(range(10, 30)), "b": (10,) * 20})
    low, high = samples.ratio_quartiles("a", to="b")
    assert low < samples.ratio("a", to="b") < high

"""Timing: every contender in every round, ratios of pairs."""

import pytest
import torch

from edgefuse.ablation import Comparison, Row, compare
from edgefuse.ablation.plain import plain_entry
from edgefuse.bench.turns import Timed, Turns, interleave
from edgefuse.checkpoint import encoder_of
from edgefuse.errors import Refused
from edgefuse.lower.graph import StreamingGraph
from edgefuse.model import Context
from edgefuse.pipeline import silent
from edgefuse.quantize.scheme import SCHEMES
from edgefuse.report import ablation_rows
from edgefuse.values import Mode


def test_every_contender_is_measured_once_in_every_round_after_the_warm_up():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleave(contenders, Turns(rounds=4, warm_up=2))
    assert {len(latencies) for latencies in samples.latency_ns.values()} == {4}
    assert all(calls.count(name) == 2 * 6 for name in "abc")  # twice a turn: the second run counts


def test_no_contender_always_runs_behind_the_same_neighbour():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(contenders, Turns(rounds=6, warm_up=0))
    turns = ["".join(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
    assert len(set(turns)) > 3


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    samples = Timed({"slow": (20, 40, 90), "fast": (10, 10, 30)})
    assert samples.ratio("slow", to="fast") == 3.0
    assert samples.p50_ms("slow") == pytest.approx(40e-6)


def test_quartiles_enclose_the_ratio():
    samples = Timed({"a": tuple(range(10, 30)), "b": (10,) * 20})
    low, high = samples.ratio_quartiles("a", to="b")
    assert low < samples.ratio("a", to="b") < high


def test_the_usual_layout_answers_as_the_best_one_does(conformer):
    encoder = encoder_of(conformer)
    best, usual = StreamingGraph(encoder, Context(4, 6)).eval(), plain_entry(encoder, 4, 6, "stream")
    after = [torch.zeros(spec.shape) for spec in usual.inputs[2:]]
    keys, values, inputs = torch.zeros(1, 6, 16), torch.zeros(1, 6, 16), torch.zeros(1, 4, 16)
    wanted_after = [*after[:2], *(keys, values, inputs) * 2]  # of two layers
    for frames in (4, 4, 4, 3):
        features = torch.randn(1, 16, 80)
        wanted, *wanted_after = best(features, torch.tensor([float(frames)]), *wanted_after)
        given, *after = usual.graph(features, torch.tensor([float(frames)]), *after)
        torch.testing.assert_close(given[:, :frames], wanted[:, :frames], rtol=1e-4, atol=1e-4)


def test_a_bar_is_a_most_or_a_least():
    assert Row("tflite", streaming=True, name="a", to="b", bar=0.9).kept(0.9)
    assert not Row("tflite", streaming=True, name="a", to="b", bar=0.9).kept(0.91)
    assert Row("tflite", streaming=True, name="a", to="b", bar=0.7, least=True).kept(0.7)
    assert not Row("tflite", streaming=True, name="a", to="b", bar=0.7, least=True).kept(0.69)


@pytest.mark.slow
def test_fewer_bits_are_timed_in_turns_with_fp32_of_both_models():
    routine = Turns(rounds=2, warm_up=0)
    (measured,) = compare("tiny", ["reference"], routine, precision=SCHEMES["int8"], seconds=[0.64], tell=silent)
    assert {"LN", "folded", "LN int8", "folded int8"} <= set(measured.samples.latency_ns)
    told = [row[2] for row in ablation_rows.ratio_rows([measured])]
    assert told[:3] == ["folded int8 / folded", "folded int8 / LN", "folded int8 / LN int8"]


def test_a_bar_is_held_against_the_preset_that_it_is_of():
    mode, samples = Mode("offline", {}), Timed({"folded int8": (30, 30), "folded": (100, 100), "LN": (100, 100)})
    base, small = (ablation_rows.ratio_rows([Comparison(size, "int8", "tflite", mode, samples)]) for size in ("base", "small"))
    assert [row[-1] for row in base] == ["kept", "kept", ""]
    assert [row[-1] for row in small] == ["", "", "MISSED"]  # of its own bars, that of fp32


def test_a_precision_that_a_target_lacks_is_refused_before_anything_is_exported():
    pytest.importorskip("executorch")
    with pytest.raises(Refused, match="int8-weights"):
        compare("tiny", ["executorch"], Turns(), precision=SCHEMES["int8-weights"], seconds=[0.64], tell=silent)

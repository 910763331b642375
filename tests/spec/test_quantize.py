"""Fewer bits: schemes, ranges from speech, and graphs that compute so."""

import copy
import dataclasses
import hashlib
import json
import statistics

import numpy as np
import pytest
import soundfile
import torch

from edgefuse import cli, errors
from edgefuse.checkpoint import encoder_of, read
from edgefuse.fold import fold
from edgefuse.lower import Chunks, lower
from edgefuse.lower.graph import Point
from edgefuse.lower.sites import points_of, positions_of, sites_of, source_of
from edgefuse.model import FULL, Context
from edgefuse.model.config import Stage
from edgefuse.pipeline import Order, export
from edgefuse.quantize.calibrate import calibrate, kind_of, read_ranges, write_ranges
from edgefuse.quantize.compensate import DAMPING, compensated
from edgefuse.quantize.equalize import Seam, equalized, rescaled, seams
from edgefuse.quantize.graph import Filled, Rounded, dequantized, filled, quantized, round_weights
from edgefuse.quantize.observe import BINS, Histogram, observe, scale_and_zero
from edgefuse.quantize.plan import plan
from edgefuse.quantize.prepare import corrected, prepare
from edgefuse.quantize.scheme import CLIPPINGS, LAYER_PRECISIONS, SCHEMES, Scheme, read_scheme, scheme_of
from edgefuse.recognize import frontend_of, hear
from edgefuse.speech import COLUMNS, read_speech
from edgefuse.store import read_bundle
from edgefuse.target import find
from edgefuse.values import Quantization
from edgefuse.verify.parity import snr_db
from edgefuse.verify.reference import logits_of
from tests.conftest import a_checkpoint
from tests.spec.conftest import FUSIONFORMER, some_of_the_shipped_speech
from tests.spec.test_cli_errors import must_be_refused

INT8 = SCHEMES["int8"]


@pytest.fixture(scope="module")
def folded():
    return fold(read(FUSIONFORMER))


@pytest.fixture(scope="module")
def program(folded):
    return lower(folded, [2.0], "fp32", [Chunks(640, 640)])


@pytest.fixture(scope="module")
def seen(folded, program, calibration):
    return calibrate(folded, program, read_speech(calibration))


@pytest.fixture(scope="module")
def whole(program):
    return program.entries[0].graph


@pytest.fixture(scope="module")
def heard(program, speech):
    """A recording as the first entry gets it."""
    return as_the_entry_gets_it(program, speech)[0]


def as_the_entry_gets_it(program, folder):
    """Every recording of a folder: features, with zeros behind them, and how many frames are valid."""
    told = []
    for each in hear(read_speech(folder), frontend_of(read(FUSIONFORMER))):
        given = np.zeros(program.entries[0].inputs[0].shape, np.float32)
        frames = min(len(each.features) // 4, given.shape[1] // 4)
        given[0, : frames * 4] = each.features[: frames * 4]
        told.append((torch.from_numpy(given), torch.tensor([float(frames)])))
    return told


def distance(graph, other, heard) -> float:
    frames = int(heard[1])
    with torch.no_grad():
        wanted, given = (each(*heard)[0, :frames].double().numpy() for each in (graph, other))
    return snr_db(wanted, given)


# --- schemes


def test_a_scheme_file_says_what_each_layer_is(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'layers = "int8"\nclipping = "kl"\nlogits = "fp32"\n[table]\n"blocks.0.*" = "fp32"\n"*.w2" = "int8-dynamic"\n'
    )
    scheme = read_scheme(tmp_path / "mine.toml")
    assert (scheme.name, scheme.clipping, scheme.logits, scheme.precision) == ("mine", "kl", "fp32", "mixed")
    assert scheme.of("blocks.0.macaron.w1") == "fp32"
    assert scheme.of("blocks.0.macaron.w2") == "int8-dynamic"  # the last line that matches
    assert scheme.of("blocks.1.macaron.w1") == "int8"
    assert scheme_of(scheme.to_json()) == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_of_one_precision_is_judged_as_that_whatever_its_file_is_called(name):
    assert SCHEMES[name].precision == name
    assert dataclasses.replace(SCHEMES[name], name="mine", clipping="minmax").precision == name
    assert dataclasses.replace(SCHEMES[name], table={"*.w1": "fp32"}).precision == "mixed"


def test_every_layer_stands_between_a_point_that_it_takes_and_one_that_it_makes(whole):
    layers = {path for path, each in whole.named_modules() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)}
    points = points_of(whole)
    assert {site.layer for site in sites_of(whole)} == layers
    for site in sites_of(whole):
        name = site.layer.rpartition(".")[2]
        assert name in points[site.takes].into
        assert points[site.makes].of == name


def test_a_scheme_file_has_the_switches_of_the_named_scheme_of_its_layers_and_may_turn_them():
    for name, named in SCHEMES.items():
        assert scheme_of({"name": name, "layers": name}) == named
    turned = scheme_of({"layers": "int8", "equalize": False, "bias_correction": False, "rounding": "mse"})
    assert (turned.equalize, turned.bias_correction, turned.rounding) == (False, False, "mse")
    assert scheme_of(turned.to_json()) == turned


@pytest.mark.parametrize("name", SCHEMES)
def test_a_switch_that_needs_speech_makes_a_scheme_need_it(name):
    bare = dataclasses.replace(SCHEMES[name], equalize=False, bias_correction=False, rounding="max")
    assert bare.calibrated == (name in {"int8", "int8-a16"})
    assert dataclasses.replace(bare, equalize=True).calibrated
    assert dataclasses.replace(bare, bias_correction=True).calibrated
    assert dataclasses.replace(bare, rounding="gptq").calibrated


# --- ranges


def test_zero_is_exact_in_every_range():
    for span in ((-1.0, 3.0), (0.0, 7.0), (-5.0, 0.0), (0.0, 0.0), (-1e-12, 1e-12)):
        rounded = Rounded(span)
        assert float(rounded(torch.zeros(1))) == 0.0
        assert -128 <= scale_and_zero(span)[1] <= 127


def test_a_rounded_value_is_within_half_a_step_inside_the_range_and_clipped_outside():
    rounded = Rounded((-1.0, 3.0))
    x = torch.linspace(-0.99, 2.99, 1000)
    assert float((rounded(x) - x).abs().max()) <= rounded.scale / 2 + 1e-6
    assert float(rounded(torch.tensor([100.0]))) == pytest.approx(3.0, abs=rounded.scale)


class Divided(torch.nn.Module):
    """A graph with one point."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.here = by, Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.here(x / self.by)


def test_counts_are_of_every_value_that_was_seen():
    graph, draw = Divided(2), torch.Generator().manual_seed(0)
    spoken = [torch.randn(50, generator=draw) for _ in range(4)]
    (seen,) = observe(lambda: ((graph, x) for x in spoken)).values()
    assert (seen.low, seen.high) == (float(torch.cat(spoken).min()) / 2, float(torch.cat(spoken).max()) / 2)
    assert sum(seen.counts) == 200
    assert not graph.here._forward_hooks


VALUES = np.concatenate([np.random.default_rng(0).normal(size=100_000), np.full(3, 60.0)]).astype(np.float32)  # three far away


def a_histogram() -> Histogram:
    low, high = float(VALUES.min()), float(VALUES.max())
    return Histogram(low, high, tuple(np.histogram(VALUES, BINS, (low, high))[0].tolist()))


def test_a_percentile_gives_up_a_few_far_values_for_resolution():
    seen = a_histogram()
    low, high = seen.range("percentile")
    assert seen.range("minmax") == (seen.low, seen.high)
    assert -6.0 < low < -3.0
    assert 3.0 < high < 6.0


def test_the_squared_error_is_smallest_in_the_range_that_mse_chooses():
    seen, x = a_histogram(), torch.from_numpy(VALUES)
    error = {way: float((Rounded(seen.range(way))(x) - x).square().mean()) for way in CLIPPINGS}
    assert error["mse"] <= min(error.values()) * 1.01
    assert error["mse"] < 0.99 * error["minmax"]


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_point_where_nothing_happens_has_a_range_too(clipping):
    assert Histogram(0.0, 0.0, (0,) * BINS).range(clipping) == (0.0, 0.0)
    low, high = Histogram(0.0, 2.0, (*(0,) * (BINS - 1), 5)).range(clipping)
    assert low == 0.0
    assert 0 < high <= 2.0


def test_ranges_of_chunks_come_from_real_caches(seen, program):
    whole, chunked = seen.modes["offline"], seen.modes["stream_640ms after 640 ms"]
    assert set(whole) == set(chunked) == set(points_of(program.entries[0].graph))
    assert whole["blocks.1.attention.keys"] != chunked["blocks.1.attention.keys"]
    cached = chunked["blocks.0.convolution.inputs"]
    assert cached.high >= 0.9 * chunked["blocks.0.convolution.gated"].high


def test_ranges_of_a_look_ahead_come_from_what_the_windows_hold(folded, calibration):
    modes = lower(folded, (), "fp32", [Chunks(640, 640, look_ahead_ms=ahead) for ahead in (0, 320)])
    heard = calibrate(folded, modes, read_speech(calibration)).modes
    without, ahead = heard["stream_640ms after 640 ms"], heard["stream_640ms_ahead_320ms after 640 ms"]
    assert set(without) == set(ahead)
    assert without["blocks.1.attention.keys"] != ahead["blocks.1.attention.keys"]


def test_ranges_of_another_past_are_other_ranges(seen, program):
    chunked = program.modes[1]
    assert kind_of(chunked) in seen.modes
    longer = dataclasses.replace(chunked, streaming=dataclasses.replace(chunked.streaming, left=64))
    with pytest.raises(errors.BadCalibration, match="not of stream_640ms after 2560 ms"):
        seen.ranges(kind_of(longer), "mse")


def test_the_same_speech_gives_the_same_ranges_and_they_survive_the_disk(seen, folded, program, calibration, tmp_path):
    assert calibrate(folded, program, read_speech(calibration)) == seen
    write_ranges(tmp_path, seen)
    assert read_ranges(tmp_path) == seen


# --- weights, before they are rounded


def deviation(one, other) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


def spoken(folded, features, context=FULL):
    return logits_of(encoder_of(folded.checkpoint, torch.float64), features, context)


def by_random_units(folded):
    draw, found = torch.Generator().manual_seed(0), [each for each in seams(folded.checkpoint.config) if isinstance(each, Seam)]
    widths = {seam: len(folded.checkpoint.weights[seam.divided[1]]) for seam in found}
    return found, {seam: torch.randn(width, generator=draw, dtype=torch.float64).exp() for seam, width in widths.items()}


@pytest.mark.parametrize("context", [FULL, Context(16, 16)], ids=["whole", "chunks"])
def test_other_units_change_no_answer(folded, seen, speech, context):
    features = hear(read_speech(speech), frontend_of(folded.checkpoint))[0].features
    wanted, (found, units) = spoken(folded, features, context), by_random_units(folded)
    assert len(found) == 2 + 6 * folded.checkpoint.config.layers + 1
    for other in (rescaled(folded, units), equalized(folded, seen.peaks)):
        assert 0.0 < deviation(wanted, spoken(other, features, context)) < 1e-10


def test_a_unit_on_one_side_only_is_another_model(folded, speech):
    features = hear(read_speech(speech), frontend_of(folded.checkpoint))[0].features
    wanted, (found, units) = spoken(folded, features), by_random_units(folded)
    for seam in found[:8]:
        half = dataclasses.replace(seam, multiplied=())
        assert deviation(wanted, spoken(rescaled(folded, {half: units[seam]}), features)) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {},
            {"norm": "layer"},
            {"norm": "rep", "norm_residual": "block"},
            {"positions": "none"},
            {"norm_positions": True},
            {"norm_residual": "block"},
            {"norm_residual": "block", "shared_blocks": True},
            {"conv_expansion": 2},
            {"conv_paths": 2},
        ),
        *({"subsampling": 8}, {"shared_blocks": True}, {"stages": (Stage(1, "none"), Stage(1, "performer"))}),
        {"stages": (Stage(1, heads=1, attention_dimension=8), Stage(1, stride=2))},
    ],
    ids=str,
)
def test_units_are_free_in_every_architecture_or_refused_with_a_reason(changes, padded_batch):
    model = fold(a_checkpoint(**changes))
    (found, units), (features, lengths) = by_random_units(model), padded_batch
    wanted, given = (
        encoder_of(each.checkpoint, torch.float64)(features.double(), lengths)[0].detach().numpy()
        for each in (model, rescaled(model, units))
    )
    assert deviation(wanted, given) < 1e-10
    refused = {each.site for each in seams(model.checkpoint.config) if not isinstance(each, Seam)}
    kept = changes.get("norm_residual") == "block" and "shared_blocks" in changes
    assert ("residual" in refused) == (changes.get("norm") == "layer" or kept)
    assert ("blocks.0.macaron" in refused) == (changes.get("norm") == "layer")
    assert len(found) > 2


def test_equalized_channels_share_the_range_of_a_value_more_evenly(seen):
    for path in ("blocks.3.macaron.hidden", "blocks.3.convolution.gated", "subsampling.first"):
        before, after = (np.array(modes["offline"][path].peaks) for modes in (seen.modes, seen.equalized))
        assert np.log(after).std() < np.log(before).std()


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (4, 4)])
def test_a_corrected_bias_leaves_the_mean_answer_where_it_was(channels, groups):
    draw = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(channels, 4, (1, 3), groups=groups, dtype=torch.float64)
    x = torch.rand(1, channels, 1, 1, generator=draw, dtype=torch.float64).expand(-1, -1, 1, 9)
    wanted, weight = layer(x), layer.weight.detach().clone()
    layer.weight.data = dequantized(round_weights(weight, 4))
    assert not torch.allclose(wanted, layer(x))
    layer.bias.data = corrected(layer.bias.data, weight - layer.weight.data, x.mean((0, 2, 3)))
    assert torch.allclose(wanted, layer(x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clipped", [False, True])
def test_weights_on_the_grid_round_to_the_integers_that_made_them_in_float32_too(bits, clipped):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0] = 0.0
    rounded = round_weights(weight, bits, clipped=clipped)
    assert torch.equal(round_weights(dequantized(rounded).float(), bits).integers, rounded.integers)
    assert rounded.integers[1:].abs().amax(1).eq(rounded.most).all()


def test_a_row_that_is_clipped_has_a_smaller_squared_error():
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, cut = ((weight - dequantized(round_weights(weight, 4, clipped=way))).square().sum(1) for way in (False, True))
    assert (cut <= whole).all()
    assert cut.sum() < 0.95 * whole.sum()


def a_layer_and_what_it_hears(columns=96):
    """Weights (24, columns), and inputs (frames, columns) that go together, a few of them loud."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns // 4, columns, generator=draw, dtype=torch.float64)
    heard = torch.randn(600, columns // 4, generator=draw, dtype=torch.float64) @ mixed
    heard += 0.3 * torch.randn(600, columns, generator=draw, dtype=torch.float64)
    return torch.randn(24, columns, generator=draw, dtype=torch.float64), heard


@pytest.mark.parametrize(("bits", "block"), [(4, 0), (4, 32), (8, 0)])
def test_weights_that_make_up_for_each_other_answer_better_than_weights_that_are_nearest(bits, block):
    weight, heard = a_layer_and_what_it_hears()
    nearest = dequantized(round_weights(weight, bits, block, clipped=True))
    made = compensated(weight, heard.T @ heard / len(heard), bits, block)
    lost, before = (float((heard @ (weight - each).T).square().mean()) for each in (made, nearest))
    assert lost < 0.6 * before
    assert torch.allclose(dequantized(round_weights(made, bits, block)), made)  # on the grid that runtimes find


def test_inputs_that_do_not_go_together_leave_every_weight_at_its_nearest():
    weight, _ = a_layer_and_what_it_hears()
    assert torch.equal(
        compensated(weight, torch.eye(96).double(), 4, 32), dequantized(round_weights(weight, 4, 32, clipped=True))
    )


def test_each_column_is_made_up_for_as_the_best_of_those_behind_it_can():
    """The least squares of what is left, solved anew after every column; (H with its damping) and no factor of an inverse."""
    weight, heard = a_layer_and_what_it_hears(80)
    covariance = heard.T @ heard / len(heard)
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(80)
    chosen = round_weights(weight, 4, clipped=True)
    largest, left, wanted = weight.abs().argmax(1), weight.clone(), torch.empty_like(weight)
    order = covariance.diagonal().argsort(descending=True, stable=True)
    for count, j in enumerate(order.tolist(), 1):
        integers = (left[:, j] / chosen.scale).round().clamp(-7, 7)
        integers = torch.where(largest == j, 7 * weight[:, j].sign(), integers)
        wanted[:, j] = integers * chosen.scale
        behind = order[count:]
        moved = torch.linalg.solve(damped[behind][:, behind], damped[behind, j])
        left[:, behind] += torch.outer(left[:, j] - wanted[:, j], moved)
    assert torch.allclose(compensated(weight, covariance, 4, 0), wanted)


@pytest.mark.parametrize(("calibrated_on", "least_gain_db"), [("eight utterances", 0.0), ("the shipped 48", 1.0)])
def test_gptq_answers_better_than_the_nearest_integers_on_speech(
    folded, program, whole, seen, tmp_path, calibrated_on, least_gain_db
):
    shipped = FUSIONFORMER.parents[1] / "calibration"
    ranges = seen if calibrated_on == "eight utterances" else calibrate(folded, program, read_speech(shipped))
    others = as_the_entry_gets_it(program, some_of_the_shipped_speech(tmp_path, slice(10, 22)))
    distances = []
    for rounding in ("mse", "gptq"):
        scheme = dataclasses.replace(SCHEMES["int4-weights"], rounding=rounding)
        prepared = lower(prepare(folded, scheme, whole, ranges), [2.0], "fp32").entries[0].graph
        made = quantized(prepared, plan(prepared, scheme, {}))
        distances.append(statistics.fmean(distance(whole, made, each) for each in others))
    assert distances[1] > distances[0] + least_gain_db


def test_a_prepared_model_has_every_rounded_layer_on_its_grid_and_the_others_as_they_were(folded, whole, seen):
    scheme = dataclasses.replace(SCHEMES["int4-weights"], block=0, table={})
    prepared = prepare(folded, scheme, whole, seen).checkpoint.weights
    before = folded.checkpoint.weights
    for site in sites_of(whole):
        name = source_of(site.layer)
        weight = prepared[f"{name}.weight"]
        if "conv1" in name or "conv2" in name or "depthwise" in name:
            assert torch.equal(weight, before[f"{name}.weight"])
        else:
            assert torch.allclose(dequantized(round_weights(weight, 4)), weight)
            assert not torch.equal(prepared[f"{name}.bias"], before[f"{name}.bias"])


# --- graphs


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_within_half_a_step_of_their_row(bits):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7).reshape(6, 1, 1, 1)
    rounded = round_weights(weight, bits)
    back = rounded.integers * rounded.scale.reshape(6, 1, 1, 1)
    assert float(((back - weight).abs().flatten(1).amax(1) / rounded.scale).max()) <= 0.5 + 1e-5
    assert int(rounded.integers.abs().max()) == rounded.most == 2 ** (bits - 1) - 1


def test_blocks_of_weights_are_within_half_a_step_and_no_scale_loses_digits_in_a_runtime():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 6).reshape(6, 1)
    weight[3] = 0.0  # an output that a norm has silenced
    weight[4, 32:64] = 0.0
    rounded = round_weights(weight, 4, 32)
    assert rounded.scale.shape == (6, 3)
    for stored in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded.scale.to(stored).float(), rounded.scale)
    rows = rounded.scale.repeat_interleave(32, 1)
    assert float(((rounded.integers * rows - weight).abs() / rows).max()) <= 0.5 + 7 / 256
    assert int(rounded.integers.abs().max()) == 7
    assert not rounded.integers[weight == 0.0].any()


def test_zeros_behind_the_inputs_of_a_layer_change_no_answer(whole, heard):
    asked = plan(whole, SCHEMES["int4-weights"], {})
    other = filled(whole, asked)
    widths = {each.in_features for each in other.modules() if isinstance(each, Filled)}
    assert widths == {
        -(-width // 32) * 32 for width in (each.in_features for each in whole.modules() if isinstance(each, torch.nn.Linear))
    }
    assert distance(whole, other, heard) > 100.0


def test_blocks_are_nearer_to_the_graph_than_one_scale_per_channel(whole, heard):
    scheme = SCHEMES["int4-weights"]
    channels, blocks = (quantized(whole, plan(whole, each, {})) for each in (dataclasses.replace(scheme, block=0), scheme))
    assert distance(whole, blocks, heard) > distance(whole, channels, heard)


@pytest.mark.parametrize(
    ("name", "least_db"), [("int8", 20.0), ("int8-dynamic", 20.0), ("int8-weights", 25.0), ("int4-weights", 8.0)]
)
def test_a_quantized_graph_answers_nearly_as_the_graph_does(whole, seen, heard, name, least_db):
    scheme = SCHEMES[name]
    asked = plan(whole, scheme, seen.ranges("offline", scheme.clipping))
    assert least_db < distance(whole, quantized(whole, asked), heard) < 80.0


def test_layers_of_fp32_are_untouched(whole, heard):
    scheme = Scheme("none", "fp32", positions="fp32")
    assert distance(whole, quantized(whole, plan(whole, scheme, {})), heard) == 300.0
    one = Scheme("one", "fp32", {"blocks.3.macaron.w1": "int8-weights"}, positions="fp32")
    asked = plan(whole, one, {})
    assert [layer for layer, precision in asked.layers.items() if precision != "fp32"] == ["blocks.3.macaron.w1"]
    assert 30.0 < distance(whole, quantized(whole, asked), heard) < 300.0


@pytest.mark.parametrize("line", ["attention", "residual"])
def test_a_line_of_the_scheme_quantizes_its_values(whole, seen, line):
    ranges = seen.ranges("offline", "mse")
    without, asked = plan(whole, INT8, ranges), plan(whole, dataclasses.replace(INT8, **{line: "int8"}), ranges)
    more = set(asked.values) - set(without.values)
    assert more == {path for path, point in points_of(whole).items() if point.line == line}


def test_positions_are_within_half_a_step_and_hardly_move_an_answer(whole, heard):
    other = quantized(whole, plan(whole, Scheme("positions", "fp32"), {}))
    exact, rounded = (dict(zip(positions_of(whole), blocks_of(each), strict=True)) for each in (whole, other))
    for path, positions in positions_of(whole).items():
        assert torch.equal(exact[path], positions.p)
        step = float(positions.p.abs().max()) / 127
        assert 0.0 < float((rounded[path] - positions.p).abs().max()) <= step * 0.5001
    assert positions_of(other) == {}
    assert 45.0 < distance(whole, other, heard) < 100.0


def blocks_of(graph):
    """What each attention of a graph adds to its keys."""
    return [block.attention.positions() for block in graph.blocks]


def test_a_model_with_dead_positions_has_a_scale_for_them(whole, heard):
    dead = copy.deepcopy(whole)
    for positions in positions_of(dead).values():
        positions.p.zero_()
    other = quantized(dead, plan(dead, Scheme("positions", "fp32"), {}))
    assert distance(dead, other, heard) == 300.0


def test_a_head_whose_logits_stay_fp32_stays_fp32_and_says_why(whole, seen):
    asked = plan(whole, dataclasses.replace(INT8, table={}, logits="fp32"), seen.ranges("offline", "mse"))
    assert asked.layers["head.ctc"] == "fp32"
    assert "logits are fp32" in asked.kept["head.ctc"]
    assert "head.logits" not in asked.values


def test_a_layer_with_a_norm_behind_it_is_no_site():
    conformer = lower(fold(a_checkpoint("layer", conv_norm="batch")), [0.64], "fp32").entries[0].graph
    layers = {site.layer for site in sites_of(conformer)}
    assert "blocks.0.macaron.w1" in layers


def test_a_product_has_a_wider_range_than_the_answer_that_its_bias_makes_of_it():
    made = pytest.importorskip("edgefuse_targets.tflite_quantize", reason="needs LiteRT's quantizer")
    draw = torch.Generator().manual_seed(0)
    product, bias = torch.randn(50, 8, generator=draw), torch.linspace(-20, 30, 8)
    answer = product + bias
    low, high = made._without(bias, (float(answer.min()), float(answer.max())))
    assert low <= float(product.min())
    assert high >= float(product.max())
    assert low <= 0.0 <= high


@pytest.mark.parametrize("name", ["int8-weights", "int4-weights"])
@pytest.mark.parametrize("rounding", ["max", "mse"])
def test_the_integers_in_a_tflite_are_those_of_the_grid(name, rounding, tmp_path):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs LiteRT")
    pytest.importorskip("litert_torch", reason="needs LiteRT's converter")
    scheme, model = Scheme(name, name, rounding=rounding, block=0), fold(a_checkpoint())
    program = lower(model, [0.64], "fp32")
    graph = lower(prepare(model, scheme, program.entries[0].graph, None), [0.64], "fp32")
    asked = dataclasses.replace(graph, precision=name, quantization=Quantization(scheme, {}, ""))
    made = find("tflite").export(asked, tmp_path, "model")
    found = [
        (integers, np.sort(tensor.quantization.scale))
        for tensor, integers in stored_integers(schema, made.path.read_bytes(), "INT4" if "4" in name else "INT8")
    ]
    layers = [layer for layer, precision in made.layers.items() if precision != "fp32"]
    assert len(layers) == len(found)
    for layer in layers:
        weight = model.checkpoint.weights[f"{source_of(layer)}.weight"]
        ours = round_weights(weight, 4 if "4" in name else 8, clipped=rounding == "mse")
        scales = np.sort(ours.scale.numpy())
        wanted = np.sort(ours.integers.numpy(), axis=None)
        assert any(np.array_equal(wanted, i) and np.allclose(scales, s, rtol=1e-5) for i, s in found), layer


def stored_integers(schema, content: bytes, kind: str):
    """Every tensor of integers in a .tflite that has a scale per row, and what it holds, sorted: LiteRT transposes weights."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for tensor in (each for graph in model.subgraphs for each in graph.tensors):
        rows = tensor.quantization is not None and tensor.quantization.scale is not None and len(tensor.quantization.scale) > 1
        if rows and tensor.type == getattr(schema.TensorType, kind):
            held = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.int8)
            yield tensor, np.sort(np.concatenate([held << 4 >> 4, held >> 4]) if kind == "INT4" else held)


# --- the road


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """More speech than elsewhere: of two utterances two frames are more than the bars allow."""
    return some_of_the_shipped_speech(tmp_path_factory.mktemp("tested"), slice(10, 20))


@pytest.fixture(scope="module")
def order(tested, calibration):
    return Order(("reference",), INT8, seconds=(2.5,), speech=tested, calibration=calibration)


@pytest.fixture(scope="module")
def bundle(order, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "bundle"
    return export(FUSIONFORMER, folder, order).bundle


def test_a_bundle_says_what_every_layer_is_and_the_gate_looks_it_up(bundle, calibration):
    (made,) = bundle.exports
    assert made.verdict.passed
    assert set(made.artifact.layers.values()) == {"int8", "int8-dynamic", "fp32"}
    assert set(made.artifact.kept) == {"subsampling.conv1"}
    assert made.structure.layers["int8"] == sum(each == "int8" for each in made.artifact.layers.values())
    assert set(made.structure.weighted) == set(made.artifact.layers)
    again = read_bundle(bundle.folder)
    assert again.exports[0].artifact == made.artifact
    assert again.exports[0].structure == made.structure
    assert again.quantization == bundle.quantization
    assert again.quantization.scheme.positions == "int8"
    assert again.quantization.calibration == read_speech(calibration).digest


def test_a_layer_that_did_not_follow_its_scheme_fails_the_gate(bundle):
    from edgefuse.verify.gate import judge

    (made,) = bundle.exports
    astray = {**made.structure.weighted, "blocks.1.macaron.w2": {"fp32": 1}}
    verdict = judge(
        dataclasses.replace(made.structure, weighted=astray),
        made.findings,
        bundle.references,
        artifact=made.artifact,
        how="run",
        hears="features",
        norm_free=True,
        digest="",
    )
    (check,) = (check for check in verdict.checks if not check.passed)
    assert check.name == "layers"
    assert "blocks.1.macaron.w2 is fp32, not int8" in check.measured
    assert "subsampling.conv1 stays fp32: its features are fp32 in the scheme" in check.measured


def test_a_quantized_bundle_that_does_not_pass_names_the_command_that_finds_its_layers(order, calibration, tmp_path):
    moved = dataclasses.replace(order, bars={"snr_db": 120.0})
    with pytest.raises(errors.GateFailed, match=r"parity is .* required >= 120 dB \(moved; usually >= 20 dB\)") as caught:
        export(FUSIONFORMER, tmp_path / "out", moved)
    command = f"edgefuse sensitivity {FUSIONFORMER} --target reference --precision int8 --calibration {calibration}"
    every = f"edgefuse verify {tmp_path / 'out.failed'}"
    assert caught.value.hint == f"See which layers lose most with: {command}; every check with: {every}"


def test_the_command_that_finds_layers_is_for_numbers_and_can_be_typed(bundle):
    from edgefuse.bundle import Quantized
    from edgefuse.values import Check, Verdict
    from edgefuse.verify.gate import which_layers

    def told(check, quantized):
        return which_layers(Verdict("tflite", "run", (Check(check, "", "", passed=False),), ""), quantized)

    named, own = bundle.quantization, Quantized(Scheme("mine", "fp32", {"*.w1": "int8-weights"}), "")
    command = "edgefuse sensitivity CHECKPOINT --target tflite --precision"
    assert told("tokens, stream_640ms", named) == f"See which layers lose most with: {command} int8 --calibration SPEECH"
    assert told("WER", own) == f"See which layers lose most with: {command} SCHEME.toml --calibration SPEECH"
    assert told("partitions", named) is told("parity", None) is None


def test_the_same_order_gives_the_same_bytes(bundle, order, tmp_path):
    again = export(FUSIONFORMER, tmp_path / "again", order).bundle
    assert again.exports[0].digest == bundle.exports[0].digest


def test_an_export_takes_ranges_that_were_taken_before(bundle, calibration, tested, tmp_path):
    ranges, made = str(tmp_path / "ranges"), tmp_path / "made"
    assert cli.run(["calibrate", str(FUSIONFORMER), "--speech", str(calibration), "--seconds", "2.5", "-o", ranges]) == 0
    command = ["export", str(FUSIONFORMER), "-t", "reference", "--precision", "int8", "--calibration", ranges, "--seconds", "2.5"]
    assert cli.run([*command, "--speech", str(tested), "-o", str(made)]) == 0
    assert read_bundle(made).exports[0].digest == bundle.exports[0].digest


def test_calibration_prints_the_range_of_every_value(calibration, tmp_path, capsys):
    command = ["calibrate", str(FUSIONFORMER), "--speech", str(calibration), "--chunk-ms", "640", "-o", str(tmp_path / "ranges")]
    assert cli.run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    low, high = told["stream_640ms after 2560 ms"]["blocks.0.macaron.hidden"]["minmax"]
    assert low == 0.0  # behind a ReLU
    assert high > 0.0


# --- when things go wrong


def a_recording(folder, samples):
    (folder / "a.wav").parent.mkdir(exist_ok=True)
    soundfile.write(folder / "a.wav", samples.astype(np.float32), 16_000)
    digest = hashlib.sha256((folder / "a.wav").read_bytes()).hexdigest()
    row = ("a", "a.wav", "calibration", "me", f"{len(samples) / 16_000:.3f}", "hello", digest)
    (folder / "manifest.tsv").write_text("\t".join(COLUMNS) + "\n" + "\t".join(row) + "\n")


NOISE = np.random.default_rng(0).normal(size=16_000 * 11) * 0.1
CALIBRATIONS = {
    "silent": np.zeros(16_000 * 11),
    "clipped": np.sign(NOISE),
    "too_short": NOISE[:16_000],
}
EXPORT = ["export", "HERE/checkpoint", "-t", "reference", "--speech", "HERE/speech", "--seconds", "2", "-o", "HERE/new"]
WRONG = {
    "none": [*EXPORT, "--precision", "int8"],
    "of_no_speech": [*EXPORT, "--precision", "int8", "--calibration", "HERE/checkpoint"],
    "of_the_test_set": [*EXPORT, "--precision", "int8", "--calibration", "HERE/speech"],
    "silent": [*EXPORT, "--precision", "int8", "--calibration", "HERE/silent"],
    "clipped": [*EXPORT, "--precision", "int8", "--calibration", "HERE/clipped"],
    "too_short": [*EXPORT, "--precision", "int8", "--calibration", "HERE/too_short"],
    "changed_ranges": [*EXPORT, "--precision", "int8", "--calibration", "HERE/changed"],
    "ranges_of_another_model": [*EXPORT, "--precision", "int8", "--calibration", "HERE/another"],
    "scheme_missing": [*EXPORT, "--precision", "int7"],
    "scheme_no_toml": [*EXPORT, "--precision", "HERE/diary.toml"],
    "scheme_unknown_line": [*EXPORT, "--precision", "HERE/line.toml"],
    "scheme_unknown_layer": [*EXPORT, "--precision", "HERE/layer.toml"],
    "scheme_unknown_precision": [*EXPORT, "--precision", "HERE/precision.toml"],
    "scheme_block": [*EXPORT, "--precision", "HERE/block.toml"],
    "scheme_positions": [*EXPORT, "--precision", "HERE/positions.toml"],
    "scheme_without_layers": [*EXPORT, "--precision", "HERE/nothing.toml"],
    "scheme_switch_neither_on_nor_off": [*EXPORT, "--precision", "HERE/switch.toml"],
    "scheme_unknown_rounding": [*EXPORT, "--precision", "HERE/rounding.toml"],
    "gptq_of_ranges": [*EXPORT, "--precision", "int4-weights", "--calibration", "HERE/ranges"],
    "no_means_to_correct_biases_with": [*EXPORT, "--precision", "int4-weights"],
}
SCHEME_FILES = {
    "diary": "Dear diary\n",
    "line": 'layers = "int8-weights"\nhead = "fp32"\n',
    "layer": 'layers = "int8-weights"\n[table]\n"blocks.99.*" = "fp32"\n',
    "precision": 'layers = "int7"\n',
    "block": 'layers = "int4-weights"\nblock = 48\n',
    "positions": 'layers = "int4-weights"\npositions = "int4"\n',
    "nothing": 'logits = "fp32"\n',
    "switch": 'layers = "int8"\nequalize = 1\n',
    "rounding": 'layers = "int8"\nrounding = "nearest"\n',
}


@pytest.fixture
def here(checkpoint_folder, speech, calibration, tmp_path):
    import shutil

    shutil.copytree(speech, tmp_path / "speech")
    for name, samples in CALIBRATIONS.items():
        (tmp_path / name).mkdir()
        a_recording(tmp_path / name, samples)
    for name, text in SCHEME_FILES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    other = fold(a_checkpoint("batch", seed=1))
    (tmp_path / "another").mkdir()
    write_ranges(tmp_path / "another", calibrate(other, lower(other, [2.0], "fp32"), read_speech(calibration)))
    shutil.copytree(tmp_path / "another", tmp_path / "changed")
    ranges = tmp_path / "changed" / "ranges.json"
    ranges.write_text(ranges.read_text().replace('"low": -', '"low": -1', 1))
    ours = fold(read(checkpoint_folder))
    (tmp_path / "ranges").mkdir()
    write_ranges(tmp_path / "ranges", calibrate(ours, lower(ours, [2.0], "fp32"), read_speech(calibration)))
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_quantized_is_refused_word_for_word(wrong, here, capsys):
    must_be_refused(WRONG[wrong], f"quantize_{wrong}", here, capsys)


def test_a_value_that_is_not_finite_is_named():
    with pytest.raises(errors.BadCalibration, match="here is not finite"):
        observe(lambda: [(Divided(0), torch.ones(3))])


def test_there_is_a_gate_for_every_precision():
    from edgefuse.values import PRECISIONS
    from edgefuse.verify.gate import BARS

    assert set(BARS) == set(PRECISIONS)
    assert set(LAYER_PRECISIONS) - {"fp32"} == set(SCHEMES)

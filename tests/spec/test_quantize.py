"""Fewer bits: schemes, ranges from speech, and graphs that compute so."""

import copy
import dataclasses
import hashlib
import json

import numpy as np
import pytest
import soundfile
import torch

from edgefuse import cli, errors
from edgefuse.checkpoint import read
from edgefuse.fold import fold
from edgefuse.lower import Chunks, lower
from edgefuse.lower.graph import Point
from edgefuse.lower.sites import points_of, positions_of, sites_of
from edgefuse.pipeline import Order, export
from edgefuse.quantize.calibrate import calibrate, read_ranges, write_ranges
from edgefuse.quantize.graph import Filled, Rounded, filled, quantized, round_weights
from edgefuse.quantize.observe import BINS, Histogram, observe, scale_and_zero
from edgefuse.quantize.plan import plan
from edgefuse.quantize.scheme import CLIPPINGS, LAYER_PRECISIONS, SCHEMES, Scheme, read_scheme, scheme_of
from edgefuse.speech import COLUMNS, read_speech
from edgefuse.store import read_bundle
from edgefuse.verify.parity import snr_db
from tests.conftest import a_checkpoint
from tests.spec.conftest import FUSIONFORMER
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
    from edgefuse.recognize import frontend_of, hear

    features = hear(read_speech(speech), frontend_of(read(FUSIONFORMER)))[0].features
    given = np.zeros(program.entries[0].inputs[0].shape, np.float32)
    frames = min(len(features) // 4, given.shape[1] // 4)
    given[0, : frames * 4] = features[: frames * 4]
    return torch.from_numpy(given), torch.tensor([float(frames)])


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
    whole, chunked = seen.modes["offline"], seen.modes["stream_640ms"]
    assert set(whole) == set(chunked) == set(points_of(program.entries[0].graph))
    assert whole["blocks.1.attention.keys"] != chunked["blocks.1.attention.keys"]
    cached = chunked["blocks.0.convolution.inputs"]
    assert cached.high >= 0.9 * chunked["blocks.0.convolution.gated"].high


def test_the_same_speech_gives_the_same_ranges_and_they_survive_the_disk(seen, folded, program, calibration, tmp_path):
    assert calibrate(folded, program, read_speech(calibration)) == seen
    write_ranges(tmp_path, seen)
    assert read_ranges(tmp_path) == seen


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
    asked = plan(whole, dataclasses.replace(INT8, logits="fp32"), seen.ranges("offline", "mse"))
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


# --- the road


@pytest.fixture(scope="module")
def order(speech, calibration):
    return Order(("reference",), INT8, seconds=(2.0,), speech=speech, calibration=calibration)


@pytest.fixture(scope="module")
def bundle(order, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "bundle"
    return export(FUSIONFORMER, folder, order).bundle


def test_a_bundle_says_what_every_layer_is_and_the_gate_looks_it_up(bundle, calibration):
    (made,) = bundle.exports
    assert made.verdict.passed
    assert set(made.artifact.layers.values()) == {"int8", "fp32"}
    assert set(made.artifact.kept) == {"subsampling.conv1"}
    assert made.structure.layers["int8"] == sum(each == "int8" for each in made.artifact.layers.values())
    again = read_bundle(bundle.folder)
    assert again.exports[0].artifact == made.artifact
    assert again.quantization == bundle.quantization
    assert again.quantization.scheme.positions == "int8"
    assert again.quantization.calibration == read_speech(calibration).digest


def test_a_layer_that_did_not_follow_its_scheme_fails_the_gate(bundle):
    from edgefuse.verify.gate import judge

    (made,) = bundle.exports
    fewer = dataclasses.replace(made.structure, layers={**made.structure.layers, "int8": made.structure.layers["int8"] - 1})
    verdict = judge(
        fewer, made.findings, bundle.references, artifact=made.artifact, how="run", hears="features", norm_free=True, digest=""
    )
    assert [check.name for check in verdict.checks if not check.passed] == ["layers"]


def test_the_same_order_gives_the_same_bytes(bundle, order, tmp_path):
    again = export(FUSIONFORMER, tmp_path / "again", order).bundle
    assert again.exports[0].digest == bundle.exports[0].digest


def test_an_export_takes_ranges_that_were_taken_before(bundle, calibration, speech, tmp_path):
    ranges, made = str(tmp_path / "ranges"), tmp_path / "made"
    assert cli.run(["calibrate", str(FUSIONFORMER), "--speech", str(calibration), "--seconds", "2", "-o", ranges]) == 0
    command = ["export", str(FUSIONFORMER), "-t", "reference", "--precision", "int8", "--calibration", ranges, "--seconds", "2"]
    assert cli.run([*command, "--speech", str(speech), "-o", str(made)]) == 0
    assert read_bundle(made).exports[0].digest == bundle.exports[0].digest


def test_calibration_prints_the_range_of_every_value(calibration, tmp_path, capsys):
    command = ["calibrate", str(FUSIONFORMER), "--speech", str(calibration), "--chunk-ms", "640", "-o", str(tmp_path / "ranges")]
    assert cli.run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    low, high = told["stream_640ms"]["blocks.0.macaron.hidden"]["minmax"]
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
}
SCHEME_FILES = {
    "diary": "Dear diary\n",
    "line": 'layers = "int8-weights"\nhead = "fp32"\n',
    "layer": 'layers = "int8-weights"\n[table]\n"blocks.99.*" = "fp32"\n',
    "precision": 'layers = "int7"\n',
    "block": 'layers = "int4-weights"\nblock = 48\n',
    "positions": 'layers = "int4-weights"\npositions = "int4"\n',
    "nothing": 'logits = "fp32"\n',
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
    assert checkpoint_folder.is_dir()
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

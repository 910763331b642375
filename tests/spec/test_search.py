"""What each layer costs, and the cheapest scheme within bounds."""

import dataclasses
import html
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli
from edgefuse.explore import HELD_OUT, Inquiry, sensitivity, stand
from edgefuse.lower import Chunks
from edgefuse.model.cost import cost
from edgefuse.pipeline import silent
from edgefuse.quantize.mixes import BITS, TIME, Bounds, Measured, binding, cheapest, front, mixes, scheme_of_mix, spread
from edgefuse.quantize.scheme import SCHEMES, Scheme, read_scheme
from edgefuse.quantize.sensitivity import Extent, extents
from edgefuse.quantize.trial import Trial
from edgefuse.report import scheme_rows
from edgefuse.report.picture import draw_front, draw_sensitivity
from edgefuse.speech import parted, read_speech
from edgefuse.verify.wer import WordErrors
from tests.conftest import a_checkpoint
from tests.spec.conftest import FUSIONFORMER
from tests.spec.test_cli_errors import must_be_refused, must_equal_golden, said

FEW_LAYERS = Scheme(
    "few", "fp32", {"subsampling.conv2": "int8", "blocks.7.macaron.*": "int8", "head.*": "int8"}, positions="fp32"
)


@pytest.fixture(scope="module")
def inquiry(calibration, speech):
    return Inquiry(FUSIONFORMER, "reference", calibration, speech, seconds=2.0)


@pytest.fixture(scope="module")
def costs(inquiry):
    return sensitivity(inquiry, FEW_LAYERS)


# --- what each layer costs


def test_every_layer_that_is_quantized_has_its_line(costs):
    assert [each.name for each in costs.parts] == ["subsampling.conv2", "blocks.7.macaron.w1", "blocks.7.macaron.w2", "head.ctc"]
    assert {each.precision for each in costs.parts} == {"int8"}
    assert set(costs.latency_ms) >= {each.name for each in costs.parts}
    assert all(latency > 0 for latency in costs.latency_ms.values())


def test_errors_of_layers_add_up_to_the_error_of_all(costs):
    assert sum(each.alone.noise for each in costs.parts) == pytest.approx(costs.whole.noise, rel=0.5)


def test_a_layer_that_is_left_float_takes_its_error_along(costs):
    worst = max(costs.parts, key=lambda each: each.alone.noise)
    assert worst.without.noise < costs.whole.noise
    assert worst.without.noise == min(each.without.noise for each in costs.parts)
    assert costs.exact.noise == 0.0
    assert costs.exact.agreement_percent == 100.0


def test_a_layer_is_left_float_even_where_a_pattern_behind_its_line_names_it(inquiry):
    scheme = Scheme("two", "fp32", {"head.ctc": "int8", "head.*": "int8"}, positions="fp32")
    (part,) = sensitivity(inquiry, scheme).parts
    assert part.without.noise == 0.0 < part.alone.noise


def test_a_line_of_the_scheme_is_a_part_too(inquiry):
    found = sensitivity(inquiry, Scheme("sums", "fp32", residual="int8", positions="fp32"))
    (part,) = found.parts
    assert (part.name, part.extent) == ("residual", None)
    assert part.alone.noise == found.whole.noise > 0.0
    assert part.without.noise == 0.0


def test_what_layers_are_adds_up_to_the_model(inquiry):
    ground = stand(inquiry, silent)
    config, (entry,) = ground.folded.checkpoint.config, ground.program.entries
    frames = entry.outputs[0].shape[1]
    whole = cost(config)
    without_attention = dataclasses.replace(whole, attention_per_key=0).macs(frames, 0)
    first = 2 * frames * ((config.mel_bins - 1) // 2) * config.subsampling_channels * 9
    one_more = first // (2 * frames)  # the first convolution makes an odd number of frames
    assert sum(each.macs for each in extents(entry).values()) == without_attention + one_more


def test_layers_of_chunks_are_tried_with_real_caches(inquiry):
    chunked = dataclasses.replace(inquiry, seconds=None, chunks=Chunks(640, 640))
    found = sensitivity(chunked, Scheme("one", "fp32", {"head.*": "int8"}))
    assert 10.0 < found.whole.snr_db < 80.0
    assert found.exact.frames > found.whole.frames // 2 > 0


def test_speech_that_is_tried_on_is_not_calibrated_on(calibration):
    whole = read_speech(calibration)
    rest, apart = parted(whole, HELD_OUT)
    assert not {each.sha256 for each in rest.utterances} & {each.sha256 for each in apart.utterances}
    assert len(apart.utterances) == len(whole.utterances) // HELD_OUT
    assert len(rest.utterances) + len(apart.utterances) == len(whole.utterances)
    assert len({rest.digest, apart.digest, whole.digest}) == 3


def test_sensitivity_prints_a_table_and_draws_it(calibration, speech, tmp_path, capsys):
    (tmp_path / "one.toml").write_text(FEW_LAYERS.to_toml())
    command = ["sensitivity", str(FUSIONFORMER), "-t", "reference", "--precision", str(tmp_path / "one.toml"), "--seconds", "2"]
    where = ["--calibration", str(calibration), "--speech", str(speech), "--picture", str(tmp_path / "picture.svg"), "--json"]
    assert cli.run([*command, *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["parts"]][-1] == "head.ctc"
    assert "blocks.7.macaron.w1 int8" in (tmp_path / "picture.svg").read_text()


def test_the_same_numbers_draw_the_same_picture(costs, tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_sensitivity(tmp_path / name, costs.parts)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def layer_weights(folder):
    """The weights of every linear and convolution of a checkpoint, but for those that make its positions: these are constants."""
    layers = checkpoints.encoder_of(checkpoints.read(folder)).named_modules()
    kinds = torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d
    return [each.weight for path, each in layers if isinstance(each, kinds) and "position" not in path]


def test_the_table_begins_with_what_costs_most(costs):
    table = scheme_rows.sensitivity_rows(costs)
    assert table[0][0] == max(costs.parts, key=lambda each: each.alone.noise).name
    assert all(len(row) == len(scheme_rows.SENSITIVITIES) for row in table)
    head = next(each for each in costs.parts if each.name == "head.ctc")
    share = 100 * head.extent.weights / sum(weight.numel() for weight in layer_weights(FUSIONFORMER))
    assert next(row[-1] for row in table if row[0] == "head.ctc") == f"{share:.1f} %"  # of the model, not of what is quantized


# --- mixes


def a_problem(layers: int, seed: int):
    draw = np.random.default_rng(seed)
    loud, size = draw.random((layers, 2)) * (0.3, 1.0), draw.integers(1, 9, (layers, 2))
    noises = {f"l{i}": {"fp32": 0.0, "int8-dynamic": loud[i, 0], "int8": loud[i, 1]} for i in range(layers)}
    return noises, {layer: Extent(*map(int, size[i]), (), ()) for i, layer in enumerate(noises)}


def price_and_noise(mix, noises, parts, worth):
    macs, weights = sum(each.macs for each in parts.values()), sum(each.weights for each in parts.values())
    time = sum(parts[layer].macs / macs * TIME[each] for layer, each in mix.items())
    size = sum(parts[layer].weights / weights * BITS[each] / 32 for layer, each in mix.items())
    return time + worth * size, sum(noises[layer][each] for layer, each in mix.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("worth", [0.0, 4.0])
def test_nothing_is_cheaper_and_better_than_a_mix_on_the_hull(seed, worth):
    noises, parts = a_problem(5, seed)
    everything = [dict(zip(noises, each, strict=True)) for each in itertools.product(("fp32", "int8", "int8-dynamic"), repeat=5)]
    points = [price_and_noise(each, noises, parts, worth) for each in everything]
    found = mixes(noises, parts, worth)
    assert len(found) > 2
    for mix in found:
        price, noise = price_and_noise(mix, noises, parts, worth)
        assert not [1 for other, loud in points if other < price - 1e-12 and loud < noise - 1e-12]


def test_mixes_go_from_the_most_accurate_to_the_cheapest():
    noises, parts = a_problem(5, 0)
    found = [price_and_noise(each, noises, parts, 0.0) for each in mixes(noises, parts, 0.0)]
    assert found[0][1] == 0.0
    assert [price for price, _ in found] == sorted((price for price, _ in found), reverse=True)
    assert [noise for _, noise in found] == sorted(noise for _, noise in found)


def test_an_even_choice_keeps_both_ends():
    schemes = [Scheme(str(i), "int8") for i in range(20)]
    assert [each.name for each in spread(schemes, 3)] == ["0", "10", "19"]
    assert list(spread(schemes[:2], 3)) == schemes[:2]


def test_a_mix_is_a_scheme_that_can_be_read(tmp_path):
    mix = {"a": "int8", "b": "int8", "c": "fp32"}
    scheme = scheme_of_mix("mix", mix, Scheme("like", "int8", clipping="kl", features="int8"))
    assert scheme.precisions(("a", "b", "c")) == mix
    assert (scheme.layers, dict(scheme.table)) == ("int8", {"c": "fp32"})
    (tmp_path / "mix.toml").write_text(scheme.to_toml())
    assert read_scheme(tmp_path / "mix.toml") == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_every_named_scheme_can_be_a_file(name, tmp_path):
    (tmp_path / f"{name}.toml").write_text(SCHEMES[name].to_toml())
    assert read_scheme(tmp_path / f"{name}.toml") == SCHEMES[name]


# --- choosing


def a_measurement(name, *, loss=0.0, ratio=1.0, ms=4.0, size=10.0, noise=1e-4):
    trial = Trial(noise, 100, 100, WordErrors(0, 0, 0, 100, 5))
    return Measured(Scheme(name, "int8"), {"int8": 1}, trial, loss, round(size * 1e6), ratio, ms)


FLOAT = a_measurement("float", noise=0.0)
MIX = a_measurement("mix", loss=0.1, ratio=0.40, ms=1.6, size=4.0)
FASTEST = a_measurement("fastest", loss=0.9, ratio=0.33, ms=1.3, size=3.5)
ALL_MEASURED = (FLOAT, MIX, FASTEST)


@pytest.mark.parametrize(
    ("bounds", "name"),
    [
        (Bounds(wer_loss=1.0), "fastest"),
        (Bounds(wer_loss=0.2), "mix"),
        (Bounds(wer_loss=0.0), "float"),
        (Bounds(latency_ms=1.5), "fastest"),
        (Bounds(wer_loss=0.2, megabytes=4.0), "mix"),
    ],
)
def test_the_cheapest_within_the_bounds_is_chosen(bounds, name):
    assert cheapest(ALL_MEASURED, bounds).scheme.name == name


def test_of_two_that_cost_the_same_the_better_one_is_chosen():
    loud = a_measurement("loud", ratio=0.399, noise=1e-2, loss=0.1)
    assert cheapest((loud, MIX), Bounds(wer_loss=0.2)) is MIX


def test_nothing_may_fit():
    assert cheapest(ALL_MEASURED, Bounds(wer_loss=0.2, latency_ms=1.5)) is None


def test_the_bound_that_binds_is_named():
    assert (
        binding(ALL_MEASURED, MIX, Bounds(wer_loss=0.2)) == "fastest would be cheaper, but: WER loss +0.90 points (at most 0.2)."
    )
    assert "No bound binds" in binding(ALL_MEASURED, FASTEST, Bounds(wer_loss=2.0))


def test_on_the_front_nothing_is_beaten_in_both():
    beaten = a_measurement("beaten", loss=0.5, ratio=0.8)
    assert [each.scheme.name for each in front((*ALL_MEASURED, beaten))] == ["fastest", "mix", "float"]


def test_a_front_is_drawn_with_every_name(tmp_path):
    draw_front(tmp_path / "front.svg", ALL_MEASURED, MIX)
    told = (tmp_path / "front.svg").read_text()
    assert all(name in told for name in ("fastest", "mix", "float", "latency / fp32"))


# --- the command


BOUNDS = ("--max-wer-loss", "50", "--max-mb", "0.3")  # which fp32 breaks


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with few layers, most of whose bytes are weights."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    folder.mkdir()
    checkpoints.write(folder, a_checkpoint(dimension=64, feed_forward=256, layers=1))
    return folder


@pytest.fixture(scope="module")
def command(small, calibration, speech):
    where = ["--calibration", str(calibration), "--speech", str(speech), "--seconds", "2"]
    return ["search", str(small), "-t", "reference", *where]


@pytest.fixture(scope="module")
def searched(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "found"
    assert cli.run([*command, *BOUNDS, "-o", str(folder)]) == 0
    return folder


def test_a_search_leaves_a_scheme_that_export_takes(searched, small, calibration, speech, tmp_path):
    assert (searched / "front.svg").is_file()
    scheme = read_scheme(searched / "scheme.toml")
    made = ["export", str(small), "-t", "reference", "--precision", str(searched / "scheme.toml"), "--seconds", "2"]
    code = cli.run([*made, "--calibration", str(calibration), "--speech", str(speech), "-o", str(tmp_path / "made")])
    assert code in (0, 61)  # random weights may not pass the gate, but it is reached
    assert (scheme.layers, scheme.table) != ("fp32", {})
    (made,) = tmp_path.glob("made*")
    page = (made / "report.html").read_text()
    assert "front.svg" in page
    assert (made / "front.svg").read_bytes() == (searched / "front.svg").read_bytes()
    assert scheme.to_toml().splitlines()[0] in html.unescape(page)


def test_a_search_goes_on_from_its_notes_and_finds_the_same(searched, command, capsys):
    notes, scheme = (searched / "search.json").read_bytes(), (searched / "scheme.toml").read_bytes()
    assert cli.run([*command, *BOUNDS, "-o", str(searched), "--resume", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (searched / "search.json").read_bytes() == notes
    assert (searched / "scheme.toml").read_bytes() == scheme
    names = [each["scheme"]["name"] for each in told["measured"]]
    assert names[:5] == ["fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights"]
    assert any(name.startswith("mix") for name in names)
    assert told["measured"][0]["snr_db"] > 100.0


def test_a_search_that_was_stopped_loses_nothing(searched, command, tmp_path, capsys):
    shutil.copytree(searched, tmp_path / "stopped")
    notes = json.loads((searched / "search.json").read_text())
    kept = dict(list(notes["found"].items())[: len(notes["found"]) // 2])
    (tmp_path / "stopped" / "search.json").write_text(json.dumps({**notes, "found": kept}))
    assert cli.run([*command, *BOUNDS, "-o", str(tmp_path / "stopped"), "--resume"]) == 0
    capsys.readouterr()
    again = json.loads((tmp_path / "stopped" / "search.json").read_text())["found"]
    assert all(again[what] == found for what, found in kept.items())
    noises = {what: found for what, found in notes["found"].items() if isinstance(found, float)}
    assert {what: again[what] for what in noises} == noises  # what is not a latency comes out the same


def test_when_nothing_fits_the_nearest_is_named_and_the_notes_are_kept(searched, command, tmp_path, capsys):
    shutil.copytree(searched, tmp_path / "search")
    notes = (tmp_path / "search" / "search.json").read_bytes()
    inside = [word.replace(str(tmp_path), "HERE") for word in command]
    page = said([*inside, "--max-mb", "0.001", "-o", str(tmp_path / "search"), "--resume"], tmp_path, capsys)
    words = page.partition("error:")
    must_equal_golden("search_nothing_fits", re.sub(r"[0-9.]+ MB", "N MB", "".join(words[1:])))
    assert (tmp_path / "search" / "search.json").read_bytes() == notes


CALIBRATED = ("--seconds", "2", "--calibration", "HERE/calibration")
SEARCH = ["search", "HERE/checkpoint", "-t", "reference", *CALIBRATED]
RANGES = ["search", "HERE/checkpoint", "-t", "reference", "--calibration", "HERE/ranges"]
FP16 = ["sensitivity", "HERE/checkpoint", "-t", "reference", "--precision", "fp16"]
WRONG = {
    "no_bound": [*SEARCH, "-o", "HERE/new"],
    "output_exists": [*SEARCH, "--max-mb", "1", "-o", "HERE/checkpoint"],
    "nothing_to_resume": [*SEARCH, "--max-mb", "1", "-o", "HERE/checkpoint", "--resume"],
    "bound_no_number": [*SEARCH, "--max-mb", "nan", "-o", "HERE/new"],
    "another_model": [*SEARCH, "--max-mb", "1", "--speech", "HERE/speech", "-o", "HERE/searched", "--resume"],
    "damaged_notes": [*SEARCH, "--speech", "HERE/speech", "--max-mb", "1", "-o", "HERE/damaged", "--resume"],
    "ranges_without_speech": [*RANGES, "--max-mb", "1", "-o", "HERE/new"],
    "tried_on_what_is_calibrated_on": [*SEARCH, "--speech", "HERE/calibration", "--max-mb", "1", "-o", "HERE/new"],
    "picture_in_no_folder": [*FP16[:-1], "int8", *CALIBRATED, "--picture", "HERE/nowhere/picture.svg"],
    "sensitivity_of_a_float": [*FP16, *CALIBRATED],
}


@pytest.mark.usefixtures("checkpoint_folder")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_searched_is_refused_word_for_word(wrong, searched, speech, calibration, tmp_path, capsys):
    shutil.copytree(speech, tmp_path / "speech")
    shutil.copytree(calibration, tmp_path / "calibration")
    shutil.copytree(searched, tmp_path / "searched")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "search.json").write_text("{")
    (tmp_path / "ranges").mkdir()
    (tmp_path / "ranges" / "ranges.json").write_text("{}")
    must_be_refused(WRONG[wrong], f"search_{wrong}", tmp_path, capsys)

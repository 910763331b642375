"""Verification: what is measured on an artifact, and the one gate that judges it."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgefuse import pipeline, store
from edgefuse.bundle import Findings, Golden, Reference
from edgefuse.errors import AudioError, MissingFile, UsageError
from edgefuse.recognize import answer, fitting
from edgefuse.speech import read_speech, shipped
from edgefuse.target import find
from edgefuse.values import OFFLINE, Artifact, Structure, TensorSpec
from edgefuse.verify.bootstrap import differences, paired_bootstrap
from edgefuse.verify.gate import WHOLE, Bars, judge, read_bars
from edgefuse.verify.parity import IDENTICAL_DB, NONSENSE_DB, agreeing_frames, snr_db, worst_snr_db
from edgefuse.verify.wer import WordErrors


def words(*errors: int, each: int = 10) -> dict[str, WordErrors]:
    """Fifty utterances of so many words, with errors in the first few."""
    return {f"u{n}": WordErrors(errors[n] if n < len(errors) else 0, 0, 0, each, 1) for n in range(50)}


GOOD = Findings(120.0, 119.0, 1000, 1000, words(1))
CLEAN = Structure({"linear": {"fp32": 9}}, (), 1, {"getitem": 1})
MODEL = Reference(dict.fromkeys(words(), "seen"), words(1), {}, ())
LIVE = "stream_640ms"


def judged(findings=GOOD, structure=CLEAN, precision="fp32", *, mode="offline", hears="features", norm_free=True, **more):
    return judge(
        structure,
        {mode: findings},
        {mode: more.pop("model", MODEL)},
        artifact=more.pop("artifact", Artifact("t", Path("model.t"), precision, {}, {}, parent="")),
        how="run on this host",
        hears=hears,
        norm_free=norm_free,
        digest="",
        **more,
    )


def failed(*found, **more) -> list[str]:
    verdict = judged(*found, **more)
    assert verdict.passed == all(check.passed for check in verdict.checks)
    return [check.name for check in verdict.checks if not check.passed]


def test_an_artifact_that_reaches_every_bar_passes():
    assert failed() == failed(mode=LIVE) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"snr_db": 89.9}, "parity"),
        ({"snr_db": float("nan")}, "parity"),
        ({"padded_snr_db": 89.9}, "padding"),
        ({"agreeing_frames": 994}, "tokens"),
        ({"frames": 0, "agreeing_frames": 0}, "tokens"),
        ({"words": words(1, 1)}, "WER"),
        ({"words": words()}, "WER"),
    ],
)
def test_one_bar_that_is_missed_is_enough_to_fail(change, name):
    assert failed(dataclasses.replace(GOOD, **change)) == [name]
    assert failed(dataclasses.replace(GOOD, **change), mode=LIVE) == [f"{name}, {LIVE}"]


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (Structure({}, ("a batch_norm",), 1, {}), "normalizations"),
        (Structure({}, (), 2, {}), "partitions"),
        (Structure({}, (), 1, {"getitem": 2, "layer_norm": 3}), "outside"),
    ],
)
def test_one_norm_or_stranger_is_enough_to_fail(structure, name):
    assert failed(structure=structure) == [name]


def test_chunks_that_are_fed_one_after_another_change_no_token():
    almost = dataclasses.replace(GOOD, agreeing_frames=999)
    assert failed(almost) == failed(almost, precision="fp16", mode=LIVE) == []
    assert failed(almost, mode=LIVE) == [f"tokens, {LIVE}"]


def test_half_precision_has_lower_bars_for_numbers_and_the_same_for_structure():
    half = dataclasses.replace(GOOD, snr_db=41.0, padded_snr_db=41.0, words=words(1, 1))
    assert failed(half, precision="fp16") == []
    assert failed(half, precision="fp32") == ["parity", "padding", "WER"]
    assert failed(half, Structure({}, ("x",), 1, {}), "fp16") == ["normalizations"]


def test_a_quantized_artifact_that_hears_better_by_chance_has_lost_nothing():
    few, many = words(1), words(*[3] * 50)
    model, better = dataclasses.replace(MODEL, words=many), dataclasses.replace(GOOD, words=few)
    worse = dataclasses.replace(GOOD, words=many)
    assert failed(better, model=model, precision="int8") == []
    assert failed(better, model=model, precision="fp32") == failed(worse, precision="int8") == ["WER"]


def test_casts_at_the_border_are_for_half_precision_only():
    casts = Structure({}, (), 1, {"_to_dim_order_copy.out": 3})
    assert failed(structure=casts, precision="fp16") == []
    assert failed(structure=casts, precision="fp32") == ["outside"]


def test_a_front_end_is_judged_where_there_is_one_and_is_a_delegate_of_its_own_before_half_precision():
    heard, two = dataclasses.replace(GOOD, features_snr_db=60.0), Structure({}, (), 2, {})
    assert failed(heard, hears="pcm") == failed(heard, two, "fp16", hears="pcm") == []
    assert failed(dataclasses.replace(GOOD, features_snr_db=59.9), hears="pcm") == ["front end"]
    assert failed(heard, two, hears="pcm") == failed(structure=two, precision="fp16") == ["partitions"]
    assert failed(heard, Structure({}, (), 3, {}), "fp16", hears="pcm") == ["partitions"]


def test_the_structure_of_a_model_that_keeps_its_norms_is_reported_and_not_judged():
    conformer = Structure({}, ("a layer_norm",) * 61, 50, {"layer_norm": 61})
    assert failed(structure=conformer, norm_free=False) == []
    assert failed(dataclasses.replace(GOOD, snr_db=10.0), conformer, norm_free=False) == ["parity"]


# --- layers that did not follow


ASKED = {"conv": "fp32", "w1": "int8", "w2": "int8"}


def layers_told(weighted, kept=None, entries=1) -> tuple[bool, str]:
    """Whether the layers of an artifact pass that was asked to have two of int8, and in which words."""
    inputs = {f"e{n}": () for n in range(entries)}
    artifact = Artifact("t", Path("model.t"), "int8", inputs, {}, parent="", layers=ASKED, kept=kept or {})
    kinds = {name: counts for name, counts in weighted.items() if name.isupper()}
    verdict = judged(structure=Structure(kinds, (), weighted=weighted), precision="int8", artifact=artifact)
    check = next(check for check in verdict.checks if check.name == "layers")
    return check.passed, check.measured


def test_a_layer_that_strayed_is_named_where_the_artifact_has_its_name_and_counted_by_operator_where_not():
    assert layers_told({"conv": {"fp32": 1}, "w1": {"int8": 1}, "w2": {"int8": 1}}) == (True, "2 int8")
    assert layers_told({"CONV": {"fp32": 2}, "FULL": {"int8": 4}}, entries=2) == (True, "4 int8")
    swapped = layers_told({"conv": {"int8": 1}, "w1": {"fp32": 1}, "w2": {"int8": 1}})  # the counts are as they should be
    assert swapped == (False, "2 int8; conv is int8, not fp32, w1 is fp32, not int8")
    assert layers_told({"CONV": {"fp32": 1}, "FULL": {"fp32": 1, "int8": 1}}) == (
        False,
        "1 int8; 1 fp32 CONV, 1 fp32, 1 int8 FULL",
    )


def test_layers_that_are_asked_to_stay_fp32_are_told_with_the_reason_the_first_few_of_them():
    passed, told = layers_told({"FULL": {"int8": 2}}, {**dict.fromkeys(("a", "b", "c", "d", "e"), "wide"), "f": "odd"})
    assert passed
    assert told == "2 int8; a, b, c and 2 more (see `kept` in edgefuse.json) stay fp32: wide; f stays fp32: odd"


# --- how sure a difference of words is


def test_the_interval_is_that_of_every_way_to_draw_the_utterances():
    more, said = np.array([0, 1, 0, -1, 2]), np.array([3, 5, 4, 2, 6])
    ways = np.array(list(itertools.product(range(5), repeat=5)))
    exact = 100.0 * more[ways].sum(axis=1) / said[ways].sum(axis=1)
    low, high = paired_bootstrap(more.tolist(), said.tolist())
    for bound, tail in ((low, 0.025), (high, 0.975)):
        assert np.mean(exact < bound - 1e-9) - 0.005 < tail < np.mean(exact <= bound + 1e-9) + 0.005


def test_the_interval_of_many_utterances_is_that_of_the_normal_distribution():
    draw = np.random.default_rng(1)
    more, said = draw.choice([-1, 0, 0, 0, 1, 2], 2000), draw.integers(3, 15, 2000)
    rate = more.sum() / said.sum()
    deviation = 100.0 * np.sqrt(np.square(more - rate * said).sum()) / said.sum()  # of a ratio, by its linear part
    low, high = paired_bootstrap(more.tolist(), said.tolist())
    assert (low + high) / 2 == pytest.approx(100.0 * rate, abs=0.05 * deviation)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.03)


def test_what_both_get_wrong_does_not_widen_the_interval_and_is_the_same_each_time():
    hard = Reference(dict.fromkeys(words(), "seen"), words(*[5] * 20), {}, ())
    (same,) = differences(hard, dataclasses.replace(GOOD, words=hard.words))
    assert (same.changed, same.points, same.interval) == (0, 0.0, (0.0, 0.0))
    worse = dataclasses.replace(GOOD, words=words(*[6] * 3, *[5] * 17))
    (once,), (again,) = differences(hard, worse), differences(hard, worse)
    assert once == again
    assert once.points == pytest.approx(0.6)
    assert 0.0 <= once.interval[0] < 0.6 < once.interval[1] < 1.5


def test_each_part_of_the_test_set_has_a_line_of_its_own_and_the_whole_is_judged():
    parts = {name: "seen" if n < 25 else "unseen" for n, name in enumerate(words())}
    model = dataclasses.replace(MODEL, parts=parts)
    lines = {check.name: check for check in judged(dataclasses.replace(GOOD, words=words(2)), model=model).checks}
    assert [name for name in lines if name.startswith("WER")] == ["WER", "WER, seen", "WER, unseen"]
    assert [lines[name].passed for name in ("WER", "WER, seen", "WER, unseen")] == [False, True, True]
    assert lines["WER, seen"].required == lines["WER, unseen"].required == "reported only"
    assert "0.80 %, model 0.40 %; +0.40 points" in lines["WER, seen"].measured
    assert "0.00 %, model 0.00 %; as many errors in each utterance; 25 utterances" in lines["WER, unseen"].measured


def test_a_test_set_that_cannot_tell_says_so():
    def told(*errors: int) -> str:
        verdict = judged(dataclasses.replace(GOOD, words=words(*errors)), precision="int8")
        return next(check.measured for check in verdict.checks if check.name == "WER")

    assert told(1, 1).endswith("50 utterances")  # one word more: 0.2 points, never 1.0
    assert told(1, 1, 1, 1).endswith("50 utterances, too few to tell")  # 0.6 points, perhaps 1.2
    assert told(*[1] * 40).endswith("50 utterances")  # far beyond the bar


# --- bars that are moved


def test_a_moved_bar_is_marked_and_remembered():
    low = dataclasses.replace(GOOD, snr_db=85.0)
    verdict = judged(low, bars={"snr_db": 80.5, "wer_points": 0.1})
    assert verdict.passed
    assert verdict.moved == {"snr_db": 80.5}  # the other stands where it always does
    assert {check.name: check.required for check in verdict.checks}["parity"] == ">= 80.5 dB (moved; usually >= 90 dB)"
    assert not judged(low).moved
    assert failed(bars={"snr_db": 130.0}) == ["parity", "padding"]


def test_every_bar_can_be_moved(tmp_path):
    values = {bar.name: 2 if bar.name in WHOLE else 1.5 for bar in dataclasses.fields(Bars)}
    (tmp_path / "bars.toml").write_text("\n".join(f"{name} = {value}" for name, value in values.items()))
    moved = read_bars(tmp_path / "bars.toml")
    assert moved == values == judged(bars=moved).moved


@pytest.mark.usefixtures("louder")
def test_a_bundle_remembers_its_moved_bars_and_is_verified_against_the_usual_ones(whole_checkpoint, speech, tmp_path, capsys):
    from edgefuse import cli

    (tmp_path / "bars.toml").write_text("snr_db = 50\n")
    folder, moved = tmp_path / "out", ["--bars", str(tmp_path / "bars.toml")]
    command = ["export", str(whole_checkpoint), "-t", "reference", "--seconds", "2", "--speech", str(speech), "-o", str(folder)]
    assert cli.run([*command, *moved]) == 0
    table = capsys.readouterr().out
    assert "passed*" in table
    assert "* bars moved: snr_db = 50" in table
    written = json.loads((folder / "edgefuse.json").read_text())["artifacts"][0]["verdict"]
    assert written["moved_bars"] == store.read_bundle(folder).exports[0].verdict.moved == {"snr_db": 50}
    assert cli.run(["verify", str(folder), "--speech", str(speech), *moved]) == 0
    assert "; bars moved: snr_db = 50" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["verify", str(folder), "--speech", str(speech)]) == 61
    out, err = capsys.readouterr()
    assert "exported with bars moved: snr_db = 50" in " ".join(out.split())
    assert "exported with other bars, snr_db = 50: give them with --bars FILE." in err


def test_what_was_said_of_each_utterance_survives_the_disk(both, speech):
    again = store.read_bundle(both.bundle.folder)
    assert again.references["offline"].parts == dict.fromkeys(again.references["offline"].alignments, "unseen")
    for mode, reference in again.references.items():
        assert set(reference.words) == set(again.exports[0].findings[mode].words) == set(reference.alignments)
    assert pipeline.verify(both.bundle.folder, speech=speech).exports[0].findings == again.exports[0].findings


# --- parity


def test_the_ratio_is_ten_decibels_per_power_of_ten():
    reference = np.ones((4, 3))
    assert snr_db(reference, reference.astype(np.float32)) == IDENTICAL_DB
    assert snr_db(reference, reference + 1e-3) == pytest.approx(60)
    assert snr_db(reference, np.zeros((4, 3))) == pytest.approx(0)


@pytest.mark.parametrize("nonsense", [np.full((4, 3), np.nan), np.full((4, 3), np.inf), np.ones((3, 3)), np.full((4, 3), 1e200)])
def test_an_answer_that_is_none_can_never_pass(nonsense):
    assert snr_db(np.ones((4, 3)), nonsense) == NONSENSE_DB


def test_silence_is_answered_with_silence_or_wrongly():
    assert snr_db(np.zeros((4, 3)), np.zeros((4, 3))) == IDENTICAL_DB
    assert snr_db(np.zeros((4, 3)), np.full((4, 3), 1e-6)) == NONSENSE_DB


def test_a_frame_that_is_not_a_number_agrees_with_nothing():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]])
    assert agreeing_frames({"u": (0, 0, 0)}, {"u": logits}) == (1, 3)


SPECS = {
    name: (TensorSpec("features", (1, 4 * frames, 5), "float32", "", frame_ms=40), TensorSpec("length", (1,), "float32", ""))
    for name, frames in (("long", 8), ("short", 4))
}
OUTPUTS = {name: (TensorSpec("logits", (1, specs[0].shape[1] // 4, 2), "float32", ""),) for name, specs in SPECS.items()}


class Summing:
    """Answers with sums over each frame of the features; `leak` lets the padding in."""

    how = "run on this host"

    def __init__(self, leak: float = 0.0) -> None:
        self.leak, self.calls = leak, []

    def run(self, entry: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self.calls.append((entry, float(inputs["length"][0])))
        sums = inputs["features"][0].reshape(-1, 20).sum(axis=1)
        sums = sums + self.leak * inputs["features"][0, -1].sum()
        return {"logits": np.stack([sums, -sums], axis=1)[None]}


@pytest.fixture
def summing_artifact(tmp_path):
    return Artifact("t", tmp_path, "fp32", SPECS, OUTPUTS, "")


def a_golden(frames: int) -> Golden:
    features = np.random.default_rng(frames).standard_normal((frames * 4 + 3, 5)).astype(np.float32)
    sums = features[: frames * 4].astype(np.float64).reshape(-1, 20).sum(axis=1)
    return Golden("u", "", np.zeros(0, np.float32), features, np.stack([sums, -sums], axis=1))


def test_an_utterance_takes_the_shortest_entry_that_holds_it():
    assert [fitting(SPECS, features) for features in (1, 19, 20, 35, 36)] == ["short", "short", "long", "long", None]


def test_what_stands_behind_the_end_is_padding_and_the_answer_ends_there(summing_artifact):
    session, golden = Summing(), a_golden(3)
    logits = answer(session, summing_artifact, "short", golden.features)
    assert session.calls == [("short", 3.0)]
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(logits, golden.logits, rtol=1e-5)


def test_every_golden_vector_is_tried_in_every_entry_that_holds_it(summing_artifact):
    session = Summing()
    assert worst_snr_db(session, summing_artifact, summing_artifact.modes[0], [a_golden(3), a_golden(6)], noise=False) > 90
    assert session.calls == [("long", 3.0), ("short", 3.0), ("long", 6.0)]


def test_padding_that_leaks_into_valid_frames_is_found_when_it_is_loud(summing_artifact):
    session, goldens = Summing(leak=1e-3), [a_golden(3)]
    assert worst_snr_db(session, summing_artifact, summing_artifact.modes[0], goldens, noise=False) > 90
    assert worst_snr_db(session, summing_artifact, summing_artifact.modes[0], goldens, noise=True) < 60


@pytest.fixture
def louder(monkeypatch):
    """Every answer of the reference target is a thousandth too large: 60 dB."""
    from edgefuse_targets import reference

    opened = reference.open

    class Louder:
        how = "run on this host"

        def __init__(self, session):
            self.session = session

        def run(self, entry, inputs):
            return {name: array * np.float32(1.001) for name, array in self.session.run(entry, inputs).items()}

    monkeypatch.setattr(reference, "open", lambda artifact, threads=1: Louder(opened(artifact, threads)))


def test_a_bundle_verifies_from_itself_alone(whole_bundle, speech):
    verified = pipeline.verify(whole_bundle, speech=speech)
    assert verified.passed
    assert [e.verdict for e in verified.exports] == [e.verdict for e in store.read_bundle(whole_bundle).exports]


@pytest.mark.usefixtures("louder")
def test_a_bundle_that_answers_differently_fails_though_every_checksum_holds(whole_bundle, speech):
    verified = pipeline.verify(whole_bundle, speech=speech)
    assert not verified.passed
    assert [c.name for e in verified.exports for c in e.verdict.checks if not c.passed] == ["parity", "padding"]


def test_the_golden_vectors_are_what_the_float64_model_says(whole_bundle, whole_checkpoint):
    import torch

    from edgefuse import checkpoint as checkpoints

    encoder = checkpoints.encoder_of(checkpoints.read(whole_checkpoint), torch.float64)  # not folded: the fold is exact
    for golden in store.read_bundle(whole_bundle).references[OFFLINE].goldens:
        features = torch.from_numpy(golden.features)[None].double()
        logits, _ = encoder(features, torch.tensor([features.shape[1]]))
        assert snr_db(logits[0].detach().numpy(), golden.logits) > 200


def test_a_conformer_is_exported_with_its_norms_and_timed_as_a_baseline(whole_checkpoint, order, tmp_path):
    from tests.conftest import a_checkpoint
    from tests.spec.conftest import ONE_LAYER

    store.write_checkpoint(tmp_path / "conformer", a_checkpoint("layer", **ONE_LAYER))
    verified = pipeline.export(tmp_path / "conformer", tmp_path / "out", order)
    (export,) = verified.exports
    assert export.structure.normalizations
    assert verified.passed
    against = pipeline.export(whole_checkpoint, tmp_path / "new", dataclasses.replace(order, baseline=tmp_path / "conformer"))
    pace = against.paces["reference"][OFFLINE]
    assert pace.baseline_ratio is not None
    assert pace.baseline_ratio > 0
    assert not list(tmp_path.rglob("*baseline*"))


def test_several_lengths_in_half_precision_pass_with_their_own_bars(whole_checkpoint, order, tmp_path):
    several = dataclasses.replace(order, seconds=(3.0, 2.0), precision="fp16")
    verified = pipeline.export(whole_checkpoint, tmp_path / "out", several)
    (export,) = verified.exports
    assert list(export.artifact.inputs) == ["offline_2000ms", "offline_3000ms"]
    assert 40 <= export.findings[OFFLINE].snr_db < 90
    goldens = {golden.identity for golden in verified.bundle.references[OFFLINE].goldens}
    assert {"full_offline_2000ms", "full_offline_3000ms"} <= goldens


def test_whole_utterances_and_chunks_are_judged_apart_in_one_artifact(both, speech):
    (export,) = both.exports
    assert [mode.name for mode in export.artifact.modes] == ["offline", "stream_640ms"] == [*both.bundle.references]
    assert {"parity", "parity, stream_640ms"} <= {check.name for check in export.verdict.checks}
    assert set(both.paces["reference"]) == {"offline", "stream_640ms"}
    assert pipeline.verify(both.bundle.folder, speech=speech).passed


def test_chunks_answer_as_the_float64_model_does_with_a_mask_over_the_whole_recording(both):
    import torch

    from edgefuse import checkpoint as checkpoints
    from edgefuse.model import Context
    from tests.spec.conftest import FUSIONFORMER

    encoder = checkpoints.encoder_of(checkpoints.read(FUSIONFORMER), torch.float64)
    goldens = store.read_bundle(both.bundle.folder).references["stream_640ms"].goldens
    assert goldens[-1].identity == "full_stream_640ms"
    for golden in goldens:
        features = torch.from_numpy(golden.features)[None].double()
        logits, _ = encoder(features, torch.tensor([features.shape[1]]), Context(16, 32))
        assert snr_db(logits[0].detach().numpy(), golden.logits) > 200


def test_a_stream_that_forgets_its_past_fails(both, speech, monkeypatch):
    from edgefuse_targets import reference

    opened = reference.open

    class Forgetful:
        how = "run on this host"

        def __init__(self, session):
            self.session = session

        def run(self, entry, inputs):
            return {n: np.zeros_like(a) if n == "keys_0_next" else a for n, a in self.session.run(entry, inputs).items()}

    monkeypatch.setattr(reference, "open", lambda artifact, threads=1: Forgetful(opened(artifact, threads)))
    failing = [
        c.name for e in pipeline.verify(both.bundle.folder, speech=speech).exports for c in e.verdict.checks if not c.passed
    ]
    assert failing
    assert all(name.endswith("stream_640ms") for name in failing)


def test_a_bundle_that_hears_samples_is_held_against_kaldi_and_against_the_model(both_from_samples, speech):
    assert both_from_samples.bundle.hears == store.read_bundle(both_from_samples.bundle.folder).hears == "pcm"
    (export,) = pipeline.verify(both_from_samples.bundle.folder, speech=speech).exports
    assert export.verdict.passed
    assert {"front end", "front end, stream_640ms"} <= {check.name for check in export.verdict.checks}
    assert all(found.features_snr_db > 90 for found in export.findings.values())


def test_a_front_end_that_hears_something_else_fails(both_from_samples, speech, monkeypatch):
    from edgefuse_targets import reference

    opened = reference.open

    class Deafer:
        how = "run on this host"

        def __init__(self, session):
            self.session = session

        def run(self, entry, inputs):
            return {n: a * np.float32(1.002 if n == "features" else 1) for n, a in self.session.run(entry, inputs).items()}

    monkeypatch.setattr(reference, "open", lambda artifact, threads=1: Deafer(opened(artifact, threads)))
    (export,) = pipeline.verify(both_from_samples.bundle.folder, speech=speech).exports
    assert [c.name for c in export.verdict.checks if not c.passed] == ["front end", "front end, stream_640ms"]


def test_a_recording_that_is_longer_than_the_offline_entries_is_streamed(both, tmp_path):
    import soundfile

    from edgefuse.listen import listen

    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).standard_normal(48_000) / 10, 16_000)
    (heard,) = listen(both.exports[0].artifact.path, [tmp_path / "long.wav"])
    assert heard.seconds == 3.0


def test_the_shipped_test_set_is_whole():
    test_set = read_speech(shipped())
    assert len(test_set.utterances) == 60
    assert {u.subset for u in test_set.utterances} == {"seen", "unseen"}
    assert max(u.seconds for u in test_set.utterances) <= pipeline.SECONDS[0]


@pytest.fixture
def own_speech(speech, tmp_path):
    import shutil
    from pathlib import Path

    return Path(shutil.copytree(speech, tmp_path / "own"))


def spoil(folder, change):
    manifest = folder / "manifest.tsv"
    manifest.write_text(change(manifest.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("seconds", "minutes", 1), "does not begin with its columns"),
        (lambda text: text.splitlines()[0] + "\n", "names no utterance"),
        (lambda text: text + "one\tcolumn\n", "2 columns, not 7"),
        (lambda text: text + text.splitlines()[1] + "\n", "twice"),
        (lambda text: text.replace("flac/", "wav/", 1), "cannot be read"),
        (lambda text: text.replace(text.splitlines()[1].split("\t")[4], "long", 1), "no number of seconds"),
        (lambda text: text.replace(text.splitlines()[1].split("\t")[6], "0" * 64, 1), "has changed since"),
        (lambda _: "", "does not begin"),
    ],
)
def test_a_manifest_that_does_not_hold_what_it_says_is_refused(change, words, own_speech):
    spoil(own_speech, change)
    with pytest.raises(AudioError, match=words):
        read_speech(own_speech)


def test_speech_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(MissingFile, match=r"manifest\.tsv"):
        read_speech(tmp_path)


def test_speech_that_fits_nowhere_is_refused_before_anything_is_exported(whole_checkpoint, order, tmp_path):
    with pytest.raises(UsageError, match="No utterance"):
        pipeline.export(whole_checkpoint, tmp_path / "out", dataclasses.replace(order, seconds=(0.1,)))
    assert not (tmp_path / "out").exists()


def test_the_reference_target_needs_nothing_that_edgefuse_does_not():
    assert find("reference").missing() == []

"""A cascade on the road: one artifact with both passes, each judged, and a recognizer that lets the second one write the text."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from edgefuse import cli, store
from edgefuse.bench.feed import feed_of, judged
from edgefuse.checkpoint import encoder_of
from edgefuse.decode.endpoint import Endpointing
from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.search import Decoding, begin
from edgefuse.decode.spelling import words_of
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError
from edgefuse.fold import exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.listen import load
from edgefuse.lower import Chunks, StreamingGraph, program_of
from edgefuse.lower.held import HeldGraph
from edgefuse.lower.program import caches_of
from edgefuse.model import Context
from edgefuse.pipeline import Order, export, verify
from edgefuse.quantize.scheme import SCHEMES
from edgefuse.recognize import Stream, answers, heard_in
from edgefuse.recognizer import Recognizer
from edgefuse.speech import read_speech
from edgefuse.target import find
from edgefuse.values import ENCODED, Fold
from edgefuse.verify.wer import count_word_errors
from tests.conftest import a_checkpoint

CASCADE = {"layers": 3, "second_pass": 1}
CHUNKS = Chunks(640, 1280)
CONTEXT = Context(16, 32)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """On disk."""
    folder = tmp_path_factory.mktemp("cascade") / "checkpoint"
    store.write_checkpoint(folder, a_checkpoint(**CASCADE))
    return folder


@pytest.fixture(scope="module", params=["features", "pcm"])
def exported(request, cascade, speech, tmp_path_factory):
    order = Order(("reference",), seconds=(1.0, 2.0), chunks=(CHUNKS,), speech=speech, hears=request.param)
    return export(cascade, tmp_path_factory.mktemp("exported") / "bundle", order)


@pytest.fixture(scope="module")
def loaded(exported):
    return load(exported.exports[0].artifact.path)


@pytest.fixture(scope="module")
def recordings(speech):
    return sorted(speech.rglob("*.flac"))


@pytest.fixture(scope="module")
def exact():
    """The folded model in float64."""
    return encoder_of(fold(a_checkpoint(**CASCADE)).checkpoint, torch.float64)


def names_of(specs) -> list[str]:
    return [spec.name for spec in specs]


def wanted(exact, loaded, recording):
    """The model's first pass over a recording, in chunks, and its second pass over that; both (T, ...)."""
    features = torch.from_numpy(heard_in(recording, loaded.bundle.frontend).features)[None].double()
    with torch.no_grad():
        encoded, lengths = exact.encode(features, torch.tensor([features.shape[1]]), CONTEXT)
        return encoded[0].numpy(), exact.again(encoded, lengths)[0].numpy()


def test_a_cascade_that_streams_and_takes_whole_utterances_has_a_second_pass_for_each_length():
    checkpoint = a_checkpoint(**CASCADE)
    program = program_of(checkpoint, (1.0, 2.0), "fp32", [CHUNKS])
    assert [entry.name for entry in program.entries] == [
        *("offline_1000ms", "offline_2000ms"),
        "stream_640ms",
        *("second_1000ms", "second_2000ms"),
    ]
    assert [mode.name for mode in program.modes] == ["offline", "stream_640ms", "second_pass"]
    assert program.modes[2].after == program.streaming["stream_640ms"]
    second = program.entries[-1]
    assert [(spec.name, spec.shape, spec.frame_ms) for spec in second.inputs] == [(ENCODED, (1, 50, 16), 40), ("length", (1,), 0)]
    assert [mode.name for mode in program_of(checkpoint, (1.0,), "fp32").modes] == ["offline"]
    assert [mode.name for mode in program_of(checkpoint, (), "fp32", [CHUNKS]).modes] == ["stream_640ms"]
    plain = program_of(a_checkpoint(layers=3), (1.0,), "fp32", [CHUNKS])
    assert [mode.name for mode in plain.modes] == ["offline", "stream_640ms"]
    assert ENCODED not in names_of(plain.entries[1].outputs)


@pytest.mark.parametrize("hears", ["features", "pcm"])
@pytest.mark.parametrize("held", [False, True], ids=["explicit", "held"])
def test_what_the_second_pass_wants_is_the_second_output_of_a_stream(hears, held):
    (entry,) = program_of(a_checkpoint(**CASCADE), (), "fp32", [replace(CHUNKS, held=held)], hears).entries
    assert names_of(entry.outputs)[:2] == ["logits", ENCODED]
    assert len(names_of(entry.outputs)) - (hears == "pcm") - 2 == len(entry.inputs) - 2
    assert [tuple(each.shape) for each in entry.graph(*entry.example())] == [spec.shape for spec in entry.outputs]
    assert list(entry.streaming.states.values()) == names_of(entry.outputs)[2 + (hears == "pcm") :]


def test_a_held_stream_gives_what_one_with_explicit_caches_gives(exact):
    step = StreamingGraph(exact.float(), Context(4, 8)).eval()
    caches = caches_of(exact, 8)
    held = HeldGraph(step, caches[1:])
    past, explicit = torch.zeros(1), [torch.zeros(spec.shape) for spec in caches]
    for _ in range(3):
        features, length = torch.randn(1, 16, 80), torch.tensor([4.0])
        logits, encoded, *explicit = step(features, length, *explicit)
        got_logits, got_encoded, past = held(features, length, past)
        assert torch.equal(got_logits, logits)
        assert torch.equal(got_encoded, encoded)
        assert torch.equal(past, explicit[0])
    exact.double()


def test_every_pass_is_verified_and_the_second_one_hears_what_the_first_gives(exported, exact, loaded, recordings):
    assert exported.passed
    bundle = store.read_bundle(exported.bundle.folder)
    assert list(bundle.references) == ["offline", "stream_640ms", "second_pass"]
    named = {check.name for check in exported.exports[0].verdict.checks}
    assert {"parity, second_pass", "padding, second_pass", "tokens, second_pass", "WER, second_pass"} <= named
    assert ("front end, stream_640ms" in named) == (bundle.hears == "pcm")
    assert "front end, second_pass" not in named
    for name in ("stream_640ms", "second_pass"):
        golden = bundle.references[name].goldens[0]
        assert golden.encoded.dtype == np.float32
        assert golden.encoded.shape == (len(golden.logits), 16)
    assert bundle.references["offline"].goldens[0].encoded is None
    (recording,) = (each for each in recordings if each.stem in golden.identity or golden.identity in str(each))
    encoded, logits = wanted(exact, loaded, recording)
    np.testing.assert_allclose(golden.encoded, encoded, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(golden.logits, logits, rtol=1e-5, atol=1e-6)


def test_a_stream_whose_second_output_is_wrong_does_not_pass(exported, speech, monkeypatch):
    def wrong(self, heard, padding=None, run=Stream.run):
        given = run(self, heard, padding)
        return {**given, ENCODED: given[ENCODED] + 0.01} if ENCODED in given else given

    monkeypatch.setattr(Stream, "run", wrong)
    (found,) = verify(exported.bundle.folder, speech=speech).exports
    failed = {check.name for check in found.verdict.checks if not check.passed}
    assert {"parity, stream_640ms", "padding, stream_640ms"} <= failed
    assert not {"parity", "parity, second_pass"} & failed


def test_a_device_is_fed_what_the_first_pass_gives(exported):
    artifact, goldens = exported.exports[0].artifact, exported.bundle.references["second_pass"].goldens
    feed = feed_of(artifact, "second_2000ms", goldens)
    assert [call.utterance for call in feed] == [golden.identity for golden in goldens]
    for call, golden in zip(feed, goldens, strict=True):
        np.testing.assert_array_equal(call.inputs[ENCODED][0, : call.frames], golden.encoded)
        assert call.inputs["length"] == [call.frames]
    right = [np.zeros((50, golden.logits.shape[1]), np.float32) for golden in goldens]
    for answer, golden in zip(right, goldens, strict=True):
        answer[: len(golden.logits)] = golden.logits
    assert judged(feed, right, goldens)[0] > 100


def test_all_entries_share_their_weights(tmp_path):
    folded = fold(a_checkpoint(**CASCADE, feed_forward=4096)).checkpoint
    sizes = [
        store.size_bytes(find("reference").export(program_of(folded, (1.0,), "fp32", chunks), tmp_path, f"m{len(chunks)}").path)
        for chunks in ((), [CHUNKS])
    ]
    weights = sum(tensor.numel() for tensor in folded.weights.values()) * 4
    assert sizes[0] > weights
    assert sizes[1] - sizes[0] < weights / 4


def heard(loaded, samples, piece=4000, **how):
    recognizer = Recognizer(loaded, second_pass=True, **how)
    partial = [recognizer.accept(samples[start : start + piece]) for start in range(0, len(samples), piece)]
    return recognizer, partial, recognizer.finish()


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(beam=4)], ids=["greedy", "beam"])
def test_the_second_pass_writes_the_words_and_their_times_when_the_utterance_is_over(exact, loaded, recordings, decoding):
    samples = soundfile.read(recordings[0], dtype="float32")[0]
    recognizer, partial, text = heard(loaded, samples, decoding=decoding)
    first = Recognizer(loaded, decoding)
    first.accept(samples)
    assert partial[-1] == first.text
    _, logits = wanted(exact, loaded, recordings[0])
    tokens = Tokens(loaded.bundle.tokens)
    words = words_of(begin(decoding, tokens).accept(logits).best, tokens)
    assert words
    assert recognizer.words == words
    assert text == recognizer.text != first.finish()
    (said,) = recognizer.said
    assert (said.words, said.second_pass) == (words, True)
    assert not first.said[0].second_pass


def test_every_utterance_of_a_recording_is_heard_again_with_its_own_frames_alone(loaded, recordings):
    samples = soundfile.read(recordings[0], dtype="float32")[0]
    recognizer, _, _ = heard(loaded, np.tile(samples, 4), endpointing=Endpointing(longest_ms=1000))
    assert len(recognizer.said) > 2
    assert all(said.second_pass for said in recognizer.said)
    given = answers(loaded.session, loaded.artifact, "stream_640ms", samples_or_features(loaded, recordings[0]))[ENCODED][:25]
    logits = Stream(loaded.session, loaded.artifact, "second_1000ms").accept(given)
    assert recognizer.said[0].text == greedy_text(logits, Tokens(loaded.bundle.tokens))


def samples_or_features(loaded, recording):
    spoken = heard_in(recording, loaded.bundle.frontend)
    return spoken.samples if loaded.bundle.hears == "pcm" else spoken.features


def test_an_utterance_that_is_too_long_for_the_second_pass_keeps_the_words_of_the_first(loaded, recordings, capsys, tmp_path):
    samples = np.tile(soundfile.read(recordings[0], dtype="float32")[0], 3)
    recognizer, partial, text = heard(loaded, samples)
    first = Recognizer(loaded)
    first.accept(samples)
    assert partial[-1]
    assert text == first.finish()
    assert [said.second_pass for said in recognizer.said] == [False]
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    assert cli.run(["transcribe", str(loaded.artifact.path), str(tmp_path / "long.wav"), "--stream", "--second-pass"]) == 0
    said = capsys.readouterr()
    assert text in said.out
    assert "longer than the second pass takes" in said.err


def test_transcribe_shows_the_first_pass_as_it_forms_and_prints_the_second(loaded, recordings, capsys):
    samples = soundfile.read(recordings[0], dtype="float32")[0]
    _, _, text = heard(loaded, samples)
    command = ["transcribe", str(loaded.artifact.path), str(recordings[0]), "--stream", "--second-pass"]
    assert cli.run(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == text
    assert said.err.splitlines()[0] != text
    assert cli.run([*command, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["text"] == text
    assert [each["second_pass"] for each in told["utterances"]] == [True]


def test_a_test_set_is_evaluated_behind_the_second_pass_as_a_speaker_is_heard(loaded, speech, monkeypatch, capsys):
    compared = []
    monkeypatch.setattr("edgefuse.evaluate.units", lambda references, texts: compared.append(texts) or (references, texts))
    command = ["evaluate", str(loaded.artifact.path), "--speech", str(speech), "--stream"]
    assert cli.run(command) == cli.run([*command, "--second-pass"]) == 0
    first, second = compared
    spoken = read_speech(speech).utterances
    texts = [heard(loaded, soundfile.read(each.path, dtype="float32")[0])[2] for each in spoken]
    assert second == texts != first
    assert f"{count_word_errors([each.text for each in spoken], texts).wer_percent:.2f} %" in capsys.readouterr().out


def test_a_second_pass_is_for_streams_and_for_cascades(loaded, both, recordings, capsys):
    assert cli.run(["transcribe", str(loaded.artifact.path), str(recordings[0]), "--second-pass"]) == UsageError.exit_code
    assert "heard by both passes of a cascade anyway" in capsys.readouterr().err
    path = both.exports[0].artifact.path
    assert cli.run(["evaluate", str(path), "--speech", "ANY", "--second-pass"]) == UsageError.exit_code
    assert "heard by both passes of a cascade anyway" in capsys.readouterr().err
    assert cli.run(["transcribe", str(path), str(recordings[0]), "--stream", "--second-pass"]) == UsageError.exit_code
    told = capsys.readouterr().err
    assert "has no second pass behind a stream" in told
    assert "--chunk-ms 640 --seconds 5.12" in told


@pytest.mark.parametrize("precision", ["int8", "int4-weights"])
def test_a_cascade_is_not_quantized_and_says_so(cascade, speech, calibration, tmp_path, precision):
    order = Order(("reference",), SCHEMES[precision], (2.0,), (CHUNKS,), speech=speech, calibration=calibration)
    with pytest.raises(UsageError, match="a cascade is two"):
        export(cascade, tmp_path / "bundle", order)


def test_both_heads_of_a_cascade_fold_exactly():
    checkpoint = a_checkpoint(**CASCADE, norm_residual="output")
    folded = fold(checkpoint)
    sites = {site.site: site.into for site in folded.plan if isinstance(site, Fold)}
    assert sites["norm"] == ("ctc",)
    assert sites["second_norm"] == ("second_ctc",)
    error = exactness(checkpoint, folded, *probe(80))
    assert max(error.worst_site, error.end_to_end) < 1e-10
    before, after = encoder_of(checkpoint, torch.float64), encoder_of(folded.checkpoint, torch.float64)
    features, length = torch.randn(1, 80, 80).double(), torch.tensor([80])
    for context in (Context(), Context(4, 8)):
        for one, other in zip(before.answers(features, length, context), after.answers(features, length, context), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)

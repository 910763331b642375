"""The recognizer: speech in pieces of any size, partial texts, and utterances that know nothing of each other."""

import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from edgefuse import cli
from edgefuse.checkpoint import encoder_of, read
from edgefuse.decode.endpoint import Endpointing
from edgefuse.decode.search import Decoding
from edgefuse.errors import AudioError, AudioNotFinite, BadHotwords, UsageError
from edgefuse.listen import follow, load
from edgefuse.recognize import Stream, heard_in
from edgefuse.recognizer import Recognizer
from edgefuse.verify.reference import context_of, logits_of
from tests.spec.conftest import FUSIONFORMER


@pytest.fixture(scope="module")
def hears_features(both):
    return load(both.exports[0].artifact.path)


@pytest.fixture(scope="module", params=["both", "both_from_samples", "looking_ahead"])
def loaded(request):
    return load(request.getfixturevalue(request.param).exports[0].artifact.path)


@pytest.fixture(scope="module")
def recordings(speech):
    return sorted(speech.rglob("*.flac"))


@pytest.fixture(scope="module")
def spoken(recordings):
    """The samples of each recording."""
    return [soundfile.read(path, dtype="float32")[0] for path in recordings]


def alone(loaded, samples) -> str:
    recognizer = Recognizer(loaded)
    recognizer.accept(samples)
    return recognizer.finish()


@pytest.mark.parametrize("piece", [37, 160, 1000, 2560, 100_000])
def test_the_size_of_the_pieces_does_not_matter(loaded, spoken, piece):
    recognizer = Recognizer(loaded)
    for start in range(0, len(spoken[0]), piece):
        recognizer.accept(spoken[0][start : start + piece])
    assert recognizer.finish() == alone(loaded, spoken[0])


def test_live_text_is_that_of_the_features_of_the_whole_recording(loaded, recordings, spoken):
    from edgefuse.decode.greedy import greedy_text
    from edgefuse.decode.tokens import Tokens

    heard = heard_in(recordings[0], loaded.bundle.frontend)
    mode = next(mode for mode in loaded.artifact.modes if mode.streaming)
    logits = logits_of(encoder_of(read(FUSIONFORMER)), heard.features, context_of(mode))
    text = alone(loaded, spoken[0])
    assert text
    assert text == greedy_text(logits, Tokens(loaded.bundle.tokens))


def test_partial_texts_grow_into_the_final_one(loaded, spoken):
    recognizer = Recognizer(loaded)
    hop = recognizer.chunk_samples
    partial = [recognizer.accept(spoken[0][start : start + hop]) for start in range(0, len(spoken[0]), hop)]
    final = recognizer.finish()
    assert len({*partial, final}) > 2
    assert all(final.startswith(text) for text in partial)
    assert len(recognizer.latency_ns) == -(-len(spoken[0]) // hop)


def test_utterances_at_once_and_one_after_another_know_nothing_of_each_other(loaded, spoken):
    wanted = [alone(loaded, samples) for samples in spoken[:2]]
    together = [Recognizer(loaded), Recognizer(loaded)]
    for start in range(0, max(map(len, spoken[:2])), 4000):
        for recognizer, samples in zip(together, spoken, strict=False):
            recognizer.accept(samples[start : start + 4000])
    assert [recognizer.finish() for recognizer in together] == wanted
    again = together[0]
    again.reset()
    again.accept(spoken[1])
    assert again.finish() == wanted[1]


def test_samples_of_sixteen_bits_are_heard_as_well(loaded, spoken):
    assert alone(loaded, (spoken[0] * 32_768).astype(np.int16)) == alone(loaded, spoken[0])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (np.full(100, np.nan, np.float32), AudioNotFinite),
        (np.full(100, np.inf, np.float32), AudioNotFinite),
        (np.zeros((2, 100), np.float32), AudioError),
        (np.zeros(100, np.float64), AudioError),
        ([0.0, 0.1], AudioError),
    ],
    ids=["nan", "infinite", "stereo", "float64", "a list"],
)
def test_samples_that_are_none_leave_the_utterance_as_it_was(loaded, spoken, wrong, error):
    recognizer = Recognizer(loaded)
    recognizer.accept(spoken[0][:5000])
    with pytest.raises(error):
        recognizer.accept(wrong)
    recognizer.accept(spoken[0][5000:])
    assert recognizer.finish() == alone(loaded, spoken[0])


def test_a_finished_utterance_hears_nothing_more(loaded, spoken):
    recognizer = Recognizer(loaded)
    recognizer.accept(spoken[0])
    text = recognizer.finish()
    with pytest.raises(UsageError, match="finished"):
        recognizer.finish()
    with pytest.raises(UsageError, match="finished"):
        recognizer.accept(spoken[0])
    assert recognizer.text == text


def test_silence_shorter_than_a_frame_is_no_text(loaded):
    recognizer = Recognizer(loaded)
    assert recognizer.accept(np.zeros(100, np.float32)) == ""
    assert recognizer.finish() == ""


def test_an_artifact_for_whole_utterances_cannot_be_streamed(whole_bundle):
    with pytest.raises(UsageError, match="whole utterances only"):
        Recognizer(load(whole_bundle / "model.safetensors"))


def test_transcribe_shows_the_text_as_it_forms_and_what_a_chunk_costs(both, recordings, capsys):
    assert cli.run(["transcribe", str(both.exports[0].artifact.path), str(recordings[0]), "--stream"]) == 0
    out, err = capsys.readouterr()
    partial = err.splitlines()
    assert partial
    assert out.startswith(partial[-1])
    assert "real-time factor" in out
    assert "p99" in out


def wrong(inputs, **changes):
    return {name: value for name, value in {**inputs, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keys_0": np.zeros((1, 31, 144), np.float32)}, r"keys_0 is float32 of shape \(1, 31, 144\), not .*\(1, 32, 144\)"),
        ({"values_1": np.zeros((1, 32, 144))}, "values_1 is float64"),
        ({"past": None}, "past is missing"),
        ({"futures": np.zeros(1, np.float32)}, "futures is not an input"),
        ({"history": np.full((1, 3, 80), np.nan, np.float32)}, "history has values that are NaN"),
        ({"features": np.zeros((1, 60, 80), np.float32)}, r"features is float32 of shape \(1, 60, 80\)"),
    ],
)
def test_a_chunk_or_a_cache_that_is_none_is_refused_in_words(hears_features, changes, told):
    right = {spec.name: np.zeros(spec.shape, np.float32) for spec in hears_features.artifact.inputs["stream_640ms"]}
    hears_features.session.run("stream_640ms", right)
    with pytest.raises(UsageError, match=told):
        hears_features.session.run("stream_640ms", wrong(right, **changes))
    with pytest.raises(UsageError, match="has no entry 'stream_320ms'"):
        hears_features.session.run("stream_320ms", right)


def test_what_goes_wrong_for_one_speaker_is_nothing_to_another(loaded, spoken):
    other, hop = Recognizer(loaded), Recognizer(loaded).chunk_samples
    for start in range(0, len(spoken[0]), hop):
        other.accept(spoken[0][start : start + hop])
        with pytest.raises(AudioNotFinite):
            Recognizer(loaded).accept(np.full(hop, np.nan, np.float32))
    assert other.finish() == alone(loaded, spoken[0])


def test_a_stream_takes_no_more_than_a_chunk_and_nothing_behind_its_end(hears_features):
    stream = Stream(hears_features.session, hears_features.artifact, "stream_640ms")
    with pytest.raises(UsageError, match=r"up to \(64, 80\), not \(68, 80\)"):
        stream.accept(np.zeros((68, 80), np.float32))
    assert len(stream.accept(np.zeros((64, 80), np.float32))) == 16
    assert len(stream.accept(np.zeros((8, 80), np.float32))) == 2
    with pytest.raises(UsageError, match="has ended"):
        stream.accept(np.zeros((64, 80), np.float32))


HOTWORDS = {"kitchen": 0.5, "bob": 0.5}
SEARCHES = [Decoding(), Decoding(4), Decoding(4, HOTWORDS)]
ENDED = Endpointing(silence_ms=600, nothing_ms=1000)
RATE_HZ = 16_000


def silence(seconds: float) -> np.ndarray:
    """The noise of a quiet room."""
    return (np.random.default_rng(0).normal(size=int(seconds * RATE_HZ)) * 1e-4).astype(np.float32)


@pytest.fixture(scope="module")
def conversation(spoken):
    """Two utterances, pauses around them, the second one longer than nothing may last."""
    return np.concatenate([silence(0.5), spoken[0], silence(3.0), spoken[1], silence(0.3)])


def heard(loaded, samples, piece=RATE_HZ, decoding=SEARCHES[0], endpointing=None):
    recognizer = Recognizer(loaded, decoding, endpointing)
    for start in range(0, len(samples), piece):
        recognizer.accept(samples[start : start + piece])
    recognizer.finish()
    return recognizer.said


@pytest.mark.parametrize("decoding", SEARCHES, ids=["greedy", "beam", "hotwords"])
def test_with_any_search_the_size_of_the_pieces_does_not_matter(loaded, conversation, decoding):
    whole = heard(loaded, conversation, len(conversation), decoding, ENDED)
    assert len(whole) == 2
    assert all(heard(loaded, conversation, piece, decoding, ENDED) == whole for piece in (999, 10_240))


def test_an_utterance_ends_after_silence_and_the_next_one_has_no_trace_of_it(loaded, conversation, spoken):
    said = heard(loaded, conversation, endpointing=ENDED)
    assert len(said) == 2
    begins_s = said[1].words[0].start_s
    assert (len(spoken[0]) / RATE_HZ + 3.0) < begins_s < len(conversation) / RATE_HZ
    one_by_one = Recognizer(loaded, endpointing=ENDED)
    one_by_one.accept(conversation)
    one_by_one.reset()
    one_by_one.accept(conversation)
    one_by_one.finish()
    assert one_by_one.said == said


def test_the_utterance_after_an_endpoint_is_heard_as_if_the_recording_began_there(loaded, conversation):
    recognizer = Recognizer(loaded, endpointing=ENDED)
    begins = set()
    for start in range(0, len(conversation), 640):
        recognizer.accept(conversation[start : start + 640])
        begins.add(recognizer._first_frame)
    recognizer.finish()
    assert len(begins) > 2
    rest = heard(loaded, conversation[max(begins) * 640 :], endpointing=ENDED)
    (last,) = rest
    assert last.text == recognizer.said[-1].text
    shift_s = max(begins) * 0.04
    assert [word.start_s + shift_s for word in last.words] == pytest.approx([w.start_s for w in recognizer.said[-1].words])


def test_no_sample_is_lost_between_utterances(loaded, conversation, monkeypatch):
    """Every feature frame is answered for in exactly one utterance."""
    taken = []
    keep = Recognizer._begin

    def counting(self, first_frame):
        taken.append(first_frame)
        keep(self, first_frame)

    monkeypatch.setattr(Recognizer, "_begin", counting)
    recognizer = Recognizer(loaded, endpointing=ENDED)
    taken.clear()
    recognizer.reset()
    recognizer.accept(conversation)
    recognizer.finish()
    feature_frames = 1 + (len(conversation) - 400) // 160
    assert recognizer._first_frame + recognizer._frames == feature_frames // 4
    assert taken == sorted(set(taken))


def test_silence_alone_is_no_utterance(loaded):
    assert heard(loaded, silence(4.0), endpointing=ENDED) == ()
    assert heard(loaded, silence(4.0)) == ()


def test_the_longest_utterance_is_cut_but_what_is_said_in_it_is_not_lost(loaded, spoken):
    short = Endpointing(silence_ms=float("inf"), nothing_ms=float("inf"), longest_ms=800)
    said = heard(loaded, np.concatenate([spoken[0], spoken[0]]), endpointing=short)
    assert len(said) > 1
    assert all(each.words[-1].end_s - each.words[0].start_s <= 0.8 for each in said)


@pytest.mark.parametrize(
    ("frames", "blanks", "over"),
    [(100, 14, False), (100, 15, True), (20, 20, False), (25, 25, True), (250, 0, True), (249, 0, False)],
    ids=["a pause", "silence", "not yet a word", "never a word", "too long", "long"],
)
def test_an_utterance_is_over_by_one_of_three_rules(frames, blanks, over):
    assert Endpointing(silence_ms=600, nothing_ms=1000, longest_ms=10_000).over(frames, blanks) is over


@pytest.mark.parametrize("nonsense", [0, -1, float("nan")])
def test_silence_of_no_length_ends_nothing(nonsense):
    with pytest.raises(UsageError, match="after no time"):
        Endpointing(nonsense)


def test_words_come_in_order_and_within_the_recording(loaded, spoken):
    for decoding in SEARCHES:
        (said,) = heard(loaded, spoken[0], decoding=decoding)
        times = [time for word in said.words for time in (word.start_s, word.end_s)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= len(spoken[0]) / RATE_HZ


def test_a_wrong_piece_leaves_the_search_of_everyone_as_it_was(loaded, spoken):
    one, other = (Recognizer(loaded, SEARCHES[2], ENDED) for _ in range(2))
    one.accept(spoken[0][:12_000])
    other.accept(spoken[0][:12_000])
    with pytest.raises(AudioNotFinite):
        one.accept(np.full(100, np.nan, np.float32))
    with pytest.raises(BadHotwords):
        Recognizer(loaded, Decoding(4, {"123": 1.0}))
    for recognizer in (one, other):
        recognizer.accept(spoken[0][12_000:])
        recognizer.finish()
    assert one.said == other.said == heard(loaded, spoken[0], decoding=SEARCHES[2], endpointing=ENDED)


def test_hotwords_without_a_beam_and_beams_without_a_width_are_refused():
    with pytest.raises(UsageError, match="Greedy search does not listen"):
        Decoding(hotwords=HOTWORDS)
    with pytest.raises(UsageError, match="beam of 0"):
        Decoding(0)


def test_following_blocks_tells_what_is_new_and_each_utterance_once(loaded, conversation):
    told, ended = [], []
    recognizer = Recognizer(loaded, endpointing=ENDED)
    follow(recognizer, iter(np.array_split(conversation, 60)), told.append, ended.append)
    assert tuple(ended) == recognizer.said
    assert len(ended) == 2
    assert all(one != two for one, two in pairwise(told))
    assert "" not in told
    assert all(any(each.text.startswith(text) for each in ended) for text in told)


def test_transcribe_prints_a_line_for_each_utterance_and_the_times_of_its_words(both, conversation, tmp_path, capsys):
    soundfile.write(tmp_path / "talk.wav", conversation, RATE_HZ)
    artifact, recording = str(both.exports[0].artifact.path), str(tmp_path / "talk.wav")
    command = ["transcribe", artifact, recording, "--stream", "--endpoint-silence-ms", "600", "--timestamps"]
    assert cli.run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cli.run([*command, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert len(told["utterances"]) == 2
    for each in told["utterances"]:
        line = lines.index(each["text"])
        words = each["words"]
        below = [row.split() for row in lines[line + 1 : line + 1 + len(words)]]
        assert below == [[f"{word['start_s']:.2f}", f"{word['end_s']:.2f}", word["text"]] for word in words]


@pytest.mark.parametrize("live", [(), ("--stream",)], ids=["whole", "stream"])
def test_transcribe_takes_a_beam_and_a_file_of_hotwords(both, recordings, tmp_path, capsys, live):
    hotword = "where is pete"  # of "where is peter": heard only where it is wished for
    command = ["transcribe", str(both.exports[0].artifact.path), str(recordings[1]), *live]
    (tmp_path / "words.txt").write_text(f"{hotword}\t2\n")
    assert cli.run([*command, "--beam", "8"]) == 0
    without = capsys.readouterr().out
    assert cli.run([*command, "--hotwords", str(tmp_path / "words.txt")]) == 0
    assert without.splitlines()[0] != hotword
    assert capsys.readouterr().out.splitlines()[0] == hotword

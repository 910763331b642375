"""The recognizer: speech in pieces of any size, partial texts, and utterances that know nothing of each other."""

import numpy as np
import pytest
import soundfile

from edgefuse import cli
from edgefuse.errors import AudioError, AudioNotFinite, UsageError
from edgefuse.listen import load
from edgefuse.recognize import answer, heard_in
from edgefuse.recognizer import Recognizer


@pytest.fixture(scope="module", params=["both", "both_from_samples"])
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


def test_live_text_is_that_of_the_features_of_the_whole_recording(both, loaded, recordings, spoken):
    from edgefuse.decode.greedy import greedy_text
    from edgefuse.decode.tokens import Tokens

    heard = heard_in(recordings[0], loaded.bundle.frontend)
    features = load(both.exports[0].artifact.path)
    logits = answer(features.session, features.artifact, "stream_640ms", heard.features)
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

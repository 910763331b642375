"""Corpora are read as they lie on the disk: unpacked, in Lhotse's manifests, or as cuts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse.recipes import prepare_aishell, prepare_librispeech

from edgefuse.decode.spaceless import is_spaceless, plain, units
from edgefuse.decode.tokens import character_tokens
from edgefuse.errors import AudioError, EmptyAudio, MissingFile, NoSpace, WrongSampleRate
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.speech import read_speech, shipped
from edgefuse.train import features
from edgefuse.train.batches import trainable
from edgefuse.train.corpora import open_corpus
from edgefuse.train.features import cut_features, open_or_compute
from edgefuse.train.pieces import characters_in, characters_of, learn_tokens
from edgefuse.train.speech import open_speech
from edgefuse.train.train import train
from edgefuse.verify.wer import count_word_errors
from tests.spec.test_training import QUICK, SMALL, one_thread, tones, write_corpus

__all__ = ["one_thread"]  # a fixture
LIBRISPEECH = {"train-clean-100": 3, "train-other-500": 2, "dev-clean": 2, "dev-other": 1, "test-clean": 2, "test-other": 1}
CHINESE = {"train": ["打开 厨房 的 灯", "今天 天气", "打开 T恤 灯"], "dev": ["打开 灯"], "test": ["今天 的 天气 很 好"]}


def librispeech(folder: Path) -> Path:
    """The layout of LibriSpeech, of the shipped speech."""
    spoken = iter(read_speech(shipped()).utterances)
    for number, (part, count) in enumerate(LIBRISPEECH.items()):
        chapter = folder / "LibriSpeech" / part / str(100 + number) / "7"
        chapter.mkdir(parents=True)
        lines = []
        for place in range(count):
            said = next(spoken)
            identity = f"{100 + number}-7-{place:04}"
            samples, rate = soundfile.read(said.path)
            soundfile.write(chapter / f"{identity}.flac", samples, rate)
            lines.append(f"{identity} {said.text.upper()}\n")
        (chapter / f"{100 + number}-7.trans.txt").write_text("".join(lines))
    return folder / "LibriSpeech"


def aishell(folder: Path) -> Path:
    """The layout of AISHELL: tones, and Chinese beside them."""
    root, lines = folder / "data_aishell", []
    for part, texts in CHINESE.items():
        (root / "wav" / part / "S0001").mkdir(parents=True)
        for place, text in enumerate(texts):
            identity = f"BAC009S0001{part}{place}"
            soundfile.write(root / "wav" / part / "S0001" / f"{identity}.wav", tones("abcdefghij"[: 4 + 2 * place]), 16_000)
            lines.append(f"{identity} {text}\n")
    (root / "transcript").mkdir()
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(lines), encoding="utf-8")
    return folder


# --- layouts


@pytest.mark.parametrize("named", ["LibriSpeech", "."])
def test_unpacked_librispeech_is_read_as_it_is(tmp_path, named):
    inside = librispeech(tmp_path)
    corpus = open_corpus(tmp_path / named, tmp_path / "features")
    assert corpus.tests == ("test-clean", "test-other")
    counts = {name: len(corpus.cuts(name)) for name in corpus.sets}
    assert counts == {"train": 5, "dev": 3, "test-clean": 2, "test-other": 1}
    texts = {cut.id: cut.supervisions[0].text for cut in corpus.cuts("train")}
    written = dict(line.split(" ", 1) for path in inside.glob("train*/*/*/*.txt") for line in path.read_text().splitlines())
    assert texts == {identity: text.lower() for identity, text in written.items()}
    assert all(set(text) <= set(" '") | set(map(chr, range(97, 123))) for text in texts.values())


def test_manifests_are_prepared_once(tmp_path):
    inside = librispeech(tmp_path)
    before = [cut.id for cut in open_corpus(inside, tmp_path / "work").cuts("train")]
    for path in inside.rglob("*.trans.txt"):
        path.unlink()
    assert [cut.id for cut in open_corpus(inside, tmp_path / "work").cuts("train")] == before


@pytest.mark.parametrize(("make", "prepare"), [(librispeech, prepare_librispeech), (aishell, prepare_aishell)])
def test_lhotses_own_manifests_are_what_the_unpacked_corpus_is(tmp_path, make, prepare):
    folder = make(tmp_path)
    prepare(folder, output_dir=tmp_path / "manifests")
    given, own = open_corpus(tmp_path / "manifests", tmp_path), open_corpus(folder, tmp_path / "work")
    assert given.tests == own.tests
    assert given.sets.keys() == own.sets.keys()
    for name in own.sets:
        here, there = ({cut.id: cut for cut in each.cuts(name)} for each in (given, own))
        assert here.keys() == there.keys()
        for identity, cut in here.items():
            assert cut.supervisions[0].text == there[identity].supervisions[0].text
            assert torch.equal(cut_features(cut), cut_features(there[identity]))


def test_manifests_with_relative_paths_find_their_audio_in_the_corpus(tmp_path, monkeypatch):
    librispeech(tmp_path)
    monkeypatch.chdir(tmp_path)
    prepare_librispeech(Path("LibriSpeech"), output_dir=tmp_path)
    here = len(cut_features(next(iter(open_corpus(tmp_path, tmp_path).cuts("test-other")))))
    monkeypatch.chdir("/")
    assert len(cut_features(next(iter(open_corpus(tmp_path, tmp_path).cuts("test-other"))))) == here > 0
    for path in tmp_path.rglob("*.flac"):
        path.unlink()
    with pytest.raises(MissingFile, match="which the manifests in"):
        open_corpus(tmp_path, tmp_path).cuts("test-other")


def test_chinese_is_learnt_in_its_own_characters_and_without_spaces(tmp_path):
    heard = open_speech(aishell(tmp_path))
    corpus = heard.load("train")
    texts = [stored.text for stored in corpus.store.utterances.values()]
    assert sorted(texts) == sorted(["打开厨房的灯", "今天天气", "打开t恤灯"])
    tokens = learn_tokens(texts, 512)
    assert set(tokens.symbols) == {"<blk>", "▁", *"".join(texts)}
    kept, left_out = trainable(corpus.cuts, corpus.store, tokens, SMALL)
    assert (len(kept), left_out) == (3, {})
    unseen = heard.load("test")
    assert trainable(unseen.cuts, unseen.store, tokens, SMALL)[1] == {"with characters that are no tokens": 1}
    (batch,) = unseen.batches(tokens, 100.0, learnt=False)
    assert batch.texts == ("今天的天气很好",)


def test_a_chinese_corpus_is_trained_on_and_its_characters_are_counted(tmp_path):
    trained = train(aishell(tmp_path), tmp_path / "run", replace(QUICK, epochs=1, vocabulary_size=512), precision="fp32")
    assert trained is not None
    assert trained.characters
    assert trained.errors["test"].words == len("今天的天气很好")
    assert trained.errors.keys() >= {"test", "test, 640 ms"}


def test_librispeech_is_trained_on_and_told_by_test(tmp_path):
    recipe = replace(QUICK, epochs=1, epoch_batches=1, batch_seconds=30.0)
    trained = train(librispeech(tmp_path), tmp_path / "run", recipe, precision="fp32", features=tmp_path / "features")
    assert trained is not None
    assert not trained.characters
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["errors"]
    assert {"test-clean", "test-other", "test-clean, 640 ms"} <= told.keys()


def test_without_a_test_each_development_part_is_one(tmp_path):
    inside = librispeech(tmp_path)
    for part in ("test-clean", "test-other"):
        (inside / part).rename(tmp_path / part)
    assert open_corpus(inside, tmp_path / "work").tests == ("dev-clean", "dev-other")


# --- what is no corpus


def test_a_folder_in_no_layout_is_told_which_there_are(tmp_path):
    with pytest.raises(MissingFile, match="is no corpus") as told:
        open_corpus(tmp_path, tmp_path / "work")
    assert "LibriSpeech" in str(told.value.hint)


def test_a_corpus_without_a_development_set_says_what_it_has(tmp_path):
    inside = librispeech(tmp_path)
    for part in ("dev-clean", "dev-other"):
        (inside / part).rename(tmp_path / part)
    with pytest.raises(MissingFile, match="no set to develop on") as told:
        open_corpus(inside, tmp_path / "work")
    assert "train, test-clean, test-other" in str(told.value.hint)


def test_archives_that_were_not_unpacked_are_told(tmp_path):
    for path in aishell(tmp_path).rglob("*.wav"):
        path.unlink()
    with pytest.raises((EmptyAudio, MissingFile), match=r"no recordings|not a whole corpus"):
        open_corpus(tmp_path, tmp_path / "work")
    assert not list((tmp_path / "work").glob("manifests*"))


# --- features


def test_a_corpus_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    write_corpus(tmp_path, "train", ["abc", "bad"])
    write_corpus(tmp_path, "dev", ["abc"])
    disk = type("Disk", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(NoSpace, match="GB left"):
        open_speech(tmp_path).load("train")
    assert not list((tmp_path / "features").glob("*"))


def test_a_recording_at_another_rate_is_refused(tmp_path):
    write_corpus(tmp_path, "train", ["abc"])
    write_corpus(tmp_path, "dev", ["abc"])
    soundfile.write(tmp_path / "train-0.flac", np.zeros(8000, dtype=np.float32), 8000)
    cuts = open_corpus(tmp_path, tmp_path).cuts("train")
    for cut in cuts:
        cut.recording.sampling_rate = 8000
    with pytest.raises(WrongSampleRate, match="8000 Hz"):
        open_or_compute(cuts, tmp_path / "features" / "train")
    assert issubclass(WrongSampleRate, AudioError)


def test_audio_is_read_a_few_utterances_ahead_and_no_more(tmp_path, monkeypatch):
    write_corpus(tmp_path, "train", ["abc"] * 9)
    write_corpus(tmp_path, "dev", ["abc"])
    monkeypatch.setattr(features, "AHEAD", 2)
    begun = []
    monkeypatch.setattr(features, "cut_features", lambda cut: begun.append(cut.id) or cut_features(cut))
    ahead = features._ahead(open_corpus(tmp_path, tmp_path).cuts("train"))
    first = next(ahead)
    assert first.shape == (KALDI_80.frames(3 * 2560), 80)
    assert len(begun) <= 2
    assert sum(1 for _ in ahead) == 8


def test_utterances_are_left_out_for_a_reason(tmp_path):
    write_corpus(tmp_path, "train", ["abc", "a", "bad cab", "dad"])
    write_corpus(tmp_path, "dev", ["abc"])
    spoken = open_speech(tmp_path).load("train")
    said = {"train-0": "abc", "train-1": "abcdefghijklmnop", "train-2": " ", "train-3": "d4d"}
    told = {name: replace(stored, text=said[name]) for name, stored in spoken.store.utterances.items()}
    store = replace(spoken.store, utterances=told)
    kept, left_out = trainable(spoken.cuts, store, character_tokens(), SMALL)
    assert [cut.id for cut in kept] == ["train-0"]
    assert left_out == {"too short for their text": 1, "without a word": 1, "with characters that are no tokens": 1}
    short = replace(SMALL, max_frames=100)
    long = {name: replace(stored, count=401, text="abc") for name, stored in told.items()}
    assert trainable(spoken.cuts, replace(store, utterances=long), character_tokens(), short)[1] == {}
    longer = {name: replace(stored, count=404) for name, stored in long.items()}
    assert trainable(spoken.cuts, replace(store, utterances=longer), character_tokens(), short)[1] == {
        "longer than 100 encoder frames": 4
    }


# --- spelling


@pytest.mark.parametrize(
    ("written", "learnt"),
    [
        ("HELLO  WORLD", "hello world"),
        ("打开 T恤 的", "打开t恤的"),
        ("\N{FULLWIDTH LATIN SMALL LETTER C}\N{FULLWIDTH LATIN SMALL LETTER A} A", "ca a"),
        ("今天 very GOOD 好", "今天very good好"),
    ],
)
def test_a_transcript_is_learnt_in_its_plain_form(written, learnt):
    assert plain(written) == learnt
    assert plain(learnt) == learnt


def test_characters_are_counted_where_there_are_no_spaces_and_words_elsewhere():
    pairs = units(["turn it on", "打开灯"], ["turn it off", "打 天灯"])
    assert pairs == (["turn it on", "打 开 灯"], ["turn it off", "打 天 灯"])
    assert count_word_errors(*pairs).errors == 2
    assert is_spaceless("打")
    assert not is_spaceless("turn it on")


def test_english_keeps_its_29_characters_and_others_have_their_own():
    assert characters_of(["ab c"]) == character_tokens()
    assert characters_of(["é a"]).symbols == ("<blk>", "a", "é", "▁")
    pieces = learn_tokens(["turn on the light in the kitchen"] * 20, 40)
    assert len(pieces) == 40
    assert characters_in(pieces) == character_tokens()

"""Prefix beam search: sums over alignments, chunks, and hotwords."""

from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefuse.decode.beam import LEAST, MOST, Beam, log_softmax
from edgefuse.decode.greedy import Greedy, greedy_ids, merge_repeats
from edgefuse.decode.hotwords import NOTHING_YET, WEIGHT, Biasing, biasing, read_hotwords
from edgefuse.decode.spelling import text_of, words_of
from edgefuse.decode.tokens import BLANK, SPACE, Tokens, character_tokens
from edgefuse.errors import BadHotwords, MissingFile

WIDE = 1000
CHARACTERS = character_tokens()
PIECES = Tokens((BLANK, SPACE, *"abdeghiklmnorstyz", f"{SPACE}an", "na", f"{SPACE}kit", "chen", f"{SPACE}the", "c"))


def some_logits(seed: int, frames: int, tokens: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, tokens)) * spread


def brute_force(logits: np.ndarray) -> dict[tuple[int, ...], float]:
    """The probability of each text, summed over all alignments."""
    p = np.exp(log_softmax(logits))
    sums: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for path in product(range(p.shape[1]), repeat=len(p)):
        sums[tuple(merge_repeats(path))] += float(np.prod([p[t, v] for t, v in enumerate(path)]))
    return sums


def best_alignment(logits: np.ndarray, ids: tuple[int, ...]) -> float:
    """The probability of the most probable alignment of a text."""
    p = np.exp(log_softmax(logits))
    paths = (path for path in product(range(p.shape[1]), repeat=len(p)) if tuple(merge_repeats(path)) == ids)
    return max(float(np.prod([p[t, v] for t, v in enumerate(path)])) for path in paths)


def found(beam: Beam) -> dict[tuple[int, ...], float]:
    return {(*beam.settled.ids, *ids): float(np.exp(prefix.log_p)) for ids, prefix in beam.prefixes if prefix.log_p > LEAST * 9}


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4), st.sampled_from([0.3, 2.0]))
def test_a_wide_beam_gives_each_text_the_sum_over_all_its_alignments(seed, frames, tokens, spread):
    logits = some_logits(seed, frames, tokens, spread)
    sums = brute_force(logits)
    beam = Beam(WIDE).accept(logits)
    assert found(beam) == pytest.approx(sums)
    assert beam.best.ids == max(sums, key=sums.__getitem__)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_the_times_are_those_of_the_single_most_probable_alignment(seed):
    logits = some_logits(seed, 5, 3)
    beam = Beam(WIDE).accept(logits)
    for ids, prefix in beam.prefixes:
        best = max(prefix.blank, prefix.token, key=lambda paths: paths.best)
        if best.best > LEAST:
            whole = (*beam.settled.ids, *ids)
            assert np.exp(best.best) == pytest.approx(best_alignment(logits, whole))
            assert len(best.frames) == len(ids)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 8), st.lists(st.integers(0, 30), max_size=5))
def test_a_beam_finds_the_same_however_the_frames_are_cut(seed, width, cuts):
    logits = some_logits(seed, 30, 6)
    begin = Beam(width, biasing({"ab": 0.5, "e d": 1.0}, Tokens((BLANK, SPACE, *"abde"))))
    search = begin
    for piece in np.split(logits, sorted(cuts)):
        search = search.accept(piece)
    whole = begin.accept(logits)
    assert search.best == whole.best
    assert [prefix.log_p for _, prefix in search.prefixes] == [prefix.log_p for _, prefix in whole.prefixes]
    assert begin.best.ids == ()  # a search is a value: going on from it leaves it as it was


def test_what_all_prefixes_agree_on_is_kept_once_and_changes_nothing():
    logits = some_logits(5, 400, 6, spread=8.0)
    search = Beam(8)
    for piece in np.split(logits, 25):
        search = search.accept(piece)
    assert search.settled.ids == search.best.ids[: len(search.settled.ids)] != ()
    assert search.best == Beam(8).accept(logits).best


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 6))
def test_where_every_frame_is_sure_a_beam_of_any_width_is_greedy(path, width):
    logits = 12.0 * np.eye(5)[path]
    assert Beam(width).accept(logits).best == Greedy().accept(logits).best


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_a_wide_beam_never_finds_a_text_less_probable_than_greedy_search_does(seed):
    logits = some_logits(seed, 5, 4, spread=0.7)
    sums = brute_force(logits)
    assert sums[Beam(WIDE).accept(logits).best.ids] >= sums[tuple(greedy_ids(logits))] * (1 - 1e-9)


def test_a_beam_hears_what_greedy_search_misses_because_its_alignments_are_many():
    p = np.array([[0.55, 0.45, 0.0], [0.55, 0.45, 0.0]]) + 1e-9
    assert greedy_ids(np.log(p)) == []  # 0.30, the most probable alignment
    assert Beam(4).accept(np.log(p)).best.ids == (1,)  # 0.70, in three alignments


def test_only_the_most_probable_tokens_of_a_frame_begin():
    flat = Beam(WIDE).accept(np.eye(1, 200))
    assert len(flat.prefixes) == MOST  # the blank, being the most probable here, is one of them
    sure = Beam(WIDE).accept(np.array([[20.0, 0.0, 12.0]]))
    assert {ids for ids, _ in sure.prefixes} == {(), (2,)}


def test_numbers_that_are_not_normalized_are_read_as_logits():
    logits = some_logits(1, 4, 3)
    assert found(Beam(9).accept(logits + 7.0)) == pytest.approx(found(Beam(9).accept(log_softmax(logits))))


def bonus(hotwords: dict[str, float], text: str, tokens: Tokens = CHARACTERS) -> float:
    ready, matched = biasing(hotwords, tokens), NOTHING_YET
    for token in tokens.encode(text):
        matched = ready.step(matched, token)
    return ready.final(matched)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anna", 4),
        ("call anna now", 4),
        ("ann", 0),
        ("annas", 0),
        ("hanna", 0),
        ("anna anna", 8),
        ("living room", 11),
        ("the living rooms", 6),
        ("living", 6),
        ("living living room", 17),
        ("living room service", 11),
        ("room service", 12),
        ("living at room service", 18),
        ("big living rooster", 6),
        ("", 0),
    ],
)
def test_a_phrase_counts_as_whole_words_and_never_twice(text, said):
    hotwords = {"anna": 1.0, "living room": 1.0, "living": 1.0, "room service": 1.0, "big living space": 1.0}
    assert bonus(hotwords, text) == said


def test_each_phrase_has_its_own_weight():
    assert bonus({"anna": 2.0, "an": 0.5}, "anna an ann") == 2.0 * 4 + 0.5 * 2


def spellings(text: str, tokens: Tokens) -> list[list[int]]:
    """All ways in which tokens spell a text."""
    if not text:
        return [[]]
    fits = [(number, symbol) for number, symbol in enumerate(tokens.symbols) if number and text.startswith(symbol)]
    return [[number, *rest] for number, symbol in fits for rest in spellings(text[len(symbol) :], tokens)]


def test_a_phrase_counts_the_same_in_whichever_pieces_it_is_spelled():
    ready = biasing({"anna": 1.0, "the kitchen": 0.5}, PIECES)
    ways = spellings(f"{SPACE}the{SPACE}kitchen{SPACE}anna", PIECES)
    assert len(ways) > 10
    for ids in ways:
        matched = NOTHING_YET
        for token in ids:
            matched = ready.step(matched, token)
        assert ready.final(matched) == 4 + 0.5 * 11


def test_the_bonus_comes_letter_by_letter_and_is_taken_back():
    ready, matched, seen = biasing({"anna": 1.0}, CHARACTERS), NOTHING_YET, []
    for token in CHARACTERS.encode("anne an"):
        matched = ready.step(matched, token)
        seen.append(matched.bonus)
    assert seen == [1, 2, 3, 0, 0, 1, 2]
    assert ready.final(matched) == 0


def unsure(sure: str, other: str, logit: float) -> np.ndarray:
    """Logits of characters in which each letter of `other` is somewhat less probable than that of `sure`."""
    logits = np.zeros((2 * len(sure), len(CHARACTERS)))
    for place, (one, two) in enumerate(zip(CHARACTERS.encode(sure), CHARACTERS.encode(other), strict=True)):
        logits[2 * place, two] = logit - 1.0
        logits[2 * place, one] = logit
        logits[2 * place + 1, 0] = logit
    return logits


def heard(logits: np.ndarray, ready: Biasing | None = None) -> str:
    beam = Beam(8, ready) if ready else Beam(8)
    return text_of(words_of(beam.accept(logits).best, CHARACTERS))


def test_a_hotword_is_heard_where_it_is_almost_as_probable_and_only_as_a_whole_word():
    logits = unsure("call hanne now", "call hanna now", 12.0)
    assert heard(logits) == "call hanne now"
    assert heard(logits, biasing({"hanna": 1.0}, CHARACTERS)) == "call hanna now"
    assert heard(logits, biasing({"hann": 1.0}, CHARACTERS)) == "call hanne now"
    assert heard(logits, biasing({"hanna": 0.1}, CHARACTERS)) == "call hanne now"


def test_a_hotword_that_nobody_says_changes_nothing():
    logits = unsure("stop the timer", "stop the timer", 12.0)
    assert heard(logits, biasing({"stopwatch": 1.0, "time": 1.0, "kitchen": 1.0}, CHARACTERS)) == "stop the timer"


def written(folder: Path, content: str) -> Path:
    path = folder / "rooms.txt"
    path.write_bytes(content.encode())
    return path


def test_a_file_of_hotwords_has_a_phrase_a_line_and_perhaps_its_weight(tmp_path):
    path = written(tmp_path, "\ufeffliving  room\r\n\nanna\t2.5\n  kitchen \t\n")
    assert read_hotwords(path) == {"living room": WEIGHT, "anna": 2.5, "kitchen": WEIGHT}


def test_a_missing_file_of_hotwords_is_a_missing_file(tmp_path):
    with pytest.raises(MissingFile, match="no file of hotwords"):
        read_hotwords(tmp_path / "rooms.txt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no phrase"),
        (" \n\n", "holds no phrase"),
        ("anna\tmuch\n", "line 1: the weight 'much' is no positive number"),
        ("anna\n\nbob\tnan\n", "line 3: the weight 'nan'"),
        ("anna\t-1\n", "the weight '-1'"),
        ("anna\tinf\n", "the weight 'inf'"),
        ("\t2\n", "a weight, but no phrase"),
    ],
)
def test_a_file_of_hotwords_that_cannot_be_used_is_refused_with_its_line(tmp_path, content, complaint):
    with pytest.raises(BadHotwords, match=complaint):
        read_hotwords(written(tmp_path, content))


def test_a_file_that_is_no_text_is_no_file_of_hotwords(tmp_path):
    (tmp_path / "rooms.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadHotwords, match="not text in UTF-8"):
        read_hotwords(tmp_path / "rooms.txt")
    with pytest.raises(BadHotwords, match="cannot be read"):
        read_hotwords(tmp_path)


def test_a_hotword_that_the_model_cannot_write_is_named():
    with pytest.raises(BadHotwords, match="'Café 2' has characters that the model never writes: 2 C é"):
        biasing({"Café 2": 1.0}, CHARACTERS)

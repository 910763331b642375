"""From logits to words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgefuse.decode.greedy import Greedy, greedy_ids, greedy_text, merge_repeats
from edgefuse.decode.spelling import Spelling, Word, text_of, words_of
from edgefuse.decode.tokens import BLANK, SPACE, Tokens, character_tokens, read_tokens, write_tokens
from edgefuse.errors import BadConfig, MissingFile
from edgefuse.verify.wer import WordErrors, count_word_errors, split_word_errors

TOKENS = character_tokens()


def alignment(symbols: str) -> np.ndarray:
    """Logits whose best path is the given symbols; '_' is the blank."""
    ids = [0 if s == "_" else TOKENS.encode(s)[0] for s in symbols]
    return 5.0 * np.eye(len(TOKENS))[ids] - 1.0


def test_the_blank_comes_first_and_29_tokens_spell_english() -> None:
    assert TOKENS.symbols[:3] == (BLANK, SPACE, "'")
    assert len(TOKENS) == 29


def test_greedy_search_merges_repeats_and_drops_blanks() -> None:
    assert greedy_text(alignment("hh_e_l_ll__oo"), TOKENS) == "hello"


def test_a_letter_is_doubled_only_across_a_blank() -> None:
    assert greedy_text(alignment("of_f"), TOKENS) == "off"
    assert greedy_text(alignment("off"), TOKENS) == "of"


def test_spaces_are_single_and_never_at_the_ends() -> None:
    assert greedy_text(alignment(" a _ b "), TOKENS) == "a b"


def test_silence_is_the_empty_text() -> None:
    assert greedy_text(alignment("____"), TOKENS) == ""
    assert greedy_ids(np.zeros((0, 29))) == []


def test_a_tensor_and_an_array_read_the_same() -> None:
    logits = alignment("no_w")
    assert greedy_ids(torch.from_numpy(logits)) == greedy_ids(logits)


@given(st.lists(st.integers(0, 28), max_size=30))
def test_an_alignment_with_a_blank_after_every_token_keeps_all_of_them(ids: list[int]) -> None:
    aligned = [frame for token in ids for frame in (token, 0)]
    assert merge_repeats(aligned) == [token for token in ids if token != 0]


@given(st.text(alphabet="abcxyz' ", max_size=40).map(lambda text: " ".join(text.split())))
def test_a_text_survives_its_ids(text: str) -> None:
    assert TOKENS.decode(TOKENS.encode(text)) == text


def test_a_character_that_is_no_token_is_named() -> None:
    with pytest.raises(BadConfig, match="no tokens: é"):
        TOKENS.encode("café")


def test_tokens_survive_the_disk(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.txt", TOKENS)
    assert read_tokens(tmp_path / "tokens.txt") == TOKENS


@pytest.mark.parametrize(
    ("symbols", "complaint"),
    [((), "at least one token"), (("a", BLANK), "not the blank"), ((BLANK, "a", "a"), "more than one id")],
)
def test_an_impossible_vocabulary_is_refused(symbols: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        Tokens(symbols)


def test_a_missing_vocabulary_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no .*tokens\.txt"):
        read_tokens(tmp_path / "tokens.txt")


def test_word_errors_are_counted_by_kind() -> None:
    errors = count_word_errors(["turn on the light", "stop"], ["turn the lights now", "stop"])
    assert (errors.deletions + errors.substitutions + errors.insertions, errors.words) == (3, 5)
    assert errors.wer_percent == pytest.approx(60.0)


def test_words_heard_in_silence_are_insertions() -> None:
    assert count_word_errors(["", "go"], ["no way", "go"]) == WordErrors(0, 0, 2, 1, 2)


def test_word_errors_add_up_over_test_sets() -> None:
    one = count_word_errors(["a b"], ["a c"])
    two = count_word_errors(["d"], [""])
    assert one + two == count_word_errors(["a b", "d"], ["a c", ""])


def of(symbols: str) -> Spelling:
    return Greedy().accept(alignment(symbols)).best


def test_a_word_lasts_from_the_peak_of_its_first_token_to_that_of_its_last() -> None:
    assert words_of(of("__h_ii_ _y_ou__"), TOKENS) == (Word("hi", 0.08, 0.2), Word("you", 0.36, 0.52))


def test_words_of_a_later_utterance_are_timed_in_the_whole_recording() -> None:
    assert words_of(of("_a"), TOKENS, first_frame=100) == (Word("a", 4.04, 4.08),)


def test_a_word_begins_with_the_first_piece_that_has_a_letter_of_it() -> None:
    pieces = Tokens((BLANK, SPACE, f"{SPACE}tea", "m", f"{SPACE}{SPACE}s"))
    spelling = Spelling((1, 2, 3, 1, 4), (1, 2, 5, 7, 9))
    assert words_of(spelling, pieces) == (Word("team", 0.08, 0.24), Word("s", 0.36, 0.4))


@given(st.lists(st.integers(1, 28), max_size=30))
def test_words_spell_what_the_tokens_do(ids: list[int]) -> None:
    words = words_of(Spelling(tuple(ids), tuple(range(len(ids)))), TOKENS)
    assert text_of(words) == TOKENS.decode(ids)


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 20), max_size=4))
def test_a_greedy_search_finds_the_same_however_the_frames_are_cut(path: list[int], cuts: list[int]) -> None:
    logits = np.eye(4)[path].reshape(-1, 4)
    search = Greedy()
    for piece in np.split(logits, sorted(cuts)):
        search = search.accept(piece)
    assert search == Greedy().accept(logits)
    assert [path[frame] for frame in search.best.frames] == list(search.best.ids) == merge_repeats(path)


def test_errors_on_special_words_are_counted_apart() -> None:
    said = ["call anna in the kitchen", "stop anna", ""]
    heard = ["call hannah the kitchen", "anna stop the anna", "anna"]
    inside, outside, false = split_word_errors(said, heard, {"anna", "kitchen"})
    assert inside == WordErrors(substitutions=1, deletions=0, insertions=2, words=3, utterances=3)
    assert outside == WordErrors(substitutions=0, deletions=1, insertions=1, words=4, utterances=3)
    assert false == 2


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_special_words_and_the_others_add_up_to_all(pairs: list[tuple[str, str]]) -> None:
    said, heard = [one for one, _ in pairs], [two for _, two in pairs]
    inside, outside, _ = split_word_errors(said, heard, {"a", "b"})
    counted = count_word_errors(said, heard)
    assert (inside.errors + outside.errors, inside.words + outside.words) == (counted.errors, counted.words)

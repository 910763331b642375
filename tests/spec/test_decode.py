"""From logits to words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgefuse.decode.greedy import greedy_ids, greedy_text, merge_repeats
from edgefuse.decode.tokens import BLANK, SPACE, Tokens, character_tokens, read_tokens, write_tokens
from edgefuse.errors import BadConfig, MissingFile
from edgefuse.verify.wer import WordErrors, count_word_errors

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

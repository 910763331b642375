"""The learnt vocabulary: any text in its characters has an encoding, and the encoding is the text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edgefuse.decode.tokens import SPACE, character_tokens
from edgefuse.train.pieces import learn_tokens

TEXTS = ("turn on the kitchen light", "turn off the light", "what's the time", "call anna in the morning", "the light") * 20
PIECES = learn_tokens(TEXTS, 40)


def test_as_many_tokens_are_learnt_as_were_asked_for():
    assert len(PIECES) == 40


def test_frequent_words_become_one_token():
    assert f"{SPACE}the" in PIECES.symbols
    assert len(PIECES.encode("turn the light")) < len("turn the light") / 2


@settings(deadline=None)
@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=12), min_size=1, max_size=6).map(" ".join))
def test_any_text_comes_back_from_its_tokens(text):
    assert PIECES.decode(PIECES.encode(text)) == text


def test_the_same_texts_give_the_same_tokens():
    assert learn_tokens(TEXTS, 40) == PIECES


def test_a_small_vocabulary_is_the_characters():
    assert learn_tokens(TEXTS, 29) == character_tokens()

"""What the phrase book may say, and which set may say it."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from edgefuse_calibration.sentences import (
    FEWEST_WORDS,
    MOST_WORDS,
    SETS,
    SLOT,
    SPELLED,
    cardinal,
    home,
    ordinal,
    phrase_book,
    sentences,
)

MANY = 20_000


@pytest.fixture(scope="module")
def training() -> list[str]:
    return list(islice(sentences("train", seed=1), MANY))


def test_a_sentence_is_lower_case_letters_apostrophes_and_single_spaces(training: list[str]) -> None:
    assert [sentence for sentence in training if not re.fullmatch(r"[a-z']+( [a-z']+)*", sentence)] == []


def test_a_sentence_has_two_to_twelve_words(training: list[str]) -> None:
    lengths = {len(sentence.split()) for sentence in training}
    assert lengths == set(range(FEWEST_WORDS, MOST_WORDS + 1))


def test_no_sentence_of_a_set_is_said_twice(training: list[str]) -> None:
    assert len(set(training)) == MANY


def test_the_language_has_at_least_a_thousand_words(training: list[str]) -> None:
    assert len({word for sentence in training for word in sentence.split()}) >= 1000


def test_the_same_seed_says_the_same_sentences(training: list[str]) -> None:
    assert list(islice(sentences("train", seed=1), 100)) == training[:100]


def test_another_seed_says_other_sentences(training: list[str]) -> None:
    assert list(islice(sentences("train", seed=2), 100)) != training[:100]


@pytest.mark.parametrize("which", [name for name in SETS if name != "train"])
def test_a_held_out_sentence_never_occurs_in_training_whatever_the_seeds(which: str, training: list[str]) -> None:
    assert set(training).isdisjoint(islice(sentences(which, seed=7), 500))


@pytest.mark.parametrize("which", SETS)
def test_every_sentence_of_a_set_is_at_home_there(which: str) -> None:
    assert {home(sentence) for sentence in islice(sentences(which, seed=3), 200)} == {which}


def test_every_slot_that_a_phrase_names_can_be_filled() -> None:
    named = {slot for phrases in phrase_book().values() for phrase in phrases for slot in SLOT.findall(phrase)}
    assert named <= phrase_book().keys() | SPELLED.keys()


def test_every_slot_of_the_phrase_book_is_used() -> None:
    named = {slot for phrases in phrase_book().values() for phrase in phrases for slot in SLOT.findall(phrase)}
    assert phrase_book().keys() - named == {"frame"}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (87, "eighty seven"),
        (300, "three hundred"),
        (205, "two hundred and five"),
        (999, "nine hundred and ninety nine"),
    ],
)
def test_a_number_is_spelled_in_words(number: int, words: str) -> None:
    assert cardinal(number) == words


@pytest.mark.parametrize(
    ("number", "words"), [(1, "first"), (12, "twelfth"), (20, "twentieth"), (31, "thirty first"), (40, "fortieth")]
)
def test_an_ordinal_is_spelled_in_words(number: int, words: str) -> None:
    assert ordinal(number) == words

"""Home and phone commands in English, drawn from a phrase book by a seeded grammar.

A sentence has 2 to 12 words of lower-case letters and apostrophes.  Which corpus set may speak a sentence is a property
of the sentence itself (`home`), so that no sentence of a test set can ever occur in training, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

SETS = ("train", "dev", "seen", "unseen")
FEWEST_WORDS = 2
MOST_WORDS = 12
TEST_SHARE = 5  # per cent of all sentences that each of dev, seen and unseen may speak; the rest is for training

UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = (
    *("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
)
SLOT = re.compile(r"\{(\w+)\}")


def cardinal(number: int, *, joint: str = " and ") -> str:
    """Spell 0 to 999; `joint` stands between the hundreds and the rest ("two hundred and five")."""
    hundreds, rest = divmod(number, 100)
    if hundreds:
        head = f"{UNITS[hundreds]} hundred"
        return f"{head}{joint}{cardinal(rest)}" if rest else head
    if rest < len(UNITS):
        return UNITS[rest]
    tens, units = divmod(rest, 10)
    return f"{TENS[tens]} {UNITS[units]}" if units else TENS[tens]


def ordinal(number: int) -> str:
    """Spell "first" to "ninety ninth"."""
    if number < len(ORDINALS):
        return ORDINALS[number]
    tens, units = divmod(number, 10)
    return f"{TENS[tens]} {ORDINALS[units]}" if units else TENS[tens].removesuffix("y") + "ieth"


def clock(chance: random.Random) -> str:
    """One time of day the way people say it: "half past seven", "ten to nine", "six forty five"."""
    hour, following = chance.sample(UNITS[1:13], 2)
    some = UNITS[chance.choice((5, 10))]
    return chance.choice(
        (
            f"{hour} o'clock",
            hour,
            f"half past {hour}",
            f"quarter past {hour}",
            f"quarter to {following}",
            f"{some} past {hour}",
            f"{some} to {following}",
            f"{hour} {cardinal(chance.randrange(10, 60))}",
            f"{hour} {cardinal(5 * chance.randrange(2, 12))}",
            f"{hour} in the {chance.choice(('morning', 'evening', 'afternoon'))}",
        )
    )


def date(chance: random.Random) -> str:
    """One day of the year: "march the third", "the twenty first of may"."""
    month, day = chance.choice(phrase_book()["month"]), ordinal(chance.randrange(1, 32))
    return chance.choice((f"the {day} of {month}", f"{month} {day}", f"{month} the {day}", f"the {day}"))


def number(chance: random.Random) -> str:
    """One number from 0 to 999, round ones and small ones more often than their share."""
    drawn = chance.choice(
        (
            chance.randrange(1, 21),
            5 * chance.randrange(1, 20),
            chance.randrange(20, 100),
            chance.randrange(1000),
            50 * chance.randrange(2, 20),
        )
    )
    return cardinal(drawn, joint=chance.choice((" and ", " ")))


SPELLED: Mapping[str, Callable[[random.Random], str]] = {
    "clock": clock,
    "date": date,
    "number": number,
    "small": lambda chance: cardinal(chance.randrange(2, 13)),
    "percent": lambda chance: f"{cardinal(chance.choice((*range(5, 101, 5), *range(10, 100))))} percent",
    "degrees": lambda chance: cardinal(chance.randrange(12, 32)),
    "ordinal": lambda chance: ordinal(chance.randrange(1, 40)),
    "digits": lambda chance: " ".join(chance.choices(UNITS[:10], k=chance.randrange(3, 7))),
}


@cache
def phrase_book() -> Mapping[str, Sequence[str]]:
    """The slots of `sets/commands.toml`."""
    text = files(__package__).joinpath("sets/commands.toml").read_text(encoding="utf-8")
    return {slot: tuple(phrases) for slot, phrases in tomllib.loads(text).items()}


def expand(phrase: str, chance: random.Random) -> str:
    """Replace every `{slot}` of the phrase, and of what replaces it, by one draw."""

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in SPELLED:
            return SPELLED[slot](chance)
        return expand(chance.choice(phrase_book()[slot]), chance)

    return SLOT.sub(fill, phrase)


def home(sentence: str) -> str:
    """The one set that may speak this sentence, from a hash of its letters."""
    place = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:4], "big") % 100
    return ("seen", "unseen", "dev")[place // TEST_SHARE] if place < 3 * TEST_SHARE else "train"


def fits(sentence: str) -> bool:
    """Whether the sentence has a length that one breath speaks."""
    return FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS


def sentences(which: str, *, seed: int) -> Iterator[str]:
    """Distinct sentences of one set without end, the same ones for the same seed."""
    chance = random.Random(f"{seed}/{which}")  # noqa: S311  # reproducible on purpose; nothing is kept secret
    spoken: set[str] = set()
    while True:
        sentence = expand(chance.choice(phrase_book()["frame"]), chance)
        if sentence not in spoken and fits(sentence) and home(sentence) == which:
            spoken.add(sentence)
            yield sentence

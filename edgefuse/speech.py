"""Speech to verify on: a folder with `manifest.tsv` and the recordings that it names."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from edgefuse.errors import AudioError, MissingFile

MANIFEST = "manifest.tsv"
COLUMNS = ("id", "file", "set", "voice", "seconds", "text", "sha256")
IN_A_CHECKOUT = Path(__file__).parent.parent / "demo_app" / "shared" / "speech"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of a test set.

    Attributes:
        identity: unique in the set.
        path: of the recording, 16 kHz mono.
        subset: for example "seen" or "unseen" voices.
        seconds: how long it is.
        text: what is said.
        sha256: of the recording's bytes.
    """

    identity: str
    path: Path
    subset: str
    seconds: float
    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TestSet:
    """Utterances in the order of the manifest, and the digest of all that they are."""

    __test__ = False  # pytest takes every name that begins with Test for one of its own

    folder: Path
    utterances: tuple[Utterance, ...]
    digest: str


def shipped() -> Path:
    """The test set that comes with edgefuse: in a checkout, or inside the installed package."""
    if (IN_A_CHECKOUT / MANIFEST).is_file():
        return IN_A_CHECKOUT
    try:
        installed = Path(str(files("edgefuse_calibration"))) / "speech"
    except ModuleNotFoundError:
        installed = IN_A_CHECKOUT
    if (installed / MANIFEST).is_file():
        return installed
    raise MissingFile("The shipped test set of speech is not installed.", hint="Name one with --speech DIR.")


def read_speech(folder: Path) -> TestSet:
    """Read a manifest; a recording that is missing or differs from its checksum is an error, never skipped."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise MissingFile(
            f"There is no {manifest}.", hint=f"A folder of speech has a {MANIFEST} with the columns: {', '.join(COLUMNS)}"
        )
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise AudioError(f"{manifest} cannot be read: {error}.", hint="Copy the folder of speech again.") from error
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise AudioError(f"{manifest} does not begin with its columns.", hint=f"They are, tab-separated: {', '.join(COLUMNS)}")
    utterances = tuple(_utterance(folder, manifest, number, row) for number, row in enumerate(rows[1:], start=2))
    if not any(utterance.text.split() for utterance in utterances):
        raise AudioError(f"{manifest} names no utterance in which a word is said.", hint="Add some, one a line.")
    if twice := {u.identity for u in utterances if sum(v.identity == u.identity for v in utterances) > 1}:
        raise AudioError(f"{manifest} has the id {min(twice)} twice.", hint="Give each utterance its own id.")
    return TestSet(folder, utterances, _digest(utterances))


def parted(speech: TestSet, every: int) -> tuple[TestSet, TestSet]:
    """Every so-manieth utterance apart from the others: (the others, these)."""
    apart = speech.utterances[every - 1 :: every]
    others = tuple(each for number, each in enumerate(speech.utterances, 1) if number % every)
    return replace(speech, utterances=others, digest=_digest(others)), replace(speech, utterances=apart, digest=_digest(apart))


def _utterance(folder: Path, manifest: Path, number: int, row: list[str]) -> Utterance:
    if len(row) != len(COLUMNS):
        raise AudioError(f"{manifest}, line {number}: {len(row)} columns, not {len(COLUMNS)}.", hint="Columns are tab-separated.")
    identity, file, subset, _, seconds, text, sha256 = row
    path = folder / file
    try:
        duration, content = float(seconds), path.read_bytes()
    except ValueError as error:
        raise AudioError(f"{manifest}, line {number}: {seconds!r} is no number of seconds.", hint="Mend the line.") from error
    except OSError as error:
        raise AudioError(f"{manifest}, line {number}: {path} cannot be read: {error.strerror}.", hint="Copy it again.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AudioError(f"{path} has changed since {MANIFEST} was written.", hint="Copy the folder of speech again.")
    return Utterance(identity, path, subset, duration, text, sha256)


def _digest(utterances: tuple[Utterance, ...]) -> str:
    told = "\n".join(f"{u.identity}\t{u.subset}\t{u.text}\t{u.sha256}" for u in utterances)
    return hashlib.sha256(told.encode()).hexdigest()

"""Corpora as they lie on the disk, in any of three layouts.

- Lhotse cuts, `NAME.cuts.jsonl.gz`, their audio relative to the folder, as `edgefuse_calibration.synthesize` writes them;
  `train` and `dev` are what their names say, all others are tests.
- Lhotse manifests as `lhotse prepare librispeech` and `lhotse prepare aishell` write them: `CORPUS_recordings_PART.jsonl.gz`
  beside `CORPUS_supervisions_PART.jsonl.gz`.
- The corpora as they are unpacked: `LibriSpeech/train-clean-100/...`, `data_aishell/{wav,transcript}`; the folder itself or
  the one around it. Manifests are prepared once by Lhotse's recipes and kept beside the features.

Of the last two, the parts `train...` are trained on together, the parts `dev...` are the development set, and each part `test...`
is a test of its own name; where there is none, each part `dev...` is. Their transcripts are learnt in lower case.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.recipes.aishell import prepare_aishell
from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, prepare_librispeech

from edgefuse.decode.spaceless import plain
from edgefuse.errors import EmptyAudio, MissingFile
from edgefuse.train.ranks import say

TRAIN, DEV = "train", "dev"
CUTS = ".cuts.jsonl.gz"
RECORDINGS = re.compile(r"(?:(?P<corpus>.+)_)?recordings_(?P<part>.+)\.jsonl\.gz")
PREPARED = "manifests"


@dataclass(frozen=True)
class Corpus:
    """Named sets of utterances; a set has one or several files of cuts, or of recordings and supervisions.

    Attributes:
        folder: where it lies.
        sets: the files of every set that is trained, developed or tested on.
        tests: the names of those that are tested on.
    """

    folder: Path
    sets: Mapping[str, tuple[Path, ...]]
    tests: tuple[str, ...]

    def cuts(self, name: str) -> CutSet:
        """The utterances of a set, eager; of their audio nothing is read."""
        if name not in self.sets:
            raise MissingFile(f"{self.folder} has no set {name!r}.", hint=f"It has: {', '.join(self.sets)}")
        files = self.sets[name]
        if files[0].name.endswith(CUTS):
            return CutSet.from_file(files[0]).with_recording_path_prefix(str(self.folder)).to_eager()
        return CutSet.from_cuts(cut for file in files for cut in _cuts_of(file, self.folder))


def open_corpus(folder: Path, work: Path) -> Corpus:
    """Find out the layout of a corpus; manifests that have to be prepared are kept in the folder `work`.

    Raises:
        MissingFile: a folder in none of the layouts, or without speech to train on and to develop on.
        EmptyAudio: an unpacked corpus in which no recording is found.
    """
    if found := {path.name.removesuffix(CUTS): (path,) for path in sorted(folder.glob(f"*{CUTS}"))}:
        return _whole(Corpus(folder, found, tuple(name for name in found if name not in (TRAIN, DEV))))
    manifests = folder if any(_manifests(folder)) else _prepared(folder, work / PREPARED)
    parts = {match["part"]: path for path, match in _manifests(manifests)}
    sets = {role: tuple(path for part, path in parts.items() if part.startswith(role)) for role in (TRAIN, DEV)}
    tests = [part for part in parts if part.startswith("test")] or [part for part in parts if part.startswith(DEV)]
    return _whole(Corpus(folder, {n: files for n, files in sets.items() if files} | {n: (parts[n],) for n in tests}, (*tests,)))


def _whole(corpus: Corpus) -> Corpus:
    for name in (TRAIN, DEV):
        if name not in corpus.sets:
            raise MissingFile(
                f"{corpus.folder} has no set to {'train' if name == TRAIN else 'develop'} on.",
                hint=f"It has: {', '.join(corpus.sets) or 'none'}; the name of one must be, or begin with: {name}",
            )
    return corpus


def _manifests(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Recordings, with supervisions beside them."""
    for path in sorted(folder.glob("*recordings_*.jsonl.gz")):
        match = RECORDINGS.fullmatch(path.name)
        if match and _supervisions(path).is_file():
            yield path, match


def _supervisions(recordings: Path) -> Path:
    return recordings.with_name(recordings.name.replace("recordings_", "supervisions_", 1))


def _cuts_of(file: Path, folder: Path) -> Iterator[MonoCut]:
    """A cut for every supervision, of its id and its length."""
    recordings = {each.id: each for each in RecordingSet.from_file(file)}
    prefix = _prefix(next(iter(recordings.values()), None), folder)
    for said in SupervisionSet.from_file(_supervisions(file)):
        recording = recordings[said.recording_id]
        yield _cut(recording.with_path_prefix(prefix) if prefix else recording, said)


def _cut(recording: Recording, said: SupervisionSegment) -> MonoCut:
    length = min(said.duration, recording.duration - said.start)
    said.text = plain(said.text or "")
    return MonoCut(
        id=said.id,
        start=said.start,
        duration=length,
        channel=recording.channel_ids[0],
        recording=recording,
        supervisions=[said.with_offset(-said.start)],
    )


def _prefix(recording: Recording | None, folder: Path) -> str | None:
    """The folder that recordings with relative paths are in: the one that Lhotse was run in, or the corpus."""
    if recording is None:
        return None
    source = Path(recording.sources[0].source)
    if source.is_file():
        return None
    if not source.is_absolute() and (folder / source).is_file():
        return str(folder)
    raise MissingFile(
        f"There is no {source}, which the manifests in {folder} name.",
        hint="Prepare them again where the corpus now lies, or name the unpacked corpus itself with --speech.",
    )


def _prepared(folder: Path, place: Path) -> Path:
    """Manifests of an unpacked corpus, made at the first call."""
    prepare = _recipe_for(folder)
    if place.is_dir():
        return place
    say(f"Preparing manifests of {folder} in {place}")
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars that count files
            prepare(draft)
        if not any(path.stat().st_size for path in draft.glob("*")):
            raise EmptyAudio(f"{folder} holds no recordings.", hint="Unpack the archives in it first.")
        draft.rename(place)
    except (OSError, ValueError, AssertionError) as error:
        raise MissingFile(f"{folder} is not a whole corpus: {error}.", hint="Unpack it again.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _recipe_for(folder: Path) -> Callable[[Path], object]:
    for place in (folder, folder / "LibriSpeech"):
        parts = [part for part in (*LIBRISPEECH, *MINI_LIBRISPEECH) if (place / part).is_dir()]
        if parts:
            jobs = os.cpu_count() or 1
            return lambda into: prepare_librispeech(place, dataset_parts=parts, output_dir=into, num_jobs=jobs)
    for place in (folder, folder.resolve().parent):
        if (place / "data_aishell" / "wav").is_dir():
            return lambda into: prepare_aishell(place, output_dir=into)
    raise MissingFile(
        f"{folder} is no corpus.",
        hint=f"A corpus folder holds Lhotse cuts (train{CUTS}, dev{CUTS} and tests), Lhotse's manifests of LibriSpeech or "
        "AISHELL, or one of these as it was unpacked.",
    )

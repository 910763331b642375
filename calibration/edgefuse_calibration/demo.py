"""A test set small enough to ship with the demo apps, chosen evenly over the voices."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice, zip_longest
from pathlib import Path

from edgefuse_calibration.corpus import Clip, cut, write_lines

PER_SET = 30
COLUMNS = ("id", "file", "set", "voice", "seconds", "text", "sha256")


def voice_family(speaker: str) -> str:
    """The speaker without the variant: espeak-ng has hundreds of voices but only a few accents."""
    return speaker.partition("+")[0]


def shuffled(clips: Sequence[Clip]) -> list[Clip]:
    """In an order that depends on nothing but their ids."""
    return sorted(clips, key=lambda clip: hashlib.sha256(clip.identity.encode()).digest())


def evenly(clips: Sequence[Clip], fewest: int) -> list[Clip]:
    """Take turns among the voice families until there are `fewest` clips; in the order of their ids."""
    families: defaultdict[str, list[Clip]] = defaultdict(list)
    for clip in shuffled(clips):
        families[voice_family(clip.speaker)].append(clip)
    turns = chain.from_iterable(zip_longest(*(families[name] for name in sorted(families))))
    return sorted(islice((clip for clip in turns if clip), fewest), key=lambda clip: clip.identity)


def write_demo(corpus: Path, folder: Path, sets: Mapping[str, Sequence[Clip]]) -> None:
    """Copy the choice and write `cuts.jsonl.gz` and `manifest.tsv`; the same corpus gives the same bytes."""
    (folder / "flac").mkdir(parents=True, exist_ok=True)
    picked = [(which, clip) for which, clips in sets.items() for clip in evenly(clips, PER_SET)]
    rows, cuts = ["\t".join(COLUMNS)], []
    for which, clip in picked:
        file = f"flac/{clip.identity}.flac"
        shutil.copyfile(corpus / clip.path, folder / file)
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        rows.append("\t".join((clip.identity, file, which, clip.speaker, f"{clip.seconds:.3f}", clip.text, digest)))
        cuts.append(cut(replace(clip, path=file)).to_dict())
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    write_lines(folder / "cuts.jsonl.gz", cuts)

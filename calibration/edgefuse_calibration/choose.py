"""Choose speech to calibrate on:  python -m edgefuse_calibration.choose CORPUS OUT --count 48 --seed 1.

Quantization wants speech that is like all of the corpus at a fraction of its size. The choice takes turns among strata, which
are voice families, thirds of length and thirds of loudness, and depends on nothing but the corpus, the count and the seed.
OUT is a folder of speech with its manifest, and `set.toml`, which names every utterance by its id and SHA-256.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import click
import numpy as np
import soundfile
from lhotse import MonoCut

from edgefuse_calibration.corpus import load_cuts
from edgefuse_calibration.demo import COLUMNS, voice_family
from edgefuse_calibration.errors import CorpusError

POOL = 20  # candidates for each utterance that is chosen: their loudness is measured
THIRDS = 3


@dataclass(frozen=True)
class Candidate:
    """One utterance that may be chosen: `loudness_db` is the mean power against full scale."""

    identity: str
    path: Path
    voice: str
    text: str
    seconds: float
    loudness_db: float


def candidate(cut: MonoCut) -> Candidate:
    """Measure one recording."""
    path = Path(cut.recording.sources[0].source)
    samples, _ = soundfile.read(path, dtype="float32")
    power = float(np.square(samples, dtype=np.float64).mean())
    supervision = cut.supervisions[0]
    return Candidate(cut.id, path, supervision.speaker, supervision.text, cut.duration, 10 * np.log10(max(power, 1e-12)))


def thirds(values: Sequence[float]) -> list[int]:
    """Of each value, whether it is among the smallest, the middle or the largest."""
    ranks = np.argsort(np.argsort(values, kind="stable"))
    return [int(rank) * THIRDS // len(values) for rank in ranks]


def chosen(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Take turns among the strata; `candidates` are in the order in which each stratum gives them."""
    lengths, loudness = thirds([c.seconds for c in candidates]), thirds([c.loudness_db for c in candidates])
    strata: defaultdict[tuple[int, int, str], list[Candidate]] = defaultdict(list)
    for each, length, loud in zip(candidates, lengths, loudness, strict=True):
        strata[length, loud, voice_family(each.voice)].append(each)
    in_turn = sorted(strata, key=lambda stratum: hashlib.sha256(repr(stratum).encode()).digest())
    turns = chain.from_iterable(zip_longest(*(strata[stratum] for stratum in in_turn)))
    return sorted(islice((each for each in turns if each), count), key=lambda each: each.identity)


def write(folder: Path, utterances: Sequence[Candidate], corpus: Path, which: str, seed: int) -> None:
    """The recordings, their manifest, and the description of the set."""
    (folder / "flac").mkdir(parents=True, exist_ok=True)
    rows, described = ["\t".join(COLUMNS)], [f'corpus = """{(corpus / "recipe.json").read_text(encoding="utf-8").strip()}"""']
    described += [f'set = "{which}"', f"seed = {seed}"]
    for each in utterances:
        file = f"flac/{each.identity}.flac"
        shutil.copyfile(each.path, folder / file)
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        rows.append("\t".join((each.identity, file, "calibration", each.voice, f"{each.seconds:.3f}", each.text, digest)))
        described += ["", "[[utterance]]", f'id = "{each.identity}"', f'sha256 = "{digest}"', f'voice = "{each.voice}"']
        described += [f"seconds = {each.seconds:.3f}", f"loudness_db = {each.loudness_db:.1f}"]
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "set.toml").write_text("\n".join(described) + "\n", encoding="utf-8")


def choose(corpus: Path, folder: Path, *, count: int, seed: int, which: str) -> list[Candidate]:
    """Choose from a set of a corpus, and write what was chosen."""
    if not (corpus / f"{which}.cuts.jsonl.gz").is_file():
        raise CorpusError(
            f"{corpus} has no set {which!r}.", hint="Make a corpus with: python -m edgefuse_calibration.synthesize CORPUS"
        )
    order = sorted(load_cuts(corpus, which), key=lambda cut: hashlib.sha256(f"{seed}/{cut.id}".encode()).digest())
    utterances = chosen([candidate(cut) for cut in order[: POOL * count]], count)
    write(folder, utterances, corpus, which, seed)
    return utterances


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--set", "which", default="train", show_default=True, help="Never one that is tested on.")
def main(*, corpus: Path, out: Path, count: int, seed: int, which: str) -> None:
    """Choose utterances of CORPUS to calibrate on, and copy them to OUT."""
    try:
        utterances = choose(corpus, out, count=count, seed=seed, which=which)
    except CorpusError as error:
        click.echo(f"error: {error}\n  hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"{out}: {len(utterances)} utterances, {sum(each.seconds for each in utterances):.0f} s")


if __name__ == "__main__":
    main()

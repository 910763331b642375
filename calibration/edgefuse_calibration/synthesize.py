"""Make the corpus:  python -m edgefuse_calibration.synthesize OUT --hours 30 --seed 1 --jobs 2 [--demo DIR].

Every choice about an utterance is drawn from a hash of the seed and the utterance's id, so that the corpus does not
depend on --jobs nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, groupby, islice
from pathlib import Path

import click
import numpy as np
import soundfile

from edgefuse_calibration.acoustics import SAMPLE_RATE, Scene, Waveform, recorded, resized, trimmed
from edgefuse_calibration.corpus import Clip, write_manifests
from edgefuse_calibration.demo import write_demo
from edgefuse_calibration.engines import ENGINES, ESPEAK, Speaking, Speech, require
from edgefuse_calibration.errors import CorpusError, OtherRecipe
from edgefuse_calibration.sentences import SETS, phrase_book, sentences

ROUND = 256  # utterances between two looks at the goal
SHORTEST_S = 0.8
TALKERS = 4  # fewer are understood word by word

Span = tuple[float, float]


@dataclass(frozen=True)
class Variety:
    """How widely the utterances of one set differ: engines by share, uniform spans for the rest."""

    engines: Mapping[str, float]
    longest_s: float
    size: Span
    stretch: Span
    pitch: Span
    noises: Mapping[str, float]
    noisy: float  # share of the utterances with noise
    snr_db: Span
    roomy: float  # share of the utterances with reverberation
    reverberation_s: Span
    direct_db: Span


KNOWN_VOICES = {"flite": 0.6, "espeak-ng": 0.4}  # by count; flite is closer to people
TRAINING = Variety(
    engines={"flite": 0.32, "espeak-ng": 0.18, "pico": 0.1, "hibari": 0.1, "piper": 0.1, "rhvoice": 0.2},
    longest_s=6.0,
    size=(0.88, 1.14),
    stretch=(0.85, 1.25),
    pitch=(0.85, 1.2),
    noises={"white": 0.2, "pink": 0.3, "brown": 0.2, "babble": 0.3},
    noisy=0.5,
    snr_db=(10, 35),
    roomy=0.3,
    reverberation_s=(0.12, 0.5),
    direct_db=(3, 15),
)
MILD = Variety(
    engines=KNOWN_VOICES,
    longest_s=5.0,
    size=(0.95, 1.06),
    stretch=(0.92, 1.12),
    pitch=(0.94, 1.06),
    noises={"white": 0.2, "pink": 0.5, "brown": 0.3},
    noisy=0.5,
    snr_db=(20, 35),
    roomy=0.2,
    reverberation_s=(0.1, 0.25),
    direct_db=(8, 15),
)
UNSEEN = Variety(**{**vars(MILD), "engines": {"festival": 1.0}})
VARIETIES = {"train": TRAINING, "dev": MILD, "seen": MILD, "unseen": UNSEEN}


@dataclass(frozen=True)
class Utterance:
    """One utterance before it is spoken: everything is decided."""

    identity: str
    which: str
    engine: str
    speaking: Speaking
    scene: Scene

    @property
    def path(self) -> str:
        """Where it goes, relative to the corpus folder."""
        return f"flac/{self.which}/{self.identity}.flac"


@dataclass(frozen=True)
class Goal:
    """When a set is large enough: both conditions hold."""

    seconds: float
    utterances: int

    def reached(self, clips: Sequence[Clip], seconds: float) -> bool:
        """Whether these clips, `seconds` long together, are enough."""
        return seconds >= self.seconds and len(clips) >= self.utterances


def chosen(shares: Mapping[str, float], draw: np.random.Generator) -> str:
    """One key, drawn by share."""
    return str(draw.choice(list(shares), p=list(shares.values())))


def planned(which: str, place: int, sentence: str, seed: int) -> Utterance:
    """Decide everything about the utterance at this place of its set."""
    identity = f"{which}-{place:06d}"
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{identity}".encode()).digest()[:8], "big"))
    variety = VARIETIES[which]
    engine = ENGINES[chosen(variety.engines, draw)]
    speaking = Speaking(
        sentence=sentence,
        voice=str(draw.choice(list(engine.voices))),
        stretch=draw.uniform(*variety.stretch),
        pitch=draw.uniform(*variety.pitch),
    )
    return Utterance(identity, which, engine.name, speaking, scene(variety, draw))


def scene(variety: Variety, draw: np.random.Generator) -> Scene:
    """Decide how the utterance is recorded."""
    return Scene(
        size=draw.uniform(*variety.size),
        lead_s=draw.uniform(0.04, 0.25),
        tail_s=draw.uniform(0.06, 0.3),
        reverberation_s=draw.uniform(*variety.reverberation_s) if draw.random() < variety.roomy else None,
        direct_db=draw.uniform(*variety.direct_db),
        noise=chosen(variety.noises, draw) if draw.random() < variety.noisy else None,
        snr_db=draw.uniform(*variety.snr_db),
        peak_db=draw.uniform(-18, -1),
        seed=int(draw.integers(2**32)),
    )


def talkers(scene: Scene) -> list[Waveform]:
    """The people in the background of a scene with babble; they say training sentences."""
    if scene.noise != "babble":
        return []
    draw = np.random.default_rng(scene.seed)
    lines = islice(sentences("train", seed=scene.seed), TALKERS)
    speakings = [Speaking(line, str(draw.choice(list(ESPEAK.voices))), 1.0, 1.0) for line in lines]
    return [trimmed(resized(speech.waveform, speech.rate, 1.0)) for speech in ESPEAK.speak(speakings)]


def kept(folder: Path, utterance: Utterance, speech: Speech) -> Clip | None:
    """Record the speech in its scene and write it, or None if it came out too short or too long for its set."""
    voice = trimmed(resized(speech.waveform, speech.rate, utterance.scene.size))
    margins_s = utterance.scene.lead_s + utterance.scene.tail_s
    if not SHORTEST_S <= len(voice) / SAMPLE_RATE + margins_s <= VARIETIES[utterance.which].longest_s:
        return None
    sound = recorded(voice, utterance.scene, talkers(utterance.scene))
    part = (folder / utterance.path).with_suffix(".part")
    soundfile.write(part, sound, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    part.replace(folder / utterance.path)
    return clip(utterance, len(sound))


def clip(utterance: Utterance, samples: int) -> Clip:
    """The utterance as it lies on disk."""
    speaker = f"{utterance.engine}/{utterance.speaking.voice}"
    sentence = utterance.speaking.sentence
    return Clip(utterance.identity, utterance.path, samples, sentence, speaker, utterance.engine, utterance.scene)


def made(folder: Path, batch: Sequence[Utterance]) -> list[Clip | None]:
    """Speak one batch of one engine, passing over what an earlier run wrote."""
    there = {each.identity: folder / each.path for each in batch if (folder / each.path).exists()}
    todo = [each for each in batch if each.identity not in there]
    speeches = ENGINES[batch[0].engine].speak([each.speaking for each in todo]) if todo else ()
    new = {each.identity: kept(folder, each, speech) for each, speech in zip(todo, speeches, strict=True)}
    old = {each.identity: each for each in batch if each.identity in there}
    return [clip(old[name], soundfile.info(there[name]).frames) for name in there] + list(new.values())


def batches(utterances: Sequence[Utterance]) -> Iterator[Sequence[Utterance]]:
    """Cut a round into what each engine speaks at one go."""
    for engine, group in groupby(sorted(utterances, key=lambda each: each.engine), key=lambda each: each.engine):
        waiting = list(group)
        size = ENGINES[engine].batch
        yield from (waiting[start : start + size] for start in range(0, len(waiting), size))


def gathered(folder: Path, which: str, goal: Goal, seed: int, pool: ThreadPoolExecutor) -> list[Clip]:
    """Make utterances of one set in order until the goal is reached; files beyond it are removed."""
    clips: list[Clip] = []
    seconds = 0.0
    (folder / "flac" / which).mkdir(parents=True, exist_ok=True)
    plan = (planned(which, place, sentence, seed) for place, sentence in zip(count(), sentences(which, seed=seed)))
    while not goal.reached(clips, seconds):
        outcomes = pool.map(lambda batch: made(folder, batch), batches(list(islice(plan, ROUND))))
        for each in sorted((each for batch in outcomes for each in batch if each), key=lambda each: each.identity):
            if goal.reached(clips, seconds):
                (folder / each.path).unlink()
            else:
                clips.append(each)
                seconds += each.seconds
        click.echo(f"{which}: {len(clips)} utterances, {seconds / 3600:.2f} h", err=True)
    return clips


def recipe(seed: int) -> Mapping[str, str | int]:
    """What the sound of an utterance depends on, apart from the engines' versions."""
    ingredients = repr((VARIETIES, dict(phrase_book()), [(engine.name, engine.voices) for engine in ENGINES.values()]))
    return {"seed": seed, "sha256": hashlib.sha256(ingredients.encode()).hexdigest()}


def claim(folder: Path, seed: int) -> None:
    """Mark the folder with the recipe; raise OtherRecipe if another one made what lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    label = folder / "recipe.json"
    wanted = json.dumps(recipe(seed), indent=2) + "\n"
    if label.exists() and label.read_text(encoding="utf-8") != wanted:
        sentence = f"{folder} holds a corpus that was made with another seed, phrase book or variety."
        raise OtherRecipe(sentence, hint="Name an empty folder, or remove this one.")
    label.write_text(wanted, encoding="utf-8")


def synthesize(folder: Path, goals: Mapping[str, Goal], *, seed: int, jobs: int) -> Mapping[str, Sequence[Clip]]:
    """Make the sets that have a goal, with their manifests."""
    require([ENGINES[name] for name in sorted({name for which in goals for name in VARIETIES[which].engines})])
    claim(folder, seed)
    clips: dict[str, Sequence[Clip]] = {}
    # Threads suffice: the engines are processes, and numpy and soxr let go of the lock.
    with ThreadPoolExecutor(jobs) as pool:
        for which, goal in goals.items():
            clips[which] = gathered(folder, which, goal, seed, pool)
            write_manifests(folder, which, clips[which])
    return clips


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--hours", default=30.0, show_default=True, help="Hours of training speech.")
@click.option("--tests", default=400, show_default=True, help="Utterances of each test set; dev has half as many.")
@click.option("--seed", default=1, show_default=True, help="What every draw depends on.")
@click.option("--jobs", default=2, show_default=True, help="Engines that speak at the same time.")
@click.option("--demo", type=click.Path(path_type=Path, file_okay=False), help="Also write a small demo set here.")
def main(*, out: Path, hours: float, tests: int, seed: int, jobs: int, demo: Path | None) -> None:  # one parameter per option
    """Speak the corpus into OUT, going on where an earlier run stopped."""
    counts = {"dev": tests // 2, "seen": tests, "unseen": tests}
    goals = {which: Goal(0.0, counts[which]) for which in SETS if which in counts} | {"train": Goal(hours * 3600, 1)}
    try:
        clips = synthesize(out, goals, seed=seed, jobs=jobs)
        if demo is not None:
            write_demo(out, demo, {which: clips[which] for which in ("seen", "unseen")})
    except CorpusError as error:
        click.echo(f"error: {error}\n  hint: {error.hint}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

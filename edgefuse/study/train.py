"""One row of the study with one seed: trained, and heard on both test sets, whole and in chunks of 640 ms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgefuse import checkpoint as checkpoints
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import Refused, TrainingDiverged
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.model.reestimate import reestimate
from edgefuse.study.results import CHUNKED, Outcome
from edgefuse.study.rows import Plan, Row, config_at_depth, require_built
from edgefuse.train.batches import trainable
from edgefuse.train.loop import (
    EVALUATION_BATCH_SECONDS,
    LAST,
    REESTIMATION_SECONDS,
    TESTS,
    Precision,
    Speech,
    finish,
    fit,
    load_speech,
)
from edgefuse.train.module import Answer, evaluate
from edgefuse.train.pieces import learn_tokens

if TYPE_CHECKING:
    from edgefuse.train.module import Training
    from edgefuse.train.recipe import Recipe
    from edgefuse.values import Checkpoint
    from edgefuse.verify.wer import WordErrors

CHUNK_MS, LEFT_MS = 640, 2560
CONVERSION_SHARE = 0.2  # of the steps, to turn a trained network's norms into others


@dataclass(frozen=True, slots=True)
class Corpus:
    """What every row is trained and tested on."""

    folder: Path
    train: Speech
    dev: Speech
    tests: Mapping[str, Speech]
    tokens: Tokens


def load_corpus(folder: Path, vocabulary_size: int, dev_utterances: int = 100) -> Corpus:
    """The sets of a corpus folder, their features computed at the first call, and the vocabulary of its transcripts."""
    stores = folder / "features"
    train = load_speech(folder, "train", stores)
    tokens = learn_tokens((each.text for each in train.store.utterances.values()), vocabulary_size)
    dev = load_speech(folder, "dev", stores, utterances=dev_utterances)
    tests = {name: load_speech(folder, name, stores, statistics=train.store) for name in TESTS}
    return Corpus(folder, train, dev, tests, tokens)


def train_row(plan: Plan, row: Row, seed: int, corpus: Corpus, folder: Path) -> Outcome:
    """Train a row, or go on with it, and measure it; a loss that is no number is an outcome.

    Raises:
        Refused: this encoder does not build the row's architecture.
        MissingFile: the row that it begins with has not been trained.
    """
    recipe = plan.recipe_of(row, seed)
    config = recipe.encoder(len(corpus.tokens))
    require_built(config, sampled_depth=recipe.sampled_depth)
    place = folder / "runs" / f"{row.name}-{seed}"
    told = as_json(recipe)
    try:
        training, steps = _trained(plan, row, seed, corpus, folder, place)
    except TrainingDiverged as error:
        return Outcome(row.name, seed, "diverged", told, told=error.sentence)
    encoder = finish(training, corpus.train, corpus.tokens)
    _write_checkpoint(place, encoder, corpus)
    errors = {part: _errors(answer, heard, corpus) for part, heard, answer in _parts(row, encoder, corpus, recipe)}
    return Outcome(row.name, seed, "trained", told, steps=steps, errors=errors)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as its file will have it."""
    told: dict[str, Any] = json.loads(json.dumps(recipe.to_json()))
    return told


def _trained(plan: Plan, row: Row, seed: int, corpus: Corpus, folder: Path, place: Path) -> tuple[Training, int]:
    recipe = plan.recipe_of(row, seed)
    config = recipe.encoder(len(corpus.tokens))
    precision: Precision = "bf16" if torch.cuda.is_available() else "fp32"
    cuts = trainable(corpus.train.cuts, corpus.train.store, corpus.tokens)
    speech, resume = replace(corpus.train, cuts=cuts), (place / LAST).is_file()
    place.mkdir(parents=True, exist_ok=True)
    begin = None
    if row.converts:
        begin = _converted(checkpoints.read(folder / "runs" / f"{row.converts}-{seed}" / "checkpoint"), config)
        recipe = replace(recipe, epochs=max(1, round(CONVERSION_SHARE * recipe.epochs)), characters_first=0.0)
    training = fit(speech, corpus.dev, place, recipe, config, corpus.tokens, begin=begin, resume=resume, precision=precision)
    return training, training.steps


def _converted(begin: Checkpoint, config: EncoderConfig) -> Checkpoint:
    """A trained network with its norms turned into those of a config."""
    raise Refused(f"This tree cannot turn {begin.config.norm!r} norms into {config.norm!r}.", hint="Leave the row out.")


def _write_checkpoint(place: Path, encoder: Encoder, corpus: Corpus) -> None:
    written = place / "checkpoint"
    written.mkdir(exist_ok=True)
    store = corpus.train.store
    checkpoints.write(written, checkpoints.of_encoder(encoder, store.mean, store.istd, corpus.tokens.symbols))


def _parts(row: Row, encoder: Encoder, corpus: Corpus, recipe: Recipe) -> Iterator[tuple[str, EncoderConfig, Answer]]:
    """What is measured of a row: the whole, and where it has some, fewer of its layers."""
    yield "", encoder.config, encoder
    for depth in row.depths:
        shallow = Encoder(config_at_depth(encoder.config, depth)).eval()
        shallow.load_state_dict(encoder.state_dict())
        clean = corpus.train.batches(corpus.tokens, EVALUATION_BATCH_SECONDS, seed=recipe.seed)
        reestimate(shallow, _first_seconds(clean, REESTIMATION_SECONDS))
        yield f"{depth} layers", shallow.config, shallow


def _first_seconds(batches: Any, seconds: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # noqa: ANN401 - as `Batches`
    heard = 0.0
    for batch in batches:
        yield batch.features, batch.lengths
        heard += float(batch.lengths.sum()) / 100
        if heard >= seconds:
            return


def _errors(answer: Answer, config: EncoderConfig, corpus: Corpus) -> dict[str, WordErrors]:
    """On both test sets, whole and in chunks."""
    chunks = Context(-(-CHUNK_MS // config.frame_ms), -(-LEFT_MS // config.frame_ms))
    found: dict[str, WordErrors] = {}
    for told, context in (("", FULL), (CHUNKED, chunks)):
        for name, spoken in corpus.tests.items():
            batches = spoken.batches(corpus.tokens, EVALUATION_BATCH_SECONDS, shuffle=False)
            found[name + told] = evaluate(answer, batches, corpus.tokens, context)
    return found

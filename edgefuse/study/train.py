"""One row of the study with one seed: trained, and heard on both test sets, whole and in chunks of 640 ms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgefuse import checkpoint as checkpoints
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import TrainingDiverged
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.model.reestimate import reestimate
from edgefuse.study.results import CHUNKED, Outcome
from edgefuse.study.rows import Plan, Row, config_at_depth, require_built
from edgefuse.train.convert_norm import convert_norm
from edgefuse.train.corpora import DEV, TRAIN
from edgefuse.train.loop import LAST, usual_precision
from edgefuse.train.metrics import answer_again
from edgefuse.train.module import Answer, evaluate
from edgefuse.train.pieces import learn_tokens
from edgefuse.train.speech import EVALUATION_BATCH_SECONDS, Speech, fitting, open_speech, training_speech
from edgefuse.train.train import finish, fit

if TYPE_CHECKING:
    from edgefuse.train.recipe import Recipe
    from edgefuse.verify.wer import WordErrors

CHUNK_MS, LEFT_MS = 640, 2560
FIRST, SECOND = "first pass", "second pass"


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
    heard = open_speech(folder)
    train = heard.load(TRAIN)
    tokens = learn_tokens([each.text for each in train.store.utterances.values()], vocabulary_size)
    dev = heard.load(DEV, utterances=dev_utterances)
    tests = {name: heard.load(name, statistics=train.store) for name in heard.corpus.tests}
    return Corpus(folder, train, dev, tests, tokens)


def train_row(plan: Plan, row: Row, seed: int, corpus: Corpus, folder: Path) -> Outcome:
    """Train a row, or go on with it, and measure it; a loss that is no number is an outcome.

    Raises:
        Refused: this encoder does not build the row's architecture.
        MissingFile: the row that it begins with has not been trained.
    """
    recipe = plan.recipe_of(row, seed)
    config = recipe.encoder(len(corpus.tokens))
    require_built(config)
    place = folder / "runs" / f"{row.name}-{seed}"
    told = as_json(recipe)
    place.mkdir(parents=True, exist_ok=True)
    try:
        encoder, steps = _converted(row, corpus, folder, place, recipe) if row.converts else _fitted(corpus, place, recipe)
    except TrainingDiverged as error:
        return Outcome(row.name, seed, "diverged", told, usual_precision(), told=error.sentence)
    store = corpus.train.store
    written = checkpoints.of_encoder(encoder, store.mean, store.istd, corpus.tokens.symbols)
    checkpoints.write(place / "checkpoint", written)
    errors = {part: _errors(answer, heard, corpus) for part, heard, answer in _parts(row, encoder, corpus, recipe)}
    return Outcome(row.name, seed, "trained", told, usual_precision(), steps=steps, errors=errors)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as its file will have it."""
    told: dict[str, Any] = json.loads(json.dumps(recipe.to_json()))
    return told


def _fitted(corpus: Corpus, place: Path, recipe: Recipe) -> tuple[Encoder, int]:
    """Train from the start, or go on with what was interrupted; the encoder, and how many steps it took."""
    config = recipe.encoder(len(corpus.tokens))
    speech, resume = fitting(corpus.train, corpus.tokens, config), (place / LAST).is_file()
    training = fit(speech, corpus.dev, place, recipe, config, corpus.tokens, resume=resume, precision=usual_precision())
    return finish(training, corpus.train, corpus.tokens), training.steps


def _converted(row: Row, corpus: Corpus, folder: Path, place: Path, recipe: Recipe) -> tuple[Encoder, int]:
    """Turn the norms of another row's checkpoint into those of this row, taught by what it was."""
    start, resume = folder / "runs" / f"{row.converts}-{recipe.seed}" / "checkpoint", (place / LAST).is_file()
    convert_norm(start, corpus.folder, place, recipe, resume=resume, threads=torch.get_num_threads())
    return checkpoints.encoder_of(checkpoints.read(place / "checkpoint")), recipe.epochs * (recipe.epoch_batches or 0)


def _parts(row: Row, encoder: Encoder, corpus: Corpus, recipe: Recipe) -> Iterator[tuple[str, EncoderConfig, Answer]]:
    """What is measured of a row: the whole, where it has some fewer of its layers, and of a cascade both passes."""
    if encoder.config.second_pass:
        yield FIRST, encoder.config, lambda *heard: _first_pass(encoder, *heard)
        yield SECOND, encoder.config, lambda *heard: answer_again(encoder, *heard)
        return
    yield "", encoder.config, encoder
    for depth in row.depths:
        shallow = Encoder(config_at_depth(encoder.config, depth)).eval()
        shallow.load_state_dict(encoder.state_dict())
        reestimate(shallow, training_speech(corpus.train, corpus.tokens, recipe, shallow.config.frame_ms))
        yield f"{depth} layers", shallow.config, shallow


def _first_pass(encoder: Encoder, features: Tensor, lengths: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    return encoder.answers(features, lengths, context)[0], lengths // encoder.config.reduction


def _errors(answer: Answer, config: EncoderConfig, corpus: Corpus) -> dict[str, WordErrors]:
    """On both test sets, whole and in chunks."""
    chunks = Context(-(-CHUNK_MS // config.frame_ms), -(-LEFT_MS // config.frame_ms))
    found: dict[str, WordErrors] = {}
    for told, context in (("", FULL), (CHUNKED, chunks)):
        for name, spoken in corpus.tests.items():
            batches = spoken.batches(corpus.tokens, EVALUATION_BATCH_SECONDS, learnt=False)
            found[name + told] = evaluate(answer, batches, corpus.tokens, context)
    return found

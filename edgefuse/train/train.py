"""Training with transcripts: a corpus folder and a recipe in, a checkpoint and its word error rates out.

A run folder holds ``last.ckpt`` (what ``resume`` goes on from, written after every epoch and every ten minutes), ``curves/``
(see them with: ``tensorboard --logdir``), and at the end ``checkpoint/`` (what edgefuse folds) and ``metrics.json`` (its word
error rates; of Chinese, character error rates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch

from edgefuse import checkpoint
from edgefuse.decode.tokens import SPACE, Tokens
from edgefuse.errors import UsageError
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.normalization import UnifiedNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.train import ranks
from edgefuse.train.corpora import TRAIN
from edgefuse.train.loop import EpochBatches, Precision, require_free_run, run, usual_precision
from edgefuse.train.metrics import Trained, answer_again, contexts_of, spell_spaceless, test, write_metrics
from edgefuse.train.module import Training
from edgefuse.train.pieces import learn_tokens
from edgefuse.train.recipe import PRETRAINED, Recipe
from edgefuse.train.speech import Speech, fitting, heard_by, open_speech, training_speech
from edgefuse.values import Checkpoint

FEWEST_SPELLED = 0.5  # of the texts, by the tokens of a checkpoint that keeps them
AGAIN_MS = 640  # the chunks behind which the second pass of a cascade is tested


def train(
    speech: Path,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    threads: int = 1,
    precision: Precision | None = None,
    features: Path | None = None,
    start: Path | None = None,
) -> Trained | None:
    """Train an encoder on the set ``train`` of a corpus (see `corpora` for its layouts), and evaluate it on all its tests.

    ``features`` keeps the log-mel frames, ``speech``/features by default; several trainings may share it. ``resume`` goes
    on from the last step that was kept in ``output``; without it a used ``output`` is refused. ``start`` is a checkpoint whose
    encoder, of whatever architecture, is where the training begins; features are normalized as it has learnt to hear. Its tokens
    stay where they spell most of the corpus and the recipe does not want another number of them; else others are learnt, for a
    fresh head. Characters need not come first any more. Neither holds for a checkpoint that was pre-trained without words. Of
    several processes the first returns what was trained, the others nothing.
    """
    knows_words = start is not None and not (start / PRETRAINED).is_file()
    if knows_words:
        recipe = replace(recipe, characters_first=0.0)
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    begin = checkpoint.read(start) if start else None
    if begin and begin.config.folded:
        raise UsageError(
            f"{start} is folded: it has no norms left to train with.",
            hint="Fine-tune it for fewer bits with --precision, or begin with what it was folded from.",
        )
    with ranks.joined():
        heard = open_speech(speech, features)
        corpus = heard_by(begin, heard.load(TRAIN)) if begin else heard.load(TRAIN)
        _require_transcripts(corpus)
        texts = [utterance.text for utterance in corpus.store.utterances.values()]
        tokens = tokens_for(texts, recipe, begin if knows_words else None)
        config = _config_of(begin, recipe, tokens) if begin else recipe.encoder(len(tokens))
        corpus = fitting(corpus, tokens, config)
        dev = heard.dev()
        output.mkdir(parents=True, exist_ok=True)
        training = fit(
            corpus, dev, output, recipe, config, tokens, begin=begin, resume=resume, precision=precision or usual_precision()
        )
    if not ranks.is_first():
        return None
    encoder = finish(training, corpus, tokens)
    written = output / "checkpoint"
    checkpoint.write(written, checkpoint.of_encoder(encoder, corpus.store.mean, corpus.store.istd, tokens.symbols))
    errors = test(encoder, heard, corpus.store, tokens, contexts_of(encoder.config))
    if config.second_pass:
        after = {f", second pass after {AGAIN_MS} ms": contexts_of(config)[f", {AGAIN_MS} ms"]}
        errors |= test(partial(answer_again, encoder), heard, corpus.store, tokens, after)
    write_metrics(output, recipe.to_json_from(begin.digest) if begin else recipe.to_json(), errors)
    return Trained(written, errors, characters=spell_spaceless(tokens))


def fit(
    corpus: Speech,
    dev: Speech,
    output: Path,
    recipe: Recipe,
    config: EncoderConfig,
    tokens: Tokens,
    *,
    begin: Checkpoint | None = None,
    resume: bool = False,
    precision: Precision = "fp32",
) -> Training:
    """Run the epochs, from the start or from ``last.ckpt``; the same seed gives the same weights either way (on a CPU).

    With ``begin`` the weights start as that checkpoint's, but for the head of another vocabulary.
    """
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    batches = EpochBatches(corpus, dev, tokens, recipe)
    encoder = Encoder(config)
    if begin is not None:
        _begin_with(encoder, begin, tokens)
    for norm in encoder.modules():
        if isinstance(norm, UnifiedNorm):
            norm.warm_up, norm.outlier_filtration = recipe.unified_warm_up, recipe.outlier_filtration
            norm.restart()
    training = Training(encoder, tokens, recipe, batches.steps)
    run(training, batches, output, resume=resume, precision=precision)
    return training


def _require_transcripts(corpus: Speech) -> None:
    if not any(utterance.text.split() for utterance in corpus.store.utterances.values()):
        raise UsageError("No utterance of the corpus has a transcript.", hint="Learn from speech alone with: edgefuse pretrain")


def tokens_for(texts: Sequence[str], recipe: Recipe, begin: Checkpoint | None) -> Tokens:
    """The tokens of the checkpoint to begin with, where they are as many as are wanted and spell most texts; or learnt ones.

    What a few texts have besides is left out later, and said; to lose the head for it would cost more.
    """
    if begin and recipe.vocabulary_size in (None, len(begin.tokens)):
        if sum(set(text.replace(" ", SPACE)) <= {*begin.tokens} for text in texts) >= FEWEST_SPELLED * len(texts):
            return Tokens(begin.tokens)
        ranks.say("The checkpoint's tokens do not spell the corpus: others are learnt, and the head begins anew.")
    return learn_tokens(texts, recipe.pieces)


def _config_of(begin: Checkpoint, recipe: Recipe, tokens: Tokens) -> EncoderConfig:
    """The checkpoint's own encoder, for these tokens."""
    return replace(begin.config, vocabulary_size=len(tokens), dropout=recipe.dropout)


def _begin_with(encoder: Encoder, begin: Checkpoint, tokens: Tokens) -> None:
    """Load a checkpoint's weights; the head stays fresh where it knows other tokens."""
    weights = dict(begin.weights)
    if tuple(begin.tokens) != tuple(tokens.symbols):
        weights |= {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(("ctc.", "second_ctc."))}
    encoder.load_state_dict(weights)


def finish(training: Training, corpus: Speech, tokens: Tokens) -> Encoder:
    """The average of the weights, its batch statistics measured on what it was trained on, in evaluation mode."""
    encoder = training.averaged.cpu().requires_grad_(requires_grad=True)
    reestimate(encoder, training_speech(corpus, tokens, training.recipe, encoder.config.frame_ms))
    return encoder.eval()

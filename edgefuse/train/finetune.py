"""Fine-tuning for fewer bits: a folded checkpoint and a scheme in, a folded checkpoint that bears the scheme better out.

Weights are rounded in every step, and values where the scheme has ranges for them, so that the loss is that of the quantized
graph; ranges are fixed, from calibration. There are no norms left, and none come back: only weights and biases move.

What is written are the rounded weights: rounding them again changes nothing, so the float model that an export is held against
has the very weights of the artifact. The gate of that export therefore says nothing of what was lost to fewer bits, only that no
more is lost on the way to the runtime; what was lost is the distance between the word errors here, of the checkpoint in float and
of the one that was fine-tuned.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError
from edgefuse.fold import exactness
from edgefuse.fold.exactness import probe
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.lower import Chunks, lower
from edgefuse.lower.sites import sites_of
from edgefuse.model import Encoder
from edgefuse.quantize.calibrate import calibration_of, kind_of
from edgefuse.quantize.encoder import Rounding, require_learnable
from edgefuse.quantize.plan import plan, require_one_pass
from edgefuse.quantize.scheme import Scheme, require_blocks_apart
from edgefuse.refold import fold_exactly
from edgefuse.speech import TestSet, Utterance
from edgefuse.train import ranks
from edgefuse.train.corpora import TRAIN, Corpus
from edgefuse.train.loop import EpochBatches, require_free_run, run
from edgefuse.train.metrics import WHOLE, Trained, contexts_of, spell_spaceless, test, write_metrics
from edgefuse.train.module import FineTuning
from edgefuse.train.recipe import Recipe
from edgefuse.train.speech import Speech, fitting, heard_by, open_speech
from edgefuse.values import FoldedModel

SCHEME = "scheme.toml"
CHUNKS = Chunks(640, 2560)  # whose ranges all chunks have
FLOAT, BEFORE = ", float before", ", rounded before"  # behind a test set: what the checkpoint heard in it as it was given


def fine_tune(
    start: Path,
    scheme: Scheme,
    speech: Path,
    output: Path,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    resume: bool = False,
    threads: int = 1,
    features: Path | None = None,
) -> Trained | None:
    """Fine-tune the folded checkpoint `start` for a scheme; its word errors are those of the quantized graph.

    `scheme.toml` in the run's folder is the scheme to export it with: without equalization, which would leave the grid on which
    the weights have been trained.

    Raises:
        UsageError: a checkpoint that is not folded, or still has a batch norm; a scheme that needs ranges, and no calibration.
        BadScheme: a scheme of other layers, or of what training cannot win back.
        BadCalibration: calibration speech that is tested on, or that no range should be taken from.
    """
    torch.set_num_threads(threads)
    require_free_run(output, resume=resume)
    require_learnable(scheme)
    scheme = replace(scheme, equalize=False, bias_correction=False, rounding="max")  # training does what these are for
    folded = _read(start)
    tokens = Tokens(folded.checkpoint.tokens)
    with ranks.joined():
        heard = open_speech(speech, features)
        rounding = rounding_of(folded, scheme, calibration, heard.corpus)
        corpus = heard_by(folded.checkpoint, heard.load(TRAIN))
        corpus = fitting(corpus, tokens, folded.checkpoint.config)
        dev = heard.dev()
        output.mkdir(parents=True, exist_ok=True)
        training = fit(folded, rounding, corpus, dev, output, recipe, resume=resume)
    if not ranks.is_first():
        return None
    tuned = settled(training, folded)
    exact = exactness(tuned.checkpoint, tuned, *probe(KALDI_80.mel_bins))
    store.write_folded(output / "checkpoint", tuned, exact, overwrite=True)
    spoken = (heard, corpus.store, tokens)
    given, made = (checkpoints.encoder_of(each.checkpoint) for each in (folded, tuned))
    before = {FLOAT: test(given, *spoken, WHOLE), BEFORE: test(partial(rounding.answer, given), *spoken, WHOLE)}
    errors = {name + when: counted for when, found in before.items() for name, counted in found.items()}
    errors |= test(partial(rounding.answer, made), *spoken, contexts_of(folded.checkpoint.config))
    (output / SCHEME).write_text(scheme.to_toml(), encoding="utf-8")
    write_metrics(output, {"scheme": scheme.to_json(), **recipe.to_json_from(folded.digest)}, errors)
    return Trained(output / "checkpoint", errors, characters=spell_spaceless(tokens))


def rounding_of(folded: FoldedModel, scheme: Scheme, place: Path | None, corpus: Corpus) -> Rounding:
    """Lay a scheme out on the graphs of whole utterances and of chunks; ranges are of speech that `corpus` does not test on."""
    require_one_pass(folded.checkpoint.config)
    require_blocks_apart(folded.checkpoint.config)
    program = lower(folded, (1.0,), "fp32", (CHUNKS,))
    scheme.precisions(tuple(site.layer for site in sites_of(program.entries[0].graph)))  # before anything is listened to
    if not scheme.calibrated:
        return Rounding(*(plan(entry.graph, scheme, {}) for entry in program.entries))
    if place is None:
        raise UsageError(f"{scheme.name} needs ranges.", hint="Say on which speech: --calibration SPEECH")
    calibration = calibration_of(place, folded, program, _tested(corpus))
    ranges = (calibration.ranges(kind_of(mode), scheme.clipping) for mode in program.modes)
    return Rounding(*(plan(entry.graph, scheme, each) for entry, each in zip(program.entries, ranges, strict=True)))


def fit(
    folded: FoldedModel, rounding: Rounding, corpus: Speech, dev: Speech, output: Path, recipe: Recipe, *, resume: bool = False
) -> FineTuning:
    """Run the epochs, from the start or from ``last.ckpt``; the same seed gives the same weights either way (on a CPU).

    In float32: bf16 has no more levels between two powers of two than int8 has.
    """
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    tokens = Tokens(folded.checkpoint.tokens)
    batches = EpochBatches(corpus, dev, tokens, recipe)
    encoder = Encoder(replace(folded.checkpoint.config, dropout=recipe.dropout))
    encoder.load_state_dict(dict(folded.checkpoint.weights))
    training = FineTuning(encoder, rounding, tokens, recipe, batches.steps)
    run(training, batches, output, resume=resume, precision="fp32")
    return training


def settled(training: FineTuning, folded: FoldedModel) -> FoldedModel:
    """The average of the weights, rounded: as exact a fold as the one that it began as, and a child of that."""
    encoder, before = training.averaged.cpu(), folded.checkpoint
    training.rounding.settle(encoder)
    encoder.config = before.config
    tuned = checkpoints.of_encoder(encoder.double(), before.frontend_mean, before.frontend_istd, before.tokens)
    return FoldedModel(tuned, folded.plan, parent=folded.digest, origin=folded.origin)


def _read(start: Path) -> FoldedModel:
    checkpoint = checkpoints.read(start)
    if not checkpoint.config.folded:
        raise UsageError(
            f"{start} is not folded: its norms would be rounded apart from the layers that absorb them.",
            hint=f"Fold it first: edgefuse fold {start} -o FOLDED",
        )
    if any(name.endswith("running_var") for name in checkpoint.weights):
        raise UsageError(f"{start} keeps a batch norm that did not fold.", hint=f"See which with: edgefuse inspect {start}")
    if checkpoint.config.mel_bins != KALDI_80.mel_bins:
        raise UsageError(f"{start} hears {checkpoint.config.mel_bins} mel bins; a corpus has {KALDI_80.mel_bins}.")
    folded, _ = fold_exactly(start, checkpoint)
    return folded


def _tested(corpus: Corpus) -> TestSet:
    """The recordings of a corpus that a training is tested on."""
    utterances = []
    for name in corpus.tests:
        for cut in corpus.cuts(name):
            path, text = Path(cut.recording.sources[0].source), cut.supervisions[0].text
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            utterances.append(Utterance(cut.id, path, name, cut.duration, text, sha256))
    return TestSet(corpus.folder, tuple(utterances), digest="")

"""The right answers: what the model says of a test set in PyTorch, before it becomes an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.bundle import Frontend, Golden, Reference
from edgefuse.checkpoint import encoder_of
from edgefuse.decode.greedy import greedy_text
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import NotFinite, UsageError
from edgefuse.frontend.intake import of_samples
from edgefuse.model.streaming import FULL, Context
from edgefuse.recognize import capacity, features_of, fit
from edgefuse.verify.wer import count_word_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.model import Encoder
    from edgefuse.recognize import Heard
    from edgefuse.values import Checkpoint, FoldedModel, Mode, TensorSpec

MOST_GOLDENS = 5  # utterances, from the shortest to the longest; and one that fills each entry


def refer(checkpoint: Checkpoint, folded: FoldedModel, frontend: Frontend, heard: Sequence[Heard], mode: Mode) -> Reference:
    """Word errors of the checkpoint in float32, and alignments and golden vectors of the folded model in float64, in one mode."""
    fits, context, again = fit(heard, mode), context_of(mode), mode.after is not None
    if not fits:
        raise UsageError("No utterance of the speech fits into the longest entry.", hint="Ask for more with --seconds.")
    original, exact = encoder_of(checkpoint), encoder_of(folded.checkpoint, torch.float64)
    tokens = Tokens(checkpoint.tokens)
    texts = {each.identity: greedy_text(logits_of(original, each.features, context, again=again), tokens) for each in fits}
    logits = {e.identity: _finite(logits_of(exact, e.features, context, again=again), e.identity) for e in fits}
    chosen = _spread(sorted(fits, key=lambda each: each.features.shape[0]), MOST_GOLDENS)
    goldens = [
        Golden(e.identity, e.text, e.samples, e.features, logits[e.identity], encoded_of(exact, e.features, mode)) for e in chosen
    ]
    return Reference(
        parts={each.identity: each.part for each in fits},
        words={each.identity: count_word_errors([each.text], [texts[each.identity]]) for each in fits},
        alignments={identity: tuple(answer.argmax(axis=-1).tolist()) for identity, answer in logits.items()},
        goldens=(*goldens, *(_full(exact, frontend, fits, name, specs, mode) for name, specs in mode.inputs.items())),
    )


def context_of(mode: Mode) -> Context:
    """What a frame of the whole recording may see, so that PyTorch answers as the mode does."""
    chunks = mode.streaming or mode.after
    return Context(chunks.chunk, chunks.left, chunks.ahead) if chunks else FULL


@torch.no_grad()
def logits_of(
    encoder: Encoder, features: NDArray[np.float32], context: Context = FULL, *, again: bool = False
) -> NDArray[np.float64]:
    """Logits (T // reduction, vocabulary_size) of features (T, mel_bins), in the encoder's own precision, without padding.

    With `again` they are those of a cascade's second pass, over what the first one gives in that context.
    """
    batch = _batch(encoder, features)
    logits = encoder.answers(*batch, context)[1] if again else encoder(*batch, context)[0]
    return np.asarray(logits[0].double().numpy())


@torch.no_grad()
def encoded_of(encoder: Encoder, features: NDArray[np.float32], mode: Mode) -> NDArray[np.float32] | None:
    """What the first pass of a cascade gives to the second, (T // reduction, d), in the chunks of a mode; None in no chunks."""
    context = context_of(mode)
    if not encoder.config.second_pass or context == FULL:
        return None
    return np.asarray(encoder.encode(*_batch(encoder, features), context)[0][0].float().numpy())


def _batch(encoder: Encoder, features: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one utterance, in the precision of the encoder; and its length."""
    return torch.from_numpy(features)[None].to(encoder.ctc.weight.dtype), torch.tensor([features.shape[0]])


def _most(specs: Sequence[TensorSpec], mode: Mode) -> int:
    """Encoder frames that fill an entry; where it streams, its caches too, and half of one more chunk."""
    frames = capacity(specs)
    return frames if mode.streaming is None else mode.streaming.left + 2 * frames + -(-frames // 2)


def _full(
    encoder: Encoder, frontend: Frontend, heard: Sequence[Heard], entry: str, specs: Sequence[TensorSpec], mode: Mode
) -> Golden:
    """Speech, utterance after utterance, that fills an entry."""
    joined = np.concatenate([each.samples for each in heard])
    count = of_samples(encoder.config.frame_ms).count(_most(specs, mode))
    samples = np.ascontiguousarray(np.tile(joined, -(-count // len(joined)))[:count])
    features, name = features_of(torch.from_numpy(samples).double(), frontend), f"full_{entry}"
    logits = _finite(logits_of(encoder, features, context_of(mode), again=mode.after is not None), name)
    return Golden(name, "", samples, features, logits, encoded_of(encoder, features, mode))


def _finite(logits: NDArray[np.float64], identity: str) -> NDArray[np.float64]:
    if not np.isfinite(logits).all():
        raise NotFinite(
            f"The folded model's answer to {identity} has values that are NaN or infinite, even in float64.",
            hint="Go back to an earlier checkpoint; its weights are too large.",
        )
    return logits


def _spread(heard: Sequence[Heard], most: int) -> list[Heard]:
    """At most so many, from the first to the last, evenly."""
    if len(heard) <= most:
        return list(heard)
    return [heard[round(i * (len(heard) - 1) / (most - 1))] for i in range(most)]

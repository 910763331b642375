"""What a training is measured by: word errors on the test sets of its corpus, of whole utterances and in chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgefuse.decode.spaceless import is_spaceless
from edgefuse.decode.tokens import Tokens
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.train.features import FeatureStore
from edgefuse.train.module import Answer, evaluate
from edgefuse.train.speech import EVALUATION_BATCH_SECONDS, OpenSpeech
from edgefuse.verify.wer import WordErrors

WHOLE = {"": FULL}  # what every encoder is tested in
CHUNKS_MS, LEFT_MS = (160, 320, 640, 1280), 2560  # and in which chunks


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    folder: Path  # the checkpoint
    errors: dict[str, WordErrors]  # by test set; "seen, 640 ms" is the same set in chunks
    characters: bool = False  # whether these are character errors, of a language that is written without spaces


def contexts_of(config: EncoderConfig) -> dict[str, Context]:
    """What is heard in whole, and in which chunks, by what a table says behind the name of a test set."""
    ms = config.frame_ms
    return {**WHOLE, **{f", {chunk} ms": Context(-(-chunk // ms), -(-LEFT_MS // ms)) for chunk in CHUNKS_MS}}


def test(
    answer: Answer, heard: OpenSpeech, statistics: FeatureStore, tokens: Tokens, contexts: Mapping[str, Context]
) -> dict[str, WordErrors]:
    """Word errors on all test sets, of whole utterances and in chunks."""
    errors: dict[str, WordErrors] = {}
    for name in heard.corpus.tests:
        spoken = heard.load(name, statistics=statistics)
        batches = spoken.batches(tokens, EVALUATION_BATCH_SECONDS, learnt=False)
        errors |= {f"{name}{told}": evaluate(answer, batches, tokens, context) for told, context in contexts.items()}
    return errors


def answer_again(encoder: Encoder, features: Tensor, lengths: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Logits of a cascade's second pass, which hears the whole of what the first gives in that context; and lengths."""
    return encoder.answers(features, lengths, context)[1], lengths // encoder.config.reduction


def spell_spaceless(tokens: Tokens) -> bool:
    """Whether tokens spell a language that is written without spaces."""
    return any(map(is_spaceless, tokens.symbols))


def write_metrics(output: Path, recipe: dict[str, Any], errors: dict[str, WordErrors]) -> None:
    """`metrics.json`."""
    rates = {name: {**asdict(e), "wer_percent": e.wer_percent} for name, e in errors.items()}
    text = json.dumps({"recipe": recipe, "errors": rates}, indent=2)
    (output / "metrics.json").write_text(text + "\n", encoding="utf-8")

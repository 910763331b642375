"""Untrained checkpoints: what a model costs depends on its sizes, and can be measured before anybody has trained it.

Its gains are those of no fresh network: one that is 1 everywhere would not be computed. Its statistics are those of the speech
that comes with edgefuse: with others, values would grow from layer to layer until no range of integers holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.frontend.audio import read_audio
from edgefuse.frontend.kaldi import kaldi_log_mel
from edgefuse.frontend.log_mel import normalize
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.architecture import encoder_config
from edgefuse.model.config import Norm
from edgefuse.model.normalization import BatchNorm, LayerNorm, UnifiedNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.speech import read_speech, shipped
from edgefuse.values import Checkpoint

VOCABULARY = 512  # tokens, as the shipped models have them
GAINS = 0.1, 0.5  # of norms: none is 1, and rounding does not grow from block to block, as it does where they are larger
HEARD = 8  # utterances: half a minute


def new(
    size: str,
    output: Path,
    *,
    norm: Norm = "batch",
    architecture: Mapping[str, Any] | None = None,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    overwrite: bool = False,
) -> Checkpoint:
    """Write an untrained checkpoint of a preset, changed by an architecture; the same seed gives the same weights.

    Raises:
        BadConfig: there is no such preset, or no such architecture.
        OutputExists: something is there already.
    """
    whole = untrained(encoder_config(size, norm, vocabulary, architecture or {}), seed, _some_speech())
    store.write_checkpoint(output, whole, overwrite=overwrite)
    return whole


def untrained(config: EncoderConfig, seed: int = 0, speech: Sequence[Tensor] = ()) -> Checkpoint:
    """Fresh weights with gains as training leaves them, and the statistics of some speech, if it is given: features (T, 80)."""
    torch.manual_seed(seed)
    encoder = Encoder(config).eval()
    for each in encoder.modules():
        if isinstance(each, LayerNorm | BatchNorm | UnifiedNorm):
            torch.nn.init.uniform_(each.weight, *GAINS)
    mean, istd = torch.zeros(config.mel_bins), torch.ones(config.mel_bins)
    if speech:
        frames = torch.cat(list(speech))
        mean, istd = frames.mean(dim=0), 1 / frames.std(dim=0)
        together = pad_sequence([normalize(each, mean, istd) for each in speech], batch_first=True)
        reestimate(
            encoder, [(together, torch.tensor([len(each) for each in speech]))]
        )  # a batch normalizes itself: let it be all
    tokens = ["<blk>", *(f"<{number}>" for number in range(1, config.vocabulary_size))]
    return checkpoints.of_encoder(encoder, mean, istd, tokens)


def _some_speech() -> list[Tensor]:
    """Features of some of the shipped utterances, from the whole of the set."""
    utterances = read_speech(shipped()).utterances
    chosen = utterances[:: max(1, len(utterances) // HEARD)][:HEARD]
    return [kaldi_log_mel(read_audio(each.path)) for each in chosen]

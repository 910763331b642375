"""What the rows cost on a GPU: time and memory of an inference, folded where they fold, in PyTorch as it is.

Unified Normalization's paper has its figures from a GPU [R abstract], and nothing else here runs on one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgefuse import checkpoint as checkpoints
from edgefuse.bench.turns import Turns, interleave
from edgefuse.errors import Refused
from edgefuse.fold import fold
from edgefuse.model import EncoderConfig
from edgefuse.new import untrained
from edgefuse.study.rows import BASE, Plan, Row

UTTERANCES, SECONDS = 32, 10
FRAMES_PER_SECOND = 100
MIB = 2**20


def measure_on_gpu(plan: Plan, rows: Sequence[Row], turns: Turns) -> dict[str, Any]:
    """By row: milliseconds and peak MiB of one batch, and what is saved of the base's, in percent; and what the GPU is.

    Raises:
        Refused: there is none.
    """
    if not torch.cuda.is_available():
        raise Refused("There is no GPU that PyTorch can use.", hint="Leave --gpu away; the table then says: not run")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recipe = plan.recipe
    configs = {row.name: plan.config_of(row, recipe.pieces) for row in rows}
    memory = {name: _peak_bytes(config) / MIB for name, config in configs.items()}
    samples = interleave({name: _inference(config) for name, config in configs.items()}, turns)
    told: dict[str, Any] = {"device": torch.cuda.get_device_name(), "utterances": UTTERANCES, "seconds": SECONDS}
    for name in configs:
        told[name] = {
            "p50_ms": round(samples.p50_ms(name), 4),
            "peak_mib": round(memory[name], 2),
            "latency_saved_percent": round(100 * (1 - samples.ratio(name, BASE)), 2),
            "memory_saved_percent": round(100 * (1 - memory[name] / memory[BASE]), 2),
        }
    return told


def _inference(config: EncoderConfig) -> Callable[[], Tensor]:
    """One batch of noise through a fresh encoder; it returns when the GPU is done."""
    encoder = checkpoints.encoder_of(fold(untrained(config)).checkpoint).cuda()
    features = torch.randn(UTTERANCES, SECONDS * FRAMES_PER_SECOND, config.mel_bins, device="cuda")
    lengths = torch.full((UTTERANCES,), features.shape[1], device="cuda")

    @torch.inference_mode()
    def run() -> Tensor:
        logits: Tensor = encoder(features, lengths)[0]
        torch.cuda.synchronize()
        return logits

    return run


def _peak_bytes(config: EncoderConfig) -> int:
    """The most that is allocated at any moment of an inference, weights and batch included."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = _inference(config)
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before

"""Checkpoints, what folds in them, and what a pre-training made, as tables of words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgefuse.values import Fold, Refusal

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.fold import Exactness
    from edgefuse.inspection import Inspection
    from edgefuse.model.config import BlockShape, EncoderConfig
    from edgefuse.train.pretrain import Pretrained
    from edgefuse.values import FoldedModel

PLAN = ("site", "", "into, or the reason")


def plan_rows(plan: Sequence[Fold | Refusal]) -> list[tuple[str, ...]]:
    """One row per site, in the order of `PLAN`."""
    return [
        (site.site, "folds", f"{_few(site.into)} ({site.rule})") if isinstance(site, Fold) else (site.site, "STAYS", site.reason)
        for site in plan
    ]


def _few(names: Sequence[str], most: int = 4) -> str:
    """A basis of the residual stream names all that reads and writes it."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def inspection_rows(found: Inspection) -> list[tuple[str, ...]]:
    """What a checkpoint is."""
    config = found.checkpoint.config
    return [
        ("subsampling", f"by {config.subsampling}, {config.subsampling_channels} channels; a frame of {config.frame_ms} ms"),
        *_block_rows(config),
        ("norm", f"{config.norm}{', folded' if config.folded else ''}{_but_kept(config)}"),
        ("activation", config.activation),
        ("positions", config.positions),
        ("vocabulary", f"{config.vocabulary_size} tokens"),
        ("longest utterance", f"{config.max_frames * config.frame_ms / 1000:g} s"),
        (
            "parameters",
            f"{found.parameters / 1e6:.2f} million"
            + (f", run as {found.parameters_run / 1e6:.2f}: {config.layers} blocks are one" if config.shared_blocks else ""),
        ),
        ("cost", f"{found.macs_per_second / 1e6:.0f} million multiply-accumulates per second of audio"),
        ("plan", f"{found.folds} sites fold, {found.refusals} stay"),
        ("digest", found.checkpoint.digest[:16]),
    ]


def _but_kept(config: EncoderConfig) -> str:
    return " but for the residual stream" if config.residual_norms_kept else ""


def _block_rows(config: EncoderConfig) -> list[tuple[str, str]]:
    """The blocks from the bottom up, those that are alike in one line."""
    alike = [(shape, len([*group])) for shape, group in itertools.groupby(config.blocks)]
    return [("blocks" if number == 0 else "", _block_line(config, *each)) for number, each in enumerate(alike)]


def _block_line(config: EncoderConfig, shape: BlockShape, count: int) -> str:
    own = f" of width {shape.attention_dimension}" if shape.attention_dimension != config.dimension else ""
    heads = f", {shape.heads} heads{own}" if shape.attention != "none" else ""
    kind = {"softmax": "", "performer": ", Performer", "none": ", convolution only"}[shape.attention]
    said = {
        ", one and the same": config.shared_blocks,
        f", {shape.left} frames of past at most": shape.left is not None,
        ", every second frame goes on": shape.stride > 1,
        ", second pass": shape.second_pass,
    }
    more = "".join(words for words, there in said.items() if there)
    return f"{count} x d {config.dimension}{heads}, ff {shape.feed_forward}, kernel {shape.kernel}{kind}{more}"


def fold_line(folded: FoldedModel, exact: Exactness, output: Path) -> str:
    """What a fold did, and how exactly."""
    stay = sum(isinstance(site, Refusal) for site in folded.plan)
    return (
        f"{output}: {len(folded.plan) - stay} sites folded, {stay} stay; relative error in float64: "
        f"{exact.end_to_end:.1e} end to end, {exact.worst_site:.1e} at the worst site"
    )


def pretrained_line(pretrained: Pretrained) -> str:
    """What a pre-training has learnt."""
    return (
        f"{pretrained.folder}: L1 of hidden log-mel values {pretrained.after:.3f}, before {pretrained.before:.3f}, of their mean "
        f"{pretrained.mean:.3f}; its CTC head is untrained, go on with: edgefuse train --from {pretrained.folder}"
    )


def pretrained_json(pretrained: Pretrained) -> dict[str, Any]:
    """The same for programs."""
    return {**dataclasses.asdict(pretrained), "folder": str(pretrained.folder)}

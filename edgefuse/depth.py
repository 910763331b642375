"""The lowest blocks of a checkpoint, as a checkpoint of their own: Shallow Layer Inference (arXiv 2105.00812 [R abstract]).

    h_0 = subsampling(x);  h_i = block_i(h_{i-1});  logits = head(h_N), N <= layers

Blocks that are shared are all the same, and N says how often the one is run; a training with --layers-sampled makes the head
understand every N. Batch statistics are no weights: the norm of the head has seen h of other depths, and so has every norm of a
block that is shared: they are estimated again at N. One block of the study's size, run 8 times and trained for 400 steps with
sampled depths, has on 100 utterances of other texts a CTC loss per token of [M]

    N                              2      4      6      8
    statistics of 8 layers      2.93   2.70   2.42   2.24
    statistics of N layers      2.12   2.10   2.16   2.24
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from edgefuse import checkpoint as checkpoints
from edgefuse.errors import UsageError
from edgefuse.model import EncoderConfig
from edgefuse.model.config import Stage
from edgefuse.values import Checkpoint

BLOCK = re.compile(r"blocks\.(\d+)\.")


def lowest(checkpoint: Checkpoint, depth: int) -> Checkpoint:
    """The checkpoint of the lowest `depth` blocks of another, with the same subsampling and the same head.

    Raises:
        UsageError: fewer than one block or more than there are; a checkpoint that is folded; a cascade; a depth below a stride.
    """
    config = checkpoint.config
    _require_sense(config, depth)
    shallow = replace(config, layers=depth, stages=tuple(_lowest_stages(config.stages, depth)))
    if shallow.reduction != config.reduction:
        raise UsageError(
            f"The lowest {depth} blocks end before a stride: their frames are not those that the head has learnt.",
            hint=f"Keep the stride: frames are of {config.frame_ms} ms behind it.",
        )
    kept = {name: tensor for name, tensor in checkpoint.weights.items() if shallow.shared_blocks or _place(name) < depth}
    statistics = {checkpoints.MEAN: checkpoint.frontend_mean, checkpoints.ISTD: checkpoint.frontend_istd}
    return checkpoints.assemble(shallow, {**kept, **statistics}, checkpoint.tokens)


def depends_on_depth(checkpoint: Checkpoint) -> bool:
    """Whether its batch statistics are those of its number of layers: a shared block's, or those of the norm before the head."""
    statistics = [name for name in checkpoint.weights if name.endswith("running_var")]
    return any(name.startswith("norm.") or (checkpoint.config.shared_blocks and _place(name) >= 0) for name in statistics)


def _require_sense(config: EncoderConfig, depth: int) -> None:
    if not 1 <= depth <= config.layers:
        raise UsageError(
            f"A depth of {depth} is none of a model with layers 1 to {config.layers}.",
            hint="Leave --depth away for all of them.",
        )
    if config.second_pass:
        raise UsageError(
            "A cascade has a head in the middle and one at the end: it has no other depths.",
            hint="Leave --depth away; in a stream only the first pass is run.",
        )
    if config.folded:
        raise UsageError(
            "This checkpoint is folded: its batch statistics, which belong to a depth, are inside its weights.",
            hint="Pass --depth with what it was folded from.",
        )


def _lowest_stages(stages: tuple[Stage, ...], depth: int) -> Iterator[Stage]:
    for stage in stages:
        if depth > 0:
            yield replace(stage, layers=min(stage.layers, depth))
        depth -= stage.layers


def _place(name: str) -> int:
    """The number of the block that a weight belongs to; -1 where it is in none."""
    found = BLOCK.match(name)
    return int(found[1]) if found else -1

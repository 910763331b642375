"""Several checkpoints of one training become one: their weights averaged, and the batch statistics measured again.

The mean of running statistics is not what the averaged network sees: its statistics have to be estimated again before it is
folded (papers, 6.5 [I]), as stochastic weight averaging does (Izmailov et al. 2018). Or they are averaged on purpose: of
checkpoints that are near each other the mean may hear better, as the shipped FusionFormer does [M, its card].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.errors import UsageError
from edgefuse.refold import reestimated
from edgefuse.speech import read_speech
from edgefuse.values import Checkpoint


def average(
    places: Sequence[Path],
    output: Path,
    *,
    speech: Path | None = None,
    average_statistics: bool = False,
    overwrite: bool = False,
) -> Checkpoint:
    """Write the mean of checkpoints; batch statistics are those of it on `speech`, or the mean of theirs.

    Raises:
        UsageError: checkpoints that differ in more than their weights, folded ones, fewer than two; batch statistics, and neither
            speech to estimate them on nor the wish to average them, or both.
    """
    if len(places) < 2:  # noqa: PLR2004 - a mean of one is that one
        raise UsageError("One checkpoint is its own average.", hint="Name two or more.")
    if speech is not None and average_statistics:
        raise UsageError(
            "Batch statistics are estimated again or averaged, not both.", hint="Leave --reestimate or --average-statistics away."
        )
    whole = [checkpoints.read(place) for place in places]
    for place, other in zip(places[1:], whole[1:], strict=True):
        _require_alike(places[0], whole[0], place, other)
    mean = averaged(whole)
    if speech is not None:
        mean = reestimated(mean, read_speech(speech))
    elif not average_statistics and any(name.endswith("running_var") for name in mean.weights):
        raise UsageError(
            "The checkpoints have batch statistics, and the mean of statistics is not what the averaged network sees.",
            hint="Say on which speech to estimate them again: --reestimate SPEECH; or average them too: --average-statistics",
        )
    store.write_checkpoint(output, mean, overwrite=overwrite)
    return mean


def averaged(whole: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of every weight, in float64; counters, which are integers, are the largest."""
    first = whole[0]
    weights = {name: _mean([each.weights[name] for each in whole]) for name in first.weights}
    tensors = {**weights, checkpoints.MEAN: first.frontend_mean, checkpoints.ISTD: first.frontend_istd}
    return checkpoints.assemble(first.config, tensors, first.tokens)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    together = torch.stack(list(tensors))
    if not together.is_floating_point():
        return together.amax(dim=0)
    return together.double().mean(dim=0).to(together.dtype)


def _require_alike(first: Path, one: Checkpoint, place: Path, other: Checkpoint) -> None:
    hint = "Average checkpoints of one training, or of trainings that began with the same one."
    if one.config.folded or other.config.folded:
        raise UsageError(
            f"{first if one.config.folded else place} is folded: its layers have absorbed its own statistics.",
            hint="Average first, and fold what comes out.",
        )
    ours, theirs = one.config.to_json(), other.config.to_json()
    if differ := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise UsageError(f"{place} is of another architecture than {first}: {', '.join(differ)}.", hint=hint)
    if one.tokens != other.tokens:
        raise UsageError(f"{place} has other tokens than {first}.", hint=hint)
    if not torch.equal(one.frontend_mean, other.frontend_mean) or not torch.equal(one.frontend_istd, other.frontend_istd):
        raise UsageError(f"{place} normalizes its features otherwise than {first}.", hint=hint)

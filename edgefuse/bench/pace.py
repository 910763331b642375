"""How fast an artifact is here, and how many times as long its baseline takes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse.bench.contender import contender
from edgefuse.bench.turns import Turns, interleave

if TYPE_CHECKING:
    from edgefuse.target import Session, Target
    from edgefuse.values import Artifact, Mode, Program

FEW = Turns(rounds=15, warm_up=2)  # enough for a median in a table
THIS, BASELINE = "this", "baseline"


@dataclass(frozen=True, slots=True)
class Pace:
    """Latency on this host, one thread, of the shortest entry of a mode, filled to its end: of an utterance, or of one chunk.

    Attributes:
        p50_ms: the median.
        baseline_ratio: the median over the rounds of the baseline's latency divided by this one's; above 1 this is faster.
    """

    p50_ms: float
    baseline_ratio: float | None = None


def pace(session: Session, artifact: Artifact) -> dict[str, Pace]:
    """A few warm runs in each mode."""
    return {mode.name: _alone(session, artifact, mode) for mode in artifact.modes}


def pace_against(target: Target, session: Session, artifact: Artifact, baseline: Program) -> dict[str, Pace]:
    """Export the baseline to the same target, and run both in turns, in each mode; one that is no cascade has no second pass."""
    with tempfile.TemporaryDirectory() as folder:
        other = target.export(baseline, Path(folder), BASELINE)
        opened = target.open(other)
        return {mode.name: _against(session, artifact, opened, other, mode) for mode in artifact.modes}


def _alone(session: Session, artifact: Artifact, mode: Mode) -> Pace:
    return Pace(interleave({THIS: contender(session, artifact, mode)}, FEW).p50_ms(THIS))


def _against(session: Session, artifact: Artifact, opened: Session, other: Artifact, mode: Mode) -> Pace:
    twin = next((each for each in other.modes if each.name == mode.name), None)  # its caches may be of other sizes
    if twin is None:
        return _alone(session, artifact, mode)
    contenders = {THIS: contender(session, artifact, mode), BASELINE: contender(opened, other, twin)}
    samples = interleave(contenders, Turns())
    return Pace(samples.p50_ms(THIS), samples.ratio(BASELINE, to=THIS))

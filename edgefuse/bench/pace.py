"""How fast an artifact is here, and how many times as long its baseline takes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse.bench.contender import contender
from edgefuse.bench.routine import Routine, interleave

if TYPE_CHECKING:
    from edgefuse.target import Session, Target
    from edgefuse.values import Artifact, Program

FEW = Routine(rounds=15, warm_up=2)  # enough for a median in a table
THIS, BASELINE = "this", "baseline"


@dataclass(frozen=True, slots=True)
class Pace:
    """Latency on this host, one thread, of the shortest entry, filled to its end.

    Attributes:
        p50_ms: the median; None where the artifact is evaluated and not run.
        baseline_ratio: the median over the rounds of the baseline's latency divided by this one's; above 1 this is faster.
    """

    p50_ms: float | None
    baseline_ratio: float | None = None


def pace(session: Session, artifact: Artifact) -> Pace:
    """A few warm runs."""
    if session.how == "evaluated":
        return Pace(None)
    samples = interleave({THIS: contender(session, artifact)}, FEW)
    return Pace(samples.p50_ms(THIS))


def pace_against(target: Target, session: Session, artifact: Artifact, baseline: Program) -> Pace:
    """Export the baseline to the same target, and run both in turns."""
    if session.how == "evaluated":
        return Pace(None)
    with tempfile.TemporaryDirectory() as folder:
        other = target.export(baseline, Path(folder), BASELINE)
        contenders = {THIS: contender(session, artifact), BASELINE: contender(target.open(other), other)}
        samples = interleave(contenders, Routine())
    return Pace(samples.p50_ms(THIS), samples.ratio(BASELINE, to=THIS))

"""The only place that says "pass"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.values import Check, Precision, Verdict
from edgefuse.verify.structure import strangers

if TYPE_CHECKING:
    from edgefuse.bundle import Findings, Reference

REPORTED = "reported only"


@dataclass(frozen=True, slots=True)
class Bars:
    """What an artifact must reach.

    Attributes:
        snr_db: logits against the float64 folded model, on every golden vector, whatever the padding.
        agreement_percent: frames of the test set with the same best token.
        wer_points: how far the word error rate may be from the checkpoint's in PyTorch.
        partitions: delegated pieces of a graph without norms, where the runtime delegates.
    """

    snr_db: float
    agreement_percent: float
    wer_points: float
    partitions: int = 1


BARS: Mapping[Precision, Bars] = MappingProxyType(
    {
        "fp32": Bars(snr_db=90.0, agreement_percent=99.5, wer_points=0.1),
        "fp16": Bars(snr_db=40.0, agreement_percent=99.5, wer_points=0.3),
    }
)


def judge(
    findings: Findings, reference: Reference, *, target: str, how: str, precision: Precision, norm_free: bool, digest: str
) -> Verdict:
    """Hold what was found against the bars; `norm_free` is whether the plan folded every norm, which the structure must show.

    A model that keeps norms (a LayerNorm Conformer) is exported for comparison: its structure is reported, not judged.
    """
    bars = BARS[precision]
    checks = (
        *_structure(findings, bars, precision, required=norm_free),
        _at_least("parity", findings.snr_db, bars.snr_db),
        _at_least("padding", findings.padded_snr_db, bars.snr_db),
        _tokens(findings, bars),
        _words(findings, reference, bars),
    )
    return Verdict(target, how, checks, parent=digest)


def _structure(findings: Findings, bars: Bars, precision: Precision, *, required: bool) -> list[Check]:
    structure = findings.structure
    found, outside = len(structure.normalizations), strangers(structure, precision)
    checks = [Check("normalizations", str(found), "0" if required else REPORTED, found == 0 or not required)]
    if structure.partitions is not None:
        one = structure.partitions == bars.partitions
        named = ", ".join(f"{count} {name}" for name, count in sorted(outside.items())) or "nothing"
        checks += [
            Check("partitions", str(structure.partitions), str(bars.partitions) if required else REPORTED, one or not required),
            Check("outside", named, "nothing" if required else REPORTED, not outside or not required),
        ]
    return checks


def _at_least(name: str, measured_db: float, required_db: float) -> Check:
    return Check(name, f"{measured_db:.1f} dB", f">= {required_db:.0f} dB", measured_db >= required_db)


def _tokens(findings: Findings, bars: Bars) -> Check:
    passed = findings.frames > 0 and findings.agreement_percent >= bars.agreement_percent
    measured = f"{findings.agreement_percent:.2f} % of {findings.frames} frames"
    return Check("tokens", measured, f">= {bars.agreement_percent} %", passed)


def _words(findings: Findings, reference: Reference, bars: Bars) -> Check:
    words = max(1, reference.errors.words)
    points = 100.0 * abs(findings.errors.errors - reference.errors.errors) / words
    measured = (
        f"{100.0 * findings.errors.errors / words:.2f} %, model {100.0 * reference.errors.errors / words:.2f} %, "
        f"{reference.utterances} utterances"
    )
    return Check("WER", measured, f"within {bars.wer_points} points", points <= bars.wer_points)

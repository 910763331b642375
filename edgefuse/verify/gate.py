"""The only place that says "pass"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.values import OFFLINE, Check, Input, Precision, Structure, Verdict
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
        streamed_percent: the same where chunks are fed one after another.
        wer_points: how far the word error rate may be from the checkpoint's in PyTorch.
        partitions: delegated pieces of a graph without norms, where the runtime delegates. Before an fp16 network a front end,
            which stays in fp32, may be one more: a delegate computes in one precision.
        features_db: the front end in an artifact against kaldi-native-fbank, on every golden vector.
    """

    snr_db: float
    agreement_percent: float
    streamed_percent: float
    wer_points: float
    partitions: int = 1
    features_db: float = 60.0


BARS: Mapping[Precision, Bars] = MappingProxyType(
    {
        "fp32": Bars(snr_db=90.0, agreement_percent=99.5, streamed_percent=100.0, wer_points=0.1),
        "fp16": Bars(snr_db=40.0, agreement_percent=99.5, streamed_percent=99.5, wer_points=0.3),
    }
)


def judge(
    structure: Structure,
    findings: Mapping[str, Findings],
    references: Mapping[str, Reference],
    *,
    target: str,
    how: str,
    precision: Precision,
    hears: Input,
    norm_free: bool,
    digest: str,
) -> Verdict:
    """Hold what was found in each mode against the bars; `norm_free` is whether every norm folded, which the structure must show.

    A model that keeps norms (a LayerNorm Conformer) is exported for comparison: its structure is reported, not judged.
    """
    bars = BARS[precision]
    if hears == "pcm" and precision == "fp16":
        bars = replace(bars, partitions=bars.partitions + 1)
    modes = (check for mode, found in findings.items() for check in _mode(mode, found, references[mode], bars))
    return Verdict(target, how, (*_structure(structure, bars, precision, required=norm_free), *modes), parent=digest)


def _mode(mode: str, findings: Findings, reference: Reference, bars: Bars) -> tuple[Check, ...]:
    behind = "" if mode == OFFLINE else f", {mode}"
    agreement = bars.agreement_percent if mode == OFFLINE else bars.streamed_percent
    heard = findings.features_snr_db
    return (
        *([] if heard is None else [_at_least(f"front end{behind}", heard, bars.features_db)]),
        _at_least(f"parity{behind}", findings.snr_db, bars.snr_db),
        _at_least(f"padding{behind}", findings.padded_snr_db, bars.snr_db),
        _tokens(f"tokens{behind}", findings, agreement),
        _words(f"WER{behind}", findings, reference, bars),
    )


def _structure(structure: Structure, bars: Bars, precision: Precision, *, required: bool) -> list[Check]:
    found, outside = len(structure.normalizations), strangers(structure, precision)
    checks = [Check("normalizations", str(found), "0" if required else REPORTED, found == 0 or not required)]
    if structure.partitions is not None:
        few, wanted = 1 <= structure.partitions <= bars.partitions, "1" if bars.partitions == 1 else f"1 to {bars.partitions}"
        named = ", ".join(f"{count} {name}" for name, count in sorted(outside.items())) or "nothing"
        checks += [
            Check("partitions", str(structure.partitions), wanted if required else REPORTED, few or not required),
            Check("outside", named, "nothing" if required else REPORTED, not outside or not required),
        ]
    return checks


def _at_least(name: str, measured_db: float, required_db: float) -> Check:
    return Check(name, f"{measured_db:.1f} dB", f">= {required_db:.0f} dB", measured_db >= required_db)


def _tokens(name: str, findings: Findings, required_percent: float) -> Check:
    passed = findings.frames > 0 and findings.agreement_percent >= required_percent
    measured = f"{findings.agreement_percent:.2f} % of {findings.frames} frames"
    return Check(name, measured, f">= {required_percent} %", passed)


def _words(name: str, findings: Findings, reference: Reference, bars: Bars) -> Check:
    words = max(1, reference.errors.words)
    points = 100.0 * abs(findings.errors.errors - reference.errors.errors) / words
    measured = (
        f"{100.0 * findings.errors.errors / words:.2f} %, model {100.0 * reference.errors.errors / words:.2f} %, "
        f"{reference.utterances} utterances"
    )
    return Check(name, measured, f"within {bars.wer_points} points", points <= bars.wer_points)

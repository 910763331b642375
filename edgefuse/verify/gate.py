"""The only place that says "pass"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.values import FLOAT, OFFLINE, Artifact, Check, Input, Precision, Structure, Verdict
from edgefuse.verify.structure import strangers

if TYPE_CHECKING:
    from edgefuse.bundle import Findings, Reference

REPORTED = "reported only"
BECAUSE = "`kept` in edgefuse.json"  # where an artifact says why a layer is not what its scheme says


@dataclass(frozen=True, slots=True)
class Bars:
    """What an artifact must reach.

    Attributes:
        snr_db: logits against the float64 folded model, on every golden vector, whatever the padding.
        agreement_percent: frames of the test set with the same best token.
        streamed_percent: the same where chunks are fed one after another.
        wer_points: how far the word error rate may be from the checkpoint's in PyTorch.
        words: how many words it may differ by on a test set so small that they are more points than that.
        partitions: delegated pieces of a graph without norms, where the runtime delegates; None where it does not delegate such
            integers, and is slower than with floats. Before an fp16 network a front end,
            which stays in fp32, may be one more: a delegate computes in one precision.
        features_db: the front end in an artifact against kaldi-native-fbank, on every golden vector.
    """

    snr_db: float
    agreement_percent: float
    streamed_percent: float
    wer_points: float
    words: int = 0
    partitions: int | None = 1
    features_db: float = 60.0


BARS: Mapping[Precision, Bars] = MappingProxyType(
    {
        "fp32": Bars(snr_db=90.0, agreement_percent=99.5, streamed_percent=100.0, wer_points=0.1),
        "fp16": Bars(snr_db=40.0, agreement_percent=99.5, streamed_percent=99.5, wer_points=0.3),
        "int8": Bars(snr_db=20.0, agreement_percent=97.0, streamed_percent=97.0, wer_points=1.0, words=1),
        "int8-dynamic": Bars(snr_db=20.0, agreement_percent=97.0, streamed_percent=97.0, wer_points=1.0, words=1),
        "int8-weights": Bars(snr_db=25.0, agreement_percent=98.0, streamed_percent=98.0, wer_points=1.0, words=1),
        "int8-a16": Bars(25.0, agreement_percent=98.0, streamed_percent=98.0, wer_points=1.0, words=1, partitions=None),
        "int4-weights": Bars(snr_db=12.0, agreement_percent=94.0, streamed_percent=94.0, wer_points=2.0, words=1),
        "palette4-weights": Bars(snr_db=12.0, agreement_percent=94.0, streamed_percent=94.0, wer_points=2.0, words=1),
        "mixed": Bars(snr_db=12.0, agreement_percent=94.0, streamed_percent=94.0, wer_points=2.0, words=1),
    }
)


def judge(
    structure: Structure,
    findings: Mapping[str, Findings],
    references: Mapping[str, Reference],
    *,
    artifact: Artifact,
    how: str,
    hears: Input,
    norm_free: bool,
    digest: str,
) -> Verdict:
    """Hold what was found in each mode against the bars; `norm_free` is whether every norm folded, which the structure must show.

    A model that keeps norms (a LayerNorm Conformer) is exported for comparison: its structure is reported, not judged.
    """
    precision = artifact.precision
    bars = BARS[precision]
    if hears == "pcm" and precision == "fp16":
        bars = replace(bars, partitions=2)
    modes = (check for mode, found in findings.items() for check in _mode(mode, found, references[mode], bars))
    inside = (*_structure(structure, bars, precision, required=norm_free), *_layers(artifact, structure))
    return Verdict(artifact.target, how, (*inside, *modes), parent=digest)


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
        most, required = bars.partitions or 0, required and bars.partitions is not None
        few, wanted = 1 <= structure.partitions <= most, "1" if most == 1 else f"1 to {most}"
        named = ", ".join(f"{count} {name}" for name, count in sorted(outside.items())) or "nothing"
        checks += [
            Check("partitions", str(structure.partitions), wanted if required else REPORTED, few or not required),
            Check("outside", named, "nothing" if required else REPORTED, not outside or not required),
        ]
    return checks


def _layers(artifact: Artifact, structure: Structure) -> tuple[Check, ...]:
    """Whether the layers in the artifact are what its scheme asks of them, each in every entry."""
    if not artifact.layers:
        return ()
    asked: Counter[str] = Counter(precision for precision in artifact.layers.values() if precision != "fp32")
    wanted = {name: count * len(artifact.inputs) for name, count in sorted(asked.items())}
    found = {name: count for name, count in sorted(structure.layers.items()) if name not in FLOAT}
    kept = f"; {len(artifact.kept)} stay float, see {BECAUSE}" if artifact.kept else ""
    return (Check("layers", f"{_counted(found)}{kept}", _counted(wanted), found == wanted),)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _at_least(name: str, measured_db: float, required_db: float) -> Check:
    return Check(name, f"{measured_db:.1f} dB", f">= {required_db:.0f} dB", measured_db >= required_db)


def _tokens(name: str, findings: Findings, required_percent: float) -> Check:
    passed = findings.frames > 0 and findings.agreement_percent >= required_percent
    measured = f"{findings.agreement_percent:.2f} % of {findings.frames} frames"
    return Check(name, measured, f">= {required_percent} %", passed)


def _words(name: str, findings: Findings, reference: Reference, bars: Bars) -> Check:
    words = max(1, reference.errors.words)
    apart = abs(findings.errors.errors - reference.errors.errors)
    points = 100.0 * apart / words
    measured = (
        f"{100.0 * findings.errors.errors / words:.2f} %, model {100.0 * reference.errors.errors / words:.2f} %, "
        f"{reference.utterances} utterances"
    )
    told = f"within {bars.wer_points} points" + (f" or {bars.words} word" if bars.words else "")
    return Check(name, measured, told, points <= bars.wer_points or apart <= bars.words)

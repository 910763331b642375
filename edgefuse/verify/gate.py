"""The only place that says "pass"."""

from __future__ import annotations

import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.errors import BadBars, MissingFile
from edgefuse.quantize.scheme import SCHEMES
from edgefuse.values import FLOAT, OFFLINE, Artifact, Check, Input, Precision, Structure, Verdict
from edgefuse.verify.bootstrap import LEVEL_PERCENT, Difference, differences
from edgefuse.verify.structure import strangers

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.bundle import Findings, Quantized, Reference

REPORTED = "reported only"
FEW = 3  # names in a sentence
BY_ANSWERS = ("parity", "padding", "tokens", "WER")  # checks that rounding decides: of what an artifact answers, not what it is
WHOLE = ("words", "partitions")  # bars that are counts
LARGEST = 1e6  # no bar has a use beyond it
USUAL: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Bars:
    """What an artifact must reach.

    Attributes:
        snr_db: logits against the float64 folded model, on every golden vector, whatever the padding.
        agreement_percent: frames of the test set with the same best token.
        streamed_percent: the same where chunks are fed one after another.
        wer_points: how far the word error rate may be from the checkpoint's in PyTorch; of a quantized artifact, above it.
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


def read_bars(path: Path) -> Mapping[str, float]:
    """Bars that are to be moved: a TOML file whose keys are fields of `Bars`.

    Raises:
        MissingFile: there is none.
        BadBars: it cannot be read, or says what no bar can be.
    """
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.", hint="A file of bars is TOML, for example: wer_points = 1.5")
    try:
        moved = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadBars(f"{path} cannot be read: {error}.", hint="A file of bars is TOML, for example: wer_points = 1.5") from error
    names = [bar.name for bar in fields(Bars)]
    for name, value in moved.items():
        if name not in names:
            raise BadBars(f"{path}: there is no bar {name!r}.", hint=f"The bars are: {', '.join(names)}")
        kinds, told = ((int,), "a whole number") if name in WHOLE else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= LARGEST:
            raise BadBars(f"{path} says {name} = {value!r}.", hint=f"This bar is {told} from 0 to a million.")
    return moved


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
    bars: Mapping[str, float] = USUAL,
) -> Verdict:
    """Hold what was found in each mode against the bars; `norm_free` is whether every norm folded, which the structure must show.

    A model that keeps norms (a LayerNorm Conformer) is exported for comparison: its structure is reported, not judged. `bars` are
    those that are moved; the verdict names them, and each of their checks says where its bar usually stands.
    """
    precision = artifact.precision
    usual = BARS[precision]
    if hears == "pcm" and precision == "fp16":
        usual = replace(usual, partitions=2)
    moved = {name: value for name, value in bars.items() if value != getattr(usual, name)}

    def checks(against: Bars) -> Iterator[Check]:
        yield from _structure(structure, against, precision, required=norm_free)
        yield from _layers(artifact, structure)
        for mode, found in findings.items():
            yield from _mode(mode, found, references[mode], against, quantized=precision not in FLOAT)

    judged = tuple(checks(usual))
    if moved:
        judged = tuple(map(_marked, checks(replace(usual, **moved)), judged))  # type: ignore[arg-type]  # `read_bars` looked
    return Verdict(artifact.target, how, judged, parent=digest, moved=moved)


def which_layers(
    verdict: Verdict, quantized: Quantized | None, checkpoint: str = "CHECKPOINT", calibration: str = "SPEECH"
) -> str | None:
    """The command that says which layers lose most, where it helps: a quantized artifact fails by what it answers."""
    if quantized is None or not any(not check.passed and check.name.split(",")[0] in BY_ANSWERS for check in verdict.checks):
        return None
    scheme = quantized.scheme
    precision = scheme.name if SCHEMES.get(scheme.name) == scheme else "SCHEME.toml"
    where = ("--target", verdict.target, "--precision", precision, "--calibration", calibration)
    command = ("edgefuse", "sensitivity", checkpoint, *where)
    return f"See which layers lose most with: {shlex.join(command)}"


def _marked(check: Check, usual: Check) -> Check:
    if check.required == usual.required:
        return check
    return replace(check, required=f"{check.required} (moved; usually {usual.required})")


def _mode(mode: str, findings: Findings, reference: Reference, bars: Bars, *, quantized: bool) -> tuple[Check, ...]:
    behind = "" if mode == OFFLINE else f", {mode}"
    agreement = bars.agreement_percent if mode == OFFLINE else bars.streamed_percent
    heard = findings.features_snr_db
    return (
        *([] if heard is None else [_at_least(f"front end{behind}", heard, bars.features_db)]),
        _at_least(f"parity{behind}", findings.snr_db, bars.snr_db),
        _at_least(f"padding{behind}", findings.padded_snr_db, bars.snr_db),
        _tokens(f"tokens{behind}", findings, agreement),
        *(_words(behind, difference, bars, quantized=quantized) for difference in differences(reference, findings)),
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
    strays = tuple(_strays(artifact, structure))
    followed = found == wanted and not strays
    why = "" if followed else _some(strays, "weighted") or _by_operator(structure)
    told = "; ".join(filter(None, (counted(found), why, *_kept(artifact))))
    return (Check("layers", told, counted(wanted), followed),)


def _strays(artifact: Artifact, structure: Structure) -> Iterator[str]:
    """Each layer with a name in the artifact that is not what it is asked to be."""
    for layer, counts in structure.weighted.items():
        asked = artifact.layers.get(layer)
        if asked is not None and (others := [precision for precision in counts if precision != asked]):
            yield f"{layer} is {' and '.join(others)}, not {asked}"


def _by_operator(structure: Structure) -> str:
    """Where the layers have no names: what there is of each kind of operator."""
    kinds = [kind for kind in structure.weighted if kind in structure.precisions]
    return ", ".join(f"{counted(structure.weighted[kind])} {kind}" for kind in kinds)


def _kept(artifact: Artifact) -> Iterator[str]:
    """Which layers are asked to be something else than the scheme says, by reason."""
    for reason in dict.fromkeys(artifact.kept.values()):
        layers = [layer for layer, because in artifact.kept.items() if because == reason]
        others = " and ".join(sorted({artifact.layers.get(layer, "fp32") for layer in layers}))
        yield f"{_some(layers, 'kept')} {'stay' if len(layers) > 1 else 'stays'} {others}: {reason}"


def _some(names: Sequence[str], where: str) -> str:
    more = f" and {len(names) - FEW} more (see `{where}` in edgefuse.json)" if len(names) > FEW else ""
    return f"{', '.join(names[:FEW])}{more}"


def counted(counts: Mapping[str, int]) -> str:
    """Counts as a sentence has them."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _at_least(name: str, measured_db: float, required_db: float) -> Check:
    return Check(name, f"{measured_db:.1f} dB", f">= {required_db:g} dB", measured_db >= required_db)


def _tokens(name: str, findings: Findings, required_percent: float) -> Check:
    passed = findings.frames > 0 and findings.agreement_percent >= required_percent
    measured = f"{findings.agreement_percent:.2f} % of {findings.frames} frames"
    return Check(name, measured, f">= {required_percent} %", passed)


def _words(behind: str, difference: Difference, bars: Bars, *, quantized: bool) -> Check:
    """The whole test set is judged by the difference itself; its parts, and the interval, say what that is worth.

    Rounding may by chance hear a few words better, which is no loss; a float artifact has no such excuse to differ.
    """
    words = max(1, difference.model.words)
    within = max(bars.wer_points, 100.0 * bars.words / words)
    measured = (
        f"{100.0 * difference.artifact.errors / words:.2f} %, model {100.0 * difference.model.errors / words:.2f} %; "
        f"{_spread(difference)}; {difference.model.utterances} utterances"
        f"{'' if difference.tells(within) else ', too few to tell'}"
    )
    if difference.part:
        return Check(f"WER, {difference.part}{behind}", measured, REPORTED, passed=True)
    plural = "word" if bars.words == 1 else "words"
    most = f"{bars.wer_points} points" + (f" or {bars.words} {plural}" if bars.words else "")
    told, off = (f"at most {most} above", difference.points) if quantized else (f"within {most}", abs(difference.points))
    return Check(f"WER{behind}", measured, told, off <= within)


def _spread(difference: Difference) -> str:
    if not difference.changed:
        return "as many errors in each utterance"
    low, high = difference.interval
    return f"{difference.points:+.2f} points, {LEVEL_PERCENT} % within {low:+.2f} .. {high:+.2f}"

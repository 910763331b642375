"""The whole road: check, fold, lower, export, verify."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.atomic import draft
from edgefuse.bench.pace import Pace, pace, pace_against
from edgefuse.bundle import Bundle, Export, Quantized
from edgefuse.errors import GateFailed, Refused, UsageError
from edgefuse.fold import fold
from edgefuse.foreign import in_words
from edgefuse.listen import load
from edgefuse.lower import Chunks, lower
from edgefuse.packages import versions
from edgefuse.quantize.calibrate import Calibration, calibration_of, has_ranges, kind_of, write_ranges
from edgefuse.quantize.calibrate import calibrate as take_ranges
from edgefuse.quantize.plan import require_one_pass
from edgefuse.quantize.prepare import prepare
from edgefuse.quantize.scheme import Scheme
from edgefuse.recognize import Heard, frontend_of, hear
from edgefuse.refold import fold_exactly, require_apart, to_fold
from edgefuse.report.page import PAGE, page
from edgefuse.speech import TestSet, read_speech, shipped
from edgefuse.target import Target, find
from edgefuse.values import Artifact, Fold, FoldedModel, Input, Precision, Program, Quantization, Refusal
from edgefuse.verify.examine import examine
from edgefuse.verify.gate import USUAL, judge, which_layers
from edgefuse.verify.reference import refer
from edgefuse.verify.soak import Soaked
from edgefuse.verify.soak import soak as soak_session

SPEECH = "SPEECH"  # where a hint cannot name any
ARTIFACT = "model"  # + the target's suffix
SECONDS = (5.12,)  # long enough for the shipped test set
Tell = Callable[[str], AbstractContextManager[object]]


def silent(_: str) -> AbstractContextManager[object]:
    """Tell nobody what is being done."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted of a checkpoint.

    Attributes:
        targets: names on the shelf.
        precision: of every artifact, or the scheme by which they are quantized.
        seconds: longest utterances, one entry each.
        chunks: streaming entries.
        calibration: a folder of speech, or of ranges taken from one, where a scheme needs ranges.
        picture: an SVG for the report, of the search that found the scheme.
        hears: what the artifacts hear: features, or samples, the front end being inside then.
        speech: the folder of the test set; the shipped one by default.
        bars: those of the gate that are moved, as `edgefuse.verify.gate.read_bars` reads them.
        baseline: another checkpoint, say the LayerNorm Conformer that this one replaces: it is exported to the same targets,
            timed in turns with them, and not kept.
        depth: how many of the checkpoint's blocks are exported, from the bottom up; all by default.
        reestimate: a folder of speech on which its batch statistics are estimated first, at that depth, of whole utterances.
    """

    targets: tuple[str, ...]
    precision: Precision | Scheme = "fp32"
    seconds: tuple[float, ...] = SECONDS
    chunks: tuple[Chunks, ...] = ()
    hears: Input = "features"
    speech: Path | None = None
    baseline: Path | None = None
    calibration: Path | None = None
    bars: Mapping[str, float] = field(default_factory=dict)
    picture: Path | None = None
    depth: int | None = None
    reestimate: Path | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle, and what was just found out about its artifacts: the verdicts, and the pace here by target and mode."""

    bundle: Bundle
    exports: tuple[Export, ...]
    paces: Mapping[str, Mapping[str, Pace]]

    @property
    def passed(self) -> bool:
        """Whether every artifact passed."""
        return all(export.verdict.passed for export in self.exports)


def export(folder: Path, output: Path, order: Order, *, overwrite: bool = False, tell: Tell = silent) -> Verified:
    """A checkpoint becomes a bundle of verified artifacts; what does not pass the gate is put beside it as `output.failed`."""
    store.require_free_bundle(output, overwrite=overwrite)
    shelf = {name: find(name) for name in order.targets}
    with tell("Checking the checkpoint"):
        estimated = read_speech(order.reestimate) if order.reestimate else None
        checkpoint, origin = to_fold(folder, order.depth, estimated)
        other = _lower(fold(checkpoints.read(order.baseline)), order) if order.baseline else None
    with tell("Folding"):
        folded, exact = fold_exactly(folder, checkpoint)
    test_set = read_speech(order.speech or shipped())
    if estimated is not None:
        require_apart(estimated, test_set)
    program, frontend = _lower(folded, order), frontend_of(checkpoint)
    if isinstance(order.precision, Scheme):
        with tell("Calibrating"):
            program = _quantize(program, folded, order.precision, order, test_set)
    require_honoured(program, shelf)
    with tell("Listening to the test set in PyTorch"):
        heard = hear(test_set, frontend)
        references = {mode.name: refer(checkpoint, folded, frontend, heard, mode) for mode in program.modes}
    with store.new_bundle(output, overwrite=overwrite) as draft:
        bundle = Bundle(
            folder=draft,
            config=folded.checkpoint.config,
            tokens=checkpoint.tokens,
            checkpoint=folded.parent,
            folded=folded.digest,
            precision=program.precision,
            quantization=_told(program.quantization),
            hears=order.hears,
            frontend=frontend,
            folds=sum(isinstance(site, Fold) for site in folded.plan),
            refusals=tuple(site for site in folded.plan if isinstance(site, Refusal)),
            fold_error=exact.end_to_end,
            speech=test_set.digest,
            references=references,
            exports=(),
            tools=versions(order.targets),
            origin=origin or folded.origin,
        )
        artifacts = [_export(name, target, program, draft, tell) for name, target in shelf.items()]
        bundle = dataclasses.replace(bundle, exports=_verify(bundle, artifacts, heard, order.bars, tell))
        if order.picture is not None:
            shutil.copyfile(order.picture, draft / order.picture.name)
        (draft / PAGE).write_text(page(bundle, order.picture.name if order.picture else None), encoding="utf-8")
        store.write_bundle(bundle)
        _require_passed(bundle, folder, order.calibration, lambda: store.keep_failed(draft, output))
    bundle = store.read_bundle(output)
    return Verified(bundle, bundle.exports, _paces(bundle, shelf, other, tell))


def verify(
    folder: Path,
    *,
    targets: Sequence[str] = (),
    speech: Path | None = None,
    bars: Mapping[str, float] = USUAL,
    tell: Tell = silent,
) -> Verified:
    """Check a bundle again, from the bundle alone; `targets` picks some of its artifacts.

    It is held against the usual bars but for those in `bars`, wherever they stood when it was exported.

    Raises:
        BundleError: it is not what was exported.
        UsageError: an artifact that it does not hold, or other speech than it was exported with.
    """
    with tell("Checking the checksums"):
        bundle = store.read_bundle(folder)
    artifacts = [_artifact_of(bundle, name) for name in targets or [e.artifact.target for e in bundle.exports]]
    with tell("Reading the test set"):
        test_set = read_speech(speech or shipped())
        if test_set.digest != bundle.speech:
            raise UsageError(
                f"{test_set.folder} is not the speech that this bundle was exported with: there is nothing to compare with.",
                hint="Name that speech with --speech DIR, or export again with: --speech DIR",
            )
        heard = hear(test_set, bundle.frontend)
    return Verified(bundle, _verify(bundle, artifacts, heard, bars, tell), {})


def calibrate(
    folder: Path,
    speech: Path,
    output: Path,
    seconds: Sequence[float],
    chunks: Sequence[Chunks],
    *,
    overwrite: bool = False,
    tell: Tell = silent,
) -> Calibration:
    """Take the ranges of a checkpoint, folded, on speech, and write them."""
    with draft(output, overwrite=overwrite, is_ours=has_ranges) as place:
        with tell("Folding"):
            folded, _ = fold_exactly(folder, checkpoints.read(folder))
        with tell("Listening"):
            seen = take_ranges(folded, lower(folded, seconds, "fp32", chunks), read_speech(speech))
        write_ranges(place, seen)
    return seen


def soak(path: Path, folder: Path, minutes: int, *, speech: Path | None = None, tell: Tell = silent) -> tuple[Artifact, Soaked]:
    """Feed an artifact one long utterance, and compare with the checkpoint in `folder` that it was made of.

    Raises:
        UsageError: the artifact does not stream, or was made of another checkpoint.
    """
    loaded = load(path)
    with tell("Folding the checkpoint"):
        folded, _ = fold_exactly(folder, checkpoints.read(folder))
    if folded.digest != loaded.artifact.parent:
        raise UsageError(f"{path} was not made of {folder}.", hint="Name its checkpoint with: --checkpoint CHECKPOINT")
    heard = hear(read_speech(speech or shipped()), loaded.bundle.frontend)
    exact = checkpoints.encoder_of(folded.checkpoint, torch.float64)
    with tell(f"Speaking for {minutes} minutes"), in_words(loaded.artifact.target, "could not run its artifact"):
        frontend = loaded.bundle.frontend
        return loaded.artifact, soak_session(loaded.session, loaded.artifact, exact, frontend, heard, minutes)


def _lower(folded: FoldedModel, order: Order) -> Program:
    precision = "fp32" if isinstance(order.precision, Scheme) else order.precision
    return lower(folded, order.seconds, precision, order.chunks, order.hears)


def _quantize(program: Program, folded: FoldedModel, scheme: Scheme, order: Order, test_set: TestSet) -> Program:
    require_one_pass(folded.checkpoint.config)
    calibration = None
    if scheme.calibrated:
        if order.calibration is None:
            raise UsageError(f"{scheme.name} needs calibration.", hint="Say on which speech: --calibration SPEECH")
        calibration = calibration_of(order.calibration, folded, program, test_set)
    prepared = _lower(prepare(folded, scheme, program.entries[0].graph, calibration), order)
    return by_scheme(dataclasses.replace(prepared, parent=program.parent), scheme, calibration)


def by_scheme(prepared: Program, scheme: Scheme, calibration: Calibration | None) -> Program:
    """The float program of a model that was prepared for a scheme, asked for fewer bits."""
    ranges: dict[str, Mapping[str, tuple[float, float]]] = {}
    if calibration:
        for mode in prepared.modes:
            seen = calibration.ranges(kind_of(mode), scheme.clipping, equalized=scheme.equalize)
            ranges |= dict.fromkeys(mode.inputs, seen)
    speech = calibration.speech if calibration else ""
    return dataclasses.replace(prepared, precision=scheme.precision, quantization=Quantization(scheme, ranges, speech))


def _told(quantization: Quantization | None) -> Quantized | None:
    return None if quantization is None else Quantized(quantization.scheme, quantization.calibration)


def require_honoured(program: Program, shelf: Mapping[str, Target]) -> None:
    """Raise `Refused` with everything that a target says against a program."""
    for target in shelf.values():
        if sentences := target.refusals(program):
            raise Refused(" ".join(sentences), hint="See what the targets can with: edgefuse targets")


def _export(name: str, target: Target, program: Program, folder: Path, tell: Tell) -> Artifact:
    with tell(f"Exporting for {name}, {program.precision}"), in_words(name, "could not export"):
        return target.export(program, folder, ARTIFACT)


def _verify(
    bundle: Bundle, artifacts: Sequence[Artifact], heard: Sequence[Heard], bars: Mapping[str, float], tell: Tell
) -> tuple[Export, ...]:
    """Examine and judge each artifact of a bundle."""
    exports = []
    for artifact in artifacts:
        name, target = artifact.target, find(artifact.target)
        with tell(f"Verifying {artifact.path.name}"), in_words(name, "could not run its artifact"):
            session = target.open(artifact)
            structure = target.structure(artifact)
            findings = {mode.name: examine(session, artifact, mode, bundle, heard) for mode in artifact.modes}
        digest = store.digest_of(artifact.path)
        verdict = judge(
            structure,
            findings,
            bundle.references,
            artifact=artifact,
            how=session.how,
            hears=bundle.hears,
            norm_free=not bundle.refusals,
            digest=digest,
            bars=bars,
        )
        exports.append(Export(artifact, store.size_bytes(artifact.path), digest, structure, findings, verdict))
    return tuple(exports)


def _paces(bundle: Bundle, shelf: Mapping[str, Target], baseline: Program | None, tell: Tell) -> dict[str, Mapping[str, Pace]]:
    """Time every artifact of a finished bundle that runs on this host, in each mode; one that is evaluated has no latency."""
    paces: dict[str, Mapping[str, Pace]] = {}
    against = " against the baseline" if baseline else ""
    for artifact in (export.artifact for export in bundle.exports if export.verdict.how != "evaluated"):
        name, target = artifact.target, shelf[artifact.target]
        with tell(f"Timing {artifact.path.name}{against}"), in_words(name, "could not be timed"):
            session = target.open(artifact)
            paces[name] = pace_against(target, session, artifact, baseline) if baseline else pace(session, artifact)
    return paces


def _artifact_of(bundle: Bundle, target: str) -> Artifact:
    held = {each.artifact.target: each.artifact for each in bundle.exports}
    if target not in held:
        raise UsageError(f"{bundle.folder} holds no artifact for {target!r}.", hint=f"It holds: {', '.join(held)}")
    return held[target]


def _require_passed(bundle: Bundle, checkpoint: Path, calibration: Path | None, keep: Callable[[], Path]) -> None:
    """Raise `GateFailed`, naming the first check that does not hold, after `keep` has put the bundle aside."""
    for export in bundle.exports:
        for check in export.verdict.checks:
            if not check.passed:
                look = which_layers(export.verdict, bundle.quantization, str(checkpoint), str(calibration or SPEECH))
                every = f"edgefuse verify {keep()}"
                raise GateFailed(
                    f"The {export.artifact.target} artifact does not pass: {check.name} is {check.measured}, "
                    f"required {check.required}.",
                    hint=f"{look}; every check with: {every}" if look else f"See every check with: {every}",
                )

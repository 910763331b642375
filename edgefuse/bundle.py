"""The nouns of verification and of the bundle, and `edgefuse.json`, which is how they are written down.

Everything in `edgefuse.json` is what an application needs to run an artifact (entries, names, shapes, units, the frontend,
the tokens) and what a reader needs to trust it (lineage, plan, findings, verdicts, tool versions, checksums).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefuse.frontend.log_mel import FrontendSpec
from edgefuse.model.config import EncoderConfig
from edgefuse.model.cost import parameters
from edgefuse.quantize.scheme import Scheme, scheme_of
from edgefuse.values import (
    INPUTS,
    PRECISIONS,
    Artifact,
    Check,
    Input,
    Origin,
    Precision,
    Refusal,
    Streaming,
    Structure,
    TensorSpec,
    Verdict,
)
from edgefuse.verify.wer import WordErrors, total

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 7


@dataclass(frozen=True, slots=True)
class Frontend:
    """What turns samples into the input of an artifact: features = (log_mel(samples) - mean) * istd, per mel bin.

    Attributes:
        spec: the log-mel transform.
        mean: (mel_bins,) float32 values.
        istd: (mel_bins,) float32 values, inverse standard deviations.
    """

    spec: FrontendSpec
    mean: tuple[float, ...]
    istd: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Golden:
    """An utterance and the right answer.

    Attributes:
        identity: of the utterance in the test set, or "full_" and an entry, for speech that fills it to its last frame (where
            it streams: its caches too, and half of the last chunk).
        text: what is said, "" where several utterances were joined.
        samples: (N,) float32 in [-1, 1], at 16 kHz.
        features: (T, mel_bins) float32, normalized; those of the samples.
        logits: (T // 4, vocabulary_size) float64, of the folded model, without any padding.
        encoded: (T // 4, d) float32, what its first pass makes of them in chunks; None of no cascade, and of whole utterances.
    """

    identity: str
    text: str
    samples: NDArray[np.float32]
    features: NDArray[np.float32]
    logits: NDArray[np.float64]
    encoded: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model said of the test set before it became an artifact, with the context of one mode.

    Attributes:
        parts: of each utterance that fits into the longest entry, the part of the test set that it belongs to.
        words: per utterance the word errors of the checkpoint in PyTorch, float32.
        alignments: per utterance the best token of each frame, of the folded model in float64.
        goldens: utterances with every logit.
    """

    parts: Mapping[str, str]
    words: Mapping[str, WordErrors]
    alignments: Mapping[str, tuple[int, ...]]
    goldens: tuple[Golden, ...]

    @property
    def errors(self) -> WordErrors:
        """Of all utterances."""
        return total(self.words.values())


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured on one artifact in one mode; whether that is enough is the gate's to say.

    Attributes:
        snr_db: the worst golden vector's, through every entry that holds it; padding is zeros. What the first pass of a cascade
            gives to the second counts as its logits do.
        padded_snr_db: the same, padding is loud noise.
        agreeing_frames: frames of the test set whose best token is the reference's.
        frames: all of them.
        words: per utterance of the reference the word errors of the artifact.
        features_snr_db: the features that an artifact made of the golden samples against those of kaldi-native-fbank, both
            normalized; the worst. None where features are what it hears.
    """

    snr_db: float
    padded_snr_db: float
    agreeing_frames: int
    frames: int
    words: Mapping[str, WordErrors]
    features_snr_db: float | None = None

    @property
    def errors(self) -> WordErrors:
        """Of all utterances."""
        return total(self.words.values())

    @property
    def agreement_percent(self) -> float:
        """How many frames of a hundred have the reference's best token."""
        return 100.0 * self.agreeing_frames / self.frames if self.frames else 0.0


@dataclass(frozen=True, slots=True)
class Export:
    """One artifact of a bundle, what was found in it, in each mode, and what the gate says of it."""

    artifact: Artifact
    size_bytes: int
    digest: str
    structure: Structure
    findings: Mapping[str, Findings]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Quantized:
    """By which scheme the artifacts of a bundle were quantized, and on which speech they were calibrated ("" on none)."""

    scheme: Scheme
    calibration: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder that an application can be built from.

    Attributes:
        folder: where it is.
        config: of the folded model.
        tokens: the vocabulary, index is id, 0 is the blank.
        checkpoint: digest of the checkpoint.
        folded: digest of the folded model.
        precision: of every artifact in it.
        quantization: the scheme and the digest of its calibration speech, where the precision is not a float.
        hears: what every artifact in it hears: features, or samples, the front end being inside then.
        frontend: from samples to features.
        folds: how many sites were folded.
        refusals: the sites that were not, and why.
        fold_error: relative, end to end, in float64.
        speech: digest of the test set.
        references: what the model said of the test set, in each mode.
        exports: the artifacts.
        tools: versions of what made it.
        origin: the deeper checkpoint that the checkpoint's blocks are the lowest of, if they are.
    """

    folder: Path
    config: EncoderConfig
    tokens: tuple[str, ...]
    checkpoint: str
    folded: str
    precision: Precision
    quantization: Quantized | None
    hears: Input
    frontend: Frontend
    folds: int
    refusals: tuple[Refusal, ...]
    fold_error: float
    speech: str
    references: Mapping[str, Reference]
    exports: tuple[Export, ...]
    tools: Mapping[str, str]
    origin: Origin | None = None

    @property
    def passed(self) -> bool:
        """Whether every artifact passed."""
        return all(export.verdict.passed for export in self.exports)


def to_json(bundle: Bundle, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What stands in `edgefuse.json`, its own digest apart; `files` maps relative paths to size and sha256."""
    return {
        "schema": SCHEMA,
        "model": {
            "name": bundle.config.name,
            "config": bundle.config.to_json(),
            "tokens": "tokens.txt",
            **_parameters(bundle.config),
        },
        "lineage": {
            "checkpoint": bundle.checkpoint,
            "folded": bundle.folded,
            **origin_to_json(bundle.origin),
            "artifacts": {export.artifact.target: export.digest for export in bundle.exports},
        },
        "precision": bundle.precision,
        "quantization": bundle.quantization
        and {"scheme": bundle.quantization.scheme.to_json(), "calibration": bundle.quantization.calibration},
        "input": bundle.hears,
        "frontend": {
            "formula": "features = (log_mel(samples) - mean) * istd",
            **dataclasses.asdict(bundle.frontend.spec),
            "mean": bundle.frontend.mean,
            "istd": bundle.frontend.istd,
        },
        "plan": {
            "folded_sites": bundle.folds,
            "refusals": [dataclasses.asdict(refusal) for refusal in bundle.refusals],
            "relative_error_float64": bundle.fold_error,
        },
        "reference": {
            "speech": bundle.speech,
            "golden": "golden",
            "modes": list(bundle.references),
        },
        "artifacts": [_export_to_json(bundle.folder, export) for export in bundle.exports],
        "tools": dict(sorted(bundle.tools.items())),
        "files": dict(sorted(files.items())),
    }


def from_json(folder: Path, fields: Mapping[str, Any], tokens: tuple[str, ...], references: Mapping[str, Reference]) -> Bundle:
    """Read what `to_json` wrote; a KeyError, TypeError or ValueError means that it did not."""
    frontend = {f.name: fields["frontend"][f.name] for f in dataclasses.fields(FrontendSpec)}
    return Bundle(
        folder=folder,
        config=EncoderConfig.from_json(fields["model"]["config"]),
        tokens=tokens,
        checkpoint=fields["lineage"]["checkpoint"],
        folded=fields["lineage"]["folded"],
        precision=_precision(fields["precision"]),
        quantization=_quantized(fields["quantization"]),
        hears=INPUTS[INPUTS.index(fields["input"])],  # a ValueError for any other word
        frontend=Frontend(FrontendSpec(**frontend), tuple(fields["frontend"]["mean"]), tuple(fields["frontend"]["istd"])),
        folds=fields["plan"]["folded_sites"],
        refusals=tuple(Refusal(**refusal) for refusal in fields["plan"]["refusals"]),
        fold_error=fields["plan"]["relative_error_float64"],
        speech=fields["reference"]["speech"],
        references=references,
        exports=tuple(_export_from_json(folder, fields, export, references) for export in fields["artifacts"]),
        tools=fields["tools"],
        origin=origin_of(fields["lineage"]),
    )


def _parameters(config: EncoderConfig) -> dict[str, Any]:
    """How many parameters are stored and run, where these are two numbers."""
    return {"parameters": dataclasses.asdict(parameters(config))} if config.shared_blocks else {}


def origin_to_json(origin: Origin | None) -> dict[str, Any]:
    """The deeper checkpoint, where there is one."""
    return {} if origin is None else {"cut_from": dataclasses.asdict(origin)}


def origin_of(fields: Mapping[str, Any]) -> Origin | None:
    """Read it back."""
    return Origin(**fields["cut_from"]) if "cut_from" in fields else None


def _export_to_json(folder: Path, export: Export) -> dict[str, Any]:
    artifact = export.artifact
    return {
        "target": artifact.target,
        "path": artifact.path.relative_to(folder).as_posix(),
        "size_bytes": export.size_bytes,
        "digest": export.digest,
        "entries": {name: _entry_to_json(artifact, name) for name in artifact.inputs},
        "structure": structure_to_json(export.structure),
        "precision": {"layers": dict(artifact.layers), "kept": dict(artifact.kept)},
        "findings": {mode: _findings_to_json(findings) for mode, findings in export.findings.items()},
        "verdict": verdict_to_json(export.verdict),
    }


def _findings_to_json(findings: Findings) -> dict[str, Any]:
    """What was measured; word errors by kind, of the utterances that have some: their words stand in the reference."""
    told = {name: each.kinds for name, each in findings.words.items() if each.errors}
    return {**measured_to_json(findings), "word_errors": told}


def measured_to_json(findings: Findings) -> dict[str, Any]:
    """What was measured, the words left out."""
    return {each.name: getattr(findings, each.name) for each in dataclasses.fields(findings) if each.name != "words"}


def structure_to_json(structure: Structure) -> dict[str, Any]:
    """What is inside an artifact."""
    return {
        "precisions": {name: dict(counts) for name, counts in sorted(structure.precisions.items())},
        "normalizations": list(structure.normalizations),
        "partitions": structure.partitions,
        "outside": dict(sorted(structure.outside.items())),
        "weighted": {name: dict(counts) for name, counts in sorted(structure.weighted.items())},
    }


def _entry_to_json(artifact: Artifact, name: str) -> dict[str, Any]:
    """The contract of one entry; `streaming` is how an application goes on from chunk to chunk."""
    specs = {
        "inputs": [_spec_to_json(spec) for spec in artifact.inputs[name]],
        "outputs": [_spec_to_json(spec) for spec in artifact.outputs[name]],
    }
    if name not in artifact.streaming:
        return specs
    how = artifact.streaming[name]
    told = {
        "chunk_frames": how.chunk,
        "left_context_frames": how.left,
        "frame_ms": how.frame_ms,
        "look_ahead_frames": how.ahead,
        "overlap_samples": how.overlap,
        "states": dict(how.states),
        "held": list(how.held),
    }
    return {**specs, "streaming": told}


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """What the gate said."""
    return {
        "passed": verdict.passed,
        "how": verdict.how,
        "moved_bars": dict(verdict.moved),
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
    }


def _export_from_json(
    folder: Path, bundle: Mapping[str, Any], fields: Mapping[str, Any], references: Mapping[str, Reference]
) -> Export:
    target = fields["target"]
    artifact = Artifact(
        target=target,
        path=folder / fields["path"],
        precision=_precision(bundle["precision"]),
        inputs={name: _specs(entry["inputs"]) for name, entry in fields["entries"].items()},
        outputs={name: _specs(entry["outputs"]) for name, entry in fields["entries"].items()},
        parent=bundle["lineage"]["folded"],
        layers=fields["precision"]["layers"],
        kept=fields["precision"]["kept"],
        streaming={name: _streaming(entry["streaming"]) for name, entry in fields["entries"].items() if "streaming" in entry},
    )
    structure = Structure(**{**fields["structure"], "normalizations": tuple(fields["structure"]["normalizations"])})
    findings = {mode: _findings(found, references[mode]) for mode, found in fields["findings"].items()}
    checks = tuple(Check(**check) for check in fields["verdict"]["checks"])
    verdict = Verdict(target, fields["verdict"]["how"], checks, parent=fields["digest"], moved=fields["verdict"]["moved_bars"])
    return Export(artifact, fields["size_bytes"], fields["digest"], structure, findings, verdict)


def _findings(fields: Mapping[str, Any], reference: Reference) -> Findings:
    told, none = fields["word_errors"], WordErrors(0, 0, 0, 0, 0).kinds
    words = {name: WordErrors(**told.get(name, none), words=each.words, utterances=1) for name, each in reference.words.items()}
    return Findings(**{name: value for name, value in fields.items() if name != "word_errors"}, words=words)


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    """One tensor; `frame_ms` where it has one."""
    return {name: told for name, told in dataclasses.asdict(spec).items() if name != "frame_ms" or told}


def _specs(specs: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs)


def _streaming(fields: Mapping[str, Any]) -> Streaming:
    return Streaming(
        chunk=fields["chunk_frames"],
        left=fields["left_context_frames"],
        frame_ms=fields["frame_ms"],
        states=fields["states"],
        held=tuple(fields["held"]),
        overlap=fields["overlap_samples"],
        ahead=fields["look_ahead_frames"],
    )


def _quantized(fields: Mapping[str, Any] | None) -> Quantized | None:
    return None if fields is None else Quantized(scheme_of(fields["scheme"]), fields["calibration"])


def _precision(name: str) -> Precision:
    return PRECISIONS[PRECISIONS.index(name)]  # a ValueError for any other word

"""Bundles and what was checked of them, as tables of words; rendering is elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgefuse.report.terminal import megabytes, or_dash
from edgefuse.values import SECOND_PASS

if TYPE_CHECKING:
    from edgefuse.bundle import Bundle, Export
    from edgefuse.pipeline import Verified
    from edgefuse.values import Check

ARTIFACTS = (
    "target",
    "mode",
    "how",
    "precision",
    "file size",
    "SNR",
    "token agreement",
    "WER",
    "operators",
    "partitions",
    "p50 here",
    "baseline/this",
    "gate",
)
CHECKS = ("target", "check", "measured", "required", "")


def artifact_rows(verified: Verified) -> list[tuple[str, ...]]:
    """One row per artifact and mode, in the order of `ARTIFACTS`."""
    from edgefuse.verify.structure import operator_count

    rows: list[tuple[str, ...]] = []
    for export in verified.exports:
        for mode, findings in export.findings.items():
            pace = verified.paces.get(export.artifact.target, {}).get(mode)
            rows.append(
                (
                    export.artifact.target,
                    mode,
                    export.verdict.how.split()[0],  # "run" on this host, or "evaluated"
                    export.artifact.precision,
                    megabytes(export.size_bytes),
                    f"{findings.snr_db:.1f} dB",
                    f"{findings.agreement_percent:.2f} %",
                    f"{findings.errors.wer_percent:.2f} %",
                    str(operator_count(export.structure)),
                    or_dash(export.structure.partitions, "{}"),
                    or_dash(pace.p50_ms if pace else None, "{:.1f} ms"),
                    or_dash(pace.baseline_ratio if pace else None, "{:.2f}"),
                    f"{'passed' if export.verdict.passed else 'FAILED'}{'*' if export.verdict.moved else ''}",
                )
            )
    return rows


def check_rows(target: str, checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """One row per check, in the order of `CHECKS`."""
    from edgefuse.verify.gate import REPORTED

    marks = ("" if check.required == REPORTED else "passed" if check.passed else "FAILED" for check in checks)
    return [(target, check.name, check.measured, check.required, mark) for check, mark in zip(checks, marks, strict=True)]


def verified_rows(verified: Verified) -> list[tuple[str, ...]]:
    """The same of every artifact, behind what it is."""
    return [
        row
        for export in verified.exports
        for row in (*_fact_rows(export), *check_rows(export.artifact.target, export.verdict.checks))
    ]


def _fact_rows(export: Export) -> list[tuple[str, ...]]:
    from edgefuse.verify.gate import REPORTED, counted

    target, structure = export.artifact.target, export.structure
    found = f"linears and convolutions: {counted(structure.layers)}; other operators: {counted(structure.others)}"
    return [
        (target, "size", f"{export.size_bytes} bytes", REPORTED, ""),
        (target, "precisions", found, REPORTED, ""),
    ]


def checks_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [dataclasses.asdict(check) for check in checks]


def streaming_lines(bundle: Bundle) -> list[str]:
    """What each streaming entry takes and sees, its sizes whole encoder frames whatever was asked for; and second passes."""
    streaming = {name: how for export in bundle.exports for name, how in export.artifact.streaming.items()}
    modes = (mode for export in bundle.exports for mode in export.artifact.modes if mode.name == SECOND_PASS)
    second = {name: specs[0] for mode in modes for name, specs in mode.inputs.items()}
    return [
        f"{name}: chunks of {how.chunk_ms} ms, after up to {how.left_context_ms} ms of past, "
        f"{f'with {how.look_ahead_ms} ms of look-ahead' if how.ahead else 'without look-ahead'}; "
        f"its caches {'are held inside' if how.held else 'go in and out'}"
        for name, how in sorted(streaming.items())
    ] + [
        f"{name}: the second pass, over up to {heard.shape[1] * heard.frame_ms / 1000:g} s of what {next(iter(streaming))} gave"
        for name, heard in second.items()
    ]


def depth_lines(bundle: Bundle) -> list[str]:
    """What a model of fewer layers was cut from, and how often the weights of shared blocks are run."""
    from edgefuse.model.cost import parameters

    config, origin = bundle.config, bundle.origin
    lines: list[str] = []
    if origin is not None:
        lines.append(f"The lowest {config.layers} of {origin.layers} layers of checkpoint {origin.checkpoint[:16]}")
    if config.shared_blocks and config.layers > 1:
        counted = parameters(config)
        lines.append(
            f"The weights of {config.layers} blocks are stored once: {counted.stored / 1e6:.2f} million parameters, "
            f"run as {counted.run / 1e6:.2f} million"
        )
    return lines


def verified_json(verified: Verified) -> dict[str, Any]:
    """The same for programs."""
    from edgefuse.bundle import structure_to_json, verdict_to_json

    return {
        "bundle": str(verified.bundle.folder),
        "passed": verified.passed,
        "model": verified.bundle.config.name,
        "precision": verified.bundle.precision,
        "artifacts": [
            {
                "target": export.artifact.target,
                "path": str(export.artifact.path),
                "size_bytes": export.size_bytes,
                "digest": export.digest,
                "structure": structure_to_json(export.structure),
                "modes": {mode: _mode_json(verified, export, mode) for mode in export.findings},
                "verdict": verdict_to_json(export.verdict),
            }
            for export in verified.exports
        ],
    }


def _mode_json(verified: Verified, export: Export, mode: str) -> dict[str, Any]:
    from edgefuse.bundle import measured_to_json
    from edgefuse.verify.bootstrap import LEVEL_PERCENT, differences

    findings, pace = export.findings[mode], verified.paces.get(export.artifact.target, {}).get(mode)
    return {
        **measured_to_json(findings),
        "errors": dataclasses.asdict(findings.errors),
        "wer_percent": findings.errors.wer_percent,
        "against_the_model": [
            {
                "part": each.part,
                "utterances": each.model.utterances,
                "words": each.model.words,
                "errors": each.artifact.errors,
                "model_errors": each.model.errors,
                "changed_utterances": each.changed,
                "points": each.points,
                f"interval_{LEVEL_PERCENT}_percent": list(each.interval),
            }
            for each in differences(verified.bundle.references[mode], findings)
        ],
        **({"p50_ms": pace.p50_ms, "baseline_ratio": pace.baseline_ratio} if pace else {}),
    }


def lineage_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    """Where every number of a bundle comes from."""
    quantized = bundle.quantization
    return [
        ("checkpoint", bundle.checkpoint),
        ("folded model", bundle.folded),
        *([("cut from", f"{bundle.origin.checkpoint}, {bundle.origin.layers} layers")] if bundle.origin else []),
        *(
            (f"{export.artifact.target}, {megabytes(export.size_bytes)}, {export.verdict.how}", export.digest)
            for export in bundle.exports
        ),
        ("speech that it was verified on", bundle.speech),
        *([("speech that it was calibrated on", quantized.calibration)] if quantized and quantized.calibration else []),
        ("sites folded", f"{bundle.folds}; {len(bundle.refusals)} stay"),
        ("relative error of the fold, float64", f"{bundle.fold_error:.1e}"),
        ("tools", ", ".join(f"{name} {version}" for name, version in bundle.tools.items())),
    ]


def verdict_line(verified: Verified) -> str:
    """Bundle, model, precision, verdict, how each artifact was run, and against which bars where they are not the usual ones."""
    how = "; ".join(f"{export.artifact.target} {export.verdict.how}" for export in verified.exports)
    bundle, moved, before = verified.bundle, _moved(verified.exports), _moved(verified.bundle.exports)
    told = f"{bundle.folder}: {bundle.config.name}, {bundle.precision}, {'passed' if verified.passed else 'FAILED'} ({how})"
    now = f"; bars moved: {_settings(moved)}" if moved else ""
    then = f"; exported with {f'bars moved: {_settings(before)}' if before else 'the usual bars'}" if before != moved else ""
    return f"{told}{now}{then}"


def moved_lines(verified: Verified) -> list[str]:
    """Which bars are not the usual ones, if any: what the mark beside a verdict means."""
    moved = _moved(verified.exports)
    return [f"* bars moved: {_settings(moved)}"] if moved else []


def next_steps(verified: Verified) -> list[str]:
    """What to do about a bundle that does not pass, apart from reading the table."""
    from edgefuse.verify.gate import which_layers

    before, quantized = _moved(verified.bundle.exports), verified.bundle.quantization
    steps = [step for export in verified.exports if (step := which_layers(export.verdict, quantized))][:1]
    if before and not _moved(verified.exports):
        steps.insert(0, f"It was exported with other bars, {_settings(before)}: give them with --bars FILE.")
    return steps


def _moved(exports: Sequence[Export]) -> dict[str, float]:
    return {name: value for export in exports for name, value in export.verdict.moved.items()}


def _settings(bars: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in bars.items())


def budget_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What a budget says, for programs."""
    return {"budget": [dataclasses.asdict(check) for check in checks]}

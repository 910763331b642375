"""Tables as rows of words; all arithmetic of the reports is here, all rendering is elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from edgefuse.decode.spelling import Said
from edgefuse.quantize.mixes import front
from edgefuse.quantize.scheme import CLIPPINGS
from edgefuse.report.terminal import megabytes
from edgefuse.values import SECOND_PASS, Fold, Refusal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from edgefuse.ablation import Comparison, Row
    from edgefuse.bundle import Bundle, Export
    from edgefuse.device import Device
    from edgefuse.evaluate import Evaluation
    from edgefuse.explore import Costs
    from edgefuse.fold import Exactness
    from edgefuse.inspection import Inspection
    from edgefuse.model.config import BlockShape, EncoderConfig
    from edgefuse.packages import Need
    from edgefuse.pipeline import Verified
    from edgefuse.quantize.calibrate import Calibration
    from edgefuse.quantize.trial import Trial
    from edgefuse.recognize import Transcript
    from edgefuse.recognizer import Streamed
    from edgefuse.search import Found
    from edgefuse.target import Target
    from edgefuse.train.metrics import Trained
    from edgefuse.train.pretrain import Pretrained
    from edgefuse.values import Check, FoldedModel
    from edgefuse.verify.bootstrap import Difference
    from edgefuse.verify.wer import WordErrors

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
PLAN = ("site", "", "into, or the reason")
DEVICES = ("device", "what", "clock", "state")
TARGETS = ("target", "makes", "file", "state")
NEEDS = ("package", "installed", "wanted", "by", "state")
RATIOS = ("target", "mode", "ratio", "median", "half of the rounds within", "bar", "p50", "")
STREAMED = ("recording", "length", "chunks", "real-time factor", "p50", "p90", "p99")
EVALUATED = ("test set", "search", "WER", "on hotwords", "on other words", "false hotwords", "words", "utterances")
AGAINST = ("test set", "search", "WER", "the other's", "difference in points", "95 % of them", "utterances that differ")
RANGES = ("mode", "value", "smallest", "largest", *(f"for {way}" for way in CLIPPINGS))
SENSITIVITIES = (
    "layer",
    "precision",
    "share of the error",
    "SNR, alone",
    "without it",
    "tokens, alone",
    "without it",
    "WER, alone",
    "without it",
    "latency",
    "size",
)
FOUND = ("scheme", "layers", "SNR", "tokens", "WER loss", "file size", "p50 here", "/ fp32", "on the front", "")
ERRORS = ("test set", "WER", "errors", "words", "utterances")
CHARACTER_ERRORS = ("test set", "CER", "errors", "characters", "utterances")


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
                    _or_dash(export.structure.partitions, "{}"),
                    _or_dash(pace.p50_ms if pace else None, "{:.1f} ms"),
                    _or_dash(pace.baseline_ratio if pace else None, "{:.2f}"),
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


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else form.format(number)


def plan_rows(plan: Sequence[Fold | Refusal]) -> list[tuple[str, ...]]:
    """One row per site, in the order of `PLAN`."""
    return [
        (site.site, "folds", f"{_few(site.into)} ({site.rule})") if isinstance(site, Fold) else (site.site, "STAYS", site.reason)
        for site in plan
    ]


def _few(names: Sequence[str], most: int = 4) -> str:
    """A basis of the residual stream names all that reads and writes it."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def inspection_rows(found: Inspection) -> list[tuple[str, ...]]:
    """What a checkpoint is."""
    config = found.checkpoint.config
    return [
        ("subsampling", f"by {config.subsampling}, {config.subsampling_channels} channels; a frame of {config.frame_ms} ms"),
        *_block_rows(config),
        ("norm", f"{config.norm}{', folded' if config.folded else ''}{_but_kept(config)}"),
        ("activation", config.activation),
        ("positions", config.positions),
        ("vocabulary", f"{config.vocabulary_size} tokens"),
        ("longest utterance", f"{config.max_frames * config.frame_ms / 1000:g} s"),
        (
            "parameters",
            f"{found.parameters / 1e6:.2f} million"
            + (f", run as {found.parameters_run / 1e6:.2f}: {config.layers} blocks are one" if config.shared_blocks else ""),
        ),
        ("cost", f"{found.macs_per_second / 1e6:.0f} million multiply-accumulates per second of audio"),
        ("plan", f"{found.folds} sites fold, {found.refusals} stay"),
        ("digest", found.checkpoint.digest[:16]),
    ]


def _but_kept(config: EncoderConfig) -> str:
    return " but for the residual stream" if config.residual_norms_kept else ""


def _block_rows(config: EncoderConfig) -> list[tuple[str, str]]:
    """The blocks from the bottom up, those that are alike in one line."""
    alike = [(shape, len([*group])) for shape, group in itertools.groupby(config.blocks)]
    return [("blocks" if number == 0 else "", _block_line(config, *each)) for number, each in enumerate(alike)]


def _block_line(config: EncoderConfig, shape: BlockShape, count: int) -> str:
    own = f" of width {shape.attention_dimension}" if shape.attention_dimension != config.dimension else ""
    heads = f", {shape.heads} heads{own}" if shape.attention != "none" else ""
    kind = {"softmax": "", "performer": ", Performer", "none": ", convolution only"}[shape.attention]
    said = {
        ", one and the same": config.shared_blocks,
        f", {shape.left} frames of past at most": shape.left is not None,
        ", every second frame goes on": shape.stride > 1,
        ", second pass": shape.second_pass,
    }
    more = "".join(words for words, there in said.items() if there)
    return f"{count} x d {config.dimension}{heads}, ff {shape.feed_forward}, kernel {shape.kernel}{kind}{more}"


def fold_line(folded: FoldedModel, exact: Exactness, output: Path) -> str:
    """What a fold did, and how exactly."""
    stay = sum(isinstance(site, Refusal) for site in folded.plan)
    return (
        f"{output}: {len(folded.plan) - stay} sites folded, {stay} stay; relative error in float64: "
        f"{exact.end_to_end:.1e} end to end, {exact.worst_site:.1e} at the worst site"
    )


def pretrained_line(pretrained: Pretrained) -> str:
    """What a pre-training has learnt."""
    return (
        f"{pretrained.folder}: L1 of hidden log-mel values {pretrained.after:.3f}, before {pretrained.before:.3f}, of their mean "
        f"{pretrained.mean:.3f}; its CTC head is untrained, go on with: edgefuse train --from {pretrained.folder}"
    )


def pretrained_json(pretrained: Pretrained) -> dict[str, Any]:
    """The same for programs."""
    return {**dataclasses.asdict(pretrained), "folder": str(pretrained.folder)}


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


def transcript_lines(heard: Sequence[Transcript], *, timestamps: bool = False) -> list[str]:
    """The text of each utterance, with the file's name where there are several files; words below it if `timestamps`."""
    names = ["" if len(heard) == 1 else f"{each.path}: " for each in heard]
    return [
        line
        for each, name in zip(heard, names, strict=True)
        for said in each.said or (Said(()),)
        for line in said_lines(said, name, timestamps=timestamps)
    ]


def said_lines(said: Said, name: str = "", *, timestamps: bool) -> list[str]:
    """The text of one utterance; if `timestamps`, below it each word with its begin and end in seconds."""
    words = (f"{word.start_s:8.2f} {word.end_s:8.2f}  {word.text}" for word in said.words)
    return [f"{name}{said.text}", *(words if timestamps else ())]


def transcripts_json(heard: Sequence[Transcript]) -> list[dict[str, Any]]:
    """The same for programs, words with their times always."""
    return [
        {
            "path": str(each.path),
            "seconds": each.seconds,
            "text": each.text,
            "utterances": [
                {"text": said.text, "words": list(map(dataclasses.asdict, said.words)), "second_pass": said.second_pass}
                for said in each.said
            ],
        }
        for each in heard
    ]


def first_pass_lines(heard: Sequence[Streamed]) -> list[str]:
    """Of each utterance that was to be heard by a second pass and was not, why."""
    return [
        f"{each.path.name}, from {said.words[0].start_s:.2f} s: longer than the second pass takes; the first pass's text stays"
        for each in heard
        for said in each.said
        if not said.second_pass
    ]


def streamed_rows(heard: Sequence[Streamed]) -> list[tuple[str, ...]]:
    """One row per recording, in the order of `STREAMED`."""
    return [
        (
            each.path.name,
            f"{each.seconds:.2f} s",
            str(len(each.latency_ns)),
            f"{each.real_time_factor:.4f}",
            *(f"{each.latency_ms(percent):.1f} ms" for percent in (50, 90, 99)),
        )
        for each in heard
    ]


def streamed_json(heard: Sequence[Streamed]) -> list[dict[str, Any]]:
    """The same for programs, with every sample."""
    return [
        {**told, "real_time_factor": each.real_time_factor, "latency_ns": list(each.latency_ns)}
        for told, each in zip(transcripts_json(heard), heard, strict=True)
    ]


def target_rows(shelf: Mapping[str, EntryPoint]) -> list[tuple[str, ...]]:
    """One row per target, in the order of `TARGETS`."""
    rows: list[tuple[str, ...]] = []
    for name, point in shelf.items():
        target = cast("Target", point.load())
        lacking = target.missing()
        state = f"missing; pip install {' '.join(lacking)}" if lacking else "ready"
        rows.append((name, target.SUMMARY, f"model{target.SUFFIX}", state))
    return rows


def device_rows(shelf: Mapping[str, EntryPoint]) -> list[tuple[str, ...]]:
    """One row per device that is found, and one per kind that lacks something, in the order of `DEVICES`."""
    rows: list[tuple[str, ...]] = []
    for name, point in shelf.items():
        device = cast("Device", point.load())
        if lacking := device.missing():
            wants, mends = ", ".join(lack.what for lack in lacking), "; ".join(dict.fromkeys(lack.mend for lack in lacking))
            rows.append((name, device.SUMMARY, "-", f"needs {wants}; {mends}"))
            continue
        found = device.found()
        rows += [(each.spec, each.name, each.clock, "ready") for each in found]
        rows += [] if found else [(name, device.SUMMARY, "-", "none is found")]
    return rows


def budget_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What a budget says, for programs."""
    return {"budget": [dataclasses.asdict(check) for check in checks]}


def need_rows(needs: Sequence[Need]) -> list[tuple[str, ...]]:
    """One row per package, in the order of `NEEDS`."""
    return [(need.package, need.installed or "-", need.wanted, need.by, need.state) for need in needs]


def needs_json(needs: Sequence[Need], repair: str | None) -> dict[str, Any]:
    """The same for programs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [dataclasses.asdict(need) for need in needs],
        "repair": repair,
    }


def error_rows(errors: Mapping[str, WordErrors]) -> list[tuple[str, ...]]:
    """One row per test set, in the order of `ERRORS`."""
    return [
        (name, f"{counted.wer_percent:.2f} %", str(counted.errors), str(counted.words), str(counted.utterances))
        for name, counted in errors.items()
    ]


def evaluated_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """One row per test set and search, in the order of `EVALUATED`; of the hotwords' words, errors of how many said."""
    return [
        (
            each.subset,
            _search(each),
            _percent(each.errors),
            *(f"{_percent(part)} ({part.errors} of {part.words})" for part in each.hotwords or ()),
            *(() if each.hotwords else ("-", "-")),
            str(each.false_hotwords) if each.hotwords else "-",
            str(each.errors.words),
            str(each.errors.utterances),
        )
        for each in evaluations
    ]


def against_rows(evaluations: Sequence[Evaluation], apart: Sequence[Difference]) -> list[tuple[str, ...]]:
    """How far each is from another artifact's, in the order of `AGAINST`."""
    return [
        (
            each.subset,
            _search(each),
            _percent(by.artifact),
            _percent(by.model),
            f"{by.points:+.2f}",
            "{:+.2f} to {:+.2f}".format(*by.interval),
            f"{by.changed} of {by.model.utterances}",
        )
        for each, by in zip(evaluations, apart, strict=True)
    ]


def evaluated_json(evaluations: Sequence[Evaluation], apart: Sequence[Difference] = ()) -> list[dict[str, Any]]:
    """The same for programs."""
    from edgefuse.verify.bootstrap import LEVEL_PERCENT

    return [
        {
            "set": each.subset,
            "beam": each.decoding.beam,
            "hotwords": len(each.decoding.hotwords),
            "errors": _errors_json(each.errors),
            **(
                {
                    "on_hotwords": _errors_json(each.hotwords[0]),
                    "on_other_words": _errors_json(each.hotwords[1]),
                    "false_hotwords": each.false_hotwords,
                }
                if each.hotwords
                else {}
            ),
            **(
                {
                    "against": {
                        "errors": _errors_json(by.model),
                        "points": by.points,
                        f"interval_{LEVEL_PERCENT}_percent": list(by.interval),
                        "changed_utterances": by.changed,
                    }
                }
                if by
                else {}
            ),
        }
        for each, by in itertools.zip_longest(evaluations, apart)
    ]


def _search(each: Evaluation) -> str:
    beam = "greedy" if each.decoding.beam == 1 else f"beam {each.decoding.beam}"
    return f"{beam}, {len(each.decoding.hotwords)} hotwords" if each.decoding.hotwords else beam


def _percent(errors: WordErrors) -> str:
    return f"{errors.wer_percent:.2f} %" if errors.words else "-"


def _errors_json(errors: WordErrors) -> dict[str, Any]:
    return {**dataclasses.asdict(errors), "wer_percent": errors.wer_percent if errors.words else None}


def trained_json(trained: Trained) -> dict[str, Any]:
    """The same for programs, and where the checkpoint is."""
    return {
        "checkpoint": str(trained.folder),
        "counted": "characters" if trained.characters else "words",
        "errors": {name: _errors_json(counted) for name, counted in trained.errors.items()},
    }


def ratio_rows(measured: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """One row per pair of contenders, in the order of `RATIOS`; a bar of the road is held against the figure."""
    rows: list[tuple[str, ...]] = []
    for name, to, ratio, bar, comparison in _ratios(measured):
        low, high = comparison.samples.ratio_quartiles(name, to)
        p50 = " / ".join(f"{comparison.samples.p50_ms(each):.1f}" for each in (name, to))
        kept = "" if bar is None else "kept" if bar.kept(ratio) else "MISSED"
        rows.append(
            (
                comparison.target,
                comparison.mode.name,
                f"{name} / {to}",
                f"{ratio:.3f}",
                f"{low:.3f} .. {high:.3f}",
                _bar(bar),
                f"{p50} ms",
                kept,
            )
        )
    return rows


def comparisons_json(measured: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The same for programs, with every sample."""
    return [
        {
            "preset": comparison.preset,
            "precision": comparison.precision,
            "target": comparison.target,
            "mode": comparison.mode.name,
            "ratios": [
                {"ratio": f"{name} / {to}", "median": ratio, "bar": _bar(bar)}
                for name, to, ratio, bar, _ in _ratios([comparison])
            ],
            "latency_ns": {name: list(samples) for name, samples in comparison.samples.latency_ns.items()},
        }
        for comparison in measured
    ]


def _bar(row: Row | None) -> str:
    return "-" if row is None else f"{'>=' if row.least else '<='} {row.bar}"


def _ratios(measured: Sequence[Comparison]) -> Iterator[tuple[str, str, float, Row | None, Comparison]]:
    from edgefuse.ablation.compare import ROWS, pairs

    for comparison in measured:
        bars = {(row.target, row.streaming, row.name, row.to): row for row in ROWS.get(comparison.preset, ())}
        for name, to in pairs(comparison.precision):
            if {name, to} <= set(comparison.samples.latency_ns):
                bar = bars.get((comparison.target, comparison.mode.streaming is not None, name, to))
                yield name, to, comparison.samples.ratio(name, to), bar, comparison


def range_rows(seen: Calibration) -> list[tuple[str, ...]]:
    """Per mode and value: the ends that were seen, and the range that each way of clipping chooses."""
    return [
        (mode, path, f"{each.low:.3g}", f"{each.high:.3g}", *(_span(each.range(way)) for way in CLIPPINGS))
        for mode, values in seen.modes.items()
        for path, each in values.items()
    ]


def calibration_json(seen: Calibration) -> dict[str, Any]:
    """The same, without the histograms."""
    return {
        mode: {
            path: {"low": each.low, "high": each.high, **{way: each.range(way) for way in CLIPPINGS}}
            for path, each in values.items()
        }
        for mode, values in seen.modes.items()
    }


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]:.3g} to {span[1]:.3g}"


def sensitivity_rows(costs: Costs) -> list[tuple[str, ...]]:
    """One row per layer and line, in the order of `SENSITIVITIES`, what brings the most error first."""
    noise = sum(each.alone.noise for each in costs.parts) or 1.0
    latency = sum(costs.latency_ms.values())
    return [
        (
            each.name,
            each.precision,
            f"{100 * each.alone.noise / noise:.1f} %",
            *(f"{trial.snr_db:.1f} dB" for trial in (each.alone, each.without)),
            *(f"{trial.agreement_percent:.2f} %" for trial in (each.alone, each.without)),
            f"{each.alone.errors.wer_percent - costs.exact.errors.wer_percent:+.2f}",
            f"{each.without.errors.wer_percent - costs.whole.errors.wer_percent:+.2f}",
            f"{100 * costs.latency_ms[each.name] / latency:.1f} %" if each.name in costs.latency_ms and latency else "-",
            f"{100 * each.extent.weights / costs.weights:.1f} %" if each.extent else "-",
        )
        for each in sorted(costs.parts, key=lambda each: -each.alone.noise)
    ]


def sensitivity_line(costs: Costs) -> str:
    """What the scheme as a whole does."""
    return (
        f"All of it: {costs.whole.snr_db:.1f} dB, {costs.whole.agreement_percent:.2f} % of the tokens, WER "
        f"{costs.whole.errors.wer_percent:.2f} %, float {costs.exact.errors.wer_percent:.2f} % ({costs.exact.errors.words} words)"
    )


def sensitivity_json(costs: Costs) -> dict[str, Any]:
    """The same for programs."""
    return {
        "float": _trial_json(costs.exact),
        "all": _trial_json(costs.whole),
        "weights": costs.weights,
        "parts": [
            {
                "name": each.name,
                "precision": each.precision,
                "alone": _trial_json(each.alone),
                "without": _trial_json(each.without),
                "latency_ms": costs.latency_ms.get(each.name),
                "extent": dataclasses.asdict(each.extent) if each.extent else None,
            }
            for each in costs.parts
        ],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "snr_db": trial.snr_db,
        "agreement_percent": trial.agreement_percent,
        "frames": trial.frames,
        "errors": _errors_json(trial.errors),
    }


def found_rows(found: Found) -> list[tuple[str, ...]]:
    """One row per scheme that was measured, in the order of `FOUND`, the cheapest first."""
    best = front(found.measured)
    return [
        (
            each.scheme.name,
            ", ".join(f"{count} {precision}" for precision, count in sorted(each.layers.items())),
            f"{each.trial.snr_db:.1f} dB",
            f"{each.trial.agreement_percent:.2f} %",
            f"{each.wer_loss:+.2f}",
            megabytes(each.size_bytes),
            _or_dash(each.latency_ms, "{:.2f} ms"),
            _or_dash(each.latency_ratio, "{:.3f}"),
            "yes" if each in best else "",
            "chosen" if each is found.chosen else "",
        )
        for each in sorted(found.measured, key=lambda each: each.cost)
    ]


def found_json(found: Found) -> dict[str, Any]:
    """The same for programs."""
    return {
        "chosen": found.chosen.scheme.to_json(),
        "binding": found.binding,
        "measured": [
            {
                "scheme": each.scheme.to_json(),
                "layers": dict(each.layers),
                **_trial_json(each.trial),
                "wer_loss": each.wer_loss,
                "size_bytes": each.size_bytes,
                "latency_ms": each.latency_ms,
                "latency_ratio": each.latency_ratio,
            }
            for each in found.measured
        ],
    }

"""The commands: each parses, calls one function, prints one thing. One place catches what was foreseen."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from edgefuse import __version__
from edgefuse.atomic import FORBIDDEN, FULL
from edgefuse.errors import EdgefuseError, GateFailed, MissingPackage, NoSpace, NotWritable, OverBudget, UsageError
from edgefuse.values import FLOAT, INPUTS, PRECISIONS

if TYPE_CHECKING:
    from edgefuse.decode.spelling import Said
    from edgefuse.lower import Chunks
    from edgefuse.quantize.scheme import Scheme
    from edgefuse.recognize import Transcript
    from edgefuse.recognizer import Streamed
    from edgefuse.values import Check, Input, Precision

INTERRUPTED, TERMINATED, CLOSED_PIPE = 130, 143, 141  # 128 + the signal's number, as a shell has them
NORMS = ("batch", "layer", "unified", "rep", "batch-in-place", "none")  # as `edgefuse.model.config.Norm` has them
REFERENCE = "reference"  # the target without a runtime: for tests, not one of --all
MOST_CHARACTERS = 600  # of an error's sentence; a broken file can make it endless

PATH = click.Path(path_type=Path)
Command = Callable[..., None]


def json_option(command: Command) -> Command:
    """`--json`, on every command that prints a table."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def _be_verbose(_context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from edgefuse.report.terminal import show_foreign_words

        show_foreign_words()


def verbose_option(command: Command) -> Command:
    """`-v`, on every command that runs foreign libraries."""
    told = "Show what foreign libraries print."
    return click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_be_verbose, help=told)(command)


def output_options(command: Command) -> Command:
    """`-o` and `--overwrite`, on every command that writes a folder."""
    command = click.option("--overwrite", is_flag=True, help="Replace the folder, once the new one is whole.")(command)
    return click.option("-o", "--output", type=PATH, required=True, help="The folder to write; it must not exist.")(command)


def precision_option(command: Command) -> Command:
    """`--precision`, on every command that exports."""
    told = f"{', '.join(PRECISIONS[:-1])}, or a scheme file."
    return click.option("--precision", metavar="NAME|FILE", default="fp32", show_default=True, help=told)(command)


def left_context_option(command: Command) -> Command:
    """`--left-context-ms`, beside every `--chunk-ms`."""
    told = "The past that a chunk sees."
    return click.option("--left-context-ms", type=float, default=2560, show_default=True, help=told)(command)


def bars_option(command: Command) -> Command:
    """`--bars`, on every command that judges a bundle."""
    told = "Move bars of the gate: a TOML file, for example wer_points = 1.5; the verdict says so."
    return click.option("--bars", type=PATH, metavar="FILE", help=told)(command)


def decoding_options(command: Command) -> Command:
    """`--beam` and `--hotwords`, on every command that turns speech into text."""
    told = "Phrases to hear more readily, one a line; behind a tab perhaps their weight."
    command = click.option("--hotwords", type=PATH, metavar="FILE", help=told)(command)
    told = "How many texts are kept in view; 1 is greedy search.  [default: 1, with --hotwords 8]"
    return click.option("--beam", type=int, metavar="N", help=told)(command)


def architecture_option(command: Command) -> Command:
    """`--architecture`, on every command that makes an encoder of a preset."""
    told = "What the encoder has otherwise: a TOML file of config fields, for example subsampling = 8."
    return click.option("--architecture", type=PATH, metavar="FILE", help=told)(command)


def depth_options(command: Command) -> Command:
    """`--depth` and `--reestimate`, on every command that folds."""
    told = "First estimate the batch statistics again, on this speech."
    command = click.option("--reestimate", type=PATH, metavar="SPEECH", help=told)(command)
    told = "Only so many layers, the lowest; a model whose layers were sampled in training understands any.  [default: all]"
    return click.option("--depth", type=int, metavar="N", help=told)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgefuse")
def cli() -> None:
    """Turn a trained FusionFormer into verified ExecuTorch, Core ML and TFLite artifacts."""


@cli.command()
@click.argument("checkpoint", type=PATH)
@json_option
def inspect(checkpoint: Path, as_json: bool) -> None:
    """Show the architecture of CHECKPOINT, its size, its cost, and what folds, site by site."""
    from edgefuse.inspection import inspect as look
    from edgefuse.report import rows, terminal

    found = look(checkpoint)
    if as_json:
        terminal.show_json(found.to_json())
    else:
        terminal.show_table(("", ""), rows.inspection_rows(found), title=found.checkpoint.config.name)
        terminal.show_table(rows.PLAN, rows.plan_rows(found.plan), title="Plan")


@cli.command()
@click.argument("checkpoint", type=PATH)
@output_options
@depth_options
@click.option("--chunk-ms", type=float, help="Estimate them in chunks of so long.")
@left_context_option
@verbose_option
def fold(
    checkpoint: Path,
    output: Path,
    overwrite: bool,
    depth: int | None,
    reestimate: Path | None,
    chunk_ms: float | None,
    left_context_ms: float,
) -> None:
    """Fold every norm of CHECKPOINT into its neighbours, in float64, and write the folded model."""
    from edgefuse.lower import Chunks
    from edgefuse.refold import refold
    from edgefuse.report import rows, terminal

    chunks = None if chunk_ms is None else Chunks(chunk_ms, left_context_ms)
    with terminal.step("Folding"):
        folded, exact = refold(checkpoint, output, depth=depth, speech=reestimate, chunks=chunks, overwrite=overwrite)
    click.echo(rows.fold_line(folded, exact, output))


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("--target", "-t", "targets", multiple=True, help="See `edgefuse targets`; may be given several times.")
@click.option("--all", "every", is_flag=True, help="Every target.")
@precision_option
@click.option("--calibration", type=PATH, metavar="SPEECH", help="Where a scheme's ranges come from; or ranges taken from it.")
@click.option("--seconds", type=float, multiple=True, help="Longest utterance; may be given several times.  [default: 5.12]")
@click.option(
    "--chunk-ms",
    type=float,
    help="Stream, in chunks of so long; with --seconds, both in one artifact, of a cascade with a second pass for each length.",
)
@left_context_option
@click.option(
    "--state",
    type=click.Choice(("explicit", "held")),
    default="explicit",
    show_default=True,
    help="Where a stream's caches are: inputs and outputs, or inside the artifact.",
)
@click.option(
    "--input", "hears", type=click.Choice(INPUTS), default="features", show_default=True, help="pcm: samples, the log-mel inside."
)
@depth_options
@output_options
@click.option("--speech", type=PATH, help="Verify on this folder of speech instead of the shipped one.")
@click.option("--baseline", type=PATH, metavar="CHECKPOINT", help="Time this checkpoint in turns with it; it is not kept.")
@bars_option
@verbose_option
@json_option
def export(
    checkpoint: Path,
    targets: tuple[str, ...],
    every: bool,
    precision: str,
    calibration: Path | None,
    seconds: tuple[float, ...],
    chunk_ms: float | None,
    left_context_ms: float,
    state: str,
    hears: Input,
    depth: int | None,
    reestimate: Path | None,
    output: Path,
    overwrite: bool,
    speech: Path | None,
    baseline: Path | None,
    bars: Path | None,
    as_json: bool,
) -> None:
    """Fold CHECKPOINT and make a bundle of artifacts, each verified on speech."""
    chosen = _targets(targets, every=every)
    from edgefuse.pipeline import Order
    from edgefuse.pipeline import export as run
    from edgefuse.report import rows, terminal

    shapes = _shapes(seconds, chunk_ms, left_context_ms, held=state == "held")
    moved, picture = _bars(bars), _picture(precision)
    order = Order(chosen, _precision(precision), *shapes, hears, speech, baseline, calibration, moved, picture, depth, reestimate)
    verified = run(checkpoint, output, order, overwrite=overwrite, tell=terminal.step)
    if as_json:
        terminal.show_json(rows.verified_json(verified))
    else:
        terminal.show_table(rows.ARTIFACTS, rows.artifact_rows(verified))
        told = [*rows.moved_lines(verified), *rows.streaming_lines(verified.bundle), *rows.depth_lines(verified.bundle)]
        click.echo("\n".join([*told, f"Bundle: {output}"]))


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("--speech", type=PATH, required=True, help="A folder of speech with its manifest; never one that is tested on.")
@click.option("--seconds", type=float, multiple=True, help="Of whole utterances, if not only of chunks.")
@click.option("--chunk-ms", type=float, help="Of chunks of so long, with their real caches.")
@left_context_option
@output_options
@verbose_option
@json_option
def calibrate(
    checkpoint: Path,
    speech: Path,
    seconds: tuple[float, ...],
    chunk_ms: float | None,
    left_context_ms: float,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Take the ranges of the values of CHECKPOINT, folded, while it hears speech; `export --calibration` reads them."""
    from edgefuse.pipeline import calibrate as run
    from edgefuse.report import rows, terminal

    seen = run(checkpoint, speech, output, *_shapes(seconds, chunk_ms, left_context_ms), overwrite=overwrite, tell=terminal.step)
    if as_json:
        terminal.show_json(rows.calibration_json(seen))
    else:
        terminal.show_table(rows.RANGES, rows.range_rows(seen))


def trying_options(command: Command) -> Command:
    """What schemes are calibrated and tried on, and with which shape."""
    command = left_context_option(command)
    command = click.option("--chunk-ms", type=float, help="In chunks of so long, not whole utterances.")(command)
    told = "Of whole utterances."
    command = click.option("--seconds", type=float, default=5.12, show_default=True, help=told)(command)
    told = "Speech to try schemes on.  [default: every third utterance of the calibration, which is not calibrated on then]"
    command = click.option("--speech", type=PATH, help=told)(command)
    told = "Where ranges come from; or ranges taken from it."
    command = click.option("--calibration", type=PATH, metavar="SPEECH", required=True, help=told)(command)
    return click.option("--target", "-t", required=True, help="See `edgefuse targets`.")(command)


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("--precision", metavar="NAME|FILE", default="int8", show_default=True, help="A scheme, or a scheme file.")
@trying_options
@click.option("--picture", type=PATH, metavar="FILE", help="Draw it, as SVG.")
@verbose_option
@json_option
def sensitivity(
    checkpoint: Path,
    precision: str,
    target: str,
    calibration: Path,
    speech: Path | None,
    seconds: float,
    chunk_ms: float | None,
    left_context_ms: float,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Quantize each layer of CHECKPOINT alone, and all but each: what it costs, and what it saves."""
    from edgefuse.explore import Inquiry
    from edgefuse.explore import sensitivity as run
    from edgefuse.report import rows, terminal

    if picture is not None:
        from edgefuse.report.picture import draw_sensitivity  # a package that is missing is told before the work

        if not picture.parent.is_dir():
            raise UsageError(f"There is no folder {picture.parent}.", hint="Make it first, or name another --picture.")
    inquiry = Inquiry(checkpoint, target, calibration, speech, *_shape(seconds, chunk_ms, left_context_ms))
    costs = run(inquiry, _scheme(precision), terminal.step)
    if picture is not None:
        draw_sensitivity(picture, costs.parts)
    if as_json:
        terminal.show_json(rows.sensitivity_json(costs))
    else:
        terminal.show_table(rows.SENSITIVITIES, rows.sensitivity_rows(costs), title=rows.sensitivity_line(costs))


@cli.command()
@click.argument("checkpoint", type=PATH)
@trying_options
@click.option("--max-wer-loss", type=float, metavar="POINTS", help="Above the float model's, on the speech that is tried on.")
@click.option("--max-latency-ms", type=float, metavar="MS", help="Median on this host, one thread.")
@click.option("--max-mb", type=float, metavar="MB", help="Of the artifact, 10^6 bytes.")
@click.option("-o", "--output", type=PATH, required=True, help="The folder for scheme.toml, front.svg and what was measured.")
@click.option("--resume", is_flag=True, help="Go on from what was measured before, perhaps within other bounds.")
@verbose_option
@json_option
def search(
    checkpoint: Path,
    target: str,
    calibration: Path,
    speech: Path | None,
    seconds: float,
    chunk_ms: float | None,
    left_context_ms: float,
    max_wer_loss: float | None,
    max_latency_ms: float | None,
    max_mb: float | None,
    output: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Find the cheapest precision of each layer of CHECKPOINT within bounds; `export --precision` takes the scheme.toml."""
    from edgefuse.explore import Inquiry
    from edgefuse.quantize.mixes import Bounds
    from edgefuse.report import rows, terminal
    from edgefuse.search import SCHEME
    from edgefuse.search import search as run

    inquiry = Inquiry(checkpoint, target, calibration, speech, *_shape(seconds, chunk_ms, left_context_ms))
    bounds = Bounds(max_wer_loss, max_latency_ms, max_mb)
    found = run(inquiry, output, bounds, resume=resume, tell=terminal.step)
    if as_json:
        terminal.show_json(rows.found_json(found))
    else:
        terminal.show_table(rows.FOUND, rows.found_rows(found))
        click.echo(f"{found.binding}\nScheme: {output / SCHEME}")


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--target", "-t", "targets", multiple=True, help="Only this one; may be given several times.")
@click.option("--speech", type=PATH, help="The folder of speech that the bundle was exported with, if not the shipped one.")
@bars_option
@click.option("--budget", type=PATH, metavar="FILE", help="Fail where size, partitions or WER are above this file's.")
@verbose_option
@json_option
def verify(
    bundle: Path, targets: tuple[str, ...], speech: Path | None, bars: Path | None, budget: Path | None, as_json: bool
) -> None:
    """Check BUNDLE again: checksums, structure, parity, tokens and words on speech."""
    from edgefuse.bench.budget import check_exports, read_budget
    from edgefuse.pipeline import verify as run
    from edgefuse.report import rows, terminal

    limits = None if budget is None else read_budget(budget)
    verified = run(bundle, targets=targets, speech=speech, bars=_bars(bars), tell=terminal.step)
    checks = () if limits is None else check_exports(limits, verified.bundle, verified.exports)
    if as_json:
        terminal.show_json(
            rows.verified_json(verified) if limits is None else rows.verified_json(verified) | rows.budget_json(checks)
        )
    else:
        terminal.show_table(rows.CHECKS, rows.verified_rows(verified), title=rows.verdict_line(verified))
        _show_budget(checks)
    if not verified.passed:
        hints = ("The checks that failed are in the table above.", *rows.next_steps(verified))
        raise GateFailed(f"{bundle} does not pass.", hint=" ".join(hints))
    _require_kept(checks)


@cli.command()
@click.argument("artifact", type=PATH)
@click.argument("audio", type=PATH, nargs=-1)
@click.option("--stream", "live", is_flag=True, help="Feed it chunk by chunk; show the text as it forms, and what a chunk costs.")
@click.option("--microphone", is_flag=True, help="Listen to the microphone instead, until Ctrl-C.")
@click.option(
    "--endpoint-silence-ms",
    type=float,
    help="Begin another utterance after so much silence, with --stream.  [default: with --microphone, 800]",
)
@click.option("--second-pass", is_flag=True, help="Let a cascade hear each utterance again when it is over, with --stream.")
@decoding_options
@click.option("--timestamps", is_flag=True, help="Show when each word was said.")
@verbose_option
@json_option
def transcribe(
    artifact: Path,
    audio: tuple[Path, ...],
    live: bool,
    microphone: bool,
    endpoint_silence_ms: float | None,
    second_pass: bool,
    beam: int | None,
    hotwords: Path | None,
    timestamps: bool,
    as_json: bool,
) -> None:
    """Print what ARTIFACT (BUNDLE/model.something) hears in AUDIO files, or in the microphone."""
    from edgefuse.decode.endpoint import Endpointing
    from edgefuse.decode.search import decoding_of
    from edgefuse.listen import listen, record, stream
    from edgefuse.microphone import blocks
    from edgefuse.report import rows, terminal

    _require_sense(audio, live=live, microphone=microphone, endpoint_silence_ms=endpoint_silence_ms, second_pass=second_pass)
    decoding = decoding_of(beam, hotwords)
    endpointing = None if endpoint_silence_ms is None else Endpointing(endpoint_silence_ms)
    whole: tuple[Transcript, ...] = ()
    streamed: tuple[Streamed, ...] = ()
    if microphone:

        def end(said: Said) -> None:
            if not as_json:
                click.echo("\n".join(rows.said_lines(said, timestamps=timestamps)))

        endless, pauses = blocks(terminal.say), endpointing or Endpointing()
        streamed = (record(artifact, decoding, pauses, endless, terminal.say, end, second_pass=second_pass),)
    elif live:
        streamed = stream(artifact, audio, terminal.say, decoding, endpointing, second_pass=second_pass)
    else:
        whole = listen(artifact, audio, decoding)
    if as_json:
        terminal.show_json(rows.streamed_json(streamed) if streamed else rows.transcripts_json(whole))
        return
    if not microphone:
        click.echo("\n".join(rows.transcript_lines(streamed or whole, timestamps=timestamps)))
    if streamed:
        terminal.show_table(rows.STREAMED, rows.streamed_rows(streamed))
    for line in rows.first_pass_lines(streamed) if second_pass else ():
        terminal.say(line)


@cli.command()
@click.argument("artifact", type=PATH)
@click.option("--checkpoint", type=PATH, required=True, help="What the artifact was made of.")
@click.option("--minutes", type=int, default=60, show_default=True)
@click.option("--speech", type=PATH, help="Speak this folder of speech, over and over, instead of the shipped one.")
@verbose_option
@json_option
def soak(artifact: Path, checkpoint: Path, minutes: int, speech: Path | None, as_json: bool) -> None:
    """Speak to a streaming ARTIFACT without a pause: does it drift, does it grow?"""
    from edgefuse.pipeline import soak as run
    from edgefuse.report import rows, terminal

    soaked, found = run(artifact, checkpoint, minutes, speech=speech, tell=terminal.step)
    checks = found.checks(soaked.precision)
    if as_json:
        terminal.show_json(rows.checks_json(checks))
    else:
        terminal.show_table(rows.CHECKS, rows.check_rows(soaked.target, checks))
    if not all(check.passed for check in checks):
        raise GateFailed(f"{artifact} does not endure.", hint="The checks that failed are in the table above.")


@cli.command()
@click.argument("artifact", type=PATH)
@click.option("--speech", type=PATH, required=True, help="A folder of speech with its manifest, or a corpus.")
@click.option("--set", "sets", multiple=True, help="Only this one; may be given several times.  [default: all but train]")
@decoding_options
@click.option("--stream", "live", is_flag=True, help="In chunks.")
@verbose_option
@json_option
def evaluate(
    artifact: Path, speech: Path, sets: tuple[str, ...], beam: int | None, hotwords: Path | None, live: bool, as_json: bool
) -> None:
    """Print the word error rate of ARTIFACT on speech; with hotwords also without them, and on their words alone."""
    from edgefuse.decode.search import decoding_of
    from edgefuse.evaluate import evaluate as run
    from edgefuse.report import rows, terminal

    found = run(artifact, speech, decoding_of(beam, hotwords), sets=sets, live=live, tell=terminal.step)
    if as_json:
        terminal.show_json(rows.evaluated_json(found))
    else:
        terminal.show_table(rows.EVALUATED, rows.evaluated_rows(found))


@cli.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets, and whether their packages are installed."""
    from edgefuse.report import rows, terminal
    from edgefuse.target import shelf

    found = rows.target_rows(shelf())
    if as_json:
        terminal.show_json([dict(zip(("target", "makes", "file", "state"), row, strict=True)) for row in found])
    else:
        terminal.show_table(rows.TARGETS, found)


@cli.command()
@click.option("--target", "-t", "chosen", multiple=True, help="Only what this target needs; may be given several times.")
@json_option
def doctor(chosen: tuple[str, ...], as_json: bool) -> None:
    """Show versions and conflicts, what is missing, and the pip command that mends it."""
    from edgefuse.packages import extras, needs, repair
    from edgefuse.report import rows, terminal

    found = needs(chosen or extras())
    command = repair(found)
    if as_json:
        terminal.show_json(rows.needs_json(found, command))
    else:
        terminal.show_table(rows.NEEDS, rows.need_rows(found))
    if command:
        raise MissingPackage("Packages are missing or in conflict.", hint=f"Mend it with: {command}")


@cli.command()
@click.argument("weights", type=PATH)
@click.option("--config", type=PATH, required=True, help="config.json of the encoder.")
@click.option("--tokens", type=PATH, required=True, help="tokens.txt, one token a line, the blank first.")
@click.option("--cmvn", type=PATH, help="WeNet's global_cmvn in JSON, where the weights lack frontend.mean and frontend.istd.")
@output_options
def convert(weights: Path, config: Path, tokens: Path, cmvn: Path | None, output: Path, overwrite: bool) -> None:
    """Read the tensors of WEIGHTS (.pt, .ckpt) without running what else it holds, and write a checkpoint."""
    from edgefuse.convert import convert as run

    checkpoint = run(weights, config, tokens, output, cmvn=cmvn, overwrite=overwrite)
    click.echo(f"{output}: {checkpoint.config.name}, digest {checkpoint.digest[:16]}")


@cli.command()
@click.argument("checkpoints", type=PATH, nargs=-1, required=True)
@output_options
@click.option("--reestimate", type=PATH, metavar="SPEECH", help="Estimate the average's batch statistics, on this speech.")
@verbose_option
def average(checkpoints: tuple[Path, ...], output: Path, overwrite: bool, reestimate: Path | None) -> None:
    """Write the mean of the weights of CHECKPOINTS, of one training, as one checkpoint."""
    from edgefuse.average import average as run
    from edgefuse.report import terminal

    with terminal.step("Averaging"):
        mean = run(checkpoints, output, speech=reestimate, overwrite=overwrite)
    click.echo(f"{output}: {mean.config.name}, of {len(checkpoints)} checkpoints, digest {mean.digest[:16]}")


@cli.command()
@click.argument("bundles", type=PATH, nargs=-1, required=True)
@click.option(
    "--device", "-d", "devices", multiple=True, help="NAME or NAME:WHICH, see `edgefuse devices`; may be given several times."
)
@click.option("--target", "-t", "targets", multiple=True, help="Only this one; may be given several times.")
@click.option("--entry", "entries", multiple=True, help="Only this entry or mode, such as offline; may be given several times.")
@click.option("--quick", "routine", flag_value="quick", help="3 short processes of each: a first look.")
@click.option("--thorough", "routine", flag_value="thorough", help="30 long processes of each: to tell small differences.")
@click.option("--processes", type=click.IntRange(1, 100), help="Fresh processes of each.  [default: the routine's, 12]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--cores", metavar="N,N", help="Bind it to these cores, where the device can.")
@click.option("--paced", is_flag=True, help="Chunks come at the pace of speech.")
@click.option("--limit-s", type=click.IntRange(1), help="A process that takes longer is ended.  [default: 600]")
@click.option("--latency-only", is_flag=True, help="No look at memory and operators.")
@click.option("--budget", type=PATH, metavar="FILE", help="Fail where a number is above this file's, budgets.toml for example.")
@click.option("-o", "--output", type=PATH, help="The result.  [default: BUNDLE.jsonl, in this folder]")
@click.option("--resume", is_flag=True, help="Go on with a result that was interrupted, or lacks a device.")
@click.option("--overwrite", is_flag=True, help="Replace the result.")
@verbose_option
@json_option
def bench(
    bundles: tuple[Path, ...],
    devices: tuple[str, ...],
    targets: tuple[str, ...],
    entries: tuple[str, ...],
    routine: str | None,
    processes: int | None,
    threads: int,
    cores: str | None,
    paced: bool,
    limit_s: int | None,
    latency_only: bool,
    budget: Path | None,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Time every artifact of BUNDLES on devices, in turns, on real speech, each answer checked; `edgefuse report` shows it.

    Without --device, on this host.
    """
    from edgefuse.bench.budget import check, read_budget
    from edgefuse.bench.result import SUFFIX
    from edgefuse.bench.routine import Inquiry, require_whole
    from edgefuse.bench.routine import bench as run
    from edgefuse.measurement import WANTS, routine_of
    from edgefuse.report import bench_files, bench_rows, terminal

    limits = None if budget is None else read_budget(budget)
    how = routine_of(routine, processes=processes, threads=threads, cores=_cores(cores), paced=paced, limit_s=limit_s)
    wants = WANTS[:1] if latency_only else WANTS
    inquiry = Inquiry(bundles, devices or ("host",), how, targets, entries, wants)
    place = output or Path(f"{bundles[0].resolve().name}{SUFFIX}")
    result = run(inquiry, place, resume=resume, overwrite=overwrite, tell=terminal.step)
    if not as_json:
        for table in bench_rows.result_tables(result):  # one per clock
            terminal.show_table(table.columns, table.rows, title=table.title)
        click.echo(
            "\n".join([*bench_rows.failure_lines(result), f"Result: {place}", f"Page: edgefuse report {place} -o report.html"])
        )
    checks = () if limits is None else check(limits, result.measurements)  # behind what failed: it may be why a number is lacking
    if as_json:
        terminal.show_json(bench_files.result_json(result, checks))
    else:
        _show_budget(checks)
    _require_kept(checks)
    require_whole(result)


@cli.command()
@click.argument("results", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="The page: .html, .md, .csv or .json.")
@click.option("--base", help="The model that the others are compared with.  [default: the slowest]")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
def report(results: tuple[Path, ...], output: Path, base: str | None, overwrite: bool) -> None:
    """Turn RESULTS of `edgefuse bench` into one page that needs no network, or into Markdown, CSV or JSON."""
    from edgefuse.report.report import report as run

    click.echo(f"Report: {run(results, output, base=base, overwrite=overwrite)}")


@cli.command()
@click.argument("base", type=PATH)
@click.argument("new", type=PATH, required=False)
@click.option("--base-model", help="Without NEW: the model in BASE that the others are compared with.  [default: the slowest]")
@click.option("--fail-if-slower", metavar="PERCENT", help="Exit with 112 where something is slower by more, 5% for example.")
@json_option
def compare(base: Path, new: Path | None, base_model: str | None, fail_if_slower: str | None, as_json: bool) -> None:
    """Say of each row of two results of `edgefuse bench` whether NEW is FASTER, SLOWER, the SAME, or CANNOT_TELL.

    Of one result alone: the models that took turns in it.
    """
    from edgefuse.bench.compare import require_not_slower
    from edgefuse.bench.match import pairs_of
    from edgefuse.report import bench_files, bench_rows, terminal

    percent = None if fail_if_slower is None else _percent(fail_if_slower)
    pairs = pairs_of(base, new, base_model)
    if as_json:
        terminal.show_json(bench_files.compared_json(pairs))
    else:
        terminal.show_table(bench_rows.COMPARED, bench_rows.compared_rows(pairs.compared))
        for remark in pairs.remarks:
            click.echo(remark)
    if percent is not None:
        require_not_slower(pairs.compared, percent)


@cli.group(invoke_without_command=True)
@click.pass_context
@json_option
def devices(context: click.Context, as_json: bool) -> None:
    """List the devices that are found now, what is missing, and the command that mends it."""
    if context.invoked_subcommand is not None:
        return
    from edgefuse.device import shelf
    from edgefuse.report import rows, terminal

    with terminal.step("Looking for devices"):
        found = rows.device_rows(shelf())
    if as_json:
        terminal.show_json([dict(zip(("device", "what", "clock", "state"), row, strict=True)) for row in found])
    else:
        terminal.show_table(rows.DEVICES, found)


@devices.command()
@click.argument("name")
@verbose_option
def setup(name: str) -> None:
    """Fetch and build what the devices of kind NAME need; goes on where it was stopped."""
    from edgefuse.device import kind
    from edgefuse.report import terminal

    kind(name).setup(terminal.step)


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--target", "-t", "targets", multiple=True, help="Only this one; may be given several times.")
@verbose_option
@json_option
def profile(bundle: Path, targets: tuple[str, ...], as_json: bool) -> None:
    """Show where the time of a call goes in every artifact of BUNDLE on this host, by the runtimes' own profilers."""
    from edgefuse.profile import profile as run
    from edgefuse.report import profile_rows, terminal

    found = run(bundle, targets, terminal.step)
    if as_json:
        terminal.show_json(profile_rows.profile_json(found))
    else:
        terminal.show_table(profile_rows.PROFILE, profile_rows.profile_rows(found))


@cli.command()
@click.option("--preset", default="small", show_default=True, help="study, tiny, small or base.")
@click.option("--norm", type=click.Choice(("batch", "layer")), help="FusionFormer, or its twin.  [default: batch]")
@architecture_option
@click.option("--seed", type=int, default=0, show_default=True)
@output_options
def new(
    preset: str, norm: Literal["batch", "layer"] | None, architecture: Path | None, seed: int, output: Path, overwrite: bool
) -> None:
    """Write an untrained checkpoint: what it costs can be measured before it can do anything."""
    from edgefuse.model.architecture import norm_of, read_architecture
    from edgefuse.new import new as run

    changed = read_architecture(architecture, preset) if architecture else {}
    kind = norm_of(changed, norm) or "batch"
    checkpoint = run(preset, output, norm=kind, architecture=changed, seed=seed, overwrite=overwrite)
    click.echo(f"{output}: {checkpoint.config.name}, untrained, digest {checkpoint.digest[:16]}")


@cli.command()
@click.option("--preset", default="small", show_default=True, help="tiny, small or base.")
@precision_option
@click.option("--seconds", type=float, multiple=True, help="Longest utterance.  [default: 5.12, without --chunk-ms]")
@click.option("--chunk-ms", type=float, help="Time chunks of so long.")
@left_context_option
@click.option("--target", "-t", "targets", multiple=True, help="See `edgefuse targets`; may be given several times.")
@click.option("--all", "every", is_flag=True, help="Every target.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--rounds", type=int, default=40, show_default=True)
@verbose_option
@json_option
def ablation(
    preset: str,
    precision: str,
    seconds: tuple[float, ...],
    chunk_ms: float | None,
    left_context_ms: float,
    targets: tuple[str, ...],
    every: bool,
    threads: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Time a FusionFormer, folded and not, against the LayerNorm Conformer, in turns, on this host.

    With fewer bits than fp32, time the folded one and the Conformer in turns with themselves in fp32.
    """
    chosen = _targets(targets, every=every)
    from edgefuse.ablation import compare
    from edgefuse.bench.turns import Turns
    from edgefuse.report import rows, terminal

    lengths, chunks = _shapes(seconds, chunk_ms, left_context_ms)
    turns = Turns(rounds=rounds, threads=threads)
    asked = _precision(precision)
    measured = compare(preset, chosen, turns, precision=asked, seconds=lengths, chunks=chunks, tell=terminal.step)
    if as_json:
        terminal.show_json(rows.comparisons_json(measured))
    else:
        terminal.show_table(rows.RATIOS, rows.ratio_rows(measured))


@cli.command()
@click.option("--speech", type=PATH, required=True, help="A corpus: LibriSpeech, AISHELL, Lhotse's manifests of them, or cuts.")
@click.option("-o", "--output", type=PATH, required=True, help="The run's folder; its checkpoint is in `checkpoint`.")
@click.option("--features", type=PATH, metavar="DIR", help="Where log-mel frames are kept.  [default: SPEECH/features]")
@click.option("--preset", help="study, tiny, small or base.  [default: tiny]")
@click.option("--norm", type=click.Choice(NORMS), help="batch: a FusionFormer; layer: its twin.  [default: batch]")
@architecture_option
@click.option("--layers-sampled", "sampled_depth", is_flag=True, default=None, help="A step runs 1 to all layers, as it draws.")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--vocabulary", "vocabulary_size", type=int, help="Tokens; 29 are the characters.  [default: the recipe's]")
@click.option("--learning-rate", "peak_learning_rate", type=float, help="Of the peak.  [default: the recipe's]")
@click.option("--chunked-share", type=float, help="Of the steps, with attention in chunks.  [default: the recipe's]")
@click.option("--from", "start", type=PATH, metavar="CHECKPOINT", help="Begin with its weights; its vocabulary may be another.")
@click.option("--precision", metavar="NAME|FILE", help="Fine-tune it, folded, for fewer bits; an epoch is 100 batches then.")
@click.option(
    "--convert-norm", is_flag=True, help="Convert it, a LayerNorm Conformer, to one whose norms fold; an epoch is 100 batches."
)
@click.option("--calibration", type=PATH, metavar="SPEECH", help="Where a scheme's ranges come from; or ranges taken from it.")
@click.option("--batch-seconds", type=float, metavar="S", help="Of speech, in each process.  [default: the recipe's, 56]")
@click.option("--accumulate", type=int, metavar="N", help="Batches that a step hears one after another.  [default: 1]")
@click.option("--patience", type=int, metavar="N", help="End after N epochs without a better dev WER; the best is kept.")
@click.option("--checkpoint-minutes", type=float, metavar="MIN", help="Between two checkpoints at most.  [default: 10]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of this run, as if it had never ended.")
@json_option
def train(
    speech: Path,
    output: Path,
    features: Path | None,
    resume: bool,
    threads: int,
    start: Path | None,
    architecture: Path | None,
    precision: str | None,
    convert_norm: bool,
    calibration: Path | None,
    as_json: bool,
    **recipe: Any,  # noqa: ANN401 - the recipe's own fields
) -> None:
    """Train an encoder with CTC, fine-tune a folded one for fewer bits, or convert a Conformer; print its word error rates.

    On several GPUs, or machines: torchrun --nproc-per-node 8 -m edgefuse train ...  Curves: tensorboard --logdir RUN/curves
    """
    from edgefuse.report import rows, terminal

    told = {name: value for name, value in recipe.items() if value is not None}
    if architecture is not None:
        told |= _architecture(architecture, told)
    if convert_norm:
        _require_convertible(start, precision, told)
    scheme = _trained_for(precision, start, calibration, told)
    if convert_norm and start:
        from edgefuse.train.convert_norm import convert_norm as convert
        from edgefuse.train.recipe import CONVERSION

        conversion = replace(CONVERSION, **told)
        trained = convert(start, speech, output, conversion, resume=resume, threads=threads, features=features)
    elif scheme and start:
        from edgefuse.train.finetune import fine_tune
        from edgefuse.train.recipe import FINE_TUNING

        tune = partial(fine_tune, start, scheme, speech, output, replace(FINE_TUNING, **told), calibration=calibration)
        trained = tune(resume=resume, threads=threads, features=features)
    else:
        from edgefuse.train.loop import train as run
        from edgefuse.train.recipe import Recipe

        trained = run(speech, output, Recipe(**told), resume=resume, threads=threads, features=features, start=start)
    if trained is None:  # one of several processes, and not the first
        return
    if as_json:
        terminal.show_json(rows.trained_json(trained))
    else:
        columns = rows.CHARACTER_ERRORS if trained.characters else rows.ERRORS
        terminal.show_table(columns, rows.error_rows(trained.errors), title=str(trained.folder))


@cli.command()
@click.option("--speech", type=PATH, required=True, help="A corpus folder; its transcripts are not read.")
@click.option("-o", "--output", type=PATH, required=True, help="The run's folder; its checkpoint is in `checkpoint`.")
@click.option("--preset", help="study, tiny, small or base.  [default: tiny]")
@click.option("--norm", type=click.Choice(("batch", "layer")), help="FusionFormer, or its twin.  [default: batch]")
@architecture_option
@click.option("--layers-sampled", "sampled_depth", is_flag=True, default=None, help="A step runs 1 to all layers, as it draws.")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--learning-rate", "peak_learning_rate", type=float, help="Of the peak.  [default: the recipe's]")
@click.option("--chunked-share", type=float, help="Of the steps, with attention in chunks.  [default: the recipe's]")
@click.option("--resume", is_flag=True, help="Go on from the last whole epoch.")
@json_option
def pretrain(
    speech: Path,
    output: Path,
    resume: bool,
    threads: int,
    architecture: Path | None,
    as_json: bool,
    **recipe: Any,  # noqa: ANN401 - the recipe's own fields
) -> None:
    """Train an encoder on speech without transcripts, to say what is hidden from it; `train --from` goes on from there."""
    from edgefuse.report import rows, terminal
    from edgefuse.train.pretrain import PRETRAINING
    from edgefuse.train.pretrain import pretrain as run

    told = {name: value for name, value in recipe.items() if value is not None}
    if architecture is not None:
        told |= _architecture(architecture, told)
    pretrained = run(speech, output, replace(PRETRAINING, **told), resume=resume, threads=threads)
    if pretrained is None:
        return
    if as_json:
        terminal.show_json(rows.pretrained_json(pretrained))
    else:
        click.echo(rows.pretrained_line(pretrained))


@cli.command()
@click.option("--speech", type=PATH, help="A corpus folder, as edgefuse_calibration.synthesize writes it.")
@click.option("-o", "--output", type=PATH, required=True, help="The study's folder; what is finished in it is not done again.")
@click.option("--row", "names", multiple=True, help="Only this one; may be given several times.")
@click.option("--rows", "file", type=PATH, metavar="FILE", help="Other rows than the study's own: a TOML file.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="How many; the first is 1.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--latency", is_flag=True, help="Measure what all rows cost, untrained, in turns; nothing is trained.")
@click.option("--rounds", type=click.IntRange(2), default=40, show_default=True, help="With --latency.")
@click.option("--report-only", is_flag=True, help="Write STUDY.md from the results that are there.")
@verbose_option
def study(
    speech: Path | None,
    output: Path,
    names: tuple[str, ...],
    file: Path | None,
    seeds: int,
    threads: int,
    latency: bool,
    rounds: int,
    report_only: bool,
) -> None:
    """Train every idea of the papers alike, measure what it is worth and what it costs, and write the table, STUDY.md."""
    from edgefuse.report import terminal
    from edgefuse.study.rows import ROWS, read_plan
    from edgefuse.study.run import PAGE, cost_rows, report, train_rows

    plan = read_plan(file or ROWS)
    if report_only:
        report(plan, output)
    elif latency:
        from edgefuse.bench.turns import Turns

        cost_rows(plan, output, Turns(rounds=rounds, threads=threads), names=names, tell=terminal.step)
    elif speech is None:
        raise UsageError("Nothing says on which speech.", hint="Name a corpus with: --speech CORPUS; or add --latency")
    else:
        train_rows(plan, speech, output, names=names, seeds=range(1, seeds + 1), threads=threads, say=terminal.say)
    click.echo(f"The table: {output / PAGE}")


def _architecture(file: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that an architecture decides."""
    from edgefuse.model.architecture import norm_of, read_architecture
    from edgefuse.train.recipe import Recipe

    changed = read_architecture(file, told.get("preset", Recipe.preset))
    return {"norm": norm_of(changed, told.get("norm")) or Recipe.norm, "architecture": changed}


def _require_convertible(start: Path | None, precision: str | None, told: Mapping[str, object]) -> None:
    if start is None:
        raise UsageError("A conversion needs a LayerNorm Conformer to begin with.", hint="Name it with: --from CHECKPOINT")
    if precision is not None:
        raise UsageError(
            "A conversion and a fine-tuning for fewer bits are two steps.",
            hint="Convert first, fold what comes out, and then: edgefuse train --from FOLDED --precision ...",
        )
    _require_own(told, "checkpoint")


def _require_own(told: Mapping[str, object], whose: str) -> None:
    """Refuse options that the checkpoint to begin with decides."""
    for option in ("architecture", "sampled_depth", "preset", "norm", "vocabulary_size"):
        if option in told:
            name = {"sampled_depth": "layers-sampled"}.get(option, option.partition("_")[0])
            raise UsageError(f"--{name} is the {whose}'s own.", hint=f"Leave --{name} away.")


def _trained_for(
    precision: str | None, start: Path | None, calibration: Path | None, told: Mapping[str, object]
) -> Scheme | None:
    """The scheme that a training is for, if it is a fine-tuning; a `UsageError` for what does not go together."""
    if precision is None:
        if calibration is not None:
            raise UsageError("Nothing is calibrated in a training without --precision.", hint="Leave --calibration away.")
        return None
    scheme = _precision(precision)
    if isinstance(scheme, str):
        raise UsageError(f"{scheme} loses nothing that training could win back.", hint="Fine-tune for fewer bits, such as: int8")
    if start is None:
        raise UsageError("Fewer bits are learnt from a folded checkpoint.", hint="Name it with: --from FOLDED")
    _require_own(told, "folded checkpoint")
    return scheme


def _require_sense(
    audio: tuple[Path, ...], *, live: bool, microphone: bool, endpoint_silence_ms: float | None, second_pass: bool
) -> None:
    if microphone and audio:
        raise UsageError("--microphone and recordings contradict each other.", hint="Give one of them.")
    if not microphone and not audio:
        raise UsageError(
            "No recording is named.", hint="Name some: edgefuse transcribe ARTIFACT AUDIO ...  (or add --microphone)"
        )
    if endpoint_silence_ms is not None and not (live or microphone):
        raise UsageError("Utterances end only in a stream.", hint="Add: --stream")
    if second_pass and not (live or microphone):
        raise UsageError(
            "A whole utterance is heard by both passes of a cascade anyway.", hint="Leave --second-pass away, or add: --stream"
        )


def _shapes(
    seconds: tuple[float, ...], chunk_ms: float | None, left_context_ms: float, *, held: bool = False
) -> tuple[tuple[float, ...], tuple[Chunks, ...]]:
    """The lengths and the chunks that were asked for; without either, one length."""
    from edgefuse.lower import Chunks
    from edgefuse.pipeline import SECONDS

    if held and chunk_ms is None:
        raise UsageError("Without a stream there are no caches to hold.", hint="Stream, for example with: --chunk-ms 640")
    if chunk_ms is None:
        return seconds or SECONDS, ()
    return seconds, (Chunks(chunk_ms, left_context_ms, held),)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. Every foreseen failure ends here as a sentence and a hint."""
    try:
        code = cli.main(list(arguments) or ["--help"], prog_name="edgefuse", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        return CLOSED_PIPE
    except (EdgefuseError, click.ClickException, OSError, ModuleNotFoundError) as error:
        told = _in_words(error)
        click.echo(f"error: {_one_line(told.sentence)}", err=True)
        if told.hint:
            click.echo(f"  hint: {_one_line(told.hint)}", err=True)
        return told.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """`edgefuse` on the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for developers, who ask for them with: python -W default
    sys.exit(run(sys.argv[1:]))


def _terminate(*_: object) -> NoReturn:
    """Leave through every `finally`, so that no draft stays behind."""
    sys.exit(TERMINATED)


def _one_line(sentence: str) -> str:
    """A sentence as it may be printed: what a broken file has put into it cannot move the cursor or fill the screen."""
    words = "".join(c if c.isprintable() else " " for c in sentence)
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]} ..."


def _in_words(error: EdgefuseError | click.ClickException | OSError | ModuleNotFoundError) -> EdgefuseError:
    """Our own errors are said as they are, those of click, of imports and of the operating system in the same form."""
    if isinstance(error, EdgefuseError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return MissingPackage(f"The package {error.name} is not installed.", hint="See what mends it with: edgefuse doctor")
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        return UsageError(error.format_message(), hint=f"See: {context.command_path if context else 'edgefuse'} --help")
    sentence = f"{error.filename or 'The system'}: {error.strerror or error}."
    if error.errno in FULL:
        return NoSpace(sentence, hint="Free some space; TMPDIR says where temporary files go.")
    if error.errno in FORBIDDEN:
        return NotWritable(sentence, hint="Check the permissions.")
    return EdgefuseError(sentence, hint="Check the path and the disk.")


def _precision(told: str) -> Precision | Scheme:
    """A float precision, a named scheme, or a scheme file."""
    from edgefuse.quantize.scheme import SCHEMES, read_scheme

    for name in FLOAT:
        if name == told:
            return name
    return SCHEMES.get(told) or read_scheme(Path(told))


def _picture(told: str) -> Path | None:
    """What a search drew beside its scheme."""
    from edgefuse.quantize.mixes import PICTURE

    picture = Path(told).with_name(PICTURE) if Path(told).is_file() else None
    return picture if picture is not None and picture.is_file() else None


def _scheme(told: str) -> Scheme:
    """A scheme; not a float precision."""
    found = _precision(told)
    if isinstance(found, str):
        raise UsageError(f"{found} quantizes nothing.", hint="Name a scheme, for example: --precision int8")
    return found


def _shape(seconds: float, chunk_ms: float | None, left_context_ms: float) -> tuple[float | None, Chunks | None]:
    """One length, or else one kind of chunk."""
    from edgefuse.lower import Chunks

    return (seconds, None) if chunk_ms is None else (None, Chunks(chunk_ms, left_context_ms))


def _bars(file: Path | None) -> Mapping[str, float]:
    """The bars that are moved; none without a file."""
    from edgefuse.verify.gate import USUAL, read_bars

    return USUAL if file is None else read_bars(file)


def _cores(told: str | None) -> tuple[int, ...]:
    """Core numbers, separated by commas."""
    if told is None:
        return ()
    if not re.fullmatch(r"\d{1,4}(, *\d{1,4})*", told, re.ASCII):
        raise UsageError(f"{told!r} are no cores.", hint="Name some by their numbers, for example: --cores 0,1")
    return tuple(map(int, told.split(",")))


def _percent(told: str) -> float:
    """A percentage, its sign or none behind it."""
    try:
        percent = float(told.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < math.inf:
        raise UsageError(f"{told!r} is no percentage.", hint="For example: --fail-if-slower 5%")
    return percent


def _show_budget(checks: Sequence[Check]) -> None:
    from edgefuse.report import rows, terminal

    if checks:
        terminal.show_table(rows.CHECKS, rows.check_rows("budget", checks))


def _require_kept(checks: Sequence[Check]) -> None:
    over = [check for check in checks if not check.passed]
    if over:
        more = f", and {len(over) - 1} more" if len(over) > 1 else ""
        raise OverBudget(
            f"{over[0].name} is {over[0].measured}, {over[0].required} allowed{more}.",
            hint="Mend it, or change the budget on purpose.",
        )


def _targets(chosen: tuple[str, ...], *, every: bool) -> tuple[str, ...]:
    from edgefuse.target import shelf

    if every and chosen:
        raise UsageError("--all and --target contradict each other.", hint="Give one of them.")
    names = tuple(name for name in shelf() if name != REFERENCE) if every else tuple(dict.fromkeys(chosen))
    if not names:
        raise UsageError("No target is named.", hint="Give --target NAME (see: edgefuse targets), or --all")
    return names


if __name__ == "__main__":
    main()

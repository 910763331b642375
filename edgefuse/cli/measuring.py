"""What measures time, and shows and compares what was measured: `bench`, `report`, `compare`, `profile`, `ablation`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefuse.cli.budgets import require_kept, show_budget
from edgefuse.cli.options import (
    PATH,
    chunk_options,
    json_option,
    precision_of,
    precision_option,
    shapes_of,
    targets_of,
    verbose_option,
)
from edgefuse.errors import UsageError

if TYPE_CHECKING:
    from edgefuse.lower import Chunks


@click.command()
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
        show_budget(checks)
    require_kept(checks)
    require_whole(result)


@click.command()
@click.argument("results", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="The page: .html, .md, .csv or .json.")
@click.option("--base", help="The model that the others are compared with.  [default: the slowest]")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
def report(results: tuple[Path, ...], output: Path, base: str | None, overwrite: bool) -> None:
    """Turn RESULTS of `edgefuse bench` into one page that needs no network, or into Markdown, CSV or JSON."""
    from edgefuse.report.report import report as run

    click.echo(f"Report: {run(results, output, base=base, overwrite=overwrite)}")


@click.command()
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


@click.command()
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


@click.command()
@click.option("--preset", default="small", show_default=True, help="tiny, small or base.")
@precision_option
@click.option("--seconds", type=float, multiple=True, help="Longest utterance.  [default: 5.12, without --chunk-ms]")
@chunk_options("Time chunks of so long.", ahead=False)
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
    chunks: Chunks | None,
    targets: tuple[str, ...],
    every: bool,
    threads: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Time a FusionFormer, folded and not, against the LayerNorm Conformer, in turns, on this host.

    With fewer bits than fp32, time the folded one and the Conformer in turns with themselves in fp32.
    """
    chosen = targets_of(targets, every=every)
    from edgefuse.ablation import compare
    from edgefuse.bench.turns import Turns
    from edgefuse.report import ablation_rows, terminal

    lengths, streams = shapes_of(seconds, chunks)
    turns = Turns(rounds=rounds, threads=threads)
    asked = precision_of(precision)
    measured = compare(preset, chosen, turns, precision=asked, seconds=lengths, chunks=streams, tell=terminal.step)
    if as_json:
        terminal.show_json(ablation_rows.comparisons_json(measured))
    else:
        terminal.show_table(ablation_rows.RATIOS, ablation_rows.ratio_rows(measured))


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

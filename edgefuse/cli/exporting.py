"""What makes a bundle of artifacts, and checks it again: `export`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefuse.cli.budgets import require_kept, show_budget
from edgefuse.cli.options import (
    PATH,
    Command,
    chunk_options,
    depth_options,
    json_option,
    output_options,
    precision_of,
    precision_option,
    shapes_of,
    targets_of,
    verbose_option,
)
from edgefuse.errors import GateFailed
from edgefuse.values import INPUTS, Input

if TYPE_CHECKING:
    from edgefuse.lower import Chunks


def bars_option(command: Command) -> Command:
    """`--bars`, on every command that judges a bundle."""
    told = "Move bars of the gate: a TOML file, for example wer_points = 1.5; the verdict says so."
    return click.option("--bars", type=PATH, metavar="FILE", help=told)(command)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--target", "-t", "targets", multiple=True, help="See `edgefuse targets`; may be given several times.")
@click.option("--all", "every", is_flag=True, help="Every target.")
@precision_option
@click.option("--calibration", type=PATH, metavar="SPEECH", help="Where a scheme's ranges come from; or ranges taken from it.")
@click.option("--seconds", type=float, multiple=True, help="Longest utterance; may be given several times.  [default: 5.12]")
@chunk_options(
    "Stream, in chunks of so long; with --seconds, both in one artifact, of a cascade with a second pass for each length."
)
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
    chunks: Chunks | None,
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
    chosen = targets_of(targets, every=every)
    from edgefuse.pipeline import Order
    from edgefuse.pipeline import export as run
    from edgefuse.report import bundle_rows, terminal

    shapes = shapes_of(seconds, chunks, held=state == "held")
    moved, picture = _bars(bars), _picture(precision)
    order = Order(
        chosen, precision_of(precision), *shapes, hears, speech, baseline, calibration, moved, picture, depth, reestimate
    )
    verified = run(checkpoint, output, order, overwrite=overwrite, tell=terminal.step)
    if as_json:
        terminal.show_json(bundle_rows.verified_json(verified))
    else:
        terminal.show_table(bundle_rows.ARTIFACTS, bundle_rows.artifact_rows(verified))
        told = [
            *bundle_rows.moved_lines(verified),
            *bundle_rows.streaming_lines(verified.bundle),
            *bundle_rows.depth_lines(verified.bundle),
        ]
        click.echo("\n".join([*told, f"Bundle: {output}"]))


@click.command()
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
    from edgefuse.report import bundle_rows, terminal

    limits = None if budget is None else read_budget(budget)
    verified = run(bundle, targets=targets, speech=speech, bars=_bars(bars), tell=terminal.step)
    checks = () if limits is None else check_exports(limits, verified.bundle, verified.exports)
    if as_json:
        terminal.show_json(
            bundle_rows.verified_json(verified)
            if limits is None
            else bundle_rows.verified_json(verified) | bundle_rows.budget_json(checks)
        )
    else:
        terminal.show_table(bundle_rows.CHECKS, bundle_rows.verified_rows(verified), title=bundle_rows.verdict_line(verified))
        show_budget(checks)
    if not verified.passed:
        hints = ("The checks that failed are in the table above.", *bundle_rows.next_steps(verified))
        raise GateFailed(f"{bundle} does not pass.", hint=" ".join(hints))
    require_kept(checks)


def _bars(file: Path | None) -> Mapping[str, float]:
    """The bars that are moved; none without a file."""
    from edgefuse.verify.gate import USUAL, read_bars

    return USUAL if file is None else read_bars(file)


def _picture(told: str) -> Path | None:
    """What a search drew beside its scheme."""
    from edgefuse.quantize.mixes import PICTURE

    picture = Path(told).with_name(PICTURE) if Path(told).is_file() else None
    return picture if picture is not None and picture.is_file() else None

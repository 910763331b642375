"""What finds the precision of a model's layers: `calibrate`, `sensitivity`, `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefuse.cli.options import (
    PATH,
    Command,
    chunk_options,
    json_option,
    output_options,
    precision_of,
    shapes_of,
    verbose_option,
)
from edgefuse.errors import UsageError

if TYPE_CHECKING:
    from edgefuse.lower import Chunks
    from edgefuse.quantize.scheme import Scheme


def trying_options(command: Command) -> Command:
    """What schemes are calibrated and tried on, and with which shape."""
    command = chunk_options("In chunks of so long, not whole utterances.")(command)
    told = "Of whole utterances."
    command = click.option("--seconds", type=float, default=5.12, show_default=True, help=told)(command)
    told = "Speech to try schemes on.  [default: every third utterance of the calibration, which is not calibrated on then]"
    command = click.option("--speech", type=PATH, help=told)(command)
    told = "Where ranges come from; or ranges taken from it."
    command = click.option("--calibration", type=PATH, metavar="SPEECH", required=True, help=told)(command)
    return click.option("--target", "-t", required=True, help="See `edgefuse targets`.")(command)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--speech", type=PATH, required=True, help="A folder of speech with its manifest; never one that is tested on.")
@click.option("--seconds", type=float, multiple=True, help="Of whole utterances, if not only of chunks.")
@chunk_options("Of chunks of so long, with their real caches.")
@output_options
@verbose_option
@json_option
def calibrate(
    checkpoint: Path,
    speech: Path,
    seconds: tuple[float, ...],
    chunks: Chunks | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Take the ranges of the values of CHECKPOINT, folded, while it hears speech; `export --calibration` reads them."""
    from edgefuse.pipeline import calibrate as run
    from edgefuse.report import scheme_rows, terminal

    seen = run(checkpoint, speech, output, *shapes_of(seconds, chunks), overwrite=overwrite, tell=terminal.step)
    if as_json:
        terminal.show_json(scheme_rows.calibration_json(seen))
    else:
        terminal.show_table(scheme_rows.RANGES, scheme_rows.range_rows(seen))


@click.command()
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
    chunks: Chunks | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Quantize each layer of CHECKPOINT alone, and all but each: what it costs, and what it saves."""
    from edgefuse.explore import Inquiry
    from edgefuse.explore import sensitivity as run
    from edgefuse.report import scheme_rows, terminal

    if picture is not None:
        from edgefuse.report.picture import draw_sensitivity  # a package that is missing is told before the work

        if not picture.parent.is_dir():
            raise UsageError(f"There is no folder {picture.parent}.", hint="Make it first, or name another --picture.")
    inquiry = Inquiry(checkpoint, target, calibration, speech, *_shape(seconds, chunks))
    costs = run(inquiry, _scheme(precision), terminal.step)
    if picture is not None:
        draw_sensitivity(picture, costs.parts)
    if as_json:
        terminal.show_json(scheme_rows.sensitivity_json(costs))
    else:
        terminal.show_table(
            scheme_rows.SENSITIVITIES, scheme_rows.sensitivity_rows(costs), title=scheme_rows.sensitivity_line(costs)
        )


@click.command()
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
    chunks: Chunks | None,
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
    from edgefuse.report import scheme_rows, terminal
    from edgefuse.search import SCHEME
    from edgefuse.search import search as run

    inquiry = Inquiry(checkpoint, target, calibration, speech, *_shape(seconds, chunks))
    bounds = Bounds(max_wer_loss, max_latency_ms, max_mb)
    found = run(inquiry, output, bounds, resume=resume, tell=terminal.step)
    if as_json:
        terminal.show_json(scheme_rows.found_json(found))
    else:
        terminal.show_table(scheme_rows.FOUND, scheme_rows.found_rows(found))
        click.echo(f"{found.binding}\nScheme: {output / SCHEME}")


def _scheme(told: str) -> Scheme:
    """A scheme; not a float precision."""
    found = precision_of(told)
    if isinstance(found, str):
        raise UsageError(f"{found} quantizes nothing.", hint="Name a scheme, for example: --precision int8")
    return found


def _shape(seconds: float, chunks: Chunks | None) -> tuple[float | None, Chunks | None]:
    """One length, or else one kind of chunk."""
    return (seconds if chunks is None else None), chunks

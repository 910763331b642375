"""What makes a checkpoint, or looks into one: `inspect`, `fold`, `convert`, `average`, `new`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgefuse.cli.options import (
    PATH,
    architecture_option,
    chunk_options,
    depth_options,
    json_option,
    output_options,
    verbose_option,
)

if TYPE_CHECKING:
    from edgefuse.lower import Chunks


@click.command()
@click.argument("checkpoint", type=PATH)
@json_option
def inspect(checkpoint: Path, as_json: bool) -> None:
    """Show the architecture of CHECKPOINT, its size, its cost, and what folds, site by site."""
    from edgefuse.inspection import inspect as look
    from edgefuse.report import checkpoint_rows, terminal

    found = look(checkpoint)
    if as_json:
        terminal.show_json(found.to_json())
    else:
        terminal.show_table(("", ""), checkpoint_rows.inspection_rows(found), title=found.checkpoint.config.name)
        terminal.show_table(checkpoint_rows.PLAN, checkpoint_rows.plan_rows(found.plan), title="Plan")


@click.command()
@click.argument("checkpoint", type=PATH)
@output_options
@depth_options
@chunk_options("Estimate them in chunks of so long.")
@verbose_option
def fold(
    checkpoint: Path,
    output: Path,
    overwrite: bool,
    depth: int | None,
    reestimate: Path | None,
    chunks: Chunks | None,
) -> None:
    """Fold every norm of CHECKPOINT into its neighbours, in float64, and write the folded model."""
    from edgefuse.refold import refold
    from edgefuse.report import checkpoint_rows, terminal

    with terminal.step("Folding"):
        folded, exact = refold(checkpoint, output, depth=depth, speech=reestimate, chunks=chunks, overwrite=overwrite)
    click.echo(checkpoint_rows.fold_line(folded, exact, output))


@click.command()
@click.argument("weights", type=PATH)
@click.option("--config", type=PATH, required=True, help="config.json of the encoder, or train.yaml of WeNet.")
@click.option("--tokens", type=PATH, required=True, help="tokens.txt, one token a line, the blank first; or units.txt of WeNet.")
@click.option("--cmvn", type=PATH, help="WeNet's global_cmvn in JSON, where the weights lack frontend.mean and frontend.istd.")
@output_options
def convert(weights: Path, config: Path, tokens: Path, cmvn: Path | None, output: Path, overwrite: bool) -> None:
    """Read the tensors of WEIGHTS (.pt, .ckpt) without running what else it holds, and write a checkpoint."""
    from edgefuse.convert import convert as run

    checkpoint = run(weights, config, tokens, output, cmvn=cmvn, overwrite=overwrite)
    click.echo(f"{output}: {checkpoint.config.name}, digest {checkpoint.digest[:16]}")


@click.command()
@click.argument("checkpoints", type=PATH, nargs=-1, required=True)
@output_options
@click.option("--reestimate", type=PATH, metavar="SPEECH", help="Estimate the average's batch statistics, on this speech.")
@click.option("--average-statistics", is_flag=True, help="Average the batch statistics, too: compare both on speech of its own.")
@verbose_option
def average(
    checkpoints: tuple[Path, ...], output: Path, overwrite: bool, reestimate: Path | None, average_statistics: bool
) -> None:
    """Write the mean of the weights of CHECKPOINTS, of one training or of some that began alike, as one checkpoint."""
    from edgefuse.average import average as run
    from edgefuse.report import terminal

    with terminal.step("Averaging"):
        mean = run(checkpoints, output, speech=reestimate, average_statistics=average_statistics, overwrite=overwrite)
    click.echo(f"{output}: {mean.config.name}, of {len(checkpoints)} checkpoints, digest {mean.digest[:16]}")


@click.command()
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

"""``python -m edgefuse.train``: the same as ``edgefuse train``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgefuse.train.loop import train
from edgefuse.train.recipe import Recipe


@click.command()
@click.option("--speech", type=click.Path(path_type=Path), required=True)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True)
@click.option("--preset", default="tiny")
@click.option("--norm", type=click.Choice(["batch", "layer"]), default="batch")
@click.option("--epochs", type=int, default=30)
@click.option("--seed", type=int, default=0)
@click.option("--vocabulary", "vocabulary_size", type=int, default=256)
@click.option("--from", "start", type=click.Path(path_type=Path))
@click.option("--learning-rate", type=float, default=2e-3)
@click.option("--batch-seconds", type=float, default=56.0)
@click.option("--threads", type=int, default=1)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="bf16")
@click.option("--resume", is_flag=True)
def main(  # noqa: PLR0913, PLR0917 - one parameter per option
    speech: Path,
    output: Path,
    preset: str,
    norm: Literal["batch", "layer"],
    epochs: int,
    seed: int,
    vocabulary_size: int,
    start: Path | None,
    learning_rate: float,
    batch_seconds: float,
    threads: int,
    precision: Literal["fp32", "bf16"],
    resume: bool,  # noqa: FBT001 - click passes flags by name
) -> None:
    """Train an encoder on a corpus folder."""
    recipe = Recipe(
        preset=preset,
        norm=norm,
        epochs=epochs,
        seed=seed,
        batch_seconds=batch_seconds,
        peak_learning_rate=learning_rate,
        vocabulary_size=vocabulary_size,
    )
    trained = train(speech, output, recipe, resume=resume, threads=threads, precision=precision, start=start)
    for name, errors in trained.errors.items():
        click.echo(f"{name}: WER {errors.wer_percent:.2f} % ({errors.errors} of {errors.words} words)")


if __name__ == "__main__":
    main()

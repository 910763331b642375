"""What several commands share: their options, and how what was typed is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefuse.errors import UsageError
from edgefuse.values import FLOAT, PRECISIONS

if TYPE_CHECKING:
    from edgefuse.lower import Chunks
    from edgefuse.quantize.scheme import Scheme
    from edgefuse.values import Precision

REFERENCE = "reference"  # the target without a runtime: for tests, not one of --all

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


def chunk_options(told: str, *, ahead: bool = True) -> Callable[[Command], Command]:
    """`--chunk-ms` and what belongs to it, which the command gets as its `chunks`: None without `--chunk-ms`."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def run(*, chunk_ms: float | None, left_context_ms: float, look_ahead_ms: float = 0, **others: object) -> None:
            command(chunks=_chunks(chunk_ms, left_context_ms, look_ahead_ms), **others)

        if ahead:
            later = "The future that a chunk sees and waits for."
            run = click.option("--look-ahead-ms", type=float, default=0, show_default=True, help=later)(run)
        past = "The past that a chunk sees."
        run = click.option("--left-context-ms", type=float, default=2560, show_default=True, help=past)(run)
        return click.option("--chunk-ms", type=float, help=told)(run)

    return add


def _chunks(chunk_ms: float | None, left_context_ms: float, look_ahead_ms: float) -> Chunks | None:
    from edgefuse.lower import Chunks

    if chunk_ms is None and look_ahead_ms:
        raise UsageError("Whole utterances have no look-ahead.", hint="Stream, for example with: --chunk-ms 640")
    return None if chunk_ms is None else Chunks(chunk_ms, left_context_ms, look_ahead_ms=look_ahead_ms)


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


def targets_of(chosen: tuple[str, ...], *, every: bool) -> tuple[str, ...]:
    """The targets that were named, each once, or every one with a runtime; `UsageError` for both or neither."""
    from edgefuse.target import shelf

    if every and chosen:
        raise UsageError("--all and --target contradict each other.", hint="Give one of them.")
    names = tuple(name for name in shelf() if name != REFERENCE) if every else tuple(dict.fromkeys(chosen))
    if not names:
        raise UsageError("No target is named.", hint="Give --target NAME (see: edgefuse targets), or --all")
    return names


def shapes_of(
    seconds: tuple[float, ...], chunks: Chunks | None, *, held: bool = False
) -> tuple[tuple[float, ...], tuple[Chunks, ...]]:
    """The lengths and the chunks that were asked for; without either, one length."""
    from edgefuse.pipeline import SECONDS

    if held and chunks is None:
        raise UsageError("Without a stream there are no caches to hold.", hint="Stream, for example with: --chunk-ms 640")
    if chunks is None:
        return seconds or SECONDS, ()
    return seconds, (replace(chunks, held=held),)


def precision_of(told: str) -> Precision | Scheme:
    """A float precision, a named scheme, or a scheme file."""
    from edgefuse.quantize.scheme import SCHEMES, read_scheme

    for name in FLOAT:
        if name == told:
            return name
    return SCHEMES.get(told) or read_scheme(Path(told))

"""The terminal: steps with their seconds, tables, JSON, and what foreign libraries print."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

LONGEST_SILENT_STEP = 1.0  # seconds; a quicker step does not tell how long it took


@contextmanager
def step(sentence: str) -> Iterator[None]:
    """Say on stderr what is being done, and how long it took."""
    click.echo(f"{sentence} ...", err=True, nl=False)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        click.echo(err=True)
        raise
    seconds = time.monotonic() - began
    click.echo(f" {seconds:.1f} s" if seconds >= LONGEST_SILENT_STEP else " done", err=True)


def say(sentence: str) -> None:
    """One line of progress, on stderr."""
    click.echo(sentence, err=True)


def show_foreign_words() -> None:
    """Show on stderr what the targets kept from the terminal."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for ours in ("edgefuse", "edgefuse_targets"):
        logging.getLogger(ours).setLevel(logging.DEBUG)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; numbers stand to the right. On a narrow terminal, or in a pipe, nothing is cut off."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        show_header=any(columns),
    )
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a bracket in a cell is a bracket, not a style
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)


def show_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print JSON for programs."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"|-|-?[\d.]+( \S{1,2})?", cell) is not None


def or_dash(number: float | None, form: str) -> str:
    """A number in the form of `str.format`, or a dash where there is none."""
    return "-" if number is None else form.format(number)


def megabytes(size: int) -> str:
    """A file size for people."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"  # noqa: PLR2004 - 0.1 MB

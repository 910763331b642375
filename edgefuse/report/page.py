"""What a bundle is, on one page for people: `report.html` in it, without scripts and without anything from the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from edgefuse.report import bundle_rows

if TYPE_CHECKING:
    from edgefuse.bundle import Bundle

PAGE = "report.html"
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ccc; padding: .2em .8em .2em 0; text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
"""


def page(bundle: Bundle, picture: str | None = None) -> str:
    """The page; `picture` is the name of an SVG beside it: what the search that found the scheme has measured."""
    checks = [row for export in bundle.exports for row in bundle_rows.check_rows(export.artifact.target, export.verdict.checks)]
    parts = [
        HEAD.format(title=escape(f"{bundle.config.name}, {bundle.precision}")),
        _table(("", ""), bundle_rows.lineage_rows(bundle)),
        "<h2>What was checked</h2>",
        _table(bundle_rows.CHECKS, checks),
    ]
    if bundle.quantization:
        parts += ["<h2>Scheme</h2>", f"<pre>{escape(bundle.quantization.scheme.to_toml())}</pre>"]
    if picture:
        parts += ["<h2>What the search measured</h2>", f'<img src="{escape(picture)}" alt="Word error rate over latency">']
    return "\n".join([*parts, ""])


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = f"<tr>{''.join(f'<th>{escape(each)}' for each in columns)}" if any(columns) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in line)}\n" for line in lines)
    return f"<table>\n{head}\n{body}</table>"

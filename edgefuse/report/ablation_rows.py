"""Latency ratios of architectures in turns, as tables of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgefuse.ablation import Comparison, Row

RATIOS = ("target", "mode", "ratio", "median", "half of the rounds within", "bar", "p50", "")


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

"""Pictures, as SVG: the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from edgefuse.quantize.mixes import front

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from edgefuse.quantize.mixes import Measured
    from edgefuse.quantize.sensitivity import Sensitivity


def draw_front(path: Path, measured: Sequence[Measured], chosen: Measured | None) -> None:
    """What every scheme costs and loses; a line joins those that nothing beats in both."""
    figure, axes = _blank(8.0, 5.0)
    best = front(measured)
    axes.step([each.cost for each in best], [each.wer_loss for each in best], where="post", color="tab:gray", zorder=1)
    others = [each for each in measured if each is not chosen]
    kinds = {
        "uniform": ("tab:orange", [each for each in others if _is_uniform(each)]),
        "mixed": ("tab:blue", [each for each in others if not _is_uniform(each)]),
        "chosen": ("tab:red", [each for each in measured if each is chosen]),
    }
    for label, (color, those) in kinds.items():
        axes.scatter([each.cost for each in those], [each.wer_loss for each in those], color=color, label=label, zorder=2)
    for each in measured:
        axes.annotate(each.scheme.name, (each.cost, each.wer_loss), xytext=(3, 4), textcoords="offset points", fontsize=7)
    axes.legend()
    axes.set_xlabel("size in bytes" if measured[0].latency_ratio is None else "latency / fp32")
    axes.set_ylabel("WER - WER of the float model, points")
    _save(figure, path)


def draw_sensitivity(path: Path, parts: Sequence[Sensitivity]) -> None:
    """The error that each layer brings alone, worst last."""
    figure, axes = _blank(8.0, 1.0 + 0.16 * len(parts))
    ordered = sorted(parts, key=lambda each: each.alone.noise)
    axes.barh([f"{each.name} {each.precision}" for each in ordered], [each.alone.noise for each in ordered])
    axes.set_xscale("log")
    axes.set_xlabel("power of the logits' error / power of the logits, quantized alone")
    axes.tick_params(axis="y", labelsize=6)
    axes.margins(y=0.01)
    _save(figure, path)


def _is_uniform(each: Measured) -> bool:
    return each.scheme.precision != "mixed" or not each.scheme.table


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": "edgefuse", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})

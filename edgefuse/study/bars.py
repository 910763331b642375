"""What the papers claim and what the rows are held against, each with what was measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from edgefuse.study.results import SEEN, UNSEEN, Results

Verdict = Literal["holds", "missed", "not run"]
NOT_RUN: Final = "not run"
BOTH = (SEEN, UNSEEN)
OFFLINE_PTE = ("latency", "executorch", "offline")
HALF = "shared-sampled, 4 layers"


@dataclass(frozen=True, slots=True)
class Bar:
    """A number that must not be above, or with `least` not below, a limit.

    Attributes:
        told: what is held against what.
        limit: in `unit`.
        unit: behind both numbers.
        measured: the number, or None where something that it needs was not run.
        least: the limit is a least.
        tried: where it is missed, which rows or settings were to reach it.
    """

    told: str
    limit: float
    unit: str
    measured: Callable[[Results], float | None]
    least: bool = False
    tried: str = ""

    def value(self, results: Results) -> str:
        """What was measured."""
        found = self.measured(results)
        return NOT_RUN if found is None else f"{found:.2f}{self.unit}"

    def verdict(self, results: Results) -> Verdict:
        """Whether it holds."""
        found = self.measured(results)
        if found is None:
            return NOT_RUN
        return "holds" if (found >= self.limit if self.least else found <= self.limit) else "missed"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a paper says, on its data and its hardware, and the number here that comes nearest.

    Attributes:
        paper: which.
        told: what it claims.
        tag: where that was read.
        here: what was measured instead.
        measured: the number; None where it was not run.
        form: how it is written.
    """

    paper: str
    told: str
    tag: str
    here: str
    measured: Callable[[Results], float | None]
    form: str

    def value(self, results: Results) -> str:
        """What was measured."""
        found = self.measured(results)
        return NOT_RUN if found is None else self.form.format(found)


def points_above_base(row: str, part: str = "") -> Callable[[Results], float | None]:
    """How much higher a row's word error rate is than the LayerNorm Conformer's, both test sets together, mean of the seeds."""

    def measured(results: Results) -> float | None:
        own, base = results.wer(row, part, BOTH), results.wer("conformer", "", BOTH)
        return None if own is None or base is None else own.mean - base.mean

    return measured


def ratio(path: tuple[str, ...], row: str, to: str = "conformer") -> Callable[[Results], float | None]:
    """One row's latency, or step, divided by another's."""

    def measured(results: Results) -> float | None:
        own, base = results.cost(*path, row, "ratio"), results.cost(*path, to, "ratio")
        return own / base if own and base else None

    return measured


def times_faster(path: tuple[str, ...], row: str) -> Callable[[Results], float | None]:
    """How many times as fast as the LayerNorm Conformer a row is."""

    def measured(results: Results) -> float | None:
        found = ratio(path, row)(results)
        return 1 / found if found else None

    return measured


def less(of: Callable[[Results], float | None]) -> Callable[[Results], float | None]:
    """A ratio as percent that are saved."""

    def measured(results: Results) -> float | None:
        found = of(results)
        return None if found is None else 100 * (1 - found)

    return measured


def fewer_block_parameters(results: Results) -> float | None:
    """How many times as many values the blocks store that are not shared."""
    own, shared = (results.cost("sizes", row, "block_parameters") for row in ("fusionformer", "shared"))
    return own / shared if own and shared else None


FUSIONFORMER_TRIED = (
    "the depthwise convolution 2 d wide, as many channels as a GLU's two halves have: the row FusionFormer 2C. And in a "
    "longer training (3,600 steps of 50 s, one seed), where the row is 4.9 points above: two ReLUs in GLU's place, 3.6; "
    "Swish and GLU, Unified Normalization in BN's places, BN on the residual stream besides, twice the learning rate, "
    "statistics that are fixed for the last third: none of them learns faster. With Unified Normalization in LayerNorm's "
    "places it is 0.6 points above if Swish and GLU stay, and 5.6 with ReLUs: only both together come near"
)
BARS = (
    Bar(
        "WER of FusionFormer C above the LayerNorm Conformer's",
        0.3,
        " points",
        points_above_base("fusionformer"),
        tried=FUSIONFORMER_TRIED,
    ),
    Bar("WER of Unified Normalization above the LayerNorm Conformer's", 0.5, " points", points_above_base("unified")),
    Bar("best combination, times faster offline (.pte)", 3.0, "x", times_faster(OFFLINE_PTE, "best"), least=True),
    Bar(
        "best combination, times faster in chunks of 640 ms (.pte)",
        3.0,
        "x",
        times_faster((*OFFLINE_PTE[:2], "streaming"), "best"),
        least=True,
        tried="narrower convolutions in the subsampling and feed-forwards of 96 and 192 in the row",
    ),
    Bar(
        "WER of the best combination above the LayerNorm Conformer's",
        1.0,
        " points",
        points_above_base("best"),
        tried="its parts one by one: the rows subsampling by 8, funnel, and convolution-only lower half",
    ),
    Bar("sharing, times fewer block parameters", 7.0, "x", fewer_block_parameters, least=True),
    Bar("a training step with sampled depth / one without", 0.65, "", ratio(("step",), "shared-sampled", to="shared")),
)

CLAIMS = (
    Claim(
        "FusionFormer",
        "about 10 % faster than the LayerNorm Conformer",
        "[R abstract]",
        "FusionFormer C offline on .pte, latency saved",
        less(ratio(OFFLINE_PTE, "fusionformer")),
        "{:.1f} %",
    ),
    Claim(
        "Unified Normalization",
        "about 31 % faster inference on a GPU",
        "[R abstract]",
        "one batch on a GPU in PyTorch, time saved",
        lambda results: results.cost("gpu", "unified", "latency_saved_percent"),
        "{:.1f} %",
    ),
    Claim(
        "Unified Normalization",
        "about 18 % less memory on a GPU",
        "[R abstract]",
        "the same, peak memory saved",
        lambda results: results.cost("gpu", "unified", "memory_saved_percent"),
        "{:.1f} %",
    ),
    Claim(
        "Practical Conformer",
        "6.8x lower latency, all its ideas together",
        "[R abstract]",
        "the best combination offline on .pte",
        times_faster(OFFLINE_PTE, "best"),
        "{:.1f}x",
    ),
    Claim(
        "Layer Consistency",
        "7.8x fewer parameters",
        "[R abstract]",
        "values that the blocks store",
        fewer_block_parameters,
        "{:.1f}x",
    ),
    Claim(
        "Layer Consistency",
        "41.9 % training time saved",
        "[R abstract]",
        "a training step with sampled depth against one without",
        less(ratio(("step",), "shared-sampled", to="shared")),
        "{:.1f} %",
    ),
    Claim(
        "Layer Consistency",
        "37.7 % inference time saved",
        "[R abstract]",
        "4 of 8 layers offline on .pte, latency saved",
        less(ratio(OFFLINE_PTE, HALF, to="shared-sampled")),
        "{:.1f} %",
    ),
)

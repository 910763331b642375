"""STUDY.md, from the results alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edgefuse.atomic import failures_in_words
from edgefuse.study.bars import BARS, BOTH, CLAIMS, NOT_RUN
from edgefuse.study.costs import COUNTER, TARGETS, lines_of
from edgefuse.study.results import CHUNKED, SEEN, UNSEEN, Outcome, Results, seeds_of
from edgefuse.study.rows import Plan, Row

SETS = (SEEN, UNSEEN, SEEN + CHUNKED, UNSEEN + CHUNKED)
MODES = ("offline", "streaming")
SUFFIXES = {"executorch": ".pte", "tflite": ".tflite"}


def write_page(path: Path, plan: Plan, results: Results) -> None:
    """Write the page, whole or not at all."""
    with failures_in_words(path):
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(page(plan, results), encoding="utf-8")
        draft.replace(path)


def page(plan: Plan, results: Results) -> str:
    """The whole page; of the same results always the same."""
    recipe, host = plan.recipe, results.cost("host") or {}
    steps = recipe.epochs * (recipe.epoch_batches or 0)
    precisions = " and ".join(sorted({each.precision for each in results.outcomes})) or NOT_RUN
    timed = f"{host['cpu']}, {host['threads']} thread, {host['rounds']} rounds in turns" if host else NOT_RUN
    parts = [
        "# What each idea is worth",
        "",
        "`make study` measures it, and writes this page from `edgefuse/study/results.json`; nothing in it was written by hand.",
        f"All rows have the same corpus, {seeds_of(results.outcomes)} and {steps:,} steps of {recipe.batch_seconds:g} s of",
        f"speech, in {precisions}; the preset is `{recipe.preset}`, far smaller than the papers' models, and the speech is",
        "synthetic: figures are to be compared with each other only. What a row changes is in `edgefuse/study/rows.toml`.",
        f"Timing: {timed}.",
        "",
        "## What they hear",
        "",
        "Word error rates in percent of greedy search, the mean of the seeds (and between what they lie), on voices that the",
        "training has heard and on others, of whole utterances and in chunks of 640 ms after 2,560 ms of past.",
        *_doubt(results),
        "",
        *_table(("row", "seen", "unseen", "seen, chunks", "unseen, chunks", "both sets", "against LN"), _quality(plan, results)),
        "",
        "## What they cost",
        "",
        "Parameters are the stored ones, shared ones once; multiply-accumulates are per second of audio in utterances of 5.12 s;",
        "latencies and training steps have ratios to the LayerNorm Conformer (below 1 is faster), medians of runs in turns;",
        f"instructions are exact, of ExecuTorch on an emulated {COUNTER.partition(':')[2]}, in millions per utterance of 5.12 s",
        "and per chunk. What stays are norms that no fold removes.",
        "",
        *_table(_cost_columns(), _costs(plan, results)),
        "",
        *_refusals(results),
        "## What the papers claim",
        "",
        "Their figures are of other models, data and hardware. [R abstract]: read in the paper's abstract.",
        "",
        *_table(
            ("paper", "claim", "tag", "nearest figure here", "measured"),
            [(each.paper, each.told, each.tag, each.here, each.value(results)) for each in CLAIMS],
        ),
        "",
        *_gpu(results),
        "## What was to be reached",
        "",
        *_table(
            ("bar", "required", "measured", "verdict"),
            [
                (each.told, f"{'≥' if each.least else '≤'} {each.limit:g}{each.unit}", each.value(results), each.verdict(results))
                for each in BARS
            ],
        ),
        "",
        *_tried(results),
        "## The rows",
        "",
        *_table(
            ("row", "what it is", "paper", "its claim"),
            [(row.title, row.idea, row.paper, f"{row.claim} {row.tag}") for row in plan.rows],
        ),
    ]
    return "\n".join(parts) + "\n"


def _gpu(results: Results) -> Iterator[str]:
    """On which GPU, and how."""
    if gpu := results.cost("gpu"):
        batch = f"{gpu['utterances']} utterances of {gpu['seconds']} s at once"
        yield f"The GPU: {gpu['device']}; {batch}, float32, folded where it folds."
        yield ""


def _tried(results: Results) -> Iterator[str]:
    """What was to reach the bars that are missed."""
    if missed := [each for each in BARS if each.tried and each.verdict(results) == "missed"]:
        yield "What was tried for those that are missed:"
        yield ""
        yield from (f"- {each.told}: {each.tried}." for each in missed)
        yield ""


def _doubt(results: Results) -> Iterator[str]:
    """What one seed cannot tell."""
    if len({each.seed for each in results.outcomes}) == 1:
        yield ""
        yield "There is one seed: nothing here tells how much of a difference is chance, and a bar may hold or be missed by it."


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join(' --- ' for _ in columns)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _parts(row: Row, outcomes: Sequence[Outcome]) -> list[str]:
    """What there is to be said of a row: the whole, and what was measured of it besides."""
    measured = dict.fromkeys(part for each in outcomes for part in each.errors)
    return [*(measured or {"": None}), *(f"{depth} layers" for depth in row.depths if f"{depth} layers" not in measured)]


def _quality(plan: Plan, results: Results) -> Iterator[tuple[str, ...]]:
    base = results.wer("conformer", "", BOTH)
    for row in plan.rows:
        outcomes = results.of(row.name)
        diverged = [each for each in outcomes if each.status == "diverged"]
        for part in _parts(row, outcomes):
            title = f"{row.title}, {part}" if part else row.title
            if not outcomes:
                yield title, *(NOT_RUN,) * 4, "", ""
                continue
            told = f"{seeds_of(diverged)} diverged: {diverged[0].told}" if diverged else ""
            rates = [results.wer(row.name, part, (name,)) for name in SETS]
            both = results.wer(row.name, part, BOTH)
            against = f"{both.mean - base.mean:+.1f}" if both and base else ""
            yield title, *(str(rate) if rate else told or NOT_RUN for rate in rates), str(both or ""), against


def _cost_columns() -> tuple[str, ...]:
    latencies = (f"{SUFFIXES[target]} {mode}" for target in TARGETS for mode in MODES)
    return "row", "parameters", ".pte MB", "MMAC/s", "training step", *latencies, "M instr. offline", "M instr. chunk", "stays"


def _costs(plan: Plan, results: Results) -> Iterator[tuple[str, ...]]:
    for row in plan.rows:
        for line in lines_of(plan, row):
            part = line.key.removeprefix(row.name).removeprefix(", ")
            yield row.title + (f", {part}" if part else ""), *_cost(line.key, results)


def _cost(key: str, results: Results) -> Iterator[str]:
    sizes = results.cost("sizes", key)
    if sizes is None:
        yield from (NOT_RUN,) * (len(_cost_columns()) - 1)
        return
    yield f"{sizes['parameters']:,}"
    yield f"{sizes['pte_bytes'] / 1e6:.2f}" if "pte_bytes" in sizes else NOT_RUN
    yield f"{sizes['macs_per_second'] / 1e6:.1f}"
    seconds = results.cost("step", key, "p50_s")
    yield f"{seconds * 1000:.0f} ms, {_ratio(results, 'step', key)}" if seconds else NOT_RUN
    for target in TARGETS:
        for mode in MODES:
            yield _ratio(results, "latency", target, mode, key)
    for mode in MODES:
        count = results.cost("instructions", "counts", key, mode)
        yield f"{count / 1e6:.1f}" if count else NOT_RUN
    yield str(sizes["stays"])


def _ratio(results: Results, *path: str) -> str:
    found = results.cost(*path, "ratio")
    return NOT_RUN if found is None else f"{found:.2f}"


def _refusals(results: Results) -> Iterator[str]:
    refused = results.cost("refused") or {}
    lacks = results.cost("instructions", "lacks")
    told = [*(f"- {key}: {sentence}" for key, sentence in refused.items()), *([f"- {COUNTER}: {lacks}"] if lacks else [])]
    if told:
        yield "What could not be measured:"
        yield ""
        yield from told
        yield ""

"""The runner: row by row and seed by seed; what was finished is not done again, and what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from edgefuse.bench.turns import Turns
from edgefuse.errors import EdgefuseError, MissingFile, Refused, UsageError
from edgefuse.study.costs import TARGETS, measure, renewed
from edgefuse.study.gpu import measure_on_gpu
from edgefuse.study.page import write_page
from edgefuse.study.results import (
    COSTS,
    RESULTS,
    Results,
    collect,
    outcome_path,
    read_outcome,
    write_json,
    write_results,
)
from edgefuse.study.rows import BASE, Plan, Row
from edgefuse.study.train import Corpus, as_json, load_corpus, train_row

PAGE = "STUDY.md"
CLAIMED_ON_GPU = ("unified", "fusionformer")
Tell = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that could not be run, and why."""

    row: str
    sentence: str


def train_rows(
    plan: Plan,
    speech: Path,
    folder: Path,
    *,
    names: Sequence[str] = (),
    seeds: Sequence[int] = (1, 2),
    threads: int = 1,
    say: Callable[[str], None],
) -> Results:
    """Train the rows that are named, or all, seed by seed, and write what was found out.

    Raises:
        UsageError: a row that is not there, or results of another recipe.
        Refused: some rows could not be run; all others were.
    """
    chosen = [plan.row(name) for name in names] or list(plan.rows)
    waiting = [(row, seed) for seed in seeds for row in chosen if not _finished(plan, row, seed, folder)]
    failures: list[Failure] = []
    if waiting:
        torch.set_num_threads(threads)
        corpus = load_corpus(speech, plan.recipe.pieces)
        failures = [failure for row, seed in waiting if (failure := _run(plan, row, seed, corpus, folder, say))]
    results = report(plan, folder)
    if failures:
        more = f" And {len(failures) - 1} more." if len(failures) > 1 else ""
        raise Refused(
            f"{len(failures)} of {len(waiting)} trainings could not be run: {failures[0].row}: {failures[0].sentence}{more}",
            hint="All others were run; the same command tries these again.",
        )
    return results


def cost_rows(plan: Plan, folder: Path, turns: Turns, *, names: Sequence[str] = (), tell: Tell) -> Results:
    """Measure what all rows cost, in one run, and write the page; some rows beside the base replace their figures only."""
    chosen = [plan.row(name) for name in dict.fromkeys((BASE, *names))] if names else list(plan.rows)
    before = collect(folder).costs if names else {}
    write_json(folder / COSTS, renewed(before, measure(plan, chosen, TARGETS, turns, tell=tell)))
    return report(plan, folder)


def gpu_rows(plan: Plan, folder: Path, turns: Turns, *, names: Sequence[str] = ()) -> Results:
    """Measure on a GPU what an inference of the rows that are named takes, beside the base's; of none, what a paper claims of.

    Raises:
        Refused: there is no GPU.
    """
    chosen = [plan.row(name) for name in dict.fromkeys((BASE, *(names or CLAIMED_ON_GPU)))]
    write_json(folder / COSTS, renewed(collect(folder).costs, {"gpu": measure_on_gpu(plan, chosen, turns)}))
    return report(plan, folder)


def report(plan: Plan, folder: Path) -> Results:
    """Write the page and one file of all results, from the results alone."""
    results = collect(folder)
    write_results(folder / RESULTS, results)
    write_page(folder / PAGE, plan, results)
    return results


def report_again(plan: Plan, folder: Path) -> Results:
    """The same, where there are results; a `MissingFile` where there are none."""
    if collect(folder) == Results((), {}):
        raise MissingFile(
            f"{folder} holds no results of a study.", hint=f"Make them with: edgefuse study --speech CORPUS -o {folder}"
        )
    return report(plan, folder)


def _finished(plan: Plan, row: Row, seed: int, folder: Path) -> bool:
    path = outcome_path(folder, row.name, seed)
    found = read_outcome(path)
    if found is None:
        return False
    now = as_json(plan.recipe_of(row, seed))
    if changed := [name for name, value in found.recipe.items() if now.get(name) != value]:  # what has come since is at rest
        raise UsageError(
            f"{path} is of another recipe: other {', '.join(changed)}.",
            hint="Choose another -o, or remove that file and its run.",
        )
    return True


def _run(plan: Plan, row: Row, seed: int, corpus: Corpus, folder: Path, say: Callable[[str], None]) -> Failure | None:
    say(f"{row.title}, seed {seed}")
    try:
        outcome = train_row(plan, row, seed, corpus, folder)
    except EdgefuseError as error:
        say(f"{row.title}: {error.sentence}")
        return Failure(row.name, error.sentence)
    write_json(outcome_path(folder, row.name, seed), outcome.to_json())
    say(f"{row.title}, seed {seed}: {outcome.told or outcome.status}")
    return None

"""What the study has measured: one JSON file for each row and seed, one for what the rows cost, and all of it as one object."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgefuse.atomic import failures_in_words
from edgefuse.errors import MissingFile, UsageError
from edgefuse.verify.wer import WordErrors

if TYPE_CHECKING:
    from edgefuse.train.loop import Precision

RESULTS = "results.json"  # all of them
COSTS = "costs.json"  # what rows cost, whatever they have learnt
SEEN, UNSEEN = "seen", "unseen"
CHUNKED = ", 640 ms"  # behind a test set: heard in such chunks
Status = Literal["trained", "diverged"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row with a seed.

    Attributes:
        row: its name.
        seed: of its recipe.
        status: "diverged" is a result as well.
        recipe: what it was trained with, as JSON.
        precision: in which its layers were computed; this machine's usual one.
        told: how it diverged; else "".
        steps: that were taken.
        errors: by what was measured of it ("" for the whole, or for example "4 layers"), then by test set, "seen, 640 ms" being
            the same set in chunks.
    """

    row: str
    seed: int
    status: Status
    recipe: Mapping[str, Any]
    precision: Precision
    told: str = ""
    steps: int = 0
    errors: Mapping[str, Mapping[str, WordErrors]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For its file."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Outcome:
        """From its file."""
        errors = {part: {name: WordErrors(**each) for name, each in sets.items()} for part, sets in told["errors"].items()}
        return cls(**{**told, "errors": errors})


@dataclass(frozen=True, slots=True)
class Spread:
    """A number of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        """The mean, and between what the seeds are."""
        told = f"{self.mean:.1f}"
        return told if len(self.values) == 1 else f"{told} ({min(self.values):.1f} to {max(self.values):.1f})"


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured.

    Attributes:
        outcomes: of rows and seeds.
        costs: see `edgefuse.study.costs`; by measure, then by line of the table.
    """

    outcomes: tuple[Outcome, ...] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)

    def of(self, row: str) -> tuple[Outcome, ...]:
        """The outcomes of a row."""
        return tuple(each for each in self.outcomes if each.row == row)

    def wer(self, row: str, part: str, sets: Sequence[str]) -> Spread | None:
        """Word error rate in percent over some test sets together, of each seed; None where it was not measured."""
        rates = []
        for each in self.of(row):
            counted = each.errors.get(part, {})
            if all(name in counted for name in sets):
                rates.append(sum((counted[name] for name in sets), WordErrors(0, 0, 0, 0, 0)).wer_percent)
        return Spread(tuple(rates)) if rates else None

    def cost(self, *path: str) -> Any:  # noqa: ANN401 - whatever a measure is
        """One cost by its path; None where it was not measured."""
        found: Any = self.costs
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def to_json(self) -> dict[str, Any]:
        """Sorted, without the recipes' repetitions being left out: a file that two runs write alike."""
        ordered = sorted(self.outcomes, key=lambda each: (each.row, each.seed))
        return {"outcomes": [each.to_json() for each in ordered], "costs": dict(self.costs)}


def read_results(path: Path) -> Results:
    """Read what `write_results` has written.

    Raises:
        MissingFile: there is none.
        UsageError: it is something else.
    """
    told = _read(path)
    try:
        return Results(tuple(Outcome.from_json(each) for each in told["outcomes"]), told["costs"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds no results of a study: {error}.", hint="Make them with: edgefuse study") from error


def write_results(path: Path, results: Results) -> None:
    """All of them in one file."""
    write_json(path, results.to_json())


def collect(folder: Path) -> Results:
    """Everything that lies in the folder of a study, or in one that holds nothing but its results."""
    outcomes = tuple(Outcome.from_json(_read(path)) for path in sorted((folder / "rows").glob("*.json")))
    costs = _read(folder / COSTS) if (folder / COSTS).is_file() else {}
    if not outcomes and not costs and (folder / RESULTS).is_file():
        return read_results(folder / RESULTS)
    return Results(outcomes, costs)


def outcome_path(folder: Path, row: str, seed: int) -> Path:
    """Where the outcome of a row and a seed is."""
    return folder / "rows" / f"{row}-{seed}.json"


def read_outcome(path: Path) -> Outcome | None:
    """An outcome, if it is there."""
    return Outcome.from_json(_read(path)) if path.is_file() else None


def write_json(path: Path, told: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    with failures_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(f"There is no {path}.", hint="Make it with: edgefuse study --speech CORPUS -o DIR") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.", hint="Remove it, and run the study again.") from error
    return told


def seeds_of(outcomes: Iterable[Outcome]) -> str:
    """For example "2 seeds"."""
    count = len({each.seed for each in outcomes})
    return f"{count} seed{'s' if count != 1 else ''}"

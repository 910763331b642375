"""What the study trains: its recipe and its rows, from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgefuse.errors import EdgefuseError, Refused, UsageError
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.config import OPTIONAL
from edgefuse.train.augment import Augmentation
from edgefuse.train.recipe import Recipe

ROWS = Path(__file__).with_name("rows.toml")
BASE = "conformer"  # what the others are compared with
FEATURE_FRAMES = 64  # on which it is seen whether an encoder is what its architecture asks for


@dataclass(frozen=True, slots=True)
class Row:
    """One idea.

    Attributes:
        name: of its results.
        title: in the table.
        idea: in some words.
        paper: which it is from.
        claim: what that paper says of it.
        tag: where that was read.
        architecture: fields of the encoder's config that are not the preset's.
        recipe: fields of the recipe that are not the study's.
        depths: so many of its layers are measured as well, of the same checkpoint.
        converts: the row whose checkpoint it begins with, its norms converted; "" where it begins afresh.
    """

    name: str
    title: str
    idea: str
    paper: str
    claim: str
    tag: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    depths: tuple[int, ...] = ()
    converts: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A study: the recipe that all rows have in common, and the rows."""

    recipe: Recipe
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """One of them.

        Raises:
            UsageError: there is no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(f"The study has no row {name!r}.", hint=f"It has: {', '.join(row.name for row in self.rows)}")

    def recipe_of(self, row: Row, seed: int) -> Recipe:
        """What a row is trained with."""
        told = {**row.recipe, "norm": row.architecture.get("norm", self.recipe.norm)}
        return dataclasses.replace(self.recipe, **told, architecture=dict(row.architecture), seed=seed)

    def config_of(self, row: Row, vocabulary_size: int) -> EncoderConfig:
        """What a row trains."""
        return self.recipe_of(row, 0).encoder(vocabulary_size)


def read_plan(path: Path = ROWS) -> Plan:
    """Read a file of rows; every architecture in it is one that a config can describe.

    Raises:
        UsageError: it is no such file.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe = dict(told["recipe"])
        whole = Recipe(**{**recipe, "augmentation": Augmentation(**recipe.get("augmentation", {}))})
        rows = tuple(Row(**{**row, "depths": tuple(row.get("depths", ()))}) for row in told["row"])
        plan = Plan(whole, rows)
        for row in rows:
            _check(plan, row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no file of rows: {error}.", hint=f"Look at {ROWS}") from error
    if len({row.name for row in rows}) < len(rows):
        raise UsageError(f"Two rows of {path} have one name.", hint="Rename one of them.")
    return plan


def _check(plan: Plan, row: Row) -> None:
    try:
        plan.config_of(row, 2)
        if row.converts:
            plan.row(row.converts)
    except EdgefuseError as error:
        raise UsageError(f"The row {row.name!r}: {error.sentence}", hint=error.hint) from error


def require_built(config: EncoderConfig) -> Encoder:
    """The encoder of a config, with fresh weights, once it is sure that it has what is special about it.

    Raises:
        Refused: the encoder ignores a part of its config, or cannot be built.
    """
    whole = config.to_json()
    try:
        built = Encoder(config)
        told = _told(built)
        for name in whole.keys() & OPTIONAL:
            if told == _told(Encoder(EncoderConfig.from_json({n: value for n, value in whole.items() if n != name}))):
                raise Refused(f"This encoder is the same with {name} and without it.", hint="Leave the row out.")
    except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise Refused(f"This encoder cannot be built: {error}.", hint="Leave the row out.") from error
    return built


def _told(encoder: Encoder) -> tuple[object, ...]:
    """What tells an encoder from another: its tensors, and how many frames it answers with."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    features, lengths = torch.zeros(1, FEATURE_FRAMES, encoder.config.mel_bins), torch.tensor([FEATURE_FRAMES])
    encoder.eval()
    with torch.no_grad():
        logits, *_ = encoder(features, lengths)
    encoder.train()
    return shapes, tuple(logits.shape)


def config_at_depth(config: EncoderConfig, depth: int) -> EncoderConfig:
    """The same with so many layers, of blocks that are all alike."""
    return dataclasses.replace(config, layers=depth, stages=())

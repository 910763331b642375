"""What is quantized, and how wide: neutral of every runtime. A target translates a scheme, or refuses it in words.

A scheme is a named one (`edgefuse export --precision int8`) or a TOML file that anyone can read and edit:

    layers = "int8"            # of every linear and convolution that no line of the table names
    clipping = "mse"           # how a range is chosen from what calibration saw: minmax, percentile, mse or kl
    attention = "fp32"         # the operands and results of both attention products
    residual = "fp32"          # the sums of the residual stream
    features = "fp32"          # what the first convolution hears
    logits = "int8"            # what the head says; fp32 leaves the head itself in fp32
    positions = "int8"         # the constants that attention adds to its keys; they need no range
    block = 32                 # how many inputs of a layer of 4 bits share a scale; 0: all that make an output

    [table]                    # a layer, or a pattern with * and ?; the last line that matches counts
    "blocks.0.*" = "fp32"
    "*.macaron.w2" = "int8-dynamic"

Softmax has no line: a hidden key has the score -10000, and eight bits that hold it hold no difference between two others.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from edgefuse.errors import BadScheme, MissingFile
from edgefuse.values import FLOAT

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.values import Precision

LayerPrecision = Literal["fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights", "palette4-weights", "int8-a16"]
LAYER_PRECISIONS: tuple[LayerPrecision, ...] = get_args(LayerPrecision)
ValuePrecision = Literal["fp32", "int8"]
VALUE_PRECISIONS: tuple[ValuePrecision, ...] = get_args(ValuePrecision)
Clipping = Literal["minmax", "percentile", "mse", "kl"]
CLIPPINGS: tuple[Clipping, ...] = get_args(Clipping)
INNER_LINES = ("attention", "residual")  # values with a precision of their own, and ranges
OWN_LINES = (*INNER_LINES, "positions")
LINES = (*OWN_LINES, "features", "logits")
BLOCKS = (0, 32, 64, 128, 256)  # that both XNNPACK and LiteRT have
STATIC: frozenset[LayerPrecision] = frozenset({"int8", "int8-a16"})  # their activations have ranges from calibration


@dataclass(frozen=True, slots=True)
class Scheme:
    """Which layer is computed how.

    Attributes:
        name: for tables and for the bundle: a named scheme's, or the file's.
        layers: the precision of every linear and convolution that the table does not name. `int8` and `int8-a16`: weights of 8
            bits with one scale per output channel, activations of 8 or 16 with one scale from calibration; `int8-dynamic`:
            the scale of the activations from what arrives; `int8-weights`: float activations; `int4-weights`: those that are
            faster, float (Core ML) or dynamic ones; `palette4-weights`: weights of 16 values from lookup tables, float
            activations.
        table: patterns of layers to precisions; the last one that matches counts.
        clipping: how ranges are chosen.
        attention: of the operands and results of both attention products.
        residual: of the sums of the residual stream.
        features: of what the first convolution hears.
        logits: of what the head says.
        positions: of the constants that attention adds to its keys.
        block: how many inputs of a layer of 4 bits share a scale, one of `BLOCKS`; with 0 an output channel has one scale. A
            layer whose width they do not divide takes zeros behind its inputs.
    """

    name: str
    layers: LayerPrecision
    table: Mapping[str, LayerPrecision] = field(default_factory=dict)
    clipping: Clipping = "mse"
    attention: ValuePrecision = "fp32"
    residual: ValuePrecision = "fp32"
    features: ValuePrecision = "fp32"
    logits: ValuePrecision = "int8"
    positions: ValuePrecision = "int8"
    block: int = 32

    def of(self, layer: str) -> LayerPrecision:
        """The precision of a layer."""
        matching = [precision for pattern, precision in self.table.items() if fnmatchcase(layer, pattern)]
        return matching[-1] if matching else self.layers

    def precisions(self, layers: tuple[str, ...]) -> dict[str, LayerPrecision]:
        """The precision of each layer; a pattern of the table that matches none of them is a `BadScheme`."""
        for pattern in self.table:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise BadScheme(
                    f"The scheme {self.name!r} names {pattern!r}, which is no layer of this model.",
                    hint=f"Its layers are {layers[0]}, {layers[1]} and so on, to {layers[-1]}.",
                )
        return {layer: self.of(layer) for layer in layers}

    @property
    def calibrated(self) -> bool:
        """Whether it needs ranges."""
        return not STATIC.isdisjoint((self.layers, *self.table.values())) or any(
            getattr(self, line) == "int8" for line in INNER_LINES
        )

    @property
    def precision(self) -> Precision:
        """What it is called, and judged as: one precision where all layers have it, whatever the file is called."""
        return "mixed" if self.table or self.layers == "fp32" else self.layers

    def to_json(self) -> dict[str, Any]:
        """As in a scheme file, with its name."""
        lines = {line: getattr(self, line) for line in LINES}
        ways = {"clipping": self.clipping, **lines, "block": self.block}
        return {"name": self.name, "layers": self.layers, **ways, "table": dict(self.table)}

    def to_toml(self) -> str:
        """A scheme file: what `read_scheme` reads."""
        fields = self.to_json()
        del fields["name"]
        table = fields.pop("table")
        lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
        return "\n".join(
            [*lines, "", "[table]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()), ""]
        )


SCHEMES: Mapping[str, Scheme] = {name: Scheme(name, name) for name in LAYER_PRECISIONS if name != "fp32"}  # the named ones


def read_scheme(path: Path) -> Scheme:
    """A scheme file.

    Raises:
        MissingFile: there is none.
        BadScheme: it cannot be read, or says what no scheme says.
    """
    if not path.is_file():
        named = ", ".join((*FLOAT, *SCHEMES))
        raise MissingFile(
            f"There is no precision {path}, and no scheme file of that name.", hint=f"Give a file, or one of: {named}"
        )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadScheme(f"{path} is no scheme: {error}.", hint="A scheme is a TOML file.") from error
    return scheme_of({"name": path.stem, **fields})


def scheme_of(fields: Mapping[str, Any]) -> Scheme:
    """Read what `to_json` wrote, or a scheme file holds."""
    known = {"name", "layers", "clipping", "table", "block", *LINES}
    if unknown := sorted(set(fields) - known):
        raise BadScheme(f"A scheme has no {unknown[0]!r}.", hint=f"It has: {', '.join(sorted(known - {'name'}))}")
    if "layers" not in fields:
        raise BadScheme("The scheme does not say what its layers are.", hint='For example: layers = "int8"')
    table = fields.get("table", {})
    if not isinstance(table, Mapping):
        raise BadScheme("The table of a scheme maps layers to precisions.", hint='For example: "blocks.0.*" = "fp32"')
    choices: dict[str, tuple[str, ...]] = {"clipping": CLIPPINGS} | dict.fromkeys(LINES, VALUE_PRECISIONS)
    for told, value in [("layers", fields["layers"]), *table.items()]:
        _require_choice(told, value, LAYER_PRECISIONS)
    for told, words in choices.items():
        _require_choice(told, fields.get(told, words[0]), words)
    _require_choice("block", fields.get("block", 0), BLOCKS)
    return Scheme(**{**fields, "name": str(fields.get("name", "")), "table": dict(table)})


def _require_choice(told: str, value: object, choices: tuple[str, ...] | tuple[int, ...]) -> None:
    if value not in choices or type(value) is not type(choices[0]):
        raise BadScheme(f"The scheme says {told} = {value!r}.", hint=f"It can be: {', '.join(map(str, choices))}")

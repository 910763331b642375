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
    equalize = true            # give channels the units in which a value's one range, and a row's one scale, cost least
    bias_correction = true     # let the biases undo what rounding the weights does to the mean of a layer's answer
    rounding = "max"           # max: to the nearest integers; mse: rows clipped where that has a smaller error; gptq: and what is
                               # rounded later makes up for what is rounded before

    [table]                    # a layer, or a pattern with * and ?; the last line that matches counts
    "blocks.0.*" = "fp32"
    "*.macaron.w2" = "int8-dynamic"

What a file does not say is as in the named scheme of these layers, chosen by the SNR of an earlier `fusionformer-tiny`'s logits
on 100 utterances that are in no test set, calibrated on the shipped 48, in PyTorch, dB [M]:

                    none    equalize   bias_correction   mse     gptq    head   default
    int8            35.5    35.8       36.1              35.5    36.3    36.9   equalize, bias_correction, head: 38.1
    int8-dynamic    40.4    40.6       42.3              40.4    42.5           none, which needs no speech: 40.4
    int8-weights    41.9    42.0       46.3              42.3    46.8           none, which needs no speech: 41.9
    int4-weights    19.2    19.9       24.8              19.9    26.2    21.0   bias_correction, gptq, head: 28.4

`head` is the table of the named scheme: the head takes what comes in the range that it comes in, and its logits are not rounded.

Softmax has no line: a hidden key has the score -10000, and eight bits that hold it hold no difference between two others.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from edgefuse.errors import BadScheme, MissingFile
from edgefuse.values import FLOAT

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.model import EncoderConfig
    from edgefuse.values import Precision

LayerPrecision = Literal["fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights", "palette4-weights", "int8-a16"]
LAYER_PRECISIONS: tuple[LayerPrecision, ...] = get_args(LayerPrecision)
ValuePrecision = Literal["fp32", "int8"]
VALUE_PRECISIONS: tuple[ValuePrecision, ...] = get_args(ValuePrecision)
Clipping = Literal["minmax", "percentile", "mse", "kl"]
CLIPPINGS: tuple[Clipping, ...] = get_args(Clipping)
Rounding = Literal["max", "mse", "gptq"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
INNER_LINES = ("attention", "residual")  # values with a precision of their own, and ranges
OWN_LINES = (*INNER_LINES, "positions")
LINES = (*OWN_LINES, "features", "logits")
BLOCKS = (0, 32, 64, 128, 256)  # that both XNNPACK and LiteRT have
SWITCHES = ("equalize", "bias_correction")
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
        equalize: whether channels get other units first; see `edgefuse.quantize.equalize`.
        bias_correction: whether biases undo the mean error of their layer; see `edgefuse.quantize.prepare`.
        rounding: how weights are rounded; see `edgefuse.quantize.prepare` and `edgefuse.quantize.compensate`.
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
    equalize: bool = False
    bias_correction: bool = False
    rounding: Rounding = "max"

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
        """Whether it needs calibration: ranges, peaks to equalize, or means to correct biases with."""
        switched = self.equalize or self.bias_correction or self.rounding == "gptq"
        inner = any(getattr(self, line) == "int8" for line in INNER_LINES)
        return switched or inner or not STATIC.isdisjoint((self.layers, *self.table.values()))

    @property
    def precision(self) -> Precision:
        """What it is called, and judged as: that of its layers, unless its table is another than the named scheme's."""
        usual = SCHEMES[self.layers].table if self.layers in SCHEMES else None
        return self.layers if self.table == usual else "mixed"

    def to_json(self) -> dict[str, Any]:
        """As in a scheme file, with its name."""
        lines = {line: getattr(self, line) for line in (*LINES, *SWITCHES, "rounding", "block")}
        return {"name": self.name, "layers": self.layers, "clipping": self.clipping, **lines, "table": dict(self.table)}

    def to_toml(self) -> str:
        """A scheme file: what `read_scheme` reads."""
        fields = self.to_json()
        del fields["name"]
        table = fields.pop("table")
        lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
        return "\n".join(
            [*lines, "", "[table]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()), ""]
        )


HEADS: Mapping[LayerPrecision, LayerPrecision] = {
    "int8": "int8-dynamic",
    "int4-weights": "int8-dynamic",
    "palette4-weights": "int8-weights",
}  # what the head is in a named scheme: a third of the error of all layers is the head's, and its logits have nothing behind them
DATA_FREE = ("int8-dynamic", "int8-weights")  # these need no speech, and lose little without


def _named(name: LayerPrecision) -> Scheme:
    return Scheme(
        name,
        name,
        table={"head.*": HEADS[name]} if name in HEADS else {},
        equalize=name in STATIC,
        bias_correction=name not in DATA_FREE,
        rounding="gptq" if name == "int4-weights" else "max",
    )


SCHEMES: Mapping[str, Scheme] = {name: _named(name) for name in LAYER_PRECISIONS if name != "fp32"}


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
    known = {"name", "layers", "clipping", "table", "rounding", "block", *LINES, *SWITCHES}
    if unknown := sorted(set(fields) - known):
        raise BadScheme(f"A scheme has no {unknown[0]!r}.", hint=f"It has: {', '.join(sorted(known - {'name'}))}")
    if "layers" not in fields:
        raise BadScheme("The scheme does not say what its layers are.", hint='For example: layers = "int8"')
    named = next((each for name, each in SCHEMES.items() if name == fields["layers"]), Scheme("", "fp32"))
    table = fields.get("table", named.table)
    if not isinstance(table, Mapping):
        raise BadScheme("The table of a scheme maps layers to precisions.", hint='For example: "blocks.0.*" = "fp32"')
    choices: dict[str, tuple[str, ...]] = {"clipping": CLIPPINGS, "rounding": ROUNDINGS} | dict.fromkeys(LINES, VALUE_PRECISIONS)
    for told, value in [("layers", fields["layers"]), *table.items()]:
        _require_choice(told, value, LAYER_PRECISIONS)
    for told, words in choices.items():
        _require_choice(told, fields.get(told, words[0]), words)
    _require_choice("block", fields.get("block", 0), BLOCKS)
    for told in SWITCHES:
        if not isinstance(fields.get(told, False), bool):
            raise BadScheme(f"The scheme says {told} = {fields[told]!r}.", hint="It can be: true, false")
    return replace(named, **{**fields, "name": str(fields.get("name", "")), "table": dict(table)})


def _require_choice(told: str, value: object, choices: tuple[str, ...] | tuple[int, ...]) -> None:
    if value not in choices or type(value) is not type(choices[0]):
        raise BadScheme(f"The scheme says {told} = {value!r}.", hint=f"It can be: {', '.join(map(str, choices))}")


def require_blocks_apart(config: EncoderConfig) -> None:
    """Raise `BadScheme` for blocks that are one and the same: a value of theirs would need one range for all depths.

    Nor would every runtime take it: LiteRT's quantizer wants a name of its own for every tensor.
    """
    if config.shared_blocks and config.layers > 1:
        raise BadScheme(
            f"The {config.layers} blocks of this model are one, and its values have another range at every depth: "
            "it is not quantized.",
            hint="Its weights are stored once already; halve them with: --precision fp16",
        )

"""The one description of an encoder: a FusionFormer, or the LayerNorm Conformer that it replaces."""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from edgefuse.errors import BadConfig

SUBSAMPLING = 4  # feature frames per encoder frame
SUBSAMPLING_HISTORY = 3  # zero frames before the first: output j sees feature frames 4j-3 .. 4j+3, never later ones


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes and switches of an encoder with a CTC head.

    The evidence tags are: [R] read in a primary source, [I] inferred, our choice. Of the paper (arXiv 2210.17079) only the
    abstract could be read: one BN after every linear and convolution, Swish and GLU become ReLU [R]; the rest is ours [I].

    Attributes:
        vocabulary_size: tokens of the CTC head, the blank (id 0) included.
        dimension: width d of the residual stream.
        layers: number of blocks.
        heads: attention heads; d_k = dimension / heads.
        feed_forward: inner width of both half-step feed-forward modules.
        kernel: taps of the causal depthwise convolution.
        subsampling_channels: channels of both conv2d layers of the subsampling (WeNet: d [R]; fewer cost less [I]).
        mel_bins: log-mel bins per feature frame.
        norm: "batch": BN after every linear and convolution [R]; "layer": LayerNorm at WeNet's places [R].
        conv_norm: the norm after the depthwise convolution when `norm` is "layer"; WeNet has both [R].
        activation: "relu" [R], or "swish", which brings GLU with it (the Conformer).
        positions: "relative": WeNet's form, without rel_shift [R]; "none".
        conv_expansion: ReLU does not halve as GLU does: the depthwise convolution is 1 or 2 times d wide [I, option A or B].
        conv_relu: where the convolution module has a ReLU: after the first pointwise ("pointwise", in GLU's place), after
            the depthwise ("depthwise", in Swish's place), or "both" [I].
        norm_positions: BN on the positional linear too (its statistics are over positions only) [I].
        norm_subsampling: BN after the subsampling's convolutions and linear [I].
        norm_residual: a norm on the residual stream: "none"; "output": once, after the last block; "block": after each
            block too. With `norm` "layer" WeNet has "block" [R]. With `norm` "batch", "output" folds into the CTC head, and
            the network learns faster with it than with "none"; "block" can only be refused by the fold [I].
        scale_embedding: multiply by sqrt(d) after the subsampling, as WeNet does [R].
        dropout: probability, on every branch.
        max_frames: longest utterance, in encoder frames of 40 ms (WeNet: 5000 [R]).
        folded: the checkpoint has been folded: no batch norm, every constant factor inside the weights.
    """

    vocabulary_size: int
    dimension: int
    layers: int
    heads: int
    feed_forward: int
    kernel: int
    subsampling_channels: int
    mel_bins: int = 80
    norm: Literal["batch", "layer"] = "batch"
    conv_norm: Literal["batch", "layer"] = "batch"
    activation: Literal["relu", "swish"] = "relu"
    positions: Literal["relative", "none"] = "relative"
    conv_expansion: int = 1
    conv_relu: Literal["both", "pointwise", "depthwise"] = "both"
    norm_positions: bool = False
    norm_subsampling: bool = True
    norm_residual: Literal["none", "output", "block"] = "none"
    scale_embedding: bool = False
    dropout: float = 0.1
    max_frames: int = 5000
    folded: bool = False

    def __post_init__(self) -> None:
        """Refuse what no encoder can be, in words."""
        problems = [*_type_problems(self)]
        problems = problems or [*_range_problems(self)]
        if problems:
            raise BadConfig(
                f"The config is impossible: {'; '.join(problems)}.", hint="Use the config.json that the model was trained with."
            )

    @property
    def head_dimension(self) -> int:
        """d_k, the width of one attention head."""
        return self.dimension // self.heads

    @property
    def conv_width(self) -> int:
        """Channels of the depthwise convolution."""
        return self.dimension * (self.conv_expansion if self.activation == "relu" else 1)

    @property
    def subsampled_bins(self) -> int:
        """Frequency bins that two convolutions of kernel 3 and stride 2 leave of the mel bins."""
        return ((self.mel_bins - 1) // 2 - 1) // 2

    @property
    def name(self) -> str:
        """What the field calls it."""
        return "FusionFormer" if self.norm == "batch" else "LayerNorm Conformer"

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "EncoderConfig":
        """Read a JSON object; unknown, missing and mistyped fields are a `BadConfig`."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        if unknown := sorted(set(fields) - set(known)):
            named = ", ".join(reprlib.repr(key) for key in unknown[:3]) + (f" and {len(unknown) - 3} more" if unknown[3:] else "")
            raise BadConfig(f"The config has unknown keys: {named}.", hint=f"Known keys: {', '.join(known)}")
        if missing := sorted(required - set(fields)):
            raise BadConfig(f"The config lacks: {', '.join(missing)}.", hint="Add them to config.json.")
        return cls(**fields)


LARGEST = {
    "vocabulary_size": 100_000,
    "dimension": 4096,
    "layers": 256,
    "heads": 128,
    "feed_forward": 32_768,
    "kernel": 1023,
    "subsampling_channels": 4096,
    "mel_bins": 512,
    "max_frames": 100_000,
}  # beyond these a config is a typing error, and building it would only exhaust the memory
FEWEST_FRAMES = 100  # of `max_frames`: a fold is checked on 4 seconds


def _type_problems(config: EncoderConfig) -> list[str]:
    return [p for n, t in get_type_hints(EncoderConfig).items() if (p := _type_problem(n, getattr(config, n), t))]


def _type_problem(name: str, value: object, expected: Any) -> str | None:  # noqa: ANN401 - a type hint of any kind
    if choices := get_args(expected):
        known = isinstance(value, str) and value in choices
        return None if known else f"{name} is {reprlib.repr(value)}, not one of {', '.join(choices)}"
    if expected is float:
        return None if type(value) in (int, float) else f"{name} is {reprlib.repr(value)}, not a number"
    return None if type(value) is expected else f"{name} is {reprlib.repr(value)}, not of type {expected.__name__}"


def _range_problems(config: EncoderConfig) -> list[str]:
    problems = [
        f"{name} is {reprlib.repr(getattr(config, name))}, not within 1..{largest}"
        for name, largest in LARGEST.items()
        if not 1 <= getattr(config, name) <= largest
    ]
    if config.vocabulary_size < 2:  # noqa: PLR2004 - the blank and one token
        problems.append("a vocabulary needs the blank and at least one token")
    if config.heads > 0 and config.dimension % config.heads:
        problems.append(f"dimension {config.dimension} does not divide into {config.heads} heads")
    if config.positions == "relative" and config.dimension % 2:
        problems.append(f"dimension {config.dimension} is odd: sine and cosine positions come in pairs")
    if config.mel_bins < 7:  # noqa: PLR2004 - two convolutions of kernel 3, stride 2 leave nothing of fewer
        problems.append(f"mel_bins {config.mel_bins} leave nothing after the subsampling")
    if config.max_frames < FEWEST_FRAMES:
        problems.append(f"max_frames {config.max_frames} are less than 4 seconds")
    if config.conv_expansion not in (1, 2):
        problems.append(f"conv_expansion is {reprlib.repr(config.conv_expansion)}, not 1 or 2")
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout is {config.dropout}, not within 0..1")
    return problems


_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dimension": 144, "layers": 8, "heads": 4, "feed_forward": 432, "kernel": 15, "subsampling_channels": 48},
    "small": {"dimension": 144, "layers": 12, "heads": 4, "feed_forward": 576, "kernel": 15, "subsampling_channels": 144},
    "base": {"dimension": 256, "layers": 12, "heads": 4, "feed_forward": 2048, "kernel": 15, "subsampling_channels": 256},
}
PRESETS = tuple(_SIZES)


def preset(name: str, *, norm: Literal["batch", "layer"], vocabulary_size: int) -> EncoderConfig:
    """The FusionFormer (`norm` "batch") or its LayerNorm Conformer twin (`norm` "layer") of a named size."""
    if name not in _SIZES:
        raise BadConfig(f"There is no preset {name!r}.", hint=f"Presets: {', '.join(PRESETS)}")
    sized = EncoderConfig(vocabulary_size, **_SIZES[name])  # type: ignore[arg-type]  # the sizes are all integers
    if norm == "batch":
        return dataclasses.replace(sized, norm_residual="output")
    return dataclasses.replace(sized, norm="layer", conv_norm="layer", activation="swish", norm_residual="block")

"""The one description of an encoder: a FusionFormer, or the LayerNorm Conformer that it replaces."""

import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgefuse.errors import BadConfig

SUBSAMPLING = 4  # feature frames per encoder frame, of a config that says nothing else
FEATURE_HOP_MS = 10  # one feature frame
SUBSAMPLINGS: Mapping[int, tuple[tuple[int, int], ...]] = MappingProxyType(
    {4: ((3, 2), (3, 2)), 6: ((3, 2), (5, 3)), 8: ((3, 2), (3, 2), (3, 2))}
)  # by rate, the (kernel, stride) of each convolution, as WeNet's conv2d, conv2d6 and conv2d8 have them [R]

Norm = Literal["batch", "batch-in-place", "layer", "unified", "rep", "none"]
AttentionKind = Literal["softmax", "performer", "none"]


@dataclass(frozen=True, slots=True)
class Stage:
    """So many blocks in a row that are alike; 0 takes the encoder's own size (Practical Conformer [R abstract]).

    Attributes:
        layers: how many blocks.
        attention: "softmax"; "performer": a kernel whose state does not grow with the past; "none": convolution only.
        feed_forward: inner width of both half-step feed-forward modules.
        heads: attention heads; they divide `attention_dimension`.
        attention_dimension: width of queries, keys and values, all heads together.
        kernel: taps of the causal depthwise convolution.
        left: the most encoder frames of past that a streaming step attends to; 0: as many as the deployment asks for.
        stride: 2: the first block attends with every second query only, and the frame rate halves there (a funnel [R]).
    """

    layers: int
    attention: AttentionKind = "softmax"
    feed_forward: int = 0
    heads: int = 0
    attention_dimension: int = 0
    kernel: int = 0
    left: int = 0
    stride: int = 1


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What one block is: the sizes of its stage, or of the encoder where its stage says nothing.

    Attributes:
        attention: the kind.
        feed_forward: inner width of both feed-forward modules.
        heads: of attention.
        attention_dimension: width of queries, keys and values.
        kernel: taps of the depthwise convolution.
        left: the most past that a streaming step attends to, in its own frames; None: no limit of its own.
        stride: of its queries; its output has so many times fewer frames.
        frames: frames of its input per encoder frame of the output: 2 below a funnel, else 1.
        second_pass: whether it belongs to the second pass of a cascade.
    """

    attention: AttentionKind
    feed_forward: int
    heads: int
    attention_dimension: int
    kernel: int
    left: int | None
    stride: int
    frames: int
    second_pass: bool

    @property
    def head_dimension(self) -> int:
        """d_k, the width of one attention head."""
        return self.attention_dimension // self.heads


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
        norm: "batch": BN after every linear and convolution [R]; "layer": LayerNorm at WeNet's places [R]; in LayerNorm's
            places "batch-in-place": BN, which diverges in the paper [R]; "unified": Unified Normalization (arXiv 2208.01313)
            [R]; "rep": RepBN, BN(x) + alpha x (SLAB) [R]; "none": no norm anywhere, which diverges in the paper too [R].
        conv_norm: the norm after the depthwise convolution when `norm` is "layer"; WeNet has both [R]. Otherwise it is of the
            same kind as the others.
        activation: "relu" [R], or "swish", which brings GLU with it (the Conformer).
        positions: "relative": WeNet's form, without rel_shift [R]; "none".
        conv_expansion: ReLU does not halve as GLU does: the depthwise convolution is 1 or 2 times d wide [I, option A or B].
        conv_relu: where the convolution module has a ReLU: after the first pointwise ("pointwise", in GLU's place), after
            the depthwise ("depthwise", in Swish's place), or "both" [I].
        norm_positions: BN on the positional linear too (its statistics are over positions only) [I].
        norm_subsampling: BN after the subsampling's convolutions and linear [I].
        norm_residual: a norm on the residual stream: "none"; "output": once, after the last block; "block": after each
            block too. With `norm` "layer" WeNet has "block" [R]. With `norm` "batch", "output" folds into the CTC head, and
            the network learns faster with it than with "none" [I].
        scale_embedding: multiply by sqrt(d) after the subsampling, as WeNet does [R].
        dropout: probability, on every branch.
        max_frames: longest utterance, in encoder frames (WeNet: 5000 [R]).
        folded: the checkpoint has been folded: no batch norm, every constant factor inside the weights.
        subsampling: feature frames of 10 ms per frame of the first block: 4, 6 or 8 [R].
        stages: the blocks from the bottom up, where they are not all alike; their layers add up to `layers`.
        shared_blocks: all blocks are one and the same, run `layers` times (Layer Consistency, arXiv 2105.00812) [R abstract].
        second_pass: how many of the last blocks see the whole utterance even in a stream and have a CTC head of their own:
            the second pass of a cascade (Practical Conformer [R abstract]).
        residual_norms_kept: the checkpoint has been folded, but the norms on the residual stream could not be.
        conv_paths: 2: in GLU's place stand two ReLUs, each behind a pointwise and before a depthwise convolution of its own,
            and what these give is added up: a sigma(b) is close to 1/2 relu(a + b) - 1/2 relu(b - a) [I].
        gate_shift: what GLU gives of nothing but its bias is subtracted behind it. So the zeros before the first frame are what
            WeNet's depthwise convolution sees there, since WeNet pads before the pointwise one [R].
    """

    vocabulary_size: int
    dimension: int
    layers: int
    heads: int
    feed_forward: int
    kernel: int
    subsampling_channels: int
    mel_bins: int = 80
    norm: Norm = "batch"
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
    subsampling: int = SUBSAMPLING
    stages: tuple[Stage, ...] = ()
    shared_blocks: bool = False
    second_pass: int = 0
    residual_norms_kept: bool = False
    conv_paths: int = 1
    gate_shift: bool = False

    def __post_init__(self) -> None:
        """Refuse what no encoder can be, in words."""
        problems = [*_type_problems(self)]
        problems = problems or [*_range_problems(self)]
        if problems:
            raise BadConfig(f"The config is impossible: {'; '.join(problems)}.", hint=AS_TRAINED)

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """What each block is, from the bottom up."""
        shapes: list[BlockShape] = []
        rate = self.rate
        for stage in self.stages or (Stage(self.layers),):
            for place in range(stage.layers):
                stride = stage.stride if place == 0 else 1
                shapes.append(
                    BlockShape(
                        attention=stage.attention,
                        feed_forward=stage.feed_forward or self.feed_forward,
                        heads=stage.heads or self.heads,
                        attention_dimension=stage.attention_dimension or self.dimension,
                        kernel=stage.kernel or self.kernel,
                        left=stage.left or None,
                        stride=stride,
                        frames=rate,
                        second_pass=len(shapes) >= self.layers - self.second_pass,
                    )
                )
                rate //= stride
        return tuple(shapes)

    @property
    def rate(self) -> int:
        """Frames of the first block per encoder frame of the output: the product of all strides."""
        return math.prod(stage.stride for stage in self.stages)

    @property
    def reduction(self) -> int:
        """Feature frames of 10 ms per encoder frame of the output."""
        return self.subsampling * self.rate

    @property
    def frame_ms(self) -> int:
        """One encoder frame of the output, in milliseconds."""
        return self.reduction * FEATURE_HOP_MS

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
        """Frequency bins that the convolutions of the subsampling leave of the mel bins."""
        bins = self.mel_bins
        for kernel, stride in SUBSAMPLINGS[self.subsampling]:
            bins = (bins - kernel) // stride + 1
        return bins

    @property
    def name(self) -> str:
        """What the field calls it."""
        return NAMES[self.norm]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field; of those in `OPTIONAL` only what the encoder makes use of."""
        at_rest = {field.name: field.default for field in dataclasses.fields(self)}
        told = dataclasses.asdict(self)
        return {n: _as_json(v) for n, v in told.items() if n not in OPTIONAL or getattr(self, n) != at_rest[n]}

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
        stages = fields.get("stages", ())
        return cls(**{**fields, "stages": _stages(stages)})


AS_TRAINED = "Use the config.json that the model was trained with."
OPTIONAL = frozenset({"subsampling", "stages", "shared_blocks", "second_pass", "residual_norms_kept", "conv_paths", "gate_shift"})
NAMES: Mapping[Norm, str] = MappingProxyType(
    {
        "batch": "FusionFormer",
        "batch-in-place": "Conformer with batch norms in place of its LayerNorms",
        "layer": "LayerNorm Conformer",
        "unified": "Conformer with Unified Normalization",
        "rep": "Conformer with RepBN",
        "none": "Conformer without norms",
    }
)


def _as_json(value: Any) -> Any:  # noqa: ANN401 - a field of any type
    """As a JSON file has it; of a stage only what it says."""
    if isinstance(value, tuple):
        at_rest = {field.name: field.default for field in dataclasses.fields(Stage)}
        return [{name: told for name, told in stage.items() if told != at_rest[name]} for stage in value]
    return value


def _stages(told: Any) -> tuple[Stage, ...]:  # noqa: ANN401 - whatever stands in a file
    """Read the stages of a JSON object; what is none is a `BadConfig`."""
    known = [field.name for field in dataclasses.fields(Stage)]
    hint = f'A stage is an object such as {{"layers": 4, "attention": "none"}}; it may have: {", ".join(known)}'
    if isinstance(told, (list, tuple)) and all(isinstance(stage, Stage) for stage in told):
        return tuple(told)
    if not isinstance(told, (list, tuple)) or not all(isinstance(stage, Mapping) for stage in told):
        raise BadConfig(f"stages is {reprlib.repr(told)}, not a list of stages.", hint=hint)
    for number, stage in enumerate(told, start=1):
        if unknown := sorted(set(map(str, stage)) - set(known)):
            raise BadConfig(f"Stage {number} of the config has unknown keys: {', '.join(unknown[:3])}.", hint=hint)
        if "layers" not in stage:
            raise BadConfig(f"Stage {number} of the config does not say how many layers it has.", hint=hint)
    return tuple(Stage(**stage) for stage in told)


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
    problems = [p for n, t in get_type_hints(EncoderConfig).items() if (p := _type_problem(n, getattr(config, n), t))]
    for number, stage in enumerate(config.stages if not problems else (), start=1):
        hints = get_type_hints(Stage).items()
        problems += [f"in stage {number} {p}" for n, t in hints if (p := _type_problem(n, getattr(stage, n), t))]
    return problems


def _type_problem(name: str, value: object, expected: Any) -> str | None:  # noqa: ANN401 - a type hint of any kind
    if get_origin(expected) is tuple:
        whole = isinstance(value, tuple) and all(isinstance(each, Stage) for each in value)
        return None if whole else f"{name} is {reprlib.repr(value)}, not a list of stages"
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
    if config.subsampling not in SUBSAMPLINGS:
        problems.append(f"subsampling is {reprlib.repr(config.subsampling)}, not {', '.join(map(str, SUBSAMPLINGS))}")
    elif config.subsampled_bins < 1:
        problems.append(f"mel_bins {config.mel_bins} leave nothing after the subsampling")
    if config.max_frames < FEWEST_FRAMES:
        problems.append(f"max_frames {config.max_frames} are less than 4 seconds")
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout is {config.dropout}, not within 0..1")
    if config.norm == "none" and config.norm_residual != "none":
        problems.append(f'norm is "none", but norm_residual is {config.norm_residual!r}')
    problems += _convolution_problems(config)
    return problems or [*_stage_problems(config), *_cascade_problems(config)]


def _convolution_problems(config: EncoderConfig) -> Iterator[str]:
    """What is wrong with the convolution modules."""
    for name in ("conv_expansion", "conv_paths"):
        if getattr(config, name) not in (1, 2):
            yield f"{name} is {reprlib.repr(getattr(config, name))}, not 1 or 2"
    if config.conv_paths > 1 and (config.activation, config.conv_relu) != ("relu", "both"):
        yield "two conv_paths want ReLUs in the places of GLU and Swish"
    if config.gate_shift and config.activation != "swish":
        yield "a gate_shift belongs to GLU, which comes with swish"


def _stage_problems(config: EncoderConfig) -> Iterator[str]:
    """What is wrong with the blocks, where they are not all alike."""
    if config.stages and sum(stage.layers for stage in config.stages) != config.layers:
        yield f"the stages have {sum(stage.layers for stage in config.stages)} layers together, not {config.layers}"
    for number, stage in enumerate(config.stages, start=1):
        for name, fewest in {
            "layers": 1,
            "feed_forward": 0,
            "heads": 0,
            "attention_dimension": 0,
            "kernel": 0,
            "left": 0,
        }.items():
            most = LARGEST.get("dimension" if name == "attention_dimension" else name, LARGEST["max_frames"])
            if not fewest <= getattr(stage, name) <= most:
                yield f"in stage {number} {name} is {reprlib.repr(getattr(stage, name))}, not within {fewest}..{most}"
        if stage.stride not in (1, 2):
            yield f"in stage {number} stride is {reprlib.repr(stage.stride)}, not 1 or 2"
        if stage.stride != 1 and stage.attention != "softmax":
            yield f"in stage {number} a stride needs softmax attention, whose queries it leaves out"
        heads, width = stage.heads or config.heads, stage.attention_dimension or config.dimension
        if heads > 0 and width % heads:
            yield f"in stage {number} attention_dimension {width} does not divide into {heads} heads"
    if config.shared_blocks and len(config.stages) > 1:
        yield "shared_blocks are all alike, but there are several stages"
    if config.shared_blocks and config.rate != 1:
        yield "shared_blocks cannot have a stride, which each of them would have"


def _cascade_problems(config: EncoderConfig) -> Iterator[str]:
    """What is wrong with the second pass."""
    if not 0 <= config.second_pass < config.layers:
        yield f"second_pass is {reprlib.repr(config.second_pass)}, not within 0..{config.layers - 1}"
    elif config.second_pass and config.shared_blocks:
        yield "shared_blocks belong to both passes or to none; a second pass has blocks of its own"
    elif any(stage.stride != 1 for stage in config.stages) and any(s.second_pass and s.stride != 1 for s in config.blocks):
        yield "a stride belongs to the first pass: both passes have the same frames"


_SIZES: dict[str, dict[str, int]] = {
    "study": {"dimension": 96, "layers": 8, "heads": 4, "feed_forward": 288, "kernel": 15, "subsampling_channels": 32},
    "tiny": {"dimension": 144, "layers": 8, "heads": 4, "feed_forward": 432, "kernel": 15, "subsampling_channels": 48},
    "small": {"dimension": 144, "layers": 12, "heads": 4, "feed_forward": 576, "kernel": 15, "subsampling_channels": 144},
    "base": {"dimension": 256, "layers": 12, "heads": 4, "feed_forward": 2048, "kernel": 15, "subsampling_channels": 256},
}
PRESETS = tuple(_SIZES)


def preset(name: str, *, norm: Norm, vocabulary_size: int) -> EncoderConfig:
    """The FusionFormer (`norm` "batch") of a named size, or its Conformer twin (`norm` "layer") with that or another norm."""
    if name not in _SIZES:
        raise BadConfig(f"There is no preset {name!r}.", hint=f"Presets: {', '.join(PRESETS)}")
    sized = EncoderConfig(vocabulary_size, **_SIZES[name])  # type: ignore[arg-type]  # the sizes are all integers
    if norm == "batch":
        return dataclasses.replace(sized, norm_residual="output")
    residual: Literal["none", "block"] = "none" if norm == "none" else "block"
    return dataclasses.replace(sized, norm=norm, conv_norm="layer", activation="swish", norm_residual=residual)

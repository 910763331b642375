"""The nouns of edgefuse, in the order in which they appear on the road. All are frozen; each knows its parent's digest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from edgefuse.model.config import EncoderConfig
    from edgefuse.quantize.scheme import LayerPrecision, Scheme

Precision = Literal[
    "fp32", "fp16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "palette4-weights", "int8-a16", "mixed"
]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FLOAT: tuple[Precision, ...] = ("fp32", "fp16")  # the others are quantized, as a scheme says
Input = Literal["features", "pcm"]  # what the entries of an artifact hear
INPUTS: tuple[Input, ...] = ("features", "pcm")
OFFLINE = "offline"  # the mode of the entries that take whole utterances
SECOND_PASS = "second_pass"  # noqa: S105 - the mode of the entries that are the second pass of a cascade, no password
SECOND = "second_"  # with what the names of these entries begin
ENCODED = "encoded"  # the tensor that goes from the first pass of a cascade to the second


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained encoder, whole and checked.

    Attributes:
        config: the encoder's description; `config.folded` says whether its norms are folded.
        weights: the encoder's state_dict.
        frontend_mean: (mel_bins,) mean of each log-mel bin over the training speech.
        frontend_istd: (mel_bins,) inverse standard deviation of each bin.
        tokens: the vocabulary; the index is the id, 0 is the blank.
        digest: SHA-256 over all of it.
    """

    config: EncoderConfig
    weights: Mapping[str, Tensor]
    frontend_mean: Tensor
    frontend_istd: Tensor
    tokens: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Fold:
    """One site of the plan that is folded.

    Attributes:
        site: the module that disappears, or the constants that do.
        into: the layers (or parameters) that absorb it.
        rule: which equation of `edgefuse.fold.algebra` applies.
        writers: of a residual basis, the last of `into`: what is added to the stream; those before them read it.
    """

    site: str
    into: tuple[str, ...]
    rule: Literal[
        "norm after", "norm before", "residual basis", "affine before", "half step", "embedding scale", "query", "key bias"
    ]
    writers: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """Of a residual basis, what takes the stream."""
        return self.into[: len(self.into) - len(self.writers)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One site of the plan that stays, and the reason in words."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The deeper checkpoint whose lowest blocks a model is.

    Attributes:
        checkpoint: its digest.
        layers: how many it has.
        statistics: digest of the speech on which batch statistics were estimated at the new depth; "": they are the old ones.
    """

    checkpoint: str
    layers: int
    statistics: str = ""


@dataclass(frozen=True, slots=True)
class FoldedModel:
    """A checkpoint after the fold.

    Attributes:
        checkpoint: float64 weights; its config says `folded`.
        plan: what was folded and what was refused.
        parent: digest of the checkpoint before the fold.
        origin: the deeper checkpoint that this one's blocks are the lowest of, if they are.
    """

    checkpoint: Checkpoint
    plan: tuple[Fold | Refusal, ...]
    parent: str
    origin: Origin | None = None

    @property
    def digest(self) -> str:
        """The folded checkpoint's."""
        return self.checkpoint.digest


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an entry: a name, a shape, an element type, and what it holds, units included.

    Of what an entry hears, `frame_ms` is one encoder frame of its answer, in milliseconds; else it is 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32"]
    meaning: str
    frame_ms: int = 0


@dataclass(frozen=True, slots=True)
class Streaming:
    """How an entry goes on from chunk to chunk.

    Attributes:
        chunk: encoder frames that it answers at once.
        left: encoder frames before the chunk that its attention sees.
        frame_ms: one encoder frame, in milliseconds.
        states: name of an input to the name of the output that holds it for the next chunk; an utterance begins with zeros.
        held: names of the caches that the artifact holds itself: it then serves one utterance at a time.
        overlap: samples of the utterance that its `overlap` begins with instead, and behind which its chunks come; 0 where it
            has none, because features are fed.
        ahead: encoder frames behind the chunk that it takes with it, and that come again with the next.
    """

    chunk: int
    left: int
    frame_ms: int
    states: Mapping[str, str]
    held: tuple[str, ...] = ()
    overlap: int = 0
    ahead: int = 0

    @property
    def chunk_ms(self) -> int:
        """How much speech it answers at once."""
        return self.chunk * self.frame_ms

    @property
    def look_ahead_ms(self) -> int:
        """How much speech behind the chunk it waits for."""
        return self.ahead * self.frame_ms

    @property
    def left_context_ms(self) -> int:
        """How much of the past it sees."""
        return self.left * self.frame_ms


@dataclass(frozen=True, slots=True)
class Entry:
    """One way into an artifact: a graph of fixed shape.

    Attributes:
        name: for example "offline_5120ms"; the method, signature or function has this name in every artifact.
        graph: the deployment graph in float32 and evaluation mode; positional inputs and outputs in the order of the specs.
        inputs: what it takes.
        outputs: what it gives.
        streaming: how it goes on from chunk to chunk; None for an entry that takes whole utterances.
    """

    name: str
    graph: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    streaming: Streaming | None = None

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the shape of each input, to trace with."""
        import torch

        return tuple(torch.zeros(spec.shape) for spec in self.inputs)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Fewer bits for a program.

    Attributes:
        scheme: which layer gets how many.
        ranges: per entry, of each point that calibration saw, the smallest and the largest value to be told apart.
        calibration: digest of the speech that the ranges come from; "" where the scheme needs none.
    """

    scheme: Scheme
    ranges: Mapping[str, Mapping[str, tuple[float, float]]]
    calibration: str


@dataclass(frozen=True, slots=True)
class Program:
    """The deployment graphs of one folded model at one precision.

    Attributes:
        entries: at least one, shortest first; their graphs are float32 whatever the precision.
        precision: of the arithmetic; inputs and outputs are float32 always.
        parent: digest of the folded model.
        quantization: what a target is asked to do with the graphs, where the precision is not a float.
    """

    entries: tuple[Entry, ...]
    precision: Precision
    parent: str
    quantization: Quantization | None = None

    @property
    def streaming(self) -> Mapping[str, Streaming]:
        """Of each entry that streams, how."""
        return {entry.name: entry.streaming for entry in self.entries if entry.streaming}

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What it can do, whole utterances first."""
        return _modes({entry.name: entry.inputs for entry in self.entries}, self.streaming)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file (or an .mlpackage folder) that a runtime reads.

    Attributes:
        target: the target's name.
        path: where it is.
        precision: the program's.
        inputs: per entry, the specs of its inputs.
        outputs: per entry, the specs of its outputs.
        parent: digest of the folded model.
        streaming: of each entry that streams, how.
        layers: where it is quantized, what each layer is asked to be.
        kept: why a layer is asked to be something else than its scheme says, in words.
    """

    target: str
    path: Path
    precision: Precision
    inputs: Mapping[str, tuple[TensorSpec, ...]]
    outputs: Mapping[str, tuple[TensorSpec, ...]]
    parent: str
    streaming: Mapping[str, Streaming] = field(default_factory=dict)
    layers: Mapping[str, LayerPrecision] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What it can do, whole utterances first."""
        return _modes(self.inputs, self.streaming)


@dataclass(frozen=True, slots=True)
class Mode:
    """The entries of an artifact that must give the same answers.

    They are all that take whole utterances, one that streams, or all that are the second pass of a cascade.

    Attributes:
        name: "offline", the name of the streaming entry, or "second_pass".
        inputs: per entry, the specs of its inputs.
        streaming: how it goes on from chunk to chunk, if it does.
        after: of a second pass, how the first one streams: the first streaming entry, as an application takes it.
    """

    name: str
    inputs: Mapping[str, tuple[TensorSpec, ...]]
    streaming: Streaming | None = None
    after: Streaming | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """What is inside an artifact, read from the artifact itself.

    Attributes:
        precisions: how often each operator occurs, in all entries, constants left out, by the runtime's own names, and by what it
            computes with: the coarsest number that it takes or makes ("int8", "fp32"); of a linear or a convolution a precision
            of a scheme; of one that has no such number the type of what it makes ("bool").
        normalizations: each normalization found (a batch_norm, a layer_norm, a multiplication and an addition by per-channel
            constants in a row, a mean with a reciprocal root), in words; empty is what we are out for.
        partitions: delegated pieces of the entry that has most, where the runtime delegates.
        outside: operators outside every delegate, in all entries, where the runtime delegates.
        weighted: linears and convolutions of all entries, by the layer's name where the artifact has it, else by the operator's:
            how many there are of each precision.
    """

    precisions: Mapping[str, Mapping[str, int]]
    normalizations: tuple[str, ...]
    partitions: int | None = None
    outside: Mapping[str, int] = field(default_factory=dict)
    weighted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def operators(self) -> Mapping[str, int]:
        """How often each operator occurs."""
        return {name: sum(counts.values()) for name, counts in self.precisions.items()}

    @property
    def layers(self) -> Mapping[str, int]:
        """Linears and convolutions by what they are in the artifact."""
        return _sums(self.weighted)

    @property
    def others(self) -> Mapping[str, int]:
        """All other operators by what they compute with."""
        layers = self.layers
        counts = {name: count - layers.get(name, 0) for name, count in _sums(self.precisions).items()}
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verdict: what was measured, what is required, and whether it holds."""

    name: str
    measured: str
    required: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of one artifact.

    Attributes:
        target: the target's name.
        how: "run on this host", or "evaluated" for Core ML away from a Mac.
        checks: every check, passed or not.
        parent: digest of the artifact's bytes.
        moved: bars that are not the usual ones, by their names in `edgefuse.verify.gate.Bars`.
    """

    target: str
    how: str
    checks: tuple[Check, ...]
    parent: str
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)


def _sums(counted: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Inner counts of all together, sorted."""
    found: Counter[str] = Counter()
    for counts in counted.values():
        found.update(counts)
    return dict(sorted(found.items()))


def _modes(inputs: Mapping[str, tuple[TensorSpec, ...]], streaming: Mapping[str, Streaming]) -> tuple[Mode, ...]:
    second = {name: specs for name, specs in inputs.items() if specs[0].name == ENCODED}
    whole = {name: specs for name, specs in inputs.items() if name not in streaming and name not in second}
    offline = (Mode(OFFLINE, whole),) if whole else ()
    behind = (Mode(SECOND_PASS, second, after=next(iter(streaming.values()), None)),) if second else ()
    return (*offline, *(Mode(name, {name: inputs[name]}, how) for name, how in streaming.items()), *behind)

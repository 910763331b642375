"""A folded model, and the lengths and chunks that are wanted, as a `Program`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.frontend.intake import OVERLAP, SAMPLES
from edgefuse.frontend.log_mel import FrontendSpec
from edgefuse.lower.frontend import LONGEST, LogMel, PcmGraph, PcmStreamingGraph
from edgefuse.lower.graph import DeploymentGraph, StreamingGraph
from edgefuse.lower.held import HeldGraph
from edgefuse.model import SUBSAMPLING, Encoder
from edgefuse.model.config import SUBSAMPLING_HISTORY
from edgefuse.values import ENCODER_HOP_MS, Checkpoint, Entry, FoldedModel, Input, Precision, Program, Streaming, TensorSpec

HOP_MS = ENCODER_HOP_MS // SUBSAMPLING  # one feature frame
LONGEST_FP16 = 2048  # encoder frames: every whole number up to here is exact in half precision, as `length` must be
NEXT = "_next"  # behind the name of a cache: the output that holds it for the next chunk


@dataclass(frozen=True, slots=True)
class Chunks:
    """A streaming entry that is wanted, in milliseconds: what it takes at once, and the past that it sees.

    `held` leaves its caches inside the artifact; else they are inputs and outputs.
    """

    chunk_ms: float
    left_context_ms: float
    held: bool = False

    @property
    def frames(self) -> tuple[int, int]:
        """Both in whole encoder frames; a `UsageError` if there are none."""
        return (
            _whole_frames(self.chunk_ms, f"A chunk of {self.chunk_ms} ms", "--chunk-ms 640"),
            _whole_frames(self.left_context_ms, f"A left context of {self.left_context_ms} ms", "--left-context-ms 2560"),
        )


def lower(
    folded: FoldedModel,
    seconds: Sequence[float],
    precision: Precision,
    chunks: Sequence[Chunks] = (),
    hears: Input = "features",
) -> Program:
    """The deployment graphs of a folded model; see `program_of`."""
    return program_of(folded.checkpoint, seconds, precision, chunks, hears)


def program_of(
    checkpoint: Checkpoint,
    seconds: Sequence[float],
    precision: Precision,
    chunks: Sequence[Chunks] = (),
    hears: Input = "features",
) -> Program:
    """One entry per length and per kind of chunk, of any checkpoint: an unfolded one keeps its norms, which is for comparisons.

    Lengths, chunks and contexts are rounded up to whole encoder frames of 40 ms, and named in milliseconds.

    Raises:
        UsageError: neither a length nor a chunk, or one outside the model's reach.
    """
    lengths = sorted({_whole_frames(s * 1000, f"A length of {s} seconds", "--seconds 5.12") for s in seconds})
    contexts = {each.frames: each.held for each in chunks}
    if not lengths and not contexts:
        raise UsageError("An artifact needs an entry.", hint="For example: --seconds 5.12, or --chunk-ms 640")
    longest = max([*lengths, *(chunk + left for chunk, left in contexts)])
    if longest > checkpoint.config.max_frames:
        raise UsageError(
            f"The model reaches {_seconds(checkpoint.config.max_frames)} seconds, not {_seconds(longest)}.",
            hint="Ask for less with --seconds, or with --chunk-ms and --left-context-ms.",
        )
    if precision == "fp16" and longest > LONGEST_FP16:
        raise UsageError(
            f"fp16 counts frames up to {_seconds(LONGEST_FP16)} seconds; behind that, padding could leak.",
            hint="Ask for less with --seconds, or for --precision fp32.",
        )
    if hears == "pcm" and longest > LONGEST:
        raise UsageError(
            f"float32 counts samples up to {_seconds(LONGEST)} seconds.",
            hint="Ask for less with --seconds, or for --input features.",
        )
    encoder = encoder_of(checkpoint)
    offline = (_offline(encoder, frames) for frames in lengths)
    streaming = (_stream(encoder, *context, held=held) for context, held in sorted(contexts.items()))
    entries = (*offline, *streaming)
    if hears == "pcm":
        spec = FrontendSpec(mel_bins=checkpoint.config.mel_bins)
        front_end = LogMel(spec, checkpoint.frontend_mean, checkpoint.frontend_istd).float()
        entries = tuple(_hearing_samples(entry, front_end) for entry in entries)
    return Program(entries, precision, parent=checkpoint.digest)


def _seconds(frames: int) -> str:
    return f"{frames * ENCODER_HOP_MS / 1000:g}"


def _whole_frames(milliseconds: float, told: str, example: str) -> int:
    """Encoder frames that hold so many milliseconds."""
    whole = round(milliseconds) if 0 < milliseconds < 1e9 else 0  # noqa: PLR2004 - NaN and infinity end here too
    if whole < ENCODER_HOP_MS:
        raise UsageError(f"{told} is none.", hint=f"For example: {example}")
    return -(-whole // ENCODER_HOP_MS)


def _offline(encoder: Encoder, frames: int) -> Entry:
    name = f"offline_{frames * ENCODER_HOP_MS}ms"
    return Entry(name, _frozen(DeploymentGraph(encoder, frames)), _speech(encoder, frames), (_logits(encoder, frames),))


def _stream(encoder: Encoder, chunk: int, left: int, *, held: bool) -> Entry:
    step, every = StreamingGraph(encoder, chunk, left), caches_of(encoder, left)
    caches, inside = (every[:1], every[1:]) if held else (every, ())  # `past` stays outside: it says where an utterance begins
    graph = HeldGraph(step, inside) if held else step
    renewed = tuple(_renewed(spec) for spec in caches)
    states = {spec.name: after.name for spec, after in zip(caches, renewed, strict=True)}
    return Entry(
        f"stream_{chunk * ENCODER_HOP_MS}ms",
        _frozen(graph),
        (*_speech(encoder, chunk), *caches),
        (_logits(encoder, chunk), *renewed),
        Streaming(chunk, left, states, tuple(spec.name for spec in inside)),
    )


def _frozen(graph: nn.Module) -> nn.Module:
    """In evaluation mode and without gradients, which ExecuTorch would not let into a buffer."""
    return graph.eval().requires_grad_(requires_grad=False)


def _hearing_samples(entry: Entry, front_end: LogMel) -> Entry:
    """The same entry with the front end in it, and with what the encoder hears among its outputs."""
    (features, _, *caches), (logits, *renewed) = entry.inputs, entry.outputs
    frames, told = logits.shape[1], "what the encoder hears: normalized log-mel, one frame every 10 ms"
    outputs = (logits, replace(features, meaning=told))
    if entry.streaming is None:
        inputs = _samples(SAMPLES.count(frames), PcmGraph.LEAD)
        return replace(entry, graph=_frozen(PcmGraph(front_end, entry.graph)), inputs=inputs, outputs=outputs)
    told = f"the {SAMPLES.lead} samples before the chunk; an utterance begins with its first ones here, not with zeros"
    overlap = TensorSpec(OVERLAP, (1, SAMPLES.lead), "float32", told)
    states = {OVERLAP: _renewed(overlap).name, **entry.streaming.states}
    return replace(
        entry,
        graph=_frozen(PcmStreamingGraph(front_end, entry.graph)),
        inputs=(*_samples(frames * SAMPLES.per_frame, PcmStreamingGraph.LEAD), overlap, *caches),
        outputs=(*outputs, _renewed(overlap), *renewed),
        streaming=replace(entry.streaming, states=states, overlap=SAMPLES.lead),
    )


def _samples(count: int, lead: int) -> tuple[TensorSpec, TensorSpec]:
    told = "mono speech, 16000 samples per second, from -1 to 1; zeros after the end of the utterance"
    whole = f"(length - {lead}) // {SAMPLES.per_frame}" if lead else f"length // {SAMPLES.per_frame}"
    counted = f"valid samples of these; valid encoder frames: {whole}, one every {ENCODER_HOP_MS} ms"
    return TensorSpec(SAMPLES.tensor, (1, count), "float32", told), TensorSpec("length", (1,), "float32", counted)


def _renewed(cache: TensorSpec) -> TensorSpec:
    return replace(cache, name=f"{cache.name}{NEXT}", meaning=f"`{cache.name}` of the next chunk")


def _speech(encoder: Encoder, frames: int) -> tuple[TensorSpec, TensorSpec]:
    features = TensorSpec(
        "features",
        (1, frames * SUBSAMPLING, encoder.config.mel_bins),
        "float32",
        f"normalized log-mel, one frame every {HOP_MS} ms; zeros after the end of the utterance",
    )
    told = f"valid encoder frames: feature frames // {SUBSAMPLING}, one every {ENCODER_HOP_MS} ms"
    return features, TensorSpec("length", (1,), "float32", told)


def _logits(encoder: Encoder, frames: int) -> TensorSpec:
    shape = (1, frames, encoder.config.vocabulary_size)
    return TensorSpec(
        "logits", shape, "float32", f"unnormalized scores per token, one frame every {ENCODER_HOP_MS} ms; blank is 0"
    )


def caches_of(encoder: Encoder, left: int) -> tuple[TensorSpec, ...]:
    """In the order in which `StreamingGraph` takes and gives them."""
    config = encoder.config
    whole = (
        TensorSpec("past", (1,), "float32", "cached encoder frames that have been spoken; 0 at the start of an utterance"),
        TensorSpec("history", (1, SUBSAMPLING_HISTORY, config.mel_bins), "float32", "the last feature frames"),
    )
    kinds = (
        ("keys", (1, left, config.dimension), "attention keys without their positions"),
        ("values", (1, left, config.dimension), "attention values"),
        ("inputs", (1, config.kernel - 1, config.conv_width), "last inputs of the depthwise convolution"),
    )
    layers = (
        TensorSpec(f"{kind}_{layer}", shape, "float32", f"{meaning} of block {layer}")
        for layer in range(config.layers)
        for kind, shape, meaning in kinds
    )
    return (*whole, *layers)

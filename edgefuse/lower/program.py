"""A folded model, and the lengths and chunks that are wanted, as a `Program`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.frontend.intake import FEATURES, LEAD, OVERLAP, SAMPLES, Intake, of_samples
from edgefuse.frontend.log_mel import FrontendSpec
from edgefuse.lower.frontend import LONGEST, LogMel, PcmGraph, PcmStreamingGraph
from edgefuse.lower.graph import DeploymentGraph, SecondPassGraph, StreamingGraph
from edgefuse.lower.held import HeldGraph
from edgefuse.model import Encoder
from edgefuse.model.config import FEATURE_HOP_MS, BlockShape, EncoderConfig
from edgefuse.model.streaming import Context
from edgefuse.values import ENCODED, SECOND, Checkpoint, Entry, FoldedModel, Input, Precision, Program, Streaming, TensorSpec

LONGEST_FP16 = 2048  # encoder frames: every whole number up to here is exact in half precision, as `length` must be
NEXT = "_next"  # behind the name of a cache: the output that holds it for the next chunk


@dataclass(frozen=True, slots=True)
class Chunks:
    """A streaming entry that is wanted, in milliseconds: what it answers at once, and the past and the future that it sees.

    `held` leaves its caches inside the artifact; else they are inputs and outputs.
    """

    chunk_ms: float
    left_context_ms: float
    held: bool = False
    look_ahead_ms: float = 0

    def context(self, frame_ms: int) -> Context:
        """All in whole encoder frames of so many milliseconds; a `UsageError` where there are none, but for the look-ahead."""
        past, ahead = f"A left context of {self.left_context_ms} ms", f"A look-ahead of {self.look_ahead_ms} ms"
        return Context(
            _whole_frames(self.chunk_ms, frame_ms, f"A chunk of {self.chunk_ms} ms", "--chunk-ms 640"),
            _whole_frames(self.left_context_ms, frame_ms, past, "--left-context-ms 2560"),
            _whole_frames(self.look_ahead_ms, frame_ms, ahead, "--look-ahead-ms 320") if self.look_ahead_ms else 0,
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

    A cascade that both streams and takes whole utterances has its second pass as well, one entry per length, behind the others.
    Lengths, chunks and contexts are rounded up to whole encoder frames, and named in milliseconds.

    Raises:
        UsageError: neither a length nor a chunk, or one outside the model's reach; a Performer's stream in fp16.
    """
    config, frame_ms = checkpoint.config, checkpoint.config.frame_ms
    lengths = sorted({_whole_frames(s * 1000, frame_ms, f"A length of {s} seconds", "--seconds 5.12") for s in seconds})
    contexts = {each.context(frame_ms): each.held for each in chunks}
    if not lengths and not contexts:
        raise UsageError("An artifact needs an entry.", hint="For example: --seconds 5.12, or --chunk-ms 640")
    longest = max([*lengths, *(context.reach(0) for context in contexts)])
    if longest > config.max_frames:
        raise UsageError(
            f"The model reaches {_seconds(config, config.max_frames)} seconds, not {_seconds(config, longest)}.",
            hint="Ask for less with --seconds, or with --chunk-ms, --left-context-ms and --look-ahead-ms.",
        )
    if precision == "fp16" and longest > LONGEST_FP16:
        raise UsageError(
            f"fp16 counts frames up to {_seconds(config, LONGEST_FP16)} seconds; behind that, padding could leak.",
            hint="Ask for less with --seconds, or for --precision fp32.",
        )
    if precision == "fp16" and contexts and any(shape.attention == "performer" for shape in config.blocks):
        raise UsageError(
            "The state of a Performer is a sum over everything that was said: fp16 would soon not hold it.",
            hint="Stream with --precision fp32; whole utterances may be fp16.",
        )
    if hears == "pcm" and longest > LONGEST:
        raise UsageError(
            f"float32 counts samples up to {_seconds(config, LONGEST)} seconds.",
            hint="Ask for less with --seconds, or for --input features.",
        )
    encoder = encoder_of(checkpoint)
    offline = (_offline(encoder, frames) for frames in lengths)
    streaming = (_stream(encoder, context, held=held) for context, held in sorted(contexts.items(), key=_by_size))
    cascaded = lengths if config.second_pass and contexts else ()
    entries = (*offline, *streaming, *(_second(encoder, frames) for frames in cascaded))
    if hears == "pcm":
        spec = FrontendSpec(mel_bins=config.mel_bins)
        front_end = LogMel(spec, checkpoint.frontend_mean, checkpoint.frontend_istd).float()
        entries = tuple(_hearing_samples(each, front_end) if each.inputs[0].name == FEATURES else each for each in entries)
    return Program(entries, precision, parent=checkpoint.digest)


def _by_size(context: tuple[Context, bool]) -> tuple[int | None, ...]:
    return context[0].chunk, context[0].left, context[0].ahead


def _seconds(config: EncoderConfig, frames: int) -> str:
    return f"{frames * config.frame_ms / 1000:g}"


def _whole_frames(milliseconds: float, frame_ms: int, told: str, example: str) -> int:
    """Encoder frames that hold so many milliseconds."""
    whole = round(milliseconds) if 0 < milliseconds < 1e9 else 0  # noqa: PLR2004 - NaN and infinity end here too
    if whole < frame_ms:
        raise UsageError(f"{told} is none.", hint=f"For example: {example}")
    return -(-whole // frame_ms)


def _offline(encoder: Encoder, frames: int) -> Entry:
    name = f"offline_{frames * encoder.config.frame_ms}ms"
    return Entry(name, _frozen(DeploymentGraph(encoder, frames)), _speech(encoder, frames), (_logits(encoder, frames),))


def _second(encoder: Encoder, frames: int) -> Entry:
    frame_ms = encoder.config.frame_ms
    inputs = replace(_encoded(encoder, frames), frame_ms=frame_ms), _counted(f"valid encoder frames, one every {frame_ms} ms")
    graph = _frozen(SecondPassGraph(encoder, frames))
    return Entry(f"{SECOND}{frames * frame_ms}ms", graph, inputs, (_logits(encoder, frames),))


def _stream(encoder: Encoder, context: Context, *, held: bool) -> Entry:
    step = StreamingGraph(encoder, context)
    chunk, left, ahead = step.chunk, step.left, step.ahead
    every = caches_of(encoder, left)
    caches, inside = (every[:1], every[1:]) if held else (every, ())  # `past` stays outside: it says where an utterance begins
    graph = HeldGraph(step, inside) if held else step
    renewed = tuple(_renewed(spec) for spec in caches)
    states = {spec.name: after.name for spec, after in zip(caches, renewed, strict=True)}
    frame_ms = encoder.config.frame_ms
    return Entry(
        f"stream_{chunk * frame_ms}ms" + (f"_ahead_{ahead * frame_ms}ms" if ahead else ""),
        _frozen(graph),
        (*_speech(encoder, chunk + ahead), *caches),
        (_logits(encoder, chunk), *((_encoded(encoder, chunk),) if step.is_first_pass else ()), *renewed),
        Streaming(chunk, left, frame_ms, states, tuple(spec.name for spec in inside), ahead=ahead),
    )


def _frozen(graph: nn.Module) -> nn.Module:
    """In evaluation mode and without gradients, which ExecuTorch would not let into a buffer."""
    return graph.eval().requires_grad_(requires_grad=False)


def _hearing_samples(entry: Entry, front_end: LogMel) -> Entry:
    """The same entry with the front end in it, and with what the encoder hears among its outputs."""
    features, _, *caches = entry.inputs
    answered = len(entry.outputs) - len(caches)
    intake = of_samples(features.frame_ms)
    frames, told = entry.outputs[0].shape[1], "what the encoder hears: normalized log-mel, one frame every 10 ms"
    shape = (1, frames * (intake.frame_ms // FEATURE_HOP_MS), features.shape[2])
    outputs = (*entry.outputs[:answered], replace(features, shape=shape, meaning=told, frame_ms=0))
    if entry.streaming is None:
        graph = _frozen(PcmGraph(front_end, entry.graph, intake.frame_ms))
        return replace(entry, graph=graph, inputs=_samples(intake.count(frames), PcmGraph.LEAD, intake), outputs=outputs)
    told = f"the {LEAD} samples before the chunk; an utterance begins with its first ones here, not with zeros"
    overlap = TensorSpec(OVERLAP, (1, LEAD), "float32", told)
    states = {OVERLAP: _renewed(overlap).name, **entry.streaming.states}
    ahead = entry.streaming.ahead
    return replace(
        entry,
        graph=_frozen(PcmStreamingGraph(front_end, entry.graph, intake.frame_ms, ahead)),
        inputs=(*_samples((frames + ahead) * intake.per_frame, PcmStreamingGraph.LEAD, intake), overlap, *caches),
        outputs=(*outputs, _renewed(overlap), *entry.outputs[answered:]),
        streaming=replace(entry.streaming, states=states, overlap=LEAD),
    )


def _samples(count: int, lead: int, intake: Intake) -> tuple[TensorSpec, TensorSpec]:
    told = "mono speech, 16000 samples per second, from -1 to 1; zeros after the end of the utterance"
    whole = f"(length - {lead}) // {intake.per_frame}" if lead else f"length // {intake.per_frame}"
    counted = f"valid samples of these; valid encoder frames: {whole}, one every {intake.frame_ms} ms"
    samples = TensorSpec(SAMPLES, (1, count), "float32", told, intake.frame_ms)
    return samples, _counted(counted)


def _counted(told: str) -> TensorSpec:
    return TensorSpec("length", (1,), "float32", told)


def _renewed(cache: TensorSpec) -> TensorSpec:
    return replace(cache, name=f"{cache.name}{NEXT}", meaning=f"`{cache.name}` of the next chunk")


def _speech(encoder: Encoder, frames: int) -> tuple[TensorSpec, TensorSpec]:
    config = encoder.config
    features = TensorSpec(
        FEATURES,
        (1, frames * config.reduction, config.mel_bins),
        "float32",
        f"normalized log-mel, one frame every {FEATURE_HOP_MS} ms; zeros after the end of the utterance",
        config.frame_ms,
    )
    told = f"valid encoder frames: feature frames // {config.reduction}, one every {config.frame_ms} ms"
    return features, _counted(told)


def _logits(encoder: Encoder, frames: int) -> TensorSpec:
    shape, told = (1, frames, encoder.config.vocabulary_size), f"one frame every {encoder.config.frame_ms} ms"
    return TensorSpec("logits", shape, "float32", f"unnormalized scores per token, {told}; blank is 0")


def _encoded(encoder: Encoder, frames: int) -> TensorSpec:
    shape, told = (1, frames, encoder.config.dimension), f"one frame every {encoder.config.frame_ms} ms"
    return TensorSpec(ENCODED, shape, "float32", f"what the first pass gives to the second, {told}")


def caches_of(encoder: Encoder, left: int) -> tuple[TensorSpec, ...]:
    """In the order in which `StreamingGraph` takes and gives them."""
    config = encoder.config
    history = (1, encoder.subsampling.history, config.mel_bins)
    whole = (
        TensorSpec("past", (1,), "float32", "cached encoder frames that have been spoken; 0 at the start of an utterance"),
        TensorSpec("history", history, "float32", "the last feature frames"),
    )
    layers = (
        TensorSpec(f"{kind}_{layer}", shape, "float32", f"{meaning} of block {layer}")
        for layer, (_, block) in enumerate(encoder.first_pass)
        for kind, shape, meaning in _caches_of(config, block, left)
    )
    return (*whole, *layers)


def _caches_of(config: EncoderConfig, block: BlockShape, left: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Those of one block: a name, a shape, and what it is."""
    if block.attention == "softmax":
        past = (1, min(left * block.frames, block.left or left * block.frames), block.attention_dimension)
        yield "keys", past, "attention keys without their positions"
        yield "values", past, "attention values"
    if block.attention == "performer":
        sums = (block.heads, block.head_dimension, block.head_dimension + 1)
        yield "sums", sums, "sums over all that was said, of phi(key) (value, 1)'"
    for name in ("inputs", "second_inputs")[: config.conv_paths]:
        yield name, (1, block.kernel - 1, config.conv_width), "last inputs of the depthwise convolution"

"""A folded model and the lengths that are wanted, as a `Program`."""

from collections.abc import Sequence

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.lower.graph import DeploymentGraph
from edgefuse.model import SUBSAMPLING, Encoder
from edgefuse.values import Checkpoint, Entry, FoldedModel, Precision, Program, TensorSpec

HOP_MS = 10  # one feature frame
ENCODER_HOP_MS = HOP_MS * SUBSAMPLING
LONGEST_FP16 = 2048  # encoder frames: every whole number up to here is exact in half precision, as `length` must be


def lower(folded: FoldedModel, seconds: Sequence[float], precision: Precision) -> Program:
    """The deployment graphs of a folded model; see `program_of`."""
    return program_of(folded.checkpoint, seconds, precision)


def program_of(checkpoint: Checkpoint, seconds: Sequence[float], precision: Precision) -> Program:
    """One entry per length, of any checkpoint: an unfolded one keeps its norms, which is for comparisons.

    Lengths are rounded up to whole encoder frames of 40 ms, and named in milliseconds.

    Raises:
        UsageError: no length, or one outside the model's reach.
    """
    lengths = sorted({_whole_frames(s) for s in seconds})
    if not lengths:
        raise UsageError("An artifact needs a length.", hint="For example: --seconds 5.12")
    if precision == "fp16" and lengths[-1] > LONGEST_FP16:
        raise UsageError(
            f"fp16 counts frames up to {LONGEST_FP16 * ENCODER_HOP_MS / 1000:g} seconds; behind that, padding could leak.",
            hint="Ask for less with --seconds, or for --precision fp32.",
        )
    encoder = encoder_of(checkpoint)
    return Program(tuple(_entry(encoder, frames) for frames in lengths), precision, parent=checkpoint.digest)


def entry_name(encoder_frames: int) -> str:
    """The name of an offline entry, for example "offline_5120ms"."""
    return f"offline_{encoder_frames * ENCODER_HOP_MS}ms"


def _whole_frames(seconds: float) -> int:
    """Encoder frames that hold an utterance of that many seconds."""
    milliseconds = round(seconds * 1000) if 0 < seconds < 1e6 else 0  # noqa: PLR2004 - NaN and infinity end here too
    if milliseconds < ENCODER_HOP_MS:
        raise UsageError(f"A length of {seconds} seconds is none.", hint="For example: --seconds 5.12")
    return -(-milliseconds // ENCODER_HOP_MS)


def _entry(encoder: Encoder, frames: int) -> Entry:
    config = encoder.config
    if frames > config.max_frames:
        raise UsageError(
            f"The model reaches {config.max_frames * ENCODER_HOP_MS / 1000:g} seconds, not {frames * ENCODER_HOP_MS / 1000:g}.",
            hint="Ask for less with --seconds, and cut longer recordings.",
        )
    features = TensorSpec(
        "features",
        (1, frames * SUBSAMPLING, config.mel_bins),
        "float32",
        "normalized log-mel, one frame every 10 ms; zeros after the end of the utterance",
    )
    length = TensorSpec("length", (1,), "float32", f"valid encoder frames: feature frames // {SUBSAMPLING}, one every 40 ms")
    logits = TensorSpec(
        "logits",
        (1, frames, config.vocabulary_size),
        "float32",
        "unnormalized scores per token, one frame every 40 ms; blank is 0",
    )
    return Entry(entry_name(frames), DeploymentGraph(encoder, frames).eval(), (features, length), (logits,))

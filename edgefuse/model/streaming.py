"""What a frame may attend to: the whole utterance, chunks with the whole past, or chunks with a limited past.

With `chunk` and `left` set, every chunk has its own window of keys: the `left` frames before it, and itself. That is what a
streaming step sees with a cache of `left` keys per layer. Positions count from the first frame of the chunk, negative before
it [I]: a key has the same position whatever the left context is, and the first chunk has those of a whole utterance. WeNet
counts them from the start of the utterance [R], and its table, like any that was trained on utterances, ends while the stream
goes on.

The depthwise convolution is causal; its cache is the last `kernel - 1` inputs of the convolution, and starts as zeros. The
subsampling's is the last few feature frames, one less than it makes one frame of, and starts as zeros.

With a look-ahead a chunk is computed together with the `ahead` frames behind it, as one longer chunk; what these give is used in
this window alone, and they are computed again when their own chunk comes. So a frame sees at least that far ahead, in every
block, and a model that was trained in chunks has seen all of this. The windows stand one behind the other on the axis of time,
their overlaps twice. Emformer's right context is this, with copies of its own [R].
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgefuse.errors import UsageError


@dataclass(frozen=True, slots=True)
class Context:
    """How far a frame looks, in encoder frames; `chunk` None is full context, `left` None the whole past."""

    chunk: int | None = None
    left: int | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        """Refuse a context that is none."""
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"A chunk of {self.chunk} frames holds nothing.")
        if self.left is not None and (self.chunk is None or self.left < 0):
            raise UsageError("A left context needs a chunk and cannot be negative.")
        if self.ahead < 0 or (self.ahead and self.left is None):
            raise UsageError("A look-ahead needs a chunk and a left context, and cannot be negative.")

    @property
    def window(self) -> int:
        """How many frames are computed together: a chunk and what is ahead of it."""
        assert self.chunk is not None, "there are no windows without a chunk"  # noqa: S101 - the callers' duty
        return self.chunk + self.ahead

    def reach(self, frames: int) -> int:
        """How many keys a query may see at most, in an utterance of so many frames: what a table of positions must have."""
        return frames if self.chunk is None or self.left is None else self.left + self.window

    def within(self, frames: int, most: int | None = None) -> "Context":
        """The same for a block with so many frames per encoder frame, which itself looks back at most so many of its own."""
        if self.chunk is None:
            return self
        left = None if self.left is None else self.left * frames
        least = min((each for each in (left, most) if each is not None), default=None)
        return Context(self.chunk * frames, least, self.ahead * frames)


FULL = Context()


class Sight(NamedTuple):
    """What a block is told of its frames; with a look-ahead they are those of every window.

    Attributes:
        valid: (B, T) which frames of its input are.
        left: (B, T / stride) which frames are left behind its stride.
        mask: which keys a query may see, as `attention_mask` makes it.
        table: (1, reach, d) of positions, as `positions_within` makes it.
        context: how far its attention looks, in its own frames.
        context_left: the same in the frames that are left behind its stride.
    """

    valid: Tensor
    left: Tensor
    mask: Tensor
    table: Tensor
    context: Context
    context_left: Context


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    """(B,) lengths to a (B, frames) boolean mask, True where a frame is valid."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def looks_ahead(context: Context) -> bool:
    """Whether there is a look-ahead; to the tracer of the fold, whose context is none, there is not."""
    return isinstance(context, Context) and context.ahead > 0


def spread(x: Tensor, context: Context) -> Tensor:
    """Every chunk with what is ahead of it: (B, T, ...) to (B, chunks * window, ...); zeros (False) behind the end."""
    assert context.chunk is not None, "there are no windows without a chunk"  # noqa: S101 - the callers' duty
    behind = -x.shape[1] % context.chunk + context.ahead
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, behind))
    return padded.unfold(1, context.window, context.chunk).movedim(-1, 2).flatten(1, 2)


def gathered(x: Tensor, context: Context, frames: int) -> Tensor:
    """The chunks of `spread` without what is ahead of them: (B, chunks * window, ...) to (B, frames, ...)."""
    kept: Tensor = x.unflatten(1, (-1, context.window))[:, :, : context.chunk]  # type: ignore[no-untyped-call]
    return kept.flatten(1, 2)[:, :frames]


def attention_mask(valid: Tensor, context: Context, stride: int = 1) -> Tensor:
    """Which keys a query may see, True where it may; with a `stride` only every so-manieth frame, the last of each, asks.

    Returns:
        Of (B, T) valid frames, (B, 1, 1 or T / stride, T); with a limited past (B, 1, chunks, 1, reach), each chunk's keys by
        their place in its window.
    """
    keys = valid[:, None, None, :]
    if context.chunk is None:
        return keys
    if context.left is not None:
        return windows(keys.transpose(2, 3), context).transpose(3, 4)
    frame = torch.arange(valid.shape[1], device=valid.device)
    asking = frame if stride == 1 else frame[stride - 1 :: stride]
    return keys & (frame < (asking // context.chunk * context.chunk + context.chunk)[:, None])


def positions_within(table: Tensor, frames: int, context: Context) -> Tensor:
    """The positions that keys may have in an utterance of so many frames: (1, max_frames, d) to (1, reach, d).

    Sine is odd and cosine even: the position -i is that of i, every other value with the other sign.
    """
    if context.chunk is None or context.left is None:
        return table[:, :frames]
    signs = torch.tensor([-1.0, 1.0], dtype=table.dtype, device=table.device).repeat(table.shape[2] // 2)
    return torch.cat((table[:, 1 : context.left + 1].flip(1) * signs, table[:, : context.window]), dim=1)


def windows(x: Tensor, context: Context) -> Tensor:
    """What each chunk may see: (B, H, T, d) to (B, H, chunks, reach, d); zeros (False) where there is nothing."""
    assert context.chunk is not None and context.left is not None, "there are no windows without a chunk and a left context"  # noqa: S101, PT018 - the callers' duty
    if context.ahead:
        own = chunks(x, context)
        past = windows(own[:, :, :, : context.chunk].flatten(2, 3), replace(context, ahead=0))[:, :, :, : context.left]
        return torch.cat((past, own), dim=3)
    behind = -x.shape[2] % context.chunk
    return F.pad(x, (0, 0, context.left, behind)).unfold(2, context.left + context.chunk, context.chunk).transpose(3, 4)


def chunks(x: Tensor, context: Context, stride: int = 1) -> Tensor:
    """(B, H, T, d) to (B, H, chunks, window / stride, d), where only every so-manieth frame is there; zeros behind the end."""
    window = context.window // stride
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % window))
    return padded.reshape(*x.shape[:2], -1, window, x.shape[3])


def every(x: Tensor, stride: int) -> Tensor:
    """The last of every `stride` frames: (B, T, d) to (B, T / stride, d)."""
    return x if stride == 1 else x[:, stride - 1 :: stride]

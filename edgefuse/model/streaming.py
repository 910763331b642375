"""What a frame may attend to: the whole utterance, or chunks with a limited past. One mask describes both.

The masks are designed with the caches that will replace them: with `chunk` and `left` set, a frame sees its own chunk and the
`left` frames before that chunk, which is exactly what a streaming step sees with a cache of `left` keys per layer. The
depthwise convolution is causal; its cache is the last `kernel - 1` inputs of the convolution, and starts as zeros. The
subsampling's is the last `SUBSAMPLING_HISTORY` feature frames, and starts as zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgefuse.errors import UsageError


@dataclass(frozen=True, slots=True)
class Context:
    """How far attention looks, in encoder frames of 40 ms; `chunk` None is full context, `left` None the whole past."""

    chunk: int | None = None
    left: int | None = None

    def __post_init__(self) -> None:
        """Refuse a context that is none."""
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"A chunk of {self.chunk} frames holds nothing.")
        if self.left is not None and (self.chunk is None or self.left < 0):
            raise UsageError("A left context needs a chunk and cannot be negative.")


FULL = Context()


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    """(B,) lengths to a (B, frames) boolean mask, True where a frame is valid."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def attention_mask(lengths: Tensor, frames: int, context: Context) -> Tensor:
    """Which keys a query may see: (B, 1, 1 or frames, frames), True where it may."""
    keys = valid_frames(lengths, frames)[:, None, None, :]
    if context.chunk is None:
        return keys
    frame = torch.arange(frames, device=lengths.device)
    start = frame // context.chunk * context.chunk
    seen = frame < (start + context.chunk)[:, None]
    if context.left is not None:
        seen = seen & (frame >= (start - context.left)[:, None])
    return keys & seen

"""Attention whose state does not grow with the past: a Performer with the ReLU kernel, causal by chunks.

The kernel is lingvo's [R]; the recurrence follows from it [I]. Positions drop out, for the sums forget the places of keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model.config import BlockShape, EncoderConfig
from edgefuse.model.layers import NormedLinear
from edgefuse.model.streaming import Context, Sight, chunks

OFFSET = 2.0**-10  # of the kernel: no query is orthogonal to all keys; about the 1e-3 of lingvo [R], and exact in half precision
SMALLEST = 1e-9  # of the denominator; only frames of padding that see no key have so little

torch.fx.wrap("attend_linearly")  # the plan's tracer knows no element type and no context


def phi(x: Tensor) -> Tensor:
    """The kernel, relu(x) + 2^-10: of queries and of keys."""
    return F.relu(x) + OFFSET


def attend_linearly(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, context: Context) -> Tensor:
    """o_t = phi(q_t)' S / phi(q_t)' z with S = sum phi(k) v', z = sum phi(k) over all keys that the query may see.

    q, k, v (B, H, T, d_k), valid (B, T). In chunks these are the keys of its own window and of all chunks before: a limited
    past cannot be expressed. At least float32: the sums grow with the utterance.
    """
    with torch.autocast(queries.device.type, enabled=False):
        wide = torch.promote_types(queries.dtype, torch.float32)
        q, k, v = phi(queries.to(wide)), phi(keys.to(wide)) * valid[:, None, :, None], values.to(wide)
        if context.chunk is None:
            return _ratio(q, k.transpose(-2, -1) @ v, k.sum(-2))
        frames, (q, k, v) = q.shape[2], (chunks(each, context) for each in (q, k, v))
        (k, k_ahead), (v, v_ahead) = (each.tensor_split((context.chunk,), dim=3) for each in (k, v))
        sums = (k.transpose(-2, -1) @ v).cumsum(2) + k_ahead.transpose(-2, -1) @ v_ahead
        return _ratio(q, sums, k.sum(-2).cumsum(2) + k_ahead.sum(-2)).flatten(2, 3)[:, :, :frames]


def _ratio(q: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    """q S / q z, over the last two axes."""
    return (q @ sums) / (q @ weights.unsqueeze(-1)).clamp_min(SMALLEST)


class Performer(nn.Module):
    """BNo(Wo . o), o as `attend_linearly` has it."""

    def __init__(self, config: EncoderConfig, shape: BlockShape) -> None:
        """Four linears."""
        super().__init__()
        self.heads, self.head_dimension = shape.heads, shape.head_dimension
        d, width = config.dimension, shape.attention_dimension
        self.query, self.key, self.value = (NormedLinear(config, d, width) for _ in range(3))
        self.output = NormedLinear(config, width, d)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """Attend: (B, T, d) to (B, T, d)."""
        q, k, v = (self._split(layer(x, sight.valid)) for layer in (self.query, self.key, self.value))
        mixed = attend_linearly(q, k, v, sight.valid, sight.context).transpose(1, 2).flatten(2)
        return self.output(mixed, sight.valid)  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, width) to (B, H, T, d_k)."""
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dimension))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

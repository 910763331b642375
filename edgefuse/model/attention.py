"""Self-attention with WeNet's relative positions, in the form that folds."""

import math

import torch
from torch import Tensor, nn

from edgefuse.model.config import BlockShape, EncoderConfig
from edgefuse.model.layers import NormedLinear
from edgefuse.model.streaming import Context, Sight, chunks, every, windows

torch.fx.wrap("attend")  # the plan's tracer knows no element type and no context


def sinusoids(frames: int, dimension: int) -> Tensor:
    """The table of positions, (frames, dimension): sin and cos of frame / 10000^(2i / dimension), interleaved."""
    frame = torch.arange(frames, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, dimension, 2, dtype=torch.float64) * -(math.log(10_000.0) / dimension))
    return torch.stack([torch.sin(frame * rate), torch.cos(frame * rate)], dim=-1).flatten(1).float()


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """The lowest score where the mask is False; finite, or a frame of the padding that sees no key would become NaN."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor,
    mask: Tensor,
    context: Context,
    *,
    stride: int = 1,
) -> Tensor:
    """softmax(q (k + p)' + b) v: q, k, v (B, H, T, d_k); p (1, H, W, d_k), b (1, H, 1, W) over the W = context.reach(T) keys.

    With a limited past each chunk attends to its own window, in which the positions count. With a stride there are so many
    times fewer queries than keys.
    """
    frames = queries.shape[2]
    if context.left is not None:
        queries, keys, values = chunks(queries, context, stride), windows(keys, context), windows(values, context)
        positions, bias = positions[:, :, None], bias[:, :, None]
    scores = queries @ (keys + positions).transpose(-2, -1) + bias
    mixed = torch.softmax(hide(scores, mask), dim=-1) @ values
    return mixed if context.left is None else mixed.flatten(2, 3)[:, :, :frames]


class Attention(nn.Module):
    """BNo(Wo . softmax(((q + u) k' + (q + v) p') / sqrt(d_k)) v), as WeNet has it: p_j at the position j of the key.

    WeNet's sum is computed in a form that needs one product with the keys instead of two, and whose second term does not
    depend on the query [I, exact algebra]:

        (q + u) k' + (q + v) p'  =  (q + u) (k + p)' + (v - u) p'

    After the fold, u and 1/sqrt(d_k) are inside q's weights, and w = (v - u) / sqrt(d_k) is what is left of the biases.
    """

    u: Tensor
    v: Tensor
    w: Tensor

    def __init__(self, config: EncoderConfig, shape: BlockShape) -> None:
        """Four linears, and the positional one where positions are relative."""
        super().__init__()
        self.heads, self.head_dimension, self.stride = shape.heads, shape.head_dimension, shape.stride
        self.folded = config.folded
        self.scale = 1.0 if config.folded else 1.0 / math.sqrt(self.head_dimension)
        d, width = config.dimension, shape.attention_dimension
        self.query, self.key, self.value = (NormedLinear(config, d, width) for _ in range(3))
        self.output = NormedLinear(config, width, d)
        self.relative = config.positions == "relative"
        if self.relative:
            self.position = NormedLinear(config, d, width, normed=config.norm_positions, bias=config.norm_positions)
            for name in ("w",) if config.folded else ("u", "v"):
                self.register_parameter(name, nn.Parameter(torch.zeros(self.heads, self.head_dimension)))

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """Attend: (B, T, d) to (B, T / stride, d); of every `stride` frames the last one asks, and all are keys."""
        asking, valid = every(x, self.stride), sight.valid
        q, k, v = self.query(asking, sight.left), self._split(self.key(x, valid)), self._split(self.value(x, valid))
        if self.relative:
            p = self.position(sight.table, torch.ones_like(sight.table[..., 0], dtype=torch.bool))
            mixed = attend(
                self._queries(q), k, v, self._split(p), self.key_bias(p), sight.mask, sight.context, stride=self.stride
            )
        else:
            nowhere = torch.zeros_like(sight.table[:, None, :1, :1])
            mixed = attend(self._split(q) * self.scale, k, v, nowhere, nowhere, sight.mask, sight.context, stride=self.stride)
        return self.output(mixed.transpose(1, 2).flatten(2), sight.left)  # type: ignore[no-any-return]

    def key_bias(self, p: Tensor) -> Tensor:
        """((v - u) / sqrt(d_k)) p': p (1, T, d) to (1, H, 1, T)."""
        w = self.w if self.folded else (self.v - self.u) * self.scale
        return w[None, :, None, :] @ self._split(p).transpose(-2, -1)

    def _queries(self, q: Tensor) -> Tensor:
        """(q + u) / sqrt(d_k), as (B, H, T, d_k)."""
        return self._split(q) if self.folded else (self._split(q) + self.u[:, None, :]) * self.scale

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, H, T, d_k)."""
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dimension))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

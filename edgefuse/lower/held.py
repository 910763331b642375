"""A streaming graph that holds its caches itself, from one chunk to the next."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.lower.graph import StreamingGraph
from edgefuse.values import TensorSpec

ALIGNMENT = 32  # a held cache has a multiple of so many values: the Neural Engine refuses others (coremltools #2631)


class HeldGraph(nn.Module):
    """features, length, past -> what the step answers, past of the next chunk; the other caches are buffers of this module.

    `past` 0 begins an utterance. What the buffers have from the one before is then no part of any answer: keys and values are
    hidden by `past` as they are before the first chunk, and the rest is multiplied by min(past, 1).
    """

    def __init__(self, step: StreamingGraph, caches: Sequence[TensorSpec]) -> None:
        """Hold the caches of `step`, all but its first, `past`; each as one row, with zeros behind it up to `ALIGNMENT`."""
        super().__init__()
        self.step, self.shapes = step, {spec.name: spec.shape for spec in caches}
        for name, shape in self.shapes.items():
            self.register_buffer(name, torch.zeros(1, -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT))

    def forward(self, features: Tensor, length: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        """Answer, and renew the buffers."""
        going_on = torch.clamp(past, 0.0, 1.0)
        caches = [self._held(name) if _is_hidden(name) else self._held(name) * going_on for name in self.shapes]
        given: tuple[Tensor, ...] = self.step(features, length, past, *caches)
        answered = len(given) - len(caches)  # the logits, of a cascade what its second pass wants as well, and `past`
        for name, cache in zip(self.shapes, given[answered:], strict=True):
            self._hold(name, cache.reshape(1, -1))
        return given[:answered]

    def _held(self, name: str) -> Tensor:
        row, shape = self.get_buffer(name), self.shapes[name]
        size = math.prod(shape)
        return (row if row.shape[1] == size else row[:, :size]).reshape(shape)

    def _hold(self, name: str, cache: Tensor) -> None:
        row = self.get_buffer(name)
        row.copy_(cache if cache.shape == row.shape else F.pad(cache, (0, row.shape[1] - cache.shape[1])))


def _is_hidden(name: str) -> bool:
    """Whether `past` hides a cache of that name already."""
    return name.startswith(("keys", "values"))

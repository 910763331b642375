"""What values stand at the points of a graph while it hears speech, and the range that eight bits should cover.

A value x is stored as round(x / scale) + zero, from -128 to 127, and read as (q - zero) * scale. A range [low, high] that holds
0 fixes both: scale = (high - low) / 255. What lies outside is clipped, so a narrower range trades clipping for resolution:

- minmax: all that was seen;
- percentile: all but one value in ten thousand, at either end;
- mse: the range, shrunk evenly, whose expected squared error is smallest;
- kl: the one whose distribution after rounding diverges least from the one before (Migacz 2017, TensorRT) [R].
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgefuse.errors import BadCalibration
from edgefuse.lower.graph import Point
from edgefuse.lower.sites import points_of
from edgefuse.quantize.scheme import Clipping

BINS = 2048
LEVELS = 256
IMAGE = 4  # axes of what a convolution takes and makes, channels second; elsewhere they are last
OUTLIERS = 1e-4  # the share that percentile clips at either end
SHRINKS = np.linspace(1.0, 0.2, 81)  # of a range: what mse and kl try
SMOOTH = 1e-9  # probability of a bin that rounding left empty
LINEAR = ("batch", "frames", "channels")  # the axes of what a linear takes
Range = tuple[float, float]
Hearing = tuple[nn.Module, *tuple[Tensor, ...]]  # a graph, and what it hears


@dataclass(frozen=True, slots=True)
class Histogram:
    """The values that were seen at one point.

    Attributes:
        low: the smallest, or 0.
        high: the largest, or 0.
        counts: (BINS,) how many fell into each of as many equal parts of [low, high].
        means: (channels,) the mean of each channel; empty at a point that is neither before nor behind a layer.
        peaks: (channels,) the largest magnitude of each.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    means: tuple[float, ...] = ()
    peaks: tuple[float, ...] = ()

    def range(self, clipping: Clipping) -> Range:
        """The range that eight bits should cover; it holds 0."""
        if self.low == self.high:
            return self.low, self.high
        if clipping == "minmax":
            return self.low, self.high
        if clipping == "percentile":
            return self._percentile()
        error = _squared_error if clipping == "mse" else _divergence
        centers, counts = self._centers(), np.asarray(self.counts, np.float64)
        return min(((self.low * s, self.high * s) for s in SHRINKS), key=lambda span: error(centers, counts, span))

    def _centers(self) -> NDArray[np.float64]:
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[:-1] + edges[1:]) / 2)

    def _percentile(self) -> Range:
        share = np.cumsum(self.counts) / sum(self.counts)
        edges = np.linspace(self.low, self.high, BINS + 1)
        low = edges[np.searchsorted(share, OUTLIERS)]
        high = edges[np.searchsorted(share, 1 - OUTLIERS) + 1]
        return min(0.0, float(low)), max(0.0, float(high))


def scale_and_zero(span: Range) -> tuple[float, int]:
    """The scale, and the integer that stands for 0, of a range with 256 levels."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    scale = max((high - low) / (LEVELS - 1), 1e-9)
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))


@torch.no_grad()
def observe(hearing: Callable[[], Iterable[Hearing]]) -> dict[str, Histogram]:
    """Histograms at every point of graphs that hear speech; it is heard twice, for the ends and for the counts.

    Raises:
        BadCalibration: nothing was heard, or a value is not finite.
    """
    ends: defaultdict[str, _Ends] = defaultdict(_Ends)
    _listen(hearing(), ends)
    if not ends:
        raise BadCalibration("There is no speech to take ranges from.", hint="Name longer speech with: --calibration SPEECH")
    for path, each in ends.items():
        if not math.isfinite(each.low) or not math.isfinite(each.high):
            raise BadCalibration(f"A value at {path} is not finite.", hint="Look for broken recordings, or for broken weights.")
    counts = {path: _Counts(each.low, each.high) for path, each in ends.items()}
    _listen(hearing(), counts)
    return {
        path: Histogram(each.low, each.high, tuple(each.counts.tolist()), *ends[path].channels()) for path, each in counts.items()
    }


@torch.no_grad()
def products(hearing: Iterable[Hearing]) -> dict[str, Tensor]:
    """E[x x^T] over the channels (C, C) of each point that linears take, float64."""
    sums: defaultdict[str, _Products] = defaultdict(_Products)
    _listen(hearing, sums)
    return {path: each.sums / each.seen for path, each in sums.items() if each.seen}


def _listen(hearing: Iterable[Hearing], listeners: Mapping[str, _Ends | _Counts | _Products]) -> None:
    for graph, *inputs in hearing:
        hooks = [
            point.register_forward_hook(lambda point, _, x, listener=listeners[path]: listener.see(point, x))
            for path, point in points_of(graph).items()
        ]
        try:
            graph(*inputs)
        finally:
            for hook in hooks:
                hook.remove()


class _Ends:
    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.seen, self.sums, self.peaks = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0)

    def see(self, point: Point, x: Tensor) -> None:
        low, high = (float(end) for end in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not math.isfinite(low) or not math.isfinite(high):
            self.low = math.nan
        if point.into or point.of:
            by_channel = x.movedim(1 if x.ndim == IMAGE else -1, 0).flatten(1)
            new = self.seen == 0
            sums, peaks = by_channel.double().sum(1), by_channel.abs().amax(1)
            self.sums, self.peaks = (sums, peaks) if new else (self.sums + sums, torch.maximum(self.peaks, peaks))
            self.seen += by_channel.shape[1]

    def channels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Their means, and their peaks."""
        return tuple((self.sums / max(1, self.seen)).tolist()), tuple(self.peaks.tolist())


class _Products:
    def __init__(self) -> None:
        self.seen, self.sums = 0, torch.zeros((), dtype=torch.float64)

    def see(self, point: Point, x: Tensor) -> None:
        if point.into and x.ndim == len(LINEAR):
            rows = x.flatten(0, -2).double()
            self.seen += len(rows)
            self.sums = self.sums + rows.T @ rows


class _Counts:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def see(self, _: Point, x: Tensor) -> None:
        if self.low < self.high:
            self.counts += torch.histc(x.float(), BINS, self.low, self.high).long()


def _levels(span: Range) -> tuple[float, float, float]:
    scale, zero = scale_and_zero(span)
    return scale, (-128 - zero) * scale, (127 - zero) * scale


def _squared_error(x: NDArray[np.float64], counts: NDArray[np.float64], span: Range) -> float:
    scale, low, high = _levels(span)
    rounded = np.clip(np.round(x / scale) * scale, low, high)
    return float((counts * np.square(x - rounded)).sum())


def _divergence(x: NDArray[np.float64], counts: NDArray[np.float64], span: Range) -> float:
    """KL(p || q): p the distribution of what was seen, q the one that is left when each level shares its mass among its bins."""
    scale, low, high = _levels(span)
    level = np.round(np.clip(x, low, high) / scale).astype(np.int64)
    level -= level.min()
    mass, filled = np.bincount(level, counts), np.bincount(level, counts > 0)
    p = counts / counts.sum()
    q = np.where(counts > 0, (mass / np.maximum(filled, 1))[level], 0.0)
    clipped = (x < low) | (x > high)
    q = np.where(clipped, 0.0, q)
    q = np.maximum(q / max(q.sum(), SMOOTH), SMOOTH)
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())

"""Timing on the host: contenders interleaved in one run, ratios as medians of pairs."""

from edgefuse.bench.compare import ROWS, Comparison, compare
from edgefuse.bench.routine import Routine, Samples, interleave

__all__ = ["ROWS", "Comparison", "Routine", "Samples", "compare", "interleave"]

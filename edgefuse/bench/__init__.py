"""Timing on the host: contenders interleaved in one run, ratios as medians of pairs."""

from edgefuse.bench.compare import Comparison, Row, compare
from edgefuse.bench.routine import Routine, Samples, interleave

__all__ = ["Comparison", "Routine", "Row", "Samples", "compare", "interleave"]

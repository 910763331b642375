"""What each change of the architecture brings, timed on this host: contenders in turns in one process, medians of ratios."""

from edgefuse.ablation.compare import Comparison, Row, compare

__all__ = ["Comparison", "Row", "compare"]

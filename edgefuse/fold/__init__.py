"""Every normalization into its neighbour: plan, then apply; exact in float64."""

from edgefuse.fold.apply import fold
from edgefuse.fold.exactness import Exactness, exactness
from edgefuse.fold.plan import plan

__all__ = ["Exactness", "exactness", "fold", "plan"]

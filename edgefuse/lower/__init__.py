"""From a folded model to the graphs that the runtimes get: fixed shapes, one utterance, the fastest layouts."""

from edgefuse.lower.graph import DeploymentGraph
from edgefuse.lower.program import entry_name, lower, program_of

__all__ = ["DeploymentGraph", "entry_name", "lower", "program_of"]

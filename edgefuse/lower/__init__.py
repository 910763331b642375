"""From a folded model to the graphs that the runtimes get: fixed shapes, one utterance or one chunk, the fastest layouts."""

from edgefuse.lower.frontend import LogMel, PcmGraph, PcmStreamingGraph
from edgefuse.lower.graph import DeploymentGraph, SecondPassGraph, StreamingGraph
from edgefuse.lower.program import Chunks, lower, program_of

__all__ = [
    "Chunks",
    "DeploymentGraph",
    "LogMel",
    "PcmGraph",
    "PcmStreamingGraph",
    "SecondPassGraph",
    "StreamingGraph",
    "lower",
    "program_of",
]

"""A stand-in for Core ML Tools, written after the documentation of its version 9.0: names and arguments, no Core ML."""

from enum import Enum

from coremltools import models as models

__version__ = "stand-in"


class ComputeUnit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4

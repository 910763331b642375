"""FusionFormer as the paper draws it, and the LayerNorm Conformer that it replaces."""

from edgefuse.model.config import PRESETS, SUBSAMPLING, EncoderConfig, preset
from edgefuse.model.fusionformer import Encoder
from edgefuse.model.streaming import FULL, Context

__all__ = ["FULL", "PRESETS", "SUBSAMPLING", "Context", "Encoder", "EncoderConfig", "preset"]

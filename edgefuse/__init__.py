"""edgefuse: a trained FusionFormer becomes verified ExecuTorch, Core ML and TFLite artifacts."""

__version__ = "0.1.0"

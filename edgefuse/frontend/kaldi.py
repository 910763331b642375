"""Kaldi's own fbank, as a library: the witness that our features are measured against."""

import kaldi_native_fbank
import numpy as np
import torch
from torch import Tensor

from edgefuse.frontend.log_mel import KALDI_80, FrontendSpec


def kaldi_log_mel(pcm: Tensor, spec: FrontendSpec = KALDI_80) -> Tensor:
    """What `log_mel` must give: (T, mel_bins) float32 of ``pcm`` (N,) in [-1, 1], by another hand; N is at least a frame."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = spec.mel_bins
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(spec.sample_rate_hz, (pcm * spec.amplitude_scale).tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(frame) for frame in range(fbank.num_frames_ready)]))

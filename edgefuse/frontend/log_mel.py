"""Log-mel features, equal to Kaldi's ``compute-fbank-feats`` with dither 0.

A frame is 25 ms of speech, and a new one begins every 10 ms. Per frame, with the letters of the code::

    f = x - mean(x)                                    remove the DC offset
    f[n] = f[n] - 0.97 f[n-1],  f[0] = 0.03 f[0]       pre-emphasis
    f = w f,  w[n] = (0.5 - 0.5 cos(2 pi n / 399))^0.85   the "povey" window
    p = |FFT_512(f)|^2                                 power spectrum
    m = log(max(M p, epsilon))                         80 triangles, equally spaced in mel

Source: kaldi ``feat/feature-window.cc``, ``feat/mel-computations.cc`` and ``feat/feature-fbank.cc``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLOAT32_EPSILON = 1.1920928955078125e-07  # Kaldi's energy floor, in float32 and in float64 alike


@dataclass(frozen=True)
class FrontendSpec:
    """What a device must do to speech before the encoder sees it; part of the contract of every artifact.

    The defaults are Kaldi's, as WeNet uses them: 80 bins, 25 ms frames every 10 ms, no dither.
    """

    sample_rate_hz: int = 16_000
    frame_samples: int = 400
    hop_samples: int = 160
    fft_samples: int = 512
    mel_bins: int = 80
    low_hz: float = 20.0
    high_hz: float = 8_000.0
    preemphasis: float = 0.97
    window: str = "povey"
    amplitude_scale: float = 32_768.0  # samples are scaled from [-1, 1] to the range of int16
    energy_floor: float = FLOAT32_EPSILON

    def frames(self, samples: int) -> int:
        """How many whole frames lie in so many samples; a rest shorter than a frame is dropped (snip_edges)."""
        if samples < self.frame_samples:
            return 0
        return 1 + (samples - self.frame_samples) // self.hop_samples

    def samples(self, frames: int) -> int:
        """The fewest samples that give so many frames."""
        return 0 if frames == 0 else self.frame_samples + (frames - 1) * self.hop_samples


KALDI_80 = FrontendSpec()


def log_mel(pcm: Tensor, spec: FrontendSpec = KALDI_80) -> Tensor:
    """Log-mel energies (T, 80) of ``pcm`` (N,) in [-1, 1]; T = 1 + (N - 400) // 160, natural logarithm.

    Computed and returned in the dtype of ``pcm``, which is float32 or float64. Fewer than 400 samples give (0, 80).
    """
    if pcm.numel() < spec.frame_samples:
        return pcm.new_zeros(0, spec.mel_bins)
    frames = (pcm * spec.amplitude_scale).unfold(0, spec.frame_samples, spec.hop_samples)
    frames = preemphasize(frames - frames.mean(dim=1, keepdim=True), spec.preemphasis)
    spectrum = torch.fft.rfft(frames * povey_window(spec.frame_samples, pcm.dtype), n=spec.fft_samples)
    power = spectrum.real.square() + spectrum.imag.square()
    energies: Tensor = power @ mel_filters(spec, pcm.dtype).T
    return energies.clamp_min(spec.energy_floor).log()


def normalize(features: Tensor, mean: Tensor, istd: Tensor) -> Tensor:
    """(features - mean) * istd per mel bin; features (..., 80), mean (80,), istd (80,) the inverse deviation."""
    return (features - mean) * istd


def preemphasize(frames: Tensor, coefficient: float) -> Tensor:
    """frames (T, N) minus so much of the sample before; Kaldi lets the first one precede itself."""
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    return frames - coefficient * before


@lru_cache(maxsize=8)
def povey_window(samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kaldi's window (samples,): like Hann's, but it goes to zero at the edges less steeply."""
    phase = torch.arange(samples, dtype=torch.float64) * (2 * math.pi / (samples - 1))
    return (0.5 - 0.5 * phase.cos()).pow(0.85).to(dtype)


@lru_cache(maxsize=8)
def mel_filters(spec: FrontendSpec = KALDI_80, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kaldi's triangles (mel_bins, fft_samples // 2 + 1), straight in mel; the Nyquist bin weighs nothing."""
    edges = torch.linspace(hz_to_mel(spec.low_hz), hz_to_mel(spec.high_hz), spec.mel_bins + 2, dtype=torch.float64)
    left, centre, right = (edges[i : i + spec.mel_bins].unsqueeze(1) for i in range(3))
    hz = torch.arange(spec.fft_samples // 2 + 1, dtype=torch.float64) * (spec.sample_rate_hz / spec.fft_samples)
    mel = 1127.0 * (1.0 + hz / 700.0).log()
    filters = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0.0)
    filters[:, -1] = 0.0  # Kaldi's banks end one bin below Nyquist
    return filters.to(dtype)


def hz_to_mel(hz: float) -> float:
    """The mel scale of Kaldi and HTK: 1127 ln(1 + f / 700)."""
    return 1127.0 * math.log(1.0 + hz / 700.0)

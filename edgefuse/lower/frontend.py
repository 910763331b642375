"""The front end in the graph: an entry that hears samples, so that an application has nothing to compute.

Whatever Kaldi does to a frame before it takes powers is linear in the samples, and so one matrix, composed in float64::

    D = I - 1/400                     remove the DC offset
    P: f[n] - 0.97 f[n-1]             pre-emphasis
    S = 32768 F diag(w) P D           w the window, F the real and imaginary rows of the Fourier transform
    m = log(max(M (S x)^2, e))        M the mel triangles, for the real and for the imaginary half

The mean of the features goes into M and e as a factor, log(a) - mean = log(a exp(-mean)), so that just istd is left::

    features = istd log(max(M' (S x)^2, e')),   M' = diag(exp(-mean)) M,   e' = e exp(-mean)

400 samples are five blocks of 80, and a hop is two: S is a convolution over blocks. All of it is float32 at every precision: the
power of loud speech is beyond fp16.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgefuse.frontend.intake import LEAD, of_samples
from edgefuse.frontend.log_mel import FrontendSpec, mel_filters, povey_window, preemphasize
from edgefuse.model.config import FEATURE_HOP_MS

LONGEST = 6000  # encoder frames: float32 errs by 1.2e-7 of so many, which is less than half a sample


class LogMel(nn.Module):
    """samples (1, 240 + 160 T) in [-1, 1] -> normalized features (1, T, mels)."""

    istd: Tensor
    floor: Tensor

    def __init__(self, spec: FrontendSpec, mean: Tensor, istd: Tensor) -> None:
        """Compose the matrices, in float64; mean and istd (mels,) are those of the training speech."""
        super().__init__()
        self.block = math.gcd(spec.frame_samples, spec.hop_samples)
        filters = mel_filters(spec, torch.float64)
        heard = filters.sum(dim=0) > 0  # neither the lowest bin nor Nyquist's weighs anything
        factor = torch.exp(-mean.double())
        weight = _spectrum(spec)[:, heard].reshape(spec.frame_samples // self.block, self.block, -1)
        taps, _, rows = weight.shape
        self.spectrum = nn.Conv2d(self.block, rows, (1, taps), (1, spec.hop_samples // self.block), bias=False)
        self.spectrum.weight = _constant(weight.permute(2, 1, 0).unsqueeze(2))
        self.mel = nn.Linear(rows, spec.mel_bins, bias=False)
        self.mel.weight = _constant((filters[:, heard] * factor[:, None]).repeat_interleave(2, dim=1))
        self.register_buffer("floor", spec.energy_floor * factor)
        self.register_buffer("istd", istd.double())

    def forward(self, samples: Tensor) -> Tensor:
        """Features of every whole frame."""
        blocks = samples.reshape(1, 1, samples.shape[1] // self.block, self.block).permute(0, 3, 1, 2)
        spectrum = self.spectrum(blocks).permute(0, 2, 3, 1)
        energies = self.mel((spectrum * spectrum).reshape(1, spectrum.shape[2], spectrum.shape[3]))
        return torch.log(torch.maximum(energies, self.floor)) * self.istd


class PcmGraph(nn.Module):
    """samples (1, 240 + 640 T), length (1,) in samples -> what a graph answers to their features, and the features.

    With encoder frames of other than 40 ms there are as many more samples, or fewer, for each.
    """

    LEAD: ClassVar[int] = LEAD  # samples that `length` counts and that come before those of the first encoder frame
    before: Tensor
    frames_per_sample: Tensor

    def __init__(self, front_end: LogMel, network: nn.Module, frame_ms: int, ahead: int = 0) -> None:
        """Put a front end before a graph that hears features; both are shared, not copied. `ahead` counts encoder frames."""
        super().__init__()
        self.front_end, self.network, self.frame_ms, self.ahead = front_end, network, frame_ms, ahead
        self.register_buffer("before", torch.tensor([self.LEAD - 0.5]))  # half a sample keeps rounding off the whole numbers
        self.register_buffer("frames_per_sample", torch.tensor([1 / of_samples(frame_ms).per_frame]))

    def around(self, network: nn.Module) -> "PcmGraph":
        """The same front end before another graph."""
        return type(self)(self.front_end, network, self.frame_ms, self.ahead)

    def forward(self, samples: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        """Logits and features of one utterance; what comes of the samples behind `length` is meaningless."""
        features = self.front_end(samples)
        return self.network(features, self._frames(length)), features

    def _frames(self, length: Tensor) -> Tensor:
        """Whole encoder frames; exact up to `LONGEST` of them."""
        return torch.floor((length - self.before) * self.frames_per_sample)


class PcmStreamingGraph(PcmGraph):
    """samples (1, 640 window), length (1,), overlap (1, 240), caches -> logits, features, overlap and caches for the next chunk.

    The window is the chunk and what is ahead of it; the features are those of the chunk. What else the network answers, of a
    cascade what its second pass wants, stands between logits and features.

    An utterance begins with its first 240 samples in `overlap`, and the first window is what comes behind them; so no frame waits
    for a chunk that is not there yet, and `length` counts samples of the window alone.
    """

    LEAD = 0

    def forward(self, samples: Tensor, length: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Logits and features of one chunk, those behind `length` meaningless, and the next caches."""
        overlap, *inner = caches
        heard = torch.cat((overlap, samples), dim=1)
        features = self.front_end(heard)
        given = self.network(features, self._frames(length), *inner)
        answered = len(given) - len(inner)
        chunk = samples.shape[1] - self.ahead * of_samples(self.frame_ms).per_frame
        if self.ahead:
            features = features[:, : features.shape[1] - self.ahead * self.frame_ms // FEATURE_HOP_MS]
        return *given[:answered], features, heard[:, chunk : chunk + LEAD], *given[answered:]


def _spectrum(spec: FrontendSpec) -> Tensor:
    """What each sample of a frame adds to the real and imaginary part of each bin: (frame_samples, bins, 2)."""
    unit = torch.eye(spec.frame_samples, dtype=torch.float64) * spec.amplitude_scale
    frames = preemphasize(unit - unit.mean(dim=1, keepdim=True), spec.preemphasis)
    return torch.view_as_real(torch.fft.rfft(frames * povey_window(spec.frame_samples, torch.float64), n=spec.fft_samples))


def _constant(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)

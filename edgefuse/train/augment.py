"""Voices, rooms and microphones that the corpus does not have: augmentation of log-mel features (T, 80), not normalized.

Everything is done on features, from a store that is computed once; a corpus at three speeds would cost three stores.
Tempo and vocal tract are warped apart (speed perturbation, Ko et al. 2015, ties them), the channel is a smooth curve over
mel, noise is added in the power domain, and SpecAugment (Park et al. 2019) masks last, on normalized features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgefuse.frontend.log_mel import KALDI_80, FrontendSpec, hz_to_mel

FLUTTER = 0.4  # nepers: of stationary noise in a mel bin, which averages some FFT bins
QUIETEST = 0.05  # the share of a recording's frames in which nobody speaks, at the least
DB_TO_LOG_POWER = math.log(10.0) / 10.0


@dataclass(frozen=True)
class Augmentation:
    """How far each draw may go; all are uniform."""

    tempo: float = 0.12  # from 1 - tempo to 1 + tempo times as fast
    vocal_tract: float = 0.2  # frequencies from 1 - vocal_tract to 1 + vocal_tract times as high
    gain_db: float = 10.0
    channel_db: float = 10.0  # of a tilt, and of each of two ripples, over the whole band
    pause_share: float = 0.2  # of the utterances: nothing is said for a while, before and behind
    longest_pause_frames: int = 80
    noise_share: float = 0.5  # of the utterances
    noise_lowest_snr_db: float = 10.0
    noise_highest_snr_db: float = 35.0
    frequency_masks: int = 2
    frequency_mask_bins: int = 20
    time_masks: int = 2
    time_mask_frames: int = 20
    time_mask_share: float = 0.08  # of the utterance, per mask at most


def draw_tempo(how: Augmentation, draw: Generator) -> float:
    """A tempo for a whole batch: drawn one by one, tempos would undo the bucketing and cost a tenth in padding."""
    return _uniform(draw, 1 - how.tempo, 1 + how.tempo)


def draw_pauses(how: Augmentation, utterances: int, draw: Generator) -> Tensor:
    """The frames (utterances, 2) in which nothing is said before and behind each: zeros for most."""
    frames = torch.randint(0, how.longest_pause_frames + 1, (utterances, 2), generator=draw)
    return frames * (torch.rand(utterances, 1, generator=draw) < how.pause_share)


def augment(features: Tensor, how: Augmentation, draw: Generator, pauses: tuple[int, int] = (0, 0)) -> Tensor:
    """Another voice in another room: (T, 80) to (T, 80), longer by its pauses; not normalized on either side."""
    features = warp_vocal_tract(features, _uniform(draw, 1 - how.vocal_tract, 1 + how.vocal_tract))
    if any(pauses):
        features = _with_pauses(features, *pauses, draw)
    features = features + _channel(features.shape[1], how, draw)
    if _uniform(draw, 0, 1) < how.noise_share:
        features = _add_noise(features, _uniform(draw, how.noise_lowest_snr_db, how.noise_highest_snr_db), draw)
    return features


def warp_tempo(features: Tensor, factor: float) -> Tensor:
    """Speech ``factor`` times as fast, at the same pitch: (T, 80) to (round(T / factor), 80)."""
    frames = max(1, round(features.shape[0] / factor))
    return F.interpolate(features.T[None], size=frames, mode="linear", align_corners=False)[0].T


def warp_vocal_tract(features: Tensor, factor: float, spec: FrontendSpec = KALDI_80) -> Tensor:
    """All frequencies ``factor`` times as high (VTLP, Jaitly and Hinton 2013): (T, 80) to (T, 80).

    Bin j takes what stood at f_j / factor; beyond the band the last bin repeats.
    """
    low, high = hz_to_mel(spec.low_hz), hz_to_mel(spec.high_hz)
    step = (high - low) / (spec.mel_bins + 1)
    hz = 700.0 * (((low + step * torch.arange(1, spec.mel_bins + 1)) / 1127.0).exp() - 1.0)
    source = (1127.0 * (1.0 + hz / factor / 700.0).log() - low) / step - 1.0
    source = source.clamp(0, spec.mel_bins - 1)
    below = source.floor().long().clamp_max(spec.mel_bins - 2)
    share = source - below
    return features[:, below] * (1 - share) + features[:, below + 1] * share


def _with_pauses(features: Tensor, before: int, behind: int, draw: Generator) -> Tensor:
    """The quiet of the recording itself before and behind it: (T, 80) to (before + T + behind, 80)."""
    quiet = features.quantile(QUIETEST, dim=0)
    pause = quiet + FLUTTER * torch.randn((before + behind, features.shape[1]), generator=draw)
    return torch.cat((pause[:before], features, pause[before:]))


def _channel(bins: int, how: Augmentation, draw: Generator) -> Tensor:
    """A gain and a smooth curve over mel (80,), in log power."""
    x = torch.linspace(-1, 1, bins)
    curve = torch.full((bins,), _uniform(draw, -how.gain_db, how.gain_db))
    curve += _uniform(draw, -how.channel_db, how.channel_db) * x
    for ripples in (1.0, 2.0):
        phase = _uniform(draw, 0, 2 * math.pi)
        curve += _uniform(draw, -how.channel_db, how.channel_db) / 2 * (math.pi * ripples * x + phase).cos()
    return curve * DB_TO_LOG_POWER


def _add_noise(features: Tensor, snr_db: float, draw: Generator) -> Tensor:
    """Stationary coloured noise, at a signal-to-noise ratio over the mean power of the utterance."""
    x = torch.linspace(-1, 1, features.shape[1])
    colour = _uniform(draw, -2.0, 1.0) * x  # in nepers of power: from a rumble to a hiss
    colour += _uniform(draw, -1.0, 1.0) * (math.pi * x + _uniform(draw, 0, 2 * math.pi)).cos()
    colour -= colour.exp().mean().log()
    level = features.exp().mean().log() - snr_db * DB_TO_LOG_POWER
    flutter = FLUTTER * torch.randn(features.shape, generator=draw)
    return torch.logaddexp(features, level + colour + flutter)


def mask(features: Tensor, how: Augmentation, draw: Generator) -> Tensor:
    """SpecAugment on normalized features (T, 80): zeros, the mean, in a few bands and spans; in place."""
    frames, bins = features.shape
    longest = min(how.time_mask_frames, int(how.time_mask_share * frames))
    for _ in range(how.frequency_masks):
        first, width = _span(bins, how.frequency_mask_bins, draw)
        features[:, first : first + width] = 0.0
    for _ in range(how.time_masks):
        first, width = _span(frames, longest, draw)
        features[first : first + width] = 0.0
    return features


def _span(length: int, longest: int, draw: Generator) -> tuple[int, int]:
    width = int(torch.randint(0, longest + 1, (), generator=draw))
    return int(torch.randint(0, length - width + 1, (), generator=draw)), width


def _uniform(draw: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw))

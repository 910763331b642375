"""From a synthetic voice to a recording: the speaker's size, the room, the noise, the level, the silence around.

Waveforms are one-dimensional float32 arrays at 16 kHz with full scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray
from scipy import signal

Waveform = NDArray[np.float32]

SAMPLE_RATE = 16_000
FRAME = 320  # 20 ms, the step in which silence is judged
SILENCE_DB = -42.0  # below the loudest frame; the quietest fricatives of the voices lie about 10 dB above
TINY = 1e-10


@dataclass(frozen=True)
class Scene:
    """How one utterance is recorded.  A `noise` or `reverberation_s` of None means there is none."""

    size: float  # speed perturbation that moves the formants too; above 1 is a smaller, quicker speaker
    lead_s: float
    tail_s: float
    reverberation_s: float | None  # RT60
    direct_db: float  # level of the direct sound over the reverberation
    noise: str | None  # "white", "pink", "brown" or "babble"
    snr_db: float
    peak_db: float  # level of the highest sample over full scale; always negative
    seed: int


def resized(speech: NDArray[np.float32], rate: int, size: float) -> Waveform:
    """Resample to 16 kHz and perturb the speed: formants and pitch times `size`, duration over `size`."""
    return np.asarray(soxr.resample(speech, rate * size, SAMPLE_RATE), dtype=np.float32)


def trimmed(speech: Waveform) -> Waveform:
    """Cut what is silent at both ends, to whole frames; all silence gives an empty waveform."""
    frames = speech[: len(speech) // FRAME * FRAME].reshape(-1, FRAME)
    power = np.mean(np.square(frames), axis=1)
    loud = np.flatnonzero(power > max(float(power.max(initial=0.0)) * 10 ** (SILENCE_DB / 10), TINY))
    return speech[loud[0] * FRAME : (loud[-1] + 1) * FRAME] if loud.size else speech[:0]


def in_room(speech: Waveform, reverberation_s: float, direct_db: float, draw: np.random.Generator) -> Waveform:
    """Convolve with h = delta + g n(t) 10^(-3 t / RT60), n white; the direct sound is `direct_db` above the rest."""
    time_s = np.arange(int(reverberation_s * SAMPLE_RATE)) / SAMPLE_RATE
    response = draw.standard_normal(time_s.size) * 10 ** (-3 * time_s / reverberation_s)
    response[: SAMPLE_RATE // 400] = 0.0  # nothing is reflected within the first 2.5 ms, that is 0.9 m
    response *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(np.square(response)))
    response[0] = 1.0
    return np.asarray(signal.fftconvolve(speech, response)[: len(speech)], dtype=np.float32)


def coloured(length: int, colour: str, draw: np.random.Generator) -> Waveform:
    """Noise whose power falls with 1/f^0 (white), 1/f (pink) or 1/f^2 (brown) above 50 Hz."""
    spectrum = np.fft.rfft(draw.standard_normal(length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 50.0)
    exponent = {"white": 0.0, "pink": 0.5, "brown": 1.0}[colour]
    return np.fft.irfft(spectrum / hertz**exponent, length).astype(np.float32)


def babble(length: int, talkers: list[Waveform], draw: np.random.Generator) -> Waveform:
    """Several people talking at once: every talker at the same power, started somewhere, repeated to fill `length`."""
    voices = [np.roll(np.resize(voice / rms(voice), length), draw.integers(length)) for voice in talkers if voice.size]
    return np.asarray(np.sum(voices, axis=0), dtype=np.float32)


def rms(waveform: Waveform) -> float:
    """Root of the mean square, never zero."""
    return float(np.sqrt(np.mean(np.square(waveform)) + TINY))


def recorded(speech: Waveform, scene: Scene, talkers: list[Waveform]) -> Waveform:
    """Trimmed speech in its scene: silence around it, then the room, then the noise, then the level."""
    draw = np.random.default_rng(scene.seed)
    margins = int(scene.lead_s * SAMPLE_RATE), int(scene.tail_s * SAMPLE_RATE)
    sound = np.pad(speech, margins)
    if scene.reverberation_s is not None:
        sound = in_room(sound, scene.reverberation_s, scene.direct_db, draw)
    if scene.noise is not None:
        length = len(sound)
        noise = babble(length, talkers, draw) if scene.noise == "babble" else coloured(length, scene.noise, draw)
        sound = sound + noise * (rms(speech) / rms(noise) * 10 ** (-scene.snr_db / 20))
    return np.asarray(sound * (10 ** (scene.peak_db / 20) / np.max(np.abs(sound))), dtype=np.float32)

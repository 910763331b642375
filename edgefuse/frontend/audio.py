"""Recordings from disk: 16 kHz, mono, finite, long enough; anything else is refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgefuse.errors import AudioError, AudioNotFinite, EmptyAudio, NotAudio, NotMono, WrongSampleRate
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.model.config import SUBSAMPLING

FEWEST_SAMPLES = KALDI_80.samples(SUBSAMPLING)  # of one encoder frame: 880, or 55 ms


def read_audio(path: Path) -> Tensor:
    """The samples (N,) of a recording, float32 in [-1, 1] at 16 kHz; N is at least 880, one encoder frame.

    Raises an `AudioError` for a file that is missing, not audio, empty, too short, not mono, at another sample rate, or not
    finite. Nothing is mixed down or resampled: what a device will hear must be what was verified.
    """
    samples, sample_rate_hz = _read(path)
    _check_format(path, samples, sample_rate_hz)
    _check_samples(path, samples[:, 0])
    return torch.from_numpy(np.ascontiguousarray(samples[:, 0]))


def _read(path: Path) -> tuple[NDArray[np.float32], int]:
    if not path.exists():
        raise AudioError(f"There is no recording at {path}.", hint="Check the path; WAV and FLAC are read.")
    if path.is_dir():
        raise NotAudio(f"{path} is a folder, not a recording.", hint="Pass a file; WAV and FLAC are read.")
    if path.stat().st_size == 0:
        raise EmptyAudio(f"{path} is empty: 0 bytes.", hint="Record it again.")
    try:
        samples, sample_rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise NotAudio(
            f"{path} is not audio that can be read: {error}",
            hint=f"Convert it with: ffmpeg -i {path} -ac 1 -ar 16000 {path.stem}.wav",
        ) from error
    return samples, int(sample_rate_hz)


def _check_format(path: Path, samples: NDArray[np.float32], sample_rate_hz: int) -> None:
    channels = samples.shape[1]
    if channels != 1:
        raise NotMono(
            f"{path} has {channels} channels; the model hears one.",
            hint=f"Mix it down with: sox {path} {path.stem}.mono.wav remix -",
        )
    if sample_rate_hz < KALDI_80.sample_rate_hz:
        raise WrongSampleRate(
            f"{path} has {sample_rate_hz} samples per second, not 16000; what was above {sample_rate_hz // 2} Hz is lost.",
            hint="Record it again at 16 kHz; upsampling does not bring the missing band back.",
        )
    if sample_rate_hz != KALDI_80.sample_rate_hz:
        raise WrongSampleRate(
            f"{path} has {sample_rate_hz} samples per second, not 16000.",
            hint=f"Resample it with: sox {path} -r 16000 {path.stem}.16k.wav  (or ffmpeg -i {path} -ar 16000 ...)",
        )


def _check_samples(path: Path, samples: NDArray[np.float32]) -> None:
    if samples.size == 0:
        raise EmptyAudio(f"{path} holds no samples.", hint="Record it again.")
    if samples.size < FEWEST_SAMPLES:
        raise EmptyAudio(
            f"{path} lasts {samples.size / 16:.1f} ms; one encoder frame needs {FEWEST_SAMPLES / 16:.0f} ms.",
            hint="Record something longer.",
        )
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise AudioNotFinite(
            f"{path} has {bad} samples that are NaN or infinite.", hint="Write it again, as 16-bit PCM if you can."
        )

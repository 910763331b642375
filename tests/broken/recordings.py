"""Recordings that the model cannot hear, each named after what is wrong with it."""

from pathlib import Path

import numpy as np
import soundfile

TONE = (0.1 * np.sin(np.arange(16_000) / 20)).astype(np.float32)


def missing(_: Path) -> None:
    """Write nothing."""


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_samples(path: Path) -> None:
    soundfile.write(path, TONE[:0], 16_000)


def shorter_than_a_frame(path: Path) -> None:
    soundfile.write(path, TONE[:600], 16_000)


def stereo(path: Path) -> None:
    soundfile.write(path, np.stack([TONE, TONE], axis=1), 16_000)


def telephone(path: Path) -> None:
    soundfile.write(path, TONE[:8000], 8_000)


def compact_disc(path: Path) -> None:
    soundfile.write(path, TONE, 44_100)


def too_long(path: Path) -> None:
    soundfile.write(path, np.tile(TONE, 9), 16_000)


def not_audio(path: Path) -> None:
    path.write_text("Dear diary, today I recorded nothing.\n")


def a_folder(path: Path) -> None:
    path.mkdir()


def not_finite(path: Path) -> None:
    samples = TONE.copy()
    samples[100] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")

"""From speech to features: equal to Kaldi's, and strict about what it reads."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgefuse.errors import AudioError, AudioNotFinite, EmptyAudio, NotAudio, NotMono, WrongSampleRate
from edgefuse.frontend.audio import FEWEST_SAMPLES, read_audio
from edgefuse.frontend.kaldi import kaldi_log_mel
from edgefuse.frontend.log_mel import KALDI_80, log_mel, mel_filters, normalize


def speech(seconds: float, seed: int = 0) -> Tensor:
    """A voice of sorts: harmonics of a gliding pitch, syllables, breath."""
    time = torch.arange(round(seconds * 16_000)) / 16_000
    noise = torch.randn(time.shape, generator=torch.Generator().manual_seed(seed))
    phase = 2 * torch.pi * (120 * time + 20 * time.square())
    voice = sum((torch.sin(k * phase) / k for k in range(1, 20)), start=torch.zeros_like(time))
    return 0.1 * voice * torch.sin(2 * torch.pi * 3 * time).clamp_min(0) + 0.003 * noise


def snr_db(wanted: Tensor, got: Tensor) -> float:
    """Signal to noise ratio of the features themselves."""
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_equal_kaldis(dtype: torch.dtype) -> None:
    pcm = speech(3.0)
    wanted, got = kaldi_log_mel(pcm), log_mel(pcm.to(dtype))
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < 2e-3
    assert snr_db(wanted, got) > 90


def test_digital_silence_lies_on_kaldis_floor() -> None:
    pcm = torch.zeros(1600)
    assert torch.allclose(log_mel(pcm), kaldi_log_mel(pcm), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4000))
def test_only_whole_frames_count(samples: int) -> None:
    frames = log_mel(torch.ones(samples)).shape[0]
    assert frames == KALDI_80.frames(samples) == (0 if samples < 400 else 1 + (samples - 400) // 160)


@given(st.integers(0, 1000))
def test_the_fewest_samples_of_some_frames_give_exactly_those(frames: int) -> None:
    samples = KALDI_80.samples(frames)
    assert KALDI_80.frames(samples) == frames
    assert KALDI_80.frames(max(0, samples - 1)) == max(0, frames - 1)


def test_the_filters_are_triangles_that_overlap_by_half() -> None:
    filters = mel_filters(dtype=torch.float64)
    assert filters.shape == (80, 257)
    between = filters[:, 12:240].sum(dim=0)
    assert torch.allclose(between, torch.ones_like(between))


def test_twice_the_amplitude_is_four_times_the_power() -> None:
    pcm = speech(0.5).double()
    assert torch.allclose(log_mel(2 * pcm), log_mel(pcm) + torch.log(torch.tensor(4.0)), atol=1e-6)


def test_features_of_a_part_are_a_part_of_the_features() -> None:
    pcm = speech(1.0).double()
    assert torch.allclose(log_mel(pcm[10 * 160 :]), log_mel(pcm)[10:], atol=1e-9)


def test_normalized_training_speech_has_mean_0_and_deviation_1() -> None:
    features = log_mel(speech(2.0).double())
    normal = normalize(features, features.mean(dim=0), 1 / features.std(dim=0))
    assert torch.allclose(normal.mean(dim=0), torch.zeros(80, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(normal.std(dim=0), torch.ones(80, dtype=torch.float64))


@pytest.mark.parametrize(("suffix", "tolerance"), [("wav", 1e-4), ("flac", 1e-4)])
def test_a_recording_is_read_as_it_was_written(tmp_path: Path, suffix: str, tolerance: float) -> None:
    path = tmp_path / f"voice.{suffix}"
    soundfile.write(path, speech(0.3).numpy(), 16_000)
    pcm = read_audio(path)
    assert pcm.dtype == torch.float32
    assert torch.allclose(pcm, speech(0.3), atol=tolerance)


def test_the_shortest_recording_gives_one_encoder_frame(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(FEWEST_SAMPLES, np.float32), 16_000)
    assert log_mel(read_audio(tmp_path / "short.wav")).shape == (4, 80)


@pytest.mark.parametrize(
    ("samples", "sample_rate_hz", "refusal", "sentence"),
    [
        (np.zeros((16_000, 2)), 16_000, NotMono, "has 2 channels"),
        (np.zeros(8_000), 8_000, WrongSampleRate, "8000 samples per second.*is lost"),
        (np.zeros(44_100), 44_100, WrongSampleRate, "44100 samples per second, not 16000"),
        (np.zeros(48_000), 48_000, WrongSampleRate, "48000 samples per second, not 16000"),
        (np.zeros(0), 16_000, EmptyAudio, "no samples"),
        (np.zeros(399), 16_000, EmptyAudio, "lasts 24.9 ms"),
        (np.zeros(879), 16_000, EmptyAudio, "one encoder frame needs 55 ms"),
        (np.array([0.0] * 900 + [np.nan, np.inf]), 16_000, AudioNotFinite, "2 samples that are NaN or infinite"),
    ],
)
def test_what_the_model_cannot_hear_is_refused_in_words(
    tmp_path: Path, samples: np.ndarray, sample_rate_hz: int, refusal: type[AudioError], sentence: str
) -> None:
    path = tmp_path / "voice.wav"
    soundfile.write(path, samples.astype(np.float32), sample_rate_hz, subtype="FLOAT")
    with pytest.raises(refusal, match=sentence) as refused:
        read_audio(path)
    assert refused.value.hint


def test_another_sample_rate_comes_with_the_command_that_changes_it(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(44_100), 44_100)
    with pytest.raises(WrongSampleRate) as refused:
        read_audio(tmp_path / "voice.wav")
    assert refused.value.hint is not None
    assert "sox" in refused.value.hint


def test_a_file_that_is_not_audio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "voice.wav").write_text("not a recording")
    with pytest.raises(NotAudio, match="not audio"):
        read_audio(tmp_path / "voice.wav")


def test_a_missing_an_empty_and_a_folder_are_three_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    for name, sentence in (("missing.wav", "no recording"), ("empty.wav", "0 bytes"), (".", "is a folder")):
        with pytest.raises(AudioError, match=sentence):
            read_audio(tmp_path / name)

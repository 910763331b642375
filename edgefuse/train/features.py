"""Features of a whole corpus, computed once and kept in one memory-mapped file.

Reading FLAC and computing log-mel features would cost a training on two cores a third of its time. A store holds every
frame as float16 (a log-mel value of 20 is then off by at most 0.008), so that several trainings share one page cache; an hour of
speech is 58 MB, the 960 hours of LibriSpeech are 55 GB. Opening it reads no frame.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet, MonoCut
from numpy.typing import NDArray
from torch import Tensor

from edgefuse.errors import EmptyAudio, NoSpace, WrongSampleRate
from edgefuse.frontend.log_mel import KALDI_80, log_mel
from edgefuse.train.ranks import in_turn, say

AHEAD = 64  # utterances
GB = 1e9
FRAMES = "frames.npy"
INDEX = "index.json"
SMALLEST_VARIANCE = 1e-4  # a mel bin that never moves must not be blown up
SILENCE = 0.0  # below the noise of a 16-bit converter; zeros that a synthesizer wrote would dominate mean and deviation


@dataclass(frozen=True)
class Stored:
    """Where the frames of one utterance lie, and what was said."""

    id: str
    text: str
    first: int
    count: int


@dataclass(frozen=True)
class FeatureStore:
    """Log-mel frames of a set of utterances; mean and inverse deviation are over all that is not digital silence."""

    frames: NDArray[np.float16]  # (all frames, 80), memory-mapped
    utterances: Mapping[str, Stored]
    mean: Tensor  # (80,)
    istd: Tensor  # (80,)

    def features(self, utterance: str) -> Tensor:
        """Log-mel features (T, 80) float32 of one utterance, not normalized."""
        stored = self.utterances[utterance]
        return torch.from_numpy(self.frames[stored.first : stored.first + stored.count].astype(np.float32))


def cut_features(cut: MonoCut) -> Tensor:
    """Log-mel features (T, 80) float32 of one cut, computed from its audio."""
    pcm: NDArray[np.float32] = cut.load_audio()
    return log_mel(torch.from_numpy(pcm[0]))


def open_or_compute(cuts: CutSet, folder: Path) -> FeatureStore:
    """Open the store in ``folder``; if there is none, compute it there (atomically: a half-written store is no store).

    Of several processes one computes, and the others wait for it. Audio is read as it is needed, a few utterances ahead.

    Raises:
        EmptyAudio: no utterance is as long as a frame.
        WrongSampleRate: a recording at another rate than the features are of.
        NoSpace: the disk has less room than the frames need.
    """
    with in_turn():
        if not (folder / INDEX).is_file():
            _compute(cuts, folder)
    return _open(folder)


def _open(folder: Path) -> FeatureStore:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return FeatureStore(
        frames=np.load(folder / FRAMES, mmap_mode="r"),
        utterances={u["id"]: Stored(**u) for u in index["utterances"]},
        mean=torch.tensor(index["mean"]),
        istd=torch.tensor(index["istd"]),
    )


def _compute(cuts: CutSet, folder: Path) -> None:
    stored = _layout(cuts)
    total = stored[-1].first + stored[-1].count
    folder.parent.mkdir(parents=True, exist_ok=True)
    _require_room(folder, len(stored), total)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir()
    frames = np.lib.format.open_memmap(partial / FRAMES, mode="w+", dtype=np.float16, shape=(total, KALDI_80.mel_bins))
    moments = _fill(cuts, stored, frames)
    frames.flush()
    mean, istd = _mean_and_istd(moments)
    index = {"utterances": [asdict(s) for s in stored], "mean": mean.tolist(), "istd": istd.tolist()}
    (partial / INDEX).write_text(json.dumps(index), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _require_room(folder: Path, utterances: int, frames: int) -> None:
    """Say what will be written, and refuse to begin what the disk cannot hold."""
    size, free = frames * KALDI_80.mel_bins * 2, shutil.disk_usage(folder.parent).free
    hours = frames * KALDI_80.hop_samples / KALDI_80.sample_rate_hz / 3600
    if size > free:
        raise NoSpace(
            f"The features of {hours:.1f} h of speech need {size / GB:.1f} GB; {folder.parent} has {free / GB:.1f} GB left.",
            hint="Free some space, or name a folder on another disk with --features.",
        )
    say(f"Computing features of {utterances} utterances, {hours:.1f} h: {size / GB:.2f} GB in {folder}")


def _layout(cuts: Iterable[MonoCut]) -> list[Stored]:
    stored: list[Stored] = []
    first = 0
    for cut in cuts:
        if cut.sampling_rate != KALDI_80.sample_rate_hz:
            raise WrongSampleRate(
                f"The recording {cut.recording.id} is at {cut.sampling_rate} Hz, not at {KALDI_80.sample_rate_hz}.",
                hint="Convert the corpus first, for example with: sox IN -r 16000 OUT",
            )
        count = KALDI_80.frames(cut.num_samples)
        stored.append(Stored(cut.id, _text(cut), first, count))
        first += count
    if first == 0:
        raise EmptyAudio("The corpus holds no speech.", hint="Make it again, or pass another folder to --speech.")
    return stored


def _text(cut: MonoCut) -> str:
    """What is said in a cut; nothing where it has no transcript, of which a pre-training has no need."""
    return (cut.supervisions[0].text or "") if cut.supervisions else ""


def _fill(cuts: Iterable[MonoCut], stored: Iterable[Stored], frames: NDArray[np.float16]) -> NDArray[np.float64]:
    """Write every frame; return count, sum and sum of squares (3, 80) of the values that are no digital silence."""
    moments = np.zeros((3, KALDI_80.mel_bins))
    for features, place in zip(_ahead(cuts), stored, strict=True):
        frames[place.first : place.first + place.count] = features.numpy()
        wide = features.numpy().astype(np.float64)
        moments += np.stack([(wide > SILENCE) * power for power in (np.ones_like(wide), wide, wide**2)]).sum(axis=1)
    return moments


def _ahead(cuts: Iterable[MonoCut]) -> Iterator[Tensor]:
    """The features of every cut in order, some of them computed beside each other: a corpus does not fit into memory."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor() as pool:  # soundfile and PyTorch let go of the lock
        for cut in cuts:
            waiting.append(pool.submit(cut_features, cut))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _mean_and_istd(moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = np.maximum(moments[0], 1.0)
    mean = moments[1] / count
    variance = moments[2] / count - np.square(mean)
    return mean, 1.0 / np.sqrt(np.maximum(variance, SMALLEST_VARIANCE))

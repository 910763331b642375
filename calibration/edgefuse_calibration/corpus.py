"""The corpus on disk: FLAC files and Lhotse manifests whose paths are relative to the corpus folder.

- `recipe.json`: what made it
- `flac/<set>/<id>.flac`: 16 kHz, mono, 16 bit
- `<set>.cuts.jsonl.gz`: what training reads; `<set>.recordings.jsonl.gz` and `<set>.supervisions.jsonl.gz` are its parts
- a supervision has the text, the speaker (engine/voice) and, in `custom`, the engine and the recording conditions
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from edgefuse_calibration.acoustics import SAMPLE_RATE, Scene


@dataclass(frozen=True)
class Clip:
    """One utterance on disk: `path` is relative to the corpus folder, `samples` counts them at 16 kHz."""

    identity: str
    path: str
    samples: int
    text: str
    speaker: str
    engine: str
    scene: Scene

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.samples / SAMPLE_RATE


def load_cuts(folder: Path, name: str) -> CutSet:
    """The cuts of one set ("train", "dev", "seen", "unseen"), their audio found under `folder` wherever that now lies."""
    return CutSet.from_file(folder / f"{name}.cuts.jsonl.gz").with_recording_path_prefix(folder)


def cut(clip: Clip) -> MonoCut:
    """The Lhotse view of one clip: one recording, one supervision as long as it, one cut of the same id."""
    recording = Recording(
        id=clip.identity,
        sources=[AudioSource(type="file", channels=[0], source=clip.path)],
        sampling_rate=SAMPLE_RATE,
        num_samples=clip.samples,
        duration=clip.seconds,
    )
    supervision = SupervisionSegment(
        id=clip.identity,
        recording_id=clip.identity,
        start=0.0,
        duration=clip.seconds,
        channel=0,
        text=clip.text,
        language="English",
        speaker=clip.speaker,
        custom={"engine": clip.engine, "scene": asdict(clip.scene)},
    )
    return MonoCut(
        id=clip.identity,
        start=0.0,
        duration=clip.seconds,
        channel=0,
        recording=recording,
        supervisions=[supervision],
    )


def write_manifests(folder: Path, name: str, clips: Iterable[Clip]) -> None:
    """Write the three manifests of one set."""
    cuts = [cut(clip) for clip in clips]
    write_lines(folder / f"{name}.recordings.jsonl.gz", [each.recording.to_dict() for each in cuts])
    write_lines(folder / f"{name}.supervisions.jsonl.gz", [each.supervisions[0].to_dict() for each in cuts])
    write_lines(folder / f"{name}.cuts.jsonl.gz", [each.to_dict() for each in cuts])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write gzipped JSON lines, the same bytes for the same rows: no time stamp, no file name in the header."""
    part = path.with_suffix(".part")
    with part.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    part.replace(path)

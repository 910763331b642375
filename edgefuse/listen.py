"""Open an artifact of a bundle, and transcribe recordings with it: whole, or as they would come from a microphone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgefuse import store
from edgefuse.bundle import Bundle
from edgefuse.checked import Checked
from edgefuse.errors import MissingFile, UsageError
from edgefuse.foreign import in_words
from edgefuse.frontend.audio import read_audio
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.recognize import Transcript, transcribe
from edgefuse.recognizer import Loaded, Recognizer, Streamed
from edgefuse.target import find
from edgefuse.values import Artifact


def load(path: Path) -> Loaded:
    """Open one artifact: `path` is BUNDLE/model.something, or a bundle that holds only one."""
    bundle, artifact = open_artifact(path)
    with in_words(artifact.target, "could not open its artifact"):
        return Loaded(bundle, artifact, Checked(find(artifact.target).open(artifact), artifact))


def listen(path: Path, recordings: Sequence[Path]) -> tuple[Transcript, ...]:
    """Transcribe recordings with one artifact."""
    loaded = load(path)
    with in_words(loaded.artifact.target, "could not run its artifact"):
        return tuple(transcribe(loaded.session, loaded.bundle, loaded.artifact, recording) for recording in recordings)


def stream(path: Path, recordings: Sequence[Path], tell: Callable[[str], None]) -> tuple[Streamed, ...]:
    """Transcribe recordings as if they were spoken now, chunk by chunk; `tell` hears every partial text that is new."""
    loaded = load(path)
    recognizer = Recognizer(loaded)
    with in_words(loaded.artifact.target, "could not run its artifact"):
        return tuple(_streamed(recognizer, recording, tell) for recording in recordings)


def _streamed(recognizer: Recognizer, recording: Path, tell: Callable[[str], None]) -> Streamed:
    samples = read_audio(recording).numpy()
    recognizer.reset()
    told = ""
    for start in range(0, len(samples), recognizer.chunk_samples):
        text = recognizer.accept(samples[start : start + recognizer.chunk_samples])
        if text != told:
            tell(text)
        told = text
    text = recognizer.finish()
    return Streamed(recording, len(samples) / KALDI_80.sample_rate_hz, text, tuple(recognizer.latency_ns))


def open_artifact(path: Path) -> tuple[Bundle, Artifact]:
    """A bundle, every byte of it checked, and the artifact in it that a path names."""
    if (path / store.MANIFEST).is_file():
        return _the_only_one(store.read_bundle(path))
    if not path.exists():
        raise MissingFile(f"There is no artifact at {path}.", hint="Name one in a bundle: BUNDLE/model.something")
    bundle = store.read_bundle(path.parent)
    for each in bundle.exports:
        if each.artifact.path.name == path.name:
            return bundle, each.artifact
    held = ", ".join(each.artifact.path.name for each in bundle.exports)
    raise UsageError(f"{path} is no artifact.", hint=f"Its bundle holds: {held}")


def _the_only_one(bundle: Bundle) -> tuple[Bundle, Artifact]:
    if len(bundle.exports) == 1:
        return bundle, bundle.exports[0].artifact
    held = ", ".join(str(each.artifact.path) for each in bundle.exports)
    raise UsageError(f"{bundle.folder} holds {len(bundle.exports)} artifacts.", hint=f"Name one of: {held}")

"""Transcribe recordings with an artifact of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgefuse import store
from edgefuse.bundle import Bundle
from edgefuse.errors import MissingFile, UsageError
from edgefuse.foreign import in_words
from edgefuse.recognize import Transcript, transcribe
from edgefuse.target import find
from edgefuse.values import Artifact


def listen(path: Path, recordings: Sequence[Path]) -> tuple[Transcript, ...]:
    """Transcribe recordings with one artifact: `path` is BUNDLE/model.something, or a bundle that holds only one."""
    bundle, artifact = open_artifact(path)
    with in_words(artifact.target, "could not open its artifact"):
        session = find(artifact.target).open(artifact)
    with in_words(artifact.target, "could not run its artifact"):
        return tuple(transcribe(session, bundle, artifact, recording) for recording in recordings)


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

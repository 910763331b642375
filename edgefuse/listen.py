"""Open an artifact of a bundle, and transcribe recordings with it: whole, or as they would come from a microphone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse import store
from edgefuse.bundle import Bundle
from edgefuse.checked import Checked
from edgefuse.decode.endpoint import Endpointing
from edgefuse.decode.search import GREEDILY, Decoding
from edgefuse.decode.spelling import Said
from edgefuse.errors import EmptyAudio, MissingFile, UsageError
from edgefuse.foreign import in_words
from edgefuse.frontend.audio import read_audio
from edgefuse.frontend.log_mel import KALDI_80
from edgefuse.microphone import until_interrupted
from edgefuse.recognize import Transcript, transcribe
from edgefuse.recognizer import Loaded, Recognizer, Streamed
from edgefuse.target import find
from edgefuse.values import Artifact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Tell = Callable[[str], None]
End = Callable[[Said], None]


def load(path: Path) -> Loaded:
    """Open one artifact: `path` is BUNDLE/model.something, or a bundle that holds only one."""
    bundle, artifact = open_artifact(path)
    with in_words(artifact.target, "could not open its artifact"):
        return Loaded(bundle, artifact, Checked(find(artifact.target).open(artifact), artifact))


def listen(path: Path, recordings: Sequence[Path], decoding: Decoding = GREEDILY) -> tuple[Transcript, ...]:
    """Transcribe recordings with one artifact."""
    loaded = load(path)
    with in_words(loaded.artifact.target, "could not run its artifact"):
        return tuple(transcribe(loaded.session, loaded.bundle, loaded.artifact, each, decoding) for each in recordings)


def stream(
    path: Path,
    recordings: Sequence[Path],
    tell: Tell,
    decoding: Decoding = GREEDILY,
    endpointing: Endpointing | None = None,
    *,
    second_pass: bool = False,
) -> tuple[Streamed, ...]:
    """Transcribe recordings as if they were spoken now, chunk by chunk; `tell` hears every partial text that is new."""
    loaded = load(path)
    recognizer = Recognizer(loaded, decoding, endpointing, second_pass=second_pass)
    with in_words(loaded.artifact.target, "could not run its artifact"):
        return tuple(_streamed(recognizer, recording, tell) for recording in recordings)


def _streamed(recognizer: Recognizer, recording: Path, tell: Tell) -> Streamed:
    samples, size = read_audio(recording).numpy(), recognizer.chunk_samples
    recognizer.reset()
    follow(recognizer, (samples[start : start + size] for start in range(0, len(samples), size)), tell)
    return Streamed(recording, len(samples) / KALDI_80.sample_rate_hz, recognizer.said, tuple(recognizer.latency_ns))


def record(
    path: Path,
    decoding: Decoding,
    endpointing: Endpointing,
    endless: Iterable[NDArray[np.float32]],
    tell: Tell,
    end: End,
    *,
    second_pass: bool = False,
) -> Streamed:
    """Transcribe what a microphone hears, until Ctrl-C; `tell` and `end` as in `follow`."""
    loaded = load(path)
    recognizer, heard_samples = Recognizer(loaded, decoding, endpointing, second_pass=second_pass), 0

    def counted() -> Iterator[NDArray[np.float32]]:
        nonlocal heard_samples
        for block in until_interrupted(endless):
            heard_samples += len(block)
            yield block

    with in_words(loaded.artifact.target, "could not run its artifact"):
        follow(recognizer, counted(), tell, end)
    if not recognizer.latency_ns:
        raise EmptyAudio("Nothing was recorded.", hint="Speak, and end with Ctrl-C.")
    seconds = heard_samples / KALDI_80.sample_rate_hz
    return Streamed(Path("microphone"), seconds, recognizer.said, tuple(recognizer.latency_ns))


def follow(recognizer: Recognizer, blocks: Iterable[NDArray[np.float32]], tell: Tell, end: End = lambda _: None) -> None:
    """Hear blocks of samples, to the last: `tell` gets every partial text that is new, `end` each utterance that is over."""
    told, ended = "", 0
    for block in blocks:
        text = recognizer.accept(block)
        if len(recognizer.said) > ended:
            told = ""
        ended = _end(recognizer.said, ended, end)
        if text not in ("", told):
            tell(text)
        told = text
    recognizer.finish()
    _end(recognizer.said, ended, end)


def _end(said: Sequence[Said], ended: int, end: End) -> int:
    for each in said[ended:]:
        end(each)
    return len(said)


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

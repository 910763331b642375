"""Word error rates of an artifact on speech, with and without hotwords; of Chinese, character error rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse.decode.search import Decoding, begin
from edgefuse.decode.spaceless import units
from edgefuse.decode.tokens import Tokens
from edgefuse.errors import UsageError
from edgefuse.foreign import in_words
from edgefuse.listen import load
from edgefuse.recognize import (
    FRAME_SECONDS,
    Heard,
    answers,
    entry_for,
    hear,
    heard_again,
    heard_in,
    second_passes,
    streaming_entry,
    taken,
)
from edgefuse.speech import MANIFEST, read_speech
from edgefuse.values import ENCODED
from edgefuse.verify.bootstrap import Difference, difference
from edgefuse.verify.wer import WordErrors, count_word_errors, split_word_errors, total

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.bundle import Frontend
    from edgefuse.recognizer import Loaded
    from edgefuse.train.corpora import Corpus

TRAINING = "train"  # the set of a corpus that is not for evaluation
CORPUS = "*.cuts.jsonl.gz", "*recordings_*.jsonl.gz", "train-*", "LibriSpeech", "data_aishell"  # what a corpus folder holds


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One test set, searched in one way.

    Attributes:
        subset: the test set.
        decoding: how it was searched.
        utterances: the errors in each, in order.
        hotwords: on the words of the hotwords, and on all others; None where there are no hotwords.
        false_hotwords: how often such a word was heard where another was said, or none.
    """

    subset: str
    decoding: Decoding
    utterances: tuple[WordErrors, ...]
    hotwords: tuple[WordErrors, WordErrors] | None
    false_hotwords: int

    @property
    def errors(self) -> WordErrors:
        """On all words."""
        return total(self.utterances)


def evaluate(
    path: Path,
    speech: Path,
    decoding: Decoding,
    *,
    sets: Sequence[str],
    live: bool,
    whole: bool = False,
    second_pass: bool = False,
    tell: Callable[[str], AbstractContextManager[None]],
) -> tuple[Evaluation, ...]:
    """Transcribe test sets with one artifact, `live` in chunks; with hotwords each set twice, first without them.

    Without `live` what is too long for a whole entry is heard in chunks, unless it must be `whole`: then it is refused.
    With `second_pass` a cascade hears each utterance again behind its chunks, but those that are too long for it.
    `speech` is a folder with a manifest, or a corpus; without `sets`, all that it has (of a corpus, not what trains).
    """
    loaded = load(path)
    if second_pass:
        second_passes(loaded.artifact)  # what has none is told before the work
    begin(decoding, Tokens(loaded.bundle.tokens))  # a hotword that cannot be spelled is told before the work
    found: list[Evaluation] = []
    for name in _names(speech, sets):
        with tell(f"Listening to {name}"), in_words(loaded.artifact.target, "could not run its artifact"):
            heard = _read(speech, name, loaded.bundle.frontend)
            logits = [_logits(loaded, each, live=live, whole=whole, second_pass=second_pass) for each in heard]
        texts = [each.text for each in heard]
        ways = (replace(decoding, hotwords={}), decoding) if decoding.hotwords else (decoding,)
        found += (_evaluate(name, texts, logits, way, Tokens(loaded.bundle.tokens), decoding.hotwords) for way in ways)
    return tuple(found)


def require(path: Path, *, live: bool) -> None:
    """Raise an error where there is no artifact, or none that streams if it is to be heard `live`."""
    artifact = load(path).artifact
    if live:
        streaming_entry(artifact)


def against(found: Sequence[Evaluation], others: Sequence[Evaluation]) -> tuple[Difference, ...]:
    """How far each is from that of another artifact on the same speech."""
    return tuple(
        difference(one.subset, [*zip(other.utterances, one.utterances, strict=True)])
        for one, other in zip(found, others, strict=True)
    )


def _evaluate(
    name: str,
    references: Sequence[str],
    logits: Iterable[NDArray[np.float32]],
    decoding: Decoding,
    tokens: Tokens,
    hotwords: Iterable[str],
) -> Evaluation:
    search = begin(decoding, tokens)
    texts = [tokens.decode(search.accept(each).best.ids) for each in logits]
    words = {word for phrase in hotwords for word in phrase.split()}
    inside, outside, false = split_word_errors(references, texts, words)
    spoken = tuple(count_word_errors([said], [heard]) for said, heard in zip(*units(references, texts), strict=True))
    return Evaluation(name, decoding, spoken, (inside, outside) if words else None, false)


def _logits(loaded: Loaded, heard: Heard, *, live: bool, whole: bool, second_pass: bool) -> NDArray[np.float32]:
    seconds = len(heard.features) * FRAME_SECONDS
    artifact = loaded.artifact
    entry = streaming_entry(artifact) if live else entry_for(artifact, Path(heard.identity), len(heard.features), seconds)
    if whole and entry in artifact.streaming:
        raise UsageError(
            f"{artifact.path} cannot hear {heard.identity}, of {seconds:.2f} s, as a whole.",
            hint="Export it with both: --seconds 15 --chunk-ms 640",
        )
    given = answers(loaded.session, artifact, entry, taken(heard, artifact.inputs[entry]))
    again = heard_again(loaded.session, artifact, given[ENCODED]) if second_pass else None
    return given[artifact.outputs[entry][0].name] if again is None else again


def _names(speech: Path, sets: Sequence[str]) -> tuple[str, ...]:
    if (speech / MANIFEST).is_file() or not any(any(speech.glob(name)) for name in CORPUS):
        held = tuple(dict.fromkeys(each.subset for each in read_speech(speech).utterances))
    else:
        held = tuple(name for name in _corpus(speech).sets if name != TRAINING or name in sets)
    if unknown := [name for name in sets if name not in held]:
        raise UsageError(f"{speech} has no set {unknown[0]!r}.", hint=f"It has: {', '.join(held)}")
    return tuple(sets) or held


def _read(speech: Path, name: str, frontend: Frontend) -> tuple[Heard, ...]:
    if (speech / MANIFEST).is_file():
        test_set = read_speech(speech)
        return hear(replace(test_set, utterances=tuple(each for each in test_set.utterances if each.subset == name)), frontend)
    return tuple(
        heard_in(Path(cut.recording.sources[0].source), frontend, cut.id, cut.supervisions[0].text)
        for cut in _corpus(speech).cuts(name)
    )


def _corpus(speech: Path) -> Corpus:
    from edgefuse.train.corpora import open_corpus

    return open_corpus(speech, speech / "features")

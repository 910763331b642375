"""What was heard, and the word errors of it, as lines and tables of words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgefuse.decode.spelling import Said

if TYPE_CHECKING:
    from edgefuse.evaluate import Evaluation
    from edgefuse.recognize import Transcript
    from edgefuse.recognizer import Streamed
    from edgefuse.train.metrics import Trained
    from edgefuse.verify.bootstrap import Difference
    from edgefuse.verify.wer import WordErrors

STREAMED = ("recording", "length", "chunks", "real-time factor", "p50", "p90", "p99")
EVALUATED = ("test set", "search", "WER", "on hotwords", "on other words", "false hotwords", "words", "utterances")
AGAINST = ("test set", "search", "WER", "the other's", "difference in points", "95 % of them", "utterances that differ")
ERRORS = ("test set", "WER", "errors", "words", "utterances")
CHARACTER_ERRORS = ("test set", "CER", "errors", "characters", "utterances")


def transcript_lines(heard: Sequence[Transcript], *, timestamps: bool = False) -> list[str]:
    """The text of each utterance, with the file's name where there are several files; words below it if `timestamps`."""
    names = ["" if len(heard) == 1 else f"{each.path}: " for each in heard]
    return [
        line
        for each, name in zip(heard, names, strict=True)
        for said in each.said or (Said(()),)
        for line in said_lines(said, name, timestamps=timestamps)
    ]


def said_lines(said: Said, name: str = "", *, timestamps: bool) -> list[str]:
    """The text of one utterance; if `timestamps`, below it each word with its begin and end in seconds."""
    words = (f"{word.start_s:8.2f} {word.end_s:8.2f}  {word.text}" for word in said.words)
    return [f"{name}{said.text}", *(words if timestamps else ())]


def transcripts_json(heard: Sequence[Transcript]) -> list[dict[str, Any]]:
    """The same for programs, words with their times always."""
    return [
        {
            "path": str(each.path),
            "seconds": each.seconds,
            "text": each.text,
            "utterances": [
                {"text": said.text, "words": list(map(dataclasses.asdict, said.words)), "second_pass": said.second_pass}
                for said in each.said
            ],
        }
        for each in heard
    ]


def first_pass_lines(heard: Sequence[Streamed]) -> list[str]:
    """Of each utterance that was to be heard by a second pass and was not, why."""
    return [
        f"{each.path.name}, from {said.words[0].start_s:.2f} s: longer than the second pass takes; the first pass's text stays"
        for each in heard
        for said in each.said
        if not said.second_pass
    ]


def streamed_rows(heard: Sequence[Streamed]) -> list[tuple[str, ...]]:
    """One row per recording, in the order of `STREAMED`."""
    return [
        (
            each.path.name,
            f"{each.seconds:.2f} s",
            str(len(each.latency_ns)),
            f"{each.real_time_factor:.4f}",
            *(f"{each.latency_ms(percent):.1f} ms" for percent in (50, 90, 99)),
        )
        for each in heard
    ]


def streamed_json(heard: Sequence[Streamed]) -> list[dict[str, Any]]:
    """The same for programs, with every sample."""
    return [
        {**told, "real_time_factor": each.real_time_factor, "latency_ns": list(each.latency_ns)}
        for told, each in zip(transcripts_json(heard), heard, strict=True)
    ]


def error_rows(errors: Mapping[str, WordErrors]) -> list[tuple[str, ...]]:
    """One row per test set, in the order of `ERRORS`."""
    return [
        (name, f"{counted.wer_percent:.2f} %", str(counted.errors), str(counted.words), str(counted.utterances))
        for name, counted in errors.items()
    ]


def trained_json(trained: Trained) -> dict[str, Any]:
    """The same for programs, and where the checkpoint is."""
    return {
        "checkpoint": str(trained.folder),
        "counted": "characters" if trained.characters else "words",
        "errors": {name: errors_json(counted) for name, counted in trained.errors.items()},
    }


def evaluated_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """One row per test set and search, in the order of `EVALUATED`; of the hotwords' words, errors of how many said."""
    return [
        (
            each.subset,
            _search(each),
            _percent(each.errors),
            *(f"{_percent(part)} ({part.errors} of {part.words})" for part in each.hotwords or ()),
            *(() if each.hotwords else ("-", "-")),
            str(each.false_hotwords) if each.hotwords else "-",
            str(each.errors.words),
            str(each.errors.utterances),
        )
        for each in evaluations
    ]


def against_rows(evaluations: Sequence[Evaluation], apart: Sequence[Difference]) -> list[tuple[str, ...]]:
    """How far each is from another artifact's, in the order of `AGAINST`."""
    return [
        (
            each.subset,
            _search(each),
            _percent(by.artifact),
            _percent(by.model),
            f"{by.points:+.2f}",
            "{:+.2f} to {:+.2f}".format(*by.interval),
            f"{by.changed} of {by.model.utterances}",
        )
        for each, by in zip(evaluations, apart, strict=True)
    ]


def evaluated_json(evaluations: Sequence[Evaluation], apart: Sequence[Difference] = ()) -> list[dict[str, Any]]:
    """The same for programs."""
    from edgefuse.verify.bootstrap import LEVEL_PERCENT

    return [
        {
            "set": each.subset,
            "beam": each.decoding.beam,
            "hotwords": len(each.decoding.hotwords),
            "errors": errors_json(each.errors),
            **(
                {
                    "on_hotwords": errors_json(each.hotwords[0]),
                    "on_other_words": errors_json(each.hotwords[1]),
                    "false_hotwords": each.false_hotwords,
                }
                if each.hotwords
                else {}
            ),
            **(
                {
                    "against": {
                        "errors": errors_json(by.model),
                        "points": by.points,
                        f"interval_{LEVEL_PERCENT}_percent": list(by.interval),
                        "changed_utterances": by.changed,
                    }
                }
                if by
                else {}
            ),
        }
        for each, by in itertools.zip_longest(evaluations, apart)
    ]


def _search(each: Evaluation) -> str:
    beam = "greedy" if each.decoding.beam == 1 else f"beam {each.decoding.beam}"
    return f"{beam}, {len(each.decoding.hotwords)} hotwords" if each.decoding.hotwords else beam


def _percent(errors: WordErrors) -> str:
    return f"{errors.wer_percent:.2f} %" if errors.words else "-"


def errors_json(errors: WordErrors) -> dict[str, Any]:
    """Word errors for programs; of no words there is no rate."""
    return {**dataclasses.asdict(errors), "wer_percent": errors.wer_percent if errors.words else None}

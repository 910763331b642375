"""The deliberate failures of corpus making.

CorpusError            exit code 1
├── EngineMissing      exit code 3   a speech engine or one of its voices is not installed
├── EngineFailed       exit code 4   an engine ran and did not deliver sound
└── OtherRecipe        exit code 5   the folder holds a corpus that another recipe made
"""

from __future__ import annotations


class CorpusError(Exception):
    """A failure to tell the user about: one sentence that says what and where, one hint with the next command."""

    exit_code = 1

    def __init__(self, sentence: str, *, hint: str) -> None:
        """Keep the sentence as the message and the hint beside it."""
        super().__init__(sentence)
        self.hint = hint


class EngineMissing(CorpusError):
    """A speech engine or one of its voices is not installed."""

    exit_code = 3


class EngineFailed(CorpusError):
    """An engine ran and did not deliver sound."""

    exit_code = 4


class OtherRecipe(CorpusError):
    """The folder holds a corpus that another recipe made."""

    exit_code = 5

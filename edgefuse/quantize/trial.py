"""What a scheme does to the answers, tried in PyTorch on speech: nothing is exported, so that hundreds can be tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgefuse.decode.greedy import greedy_text
from edgefuse.quantize.graph import quantized
from edgefuse.quantize.plan import plan
from edgefuse.recognize import answer, fit
from edgefuse.values import Artifact
from edgefuse.verify.wer import WordErrors, count_word_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgefuse.decode.tokens import Tokens
    from edgefuse.quantize.plan import Plan
    from edgefuse.quantize.scheme import Scheme
    from edgefuse.recognize import Heard
    from edgefuse.target import Session
    from edgefuse.values import Entry, Program

SILENT_DB = 300.0  # no error at all
Tell = Callable[[str], AbstractContextManager[object]]
Quantize = Callable[["Scheme"], "Program"]


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found out about answers, held against those of the float graph.

    Attributes:
        noise: power of the error of all logits, divided by the power of the float logits.
        agreeing_frames: frames whose best token is the float graph's.
        frames: all of them.
        errors: on words.
    """

    noise: float
    agreeing_frames: int
    frames: int
    errors: WordErrors

    @property
    def snr_db(self) -> float:
        """The same as a ratio of signal to noise."""
        return SILENT_DB if self.noise == 0.0 else -10.0 * math.log10(self.noise)

    @property
    def agreement_percent(self) -> float:
        """How many frames of a hundred have the float graph's best token."""
        return 100.0 * self.agreeing_frames / self.frames


class Trials:
    """One entry of a model, and speech to try schemes on."""

    def __init__(self, program: Program, quantize: Quantize, heard: Sequence[Heard], tokens: Tokens) -> None:
        """Listen with the float graph; `quantize` lays a scheme out on the program, whose only entry is tried."""
        (self._entry,) = program.entries
        (mode,) = program.modes
        self._quantize, self._tokens, self._heard = quantize, tokens, fit(heard, mode)
        self._exact = [self._answer(self._entry.graph, each) for each in self._heard]
        self.exact = self._judge(self._exact)

    def of(self, scheme: Scheme) -> Trial:
        """Try a scheme."""
        entry, laid_out = self._laid_out(scheme)
        graph = quantized(entry.graph, laid_out)
        return self._judge([self._answer(graph, each) for each in self._heard])

    def heard_by(self, session: Session, artifact: Artifact) -> Trial:
        """The same of an artifact of the program."""
        return self._judge([answer(session, artifact, self._entry.name, each.features) for each in self._heard])

    def plan(self, scheme: Scheme) -> Plan:
        """How a scheme lies on the entry."""
        return self._laid_out(scheme)[1]

    def _laid_out(self, scheme: Scheme) -> tuple[Entry, Plan]:
        program = self._quantize(scheme)
        (entry,) = program.entries
        ranges = program.quantization.ranges.get(entry.name, {}) if program.quantization else {}
        return entry, plan(entry.graph, scheme, ranges)

    def _answer(self, graph: nn.Module, heard: Heard) -> NDArray[np.float32]:
        return answer(_InPyTorch(graph, self._entry), _artifact(self._entry), self._entry.name, heard.features)

    def _judge(self, given: Sequence[NDArray[np.float32]]) -> Trial:
        pairs = list(zip(self._exact, given, strict=True))
        error = sum(float(np.square(exact.astype(np.float64) - each).sum()) for exact, each in pairs)
        power = sum(float(np.square(exact.astype(np.float64)).sum()) for exact in self._exact)
        return Trial(
            noise=error / power,
            agreeing_frames=sum(int((exact.argmax(-1) == each.argmax(-1)).sum()) for exact, each in pairs),
            frames=sum(len(exact) for exact in self._exact),
            errors=count_word_errors([each.text for each in self._heard], [greedy_text(each, self._tokens) for each in given]),
        )


class _InPyTorch:
    """The graph of an entry as a session; satisfies `edgefuse.target.Session`."""

    how = "run on this host"

    def __init__(self, graph: nn.Module, entry: Entry) -> None:
        self._graph, self._entry = graph, entry

    @torch.no_grad()
    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once."""
        assert entry == self._entry.name, "there is one"  # noqa: S101 - `Trials` has no other
        answers = self._graph(*(torch.from_numpy(inputs[spec.name]) for spec in self._entry.inputs))
        outputs: tuple[Tensor, ...] = answers if isinstance(answers, tuple) else (answers,)
        return {spec.name: output.numpy() for spec, output in zip(self._entry.outputs, outputs, strict=True)}


def _artifact(entry: Entry) -> Artifact:
    """An entry as what an artifact would say of it."""
    streaming = {entry.name: entry.streaming} if entry.streaming else {}
    return Artifact(
        "PyTorch", Path(), "fp32", {entry.name: entry.inputs}, {entry.name: entry.outputs}, parent="", streaming=streaming
    )

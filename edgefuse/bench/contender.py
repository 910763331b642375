"""An artifact that is ready to be timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgefuse.errors import UsageError
from edgefuse.frontend.intake import intake_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgefuse.target import Session
    from edgefuse.values import Artifact, Mode, TensorSpec


@dataclass(frozen=True, slots=True)
class Contender:
    """One way into a loaded artifact, and what goes in."""

    session: Session
    entry: str
    inputs: Mapping[str, NDArray[np.float32]]

    def __call__(self) -> object:
        """Answer once."""
        return self.session.run(self.entry, self.inputs)


def contender(session: Session, artifact: Artifact, mode: Mode) -> Contender:
    """The shortest entry of a mode, filled with noise.

    Raises:
        UsageError: the artifact is evaluated here, not run.
    """
    if session.how == "evaluated":
        raise UsageError(
            f"{artifact.target} is evaluated here, not run: it has no latency.", hint="Time it on a device that has its runtime."
        )
    entry = next(iter(mode.inputs))
    return Contender(session, entry, noise(artifact.inputs[entry]))  # its own: another artifact may have other caches


def noise(specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """What an entry takes: filled to its end with noise of the range of normalized features, its caches zeros."""
    heard, length, *caches = specs
    whole = heard.shape[1] // intake_of(specs).per_length
    features = np.random.default_rng(0).standard_normal(heard.shape).astype(np.float32)
    given = {heard.name: features, length.name: np.full(length.shape, whole, np.float32)}
    return given | {cache.name: np.zeros(cache.shape, np.float32) for cache in caches}

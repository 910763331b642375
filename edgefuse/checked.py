"""A session that says what is wrong with its inputs, before the runtime sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgefuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from edgefuse.target import Session
    from edgefuse.values import Artifact, TensorSpec


class Checked:
    """An artifact's session; satisfies `edgefuse.target.Session`."""

    def __init__(self, session: Session, artifact: Artifact) -> None:
        """Hold `session` to the contract of `artifact`."""
        self._session, self._artifact = session, artifact
        self.how = session.how

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once.

        Raises:
            UsageError: an entry that the artifact lacks, or an input that is not as its spec says. Nothing has run then: an
                utterance that the artifact holds is as it was before.
        """
        if entry not in self._artifact.inputs:
            held = ", ".join(self._artifact.inputs)
            raise UsageError(f"{self._artifact.path} has no entry {entry!r}.", hint=f"It has: {held}")
        problems = list(_problems(self._artifact.inputs[entry], inputs))
        if problems:
            raise UsageError(f"{entry} cannot take this: {'; '.join(problems)}.", hint="The contract is in edgefuse.json.")
        return self._session.run(entry, inputs)


def _problems(specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[np.float32]]) -> Iterator[str]:
    names = {spec.name for spec in specs}
    yield from (f"{name} is not an input" for name in inputs if name not in names)
    for spec in specs:
        if spec.name not in inputs:
            yield f"{spec.name} is missing"
            continue
        given = np.asarray(inputs[spec.name])
        if (given.dtype, given.shape) != (np.dtype(spec.dtype), spec.shape):
            yield f"{spec.name} is {given.dtype} of shape {given.shape}, not {spec.dtype} of shape {spec.shape}"
        elif not np.isfinite(given).all():
            yield f"{spec.name} has values that are NaN or infinite"

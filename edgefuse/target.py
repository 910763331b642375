"""What a target is, and the shelf on which they stand.

A target is a module with these functions. The shelf is the `edgefuse.targets` entry point group; a module is imported at the
moment of use, its runtime inside its functions.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol, cast

from edgefuse.errors import MissingPackage, UnknownTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.values import Artifact, Program, Structure


class Session(Protocol):
    """An artifact that is loaded and answers."""

    how: str  # "run on this host", or "evaluated"

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once; names and shapes are those of the artifact's specs."""
        ...


class Opened(Session, Protocol):
    """A session whose steps can be taken one by one, so that the runtime's own work can be timed alone; `run` is all three."""

    def give(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Put in what the next call takes."""
        ...

    def call(self, entry: str) -> None:
        """Let the runtime compute, and nothing else."""
        ...

    def answers(self, entry: str) -> Mapping[str, NDArray[np.float32]]:
        """What the last call answered; it stays when the next call comes."""
        ...


class Target(Protocol):
    """One runtime."""

    SUFFIX: str  # of its artifacts, with the dot
    SUMMARY: str  # one line for `edgefuse targets`

    def missing(self) -> Sequence[str]:
        """Packages, as pip requirements, that are not installed; imports nothing heavy."""
        ...

    def refusals(self, program: Program) -> Sequence[str]:
        """Say in sentences why this program cannot be honoured; empty means it can."""
        ...

    def export(self, program: Program, folder: Path, name: str) -> Artifact:
        """Write `folder/name + SUFFIX`; the same program gives the same bytes."""
        ...

    def ready(self, threads: int = 1) -> None:
        """Import the runtime and make its threads, as an application does once, before it loads anything."""
        ...

    def open(self, artifact: Artifact, threads: int = 1, *, warm: bool = True) -> Opened:
        """Load every entry of it here, for verification and timing; `warm`: what a runtime leaves to the first call is done."""
        ...

    def profile(self, artifact: Artifact, entry: str, inputs: Mapping[str, NDArray[np.float32]], threads: int = 1) -> Profile:
        """Where the time of a call goes, operator by operator, on this host; the inputs are of its first call.

        Raises:
            Refused: the runtime does not tell, or does not run here.
        """
        ...

    def structure(self, artifact: Artifact) -> Structure:
        """Read what is inside, from the artifact itself."""
        ...


def shelf() -> Mapping[str, EntryPoint]:
    """Every target that is installed, by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group="edgefuse.targets"), key=lambda point: point.name)}


def find(name: str) -> Target:
    """The target of that name, its packages present."""
    points = shelf()
    if name not in points:
        raise UnknownTarget(f"There is no target {name!r}.", hint="See the targets with: edgefuse targets")
    target = cast("Target", points[name].load())
    if lacking := target.missing():
        raise MissingPackage(
            f"The target {name!r} needs {', '.join(lacking)}, which is not installed.",
            hint=f"Install it with: pip install {' '.join(lacking)}",
        )
    return target

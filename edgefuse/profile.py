"""Where the time of a call goes, in every artifact and every entry of a bundle, on this host: by the runtimes' own profilers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse import device as devices
from edgefuse import store
from edgefuse.bench.feed import feed_of
from edgefuse.errors import DeviceRefused, RunFailed, UsageError
from edgefuse.measurement import QUICK, Job, Profile

if TYPE_CHECKING:
    from edgefuse.bundle import Bundle
    from edgefuse.values import Artifact

Tell = Callable[[str], AbstractContextManager[object]]
HOST = "host"


@dataclass(frozen=True, slots=True)
class Profiled:
    """An entry of an artifact, and where its time goes; or why that cannot be told.

    Attributes:
        target: the runtime.
        precision: of its arithmetic.
        entry: the way in.
        profile: in a process of its own; None where there is a refusal.
        refusal: in words; "" where there is a profile.
    """

    target: str
    precision: str
    entry: str
    profile: Profile | None
    refusal: str = ""


def profile(folder: Path, targets: Sequence[str], tell: Tell) -> list[Profiled]:
    """Profile every entry of the artifacts of a bundle; of `targets` alone, if any are named.

    Raises:
        UsageError: the bundle has no such artifact.
        DeviceRefused: nothing of what was asked for can be profiled.
    """
    with tell("Checking the checksums"):
        bundle = store.read_bundle(folder)
    artifacts = [each.artifact for each in bundle.exports if not targets or each.artifact.target in targets]
    if not artifacts or (absent := set(targets) - {each.target for each in artifacts}):
        told = ", ".join(sorted(absent)) if artifacts else "artifact"
        raise UsageError(f"{folder} has no {told}.", hint="See what it holds with: edgefuse verify BUNDLE")
    with devices.connect(HOST) as host:
        found = [each for artifact in artifacts for each in _of(host, bundle, artifact, tell)]
    if not any(each.profile for each in found):
        raise DeviceRefused(found[0].refusal, hint="Profile other targets: -t executorch -t tflite")
    return found


def _of(host: devices.Connection, bundle: Bundle, artifact: Artifact, tell: Tell) -> Iterator[Profiled]:
    refusal = host.refusal(artifact)
    for mode in artifact.modes:
        for entry in mode.inputs:
            told = Profiled(artifact.target, artifact.precision, entry, None, refusal or "")
            if refusal:
                yield told
                continue
            feed = feed_of(artifact, entry, bundle.references[mode.name].goldens, few=True)
            with tell(f"Profiling {artifact.target}, {artifact.precision}, {entry}"):
                try:
                    run = host.run(Job(artifact, entry, feed, QUICK, "profile"))
                except (UsageError, RunFailed) as error:  # one that dies does not take the others with it
                    yield replace(told, refusal=error.sentence)
                    continue
            yield replace(told, profile=Profile(run.profile, run.profiled_ns or 0))

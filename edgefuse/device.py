"""What a device is, and the shelf on which they stand.

A device is a module with these functions, as a target is. The shelf is the `edgefuse.devices` entry point group; a module is
imported at the moment of use, and what it needs inside its functions.

One syntax names devices everywhere: `NAME` or `NAME:WHICH`, for example `host`, `arm64:cortex-a53`, `ssh:pi@board`, `adb:SERIAL`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgefuse.errors import DeviceBusy, DeviceMissing, UnknownDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgefuse.measurement import DeviceInfo, Job, Run
    from edgefuse.values import Artifact

GROUP = "edgefuse.devices"
THIS_MACHINE = "this machine"
Tell = "Callable[[str], AbstractContextManager[object]]"  # progress: a sentence about what is being done


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that a device needs and that is not there, and the command that mends it."""

    what: str
    mend: str


class Connection(Protocol):
    """A device that is ours for the moment."""

    info: DeviceInfo

    def refusal(self, artifact: Artifact) -> str | None:
        """Say in a sentence why the device cannot run this artifact; None means it can."""
        ...

    def conditions(self) -> Mapping[str, str]:
        """What may change while it works, in words: temperature, governor, battery, load; "not told" where it is silent."""
        ...

    def run(self, job: Job) -> Run:
        """Run a job in a fresh process.

        Raises:
            RunFailed: the process died, hung, or said what nobody understands: the next job may do better.
            DeviceGone: the device does not answer any more.
            UsageError: the device cannot do what is wanted (no profile, no such number of threads), in words.
        """
        ...


class Device(Protocol):
    """One kind of device."""

    SUMMARY: str  # one line for `edgefuse devices`
    HERE: bool  # whether its times are those of this machine's own cores, which one benchmark has at a time

    def missing(self) -> Sequence[Lack]:
        """What is not there; imports nothing heavy, and takes no time."""
        ...

    def found(self) -> Sequence[DeviceInfo]:
        """The devices of this kind that can be used now; empty, never an error, where something is missing."""
        ...

    def connect(self, which: str) -> AbstractContextManager[Connection]:
        """Take the device that `which` names ("" the usual one), make it ready, and clean it up behind the block.

        Raises:
            UnknownDevice: there is no such device.
            DeviceRefused: it is there, but does not let us in.
            DeviceGone: it does not answer.
        """
        ...

    def setup(self, tell: Callable[[str], AbstractContextManager[object]]) -> None:
        """Fetch and build what it needs; goes on where it was stopped. A `UsageError` where there is nothing to set up."""
        ...


def shelf() -> Mapping[str, EntryPoint]:
    """Every kind of device that is installed, by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def kind(name: str) -> Device:
    """The kind of that name, whether what it needs is there or not."""
    points = shelf()
    if name not in points:
        raise UnknownDevice(
            f"There is no kind of device {name!r}.", hint=f"There are: {', '.join(points)}; see them with: edgefuse devices"
        )
    return cast("Device", points[name].load())


def split(spec: str) -> tuple[str, str]:
    """The kind of device that a specification names, and which of them ("" the usual one)."""
    name, _, which = spec.partition(":")
    return name, which


@contextmanager
def connect(spec: str) -> Iterator[Connection]:
    """The device that a specification names, for the length of the block ours alone.

    Raises:
        UnknownDevice: no such kind, or no such device.
        DeviceMissing: something that it needs is not there.
        DeviceBusy: another benchmark has it.
        DeviceRefused: it does not let us in.
        DeviceGone: it does not answer.
    """
    name, which = split(spec)
    device = kind(name)
    if lacking := device.missing():
        raise DeviceMissing(
            f"The device {spec!r} needs {', '.join(lack.what for lack in lacking)}.",
            hint=f"Mend it with: {'; '.join(dict.fromkeys(lack.mend for lack in lacking))}",
        )
    with _alone(THIS_MACHINE if device.HERE else spec), device.connect(which) as connection:
        own = connection.info.spec  # of what was asked for as "adb" the lock is that of "adb:SERIAL", too
        with nullcontext() if device.HERE or own == spec else _alone(own):
            yield connection


def cache() -> Path:
    """Where devices keep what they fetch and build; `EDGEFUSE_CACHE` names another place."""
    told = os.environ.get("EDGEFUSE_CACHE")
    if told:
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefuse"


@contextmanager
def _alone(spec: str) -> Iterator[None]:
    """Nobody else measures on the device: two at once would slow each other down. The lock dies with its process."""
    folder = cache() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / hashlib.sha256(spec.encode()).hexdigest()[:16]
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeviceBusy(f"Another benchmark runs on {spec}.", hint="Wait until it has ended, then try again.") from error
        yield
    finally:
        os.close(descriptor)

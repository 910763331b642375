"""This host: the runtimes as they are installed here, each job in a Python process of its own.

Times are the host's own and no phone's: they compare artifacts with each other, and find what has become slower.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from edgefuse import target as targets
from edgefuse.errors import EdgefuseError, Refused, UnknownDevice, UsageError
from edgefuse.measurement import NOT_TOLD, DeviceInfo, OperatorTime
from edgefuse_devices import process
from edgefuse_devices.host_worker import PROFILE, Asked
from edgefuse_devices.plan import garbage, read_run, write_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from edgefuse.device import Lack
    from edgefuse.measurement import Job, Run
    from edgefuse.values import Artifact

SUMMARY = "this host, by the runtimes that are installed here"
HERE = True

NAME = "host"
RUNTIMES = ("executorch", "ai-edge-litert", "torch", "coremltools", "numpy")
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")  # of what runtimes compute with
EVALUATED = {"coreml": "Darwin"}  # where what is only evaluated elsewhere is run
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
LOADAVG = Path("/proc/loadavg")
CPUINFO = Path("/proc/cpuinfo")
AGAIN = "Run it once more; see what it printed with: -v"


def missing() -> Sequence[Lack]:
    """Nothing: whoever runs this has a host."""
    return []


def found() -> Sequence[DeviceInfo]:
    """This host."""
    return [_info()]


@contextmanager
def connect(which: str) -> Iterator[_Connection]:
    """This host; there is no other.

    Raises:
        UnknownDevice: another one is asked for.
    """
    if which:
        raise UnknownDevice(f"There is no host {which!r}: this is the only one.", hint="Measure here with: --device host")
    yield _Connection(_info())


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:  # noqa: ARG001 - the protocol's argument
    """Refuse: there is nothing to set up."""
    raise UsageError("The host needs no set-up.", hint="See what it can run with: edgefuse doctor")


@dataclass(frozen=True, slots=True)
class _Connection:
    """This host."""

    info: DeviceInfo

    def refusal(self, artifact: Artifact) -> str | None:
        """What is evaluated here, not run, and what is not installed."""
        system = EVALUATED.get(artifact.target)
        if system not in (None, platform.system()):
            return f"{artifact.target} is evaluated here, not run: it has no latency away from a Mac."
        try:
            targets.find(artifact.target)
        except EdgefuseError as error:
            return error.sentence
        return None

    def conditions(self) -> Mapping[str, str]:
        """Load, what runs besides, governor, frequency and temperature, as far as the system tells."""
        frequency = _quietly(psutil.cpu_freq)
        return {
            "load": f"{psutil.getloadavg()[0]:.2f}",
            "running": _running(),
            "governor": _line_of(CPUFREQ / "scaling_governor"),
            "frequency": f"{frequency.current:.0f} MHz" if frequency and frequency.current else NOT_TOLD,
            "temperature": _temperature(),
        }

    def run(self, job: Job) -> Run:
        """Run a job in a Python process of its own.

        Raises:
            RunFailed: the process died, hung, or said what nobody understands.
            UsageError: there are no such cores, or the runtime has no profile.
        """
        if sentence := _impossible(job):
            raise UsageError(*sentence)
        with tempfile.TemporaryDirectory(prefix="edgefuse-") as name:
            folder, routine = Path(name), job.routine
            model = f"model{job.artifact.path.suffix}"
            (folder / model).symlink_to(job.artifact.path.resolve())
            write_plan(folder, job, model=model, exact=job.want != "latency")
            _asked(job).write(folder)
            ended = process.run(_argv(folder), limit_s=routine.limit_s, env=_environment(routine.threads))
            if ended.code == Refused.exit_code:
                raise UsageError(ended.stderr.strip().splitlines()[-1])
            process.checked(ended, "The process", hint=AGAIN)
            run = read_run(folder, ended.stdout, job, "host")
            return _with_profile(run, folder, ended.stdout) if job.want == "profile" else run


def _argv(folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "edgefuse_devices.host_worker", str(folder)]


def _asked(job: Job) -> Asked:
    inputs, outputs = (
        {spec.name: spec.shape for spec in specs[job.entry]} for specs in (job.artifact.inputs, job.artifact.outputs)
    )
    return Asked(job.artifact.target, inputs, outputs, job.routine.cores, profile=job.want == "profile")


def _environment(threads: int) -> dict[str, str]:
    """Ours, but no library makes more threads than the runtime may."""
    return {**os.environ, **dict.fromkeys(POOLS, str(threads))}


def _impossible(job: Job) -> tuple[str, str] | None:
    """Why a job cannot be run here, and what to do about it."""
    cores = job.routine.cores
    if not cores:
        return None
    if not hasattr(os, "sched_getaffinity"):
        return "This system does not bind processes to cores.", "Leave --cores out."
    ours = os.sched_getaffinity(0)
    if absent := sorted(set(cores) - ours):
        told = ", ".join(map(str, sorted(ours)))
        return f"This host has no core {', '.join(map(str, absent))} for us.", f"There are: {told}"
    return None


def _with_profile(run: Run, folder: Path, stdout: str) -> Run:
    """The run with the operators that the process left beside its answers."""
    try:
        content: Any = json.loads((folder / PROFILE).read_text(encoding="utf-8"))
        operators = tuple(OperatorTime(**each) for each in content["operators"])
        return replace(run, profile=operators, profiled_ns=int(content["call_ns"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise garbage(stdout) from error


def _info() -> DeviceInfo:
    facts = _facts()
    return DeviceInfo(NAME, f"this host, {facts['chip']}", "host", facts)


def _facts() -> Mapping[str, str]:
    installed = {name: told for name in RUNTIMES if (told := _version(name))}
    return {
        "chip": _chip(),
        "cores": f"{psutil.cpu_count(logical=False) or NOT_TOLD}, {psutil.cpu_count() or NOT_TOLD} logical",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.1f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "runtimes": ", ".join(f"{name} {told}" for name, told in installed.items()),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _chip() -> str:
    """The processor's name, as the system tells it."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or NOT_TOLD


def _running() -> str:
    """How many threads compute at this moment, ourselves left out."""
    told = _line_of(LOADAVG).split()
    return str(max(0, int(told[3].partition("/")[0]) - 1)) if len(told) > 3 else NOT_TOLD  # noqa: PLR2004 - its fourth field


def _temperature() -> str:
    """Of the hottest sensor."""
    sensors = _quietly(getattr(psutil, "sensors_temperatures", dict)) or {}
    degrees = [sensor.current for each in sensors.values() for sensor in each if sensor.current]
    return f"{max(degrees):.0f} °C" if degrees else NOT_TOLD


def _quietly(ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever psutil tells
    """What psutil tells, or nothing where the system does not let it look."""
    try:
        return ask()
    except (OSError, NotImplementedError, RuntimeError):
        return None


def _line_of(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip() or NOT_TOLD
    except (OSError, UnicodeDecodeError):
        return NOT_TOLD

"""Core ML on this Mac: `apple` on whatever it chooses, `apple:cpu`, `apple:cpu+gpu` and `apple:cpu+ne` on what it is allowed to.

Written after the documentation of Core ML Tools, `devicectl`, `pmset` and `sysctl`; nothing here has run on Apple hardware.
Attached iPhones and iPads are listed and not measured: the benchmark that Core ML Tools runs on them returns times without
answers.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefuse.device import Lack
from edgefuse.errors import DeviceRefused, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import NOT_TOLD, DeviceInfo, OperatorTime
from edgefuse_devices import process
from edgefuse_devices.apple_worker import SHAPES
from edgefuse_devices.plan import read_run, write_plan
from edgefuse_targets.profiles import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from edgefuse.measurement import Job, Run
    from edgefuse.values import Artifact

SUMMARY = "Core ML on this Mac, on the compute units that are allowed"
HERE = True

TARGET, MODEL = "coreml", "model.mlpackage"
PACKAGE = "coremltools==9.0"
UNITS: Mapping[str, tuple[str, str]] = {  # Core ML Tools' name, and ours in words
    "": ("ALL", "all compute units"),
    "cpu": ("CPU_ONLY", "CPU"),
    "cpu+gpu": ("CPU_AND_GPU", "CPU and GPU"),
    "cpu+ne": ("CPU_AND_NE", "CPU and Neural Engine"),
}
WHERE: Mapping[str, str] = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}
KINDS: Mapping[str, str] = {  # of MIL's operators, where their names do not tell
    "conv": "convolution",
    "matmul": "attention product",
    "stack": "layout",
    "tile": "layout",
}
LOOK_S = 20  # for a fact
NOT_MEASURED = (
    "Core ML Tools' benchmark of an attached device returns times without answers, and nothing would say they are right"
)


def missing() -> Sequence[Lack]:
    """A Mac, and Core ML Tools."""
    if platform.system() != "Darwin":
        return [Lack("macOS", "a Mac, the only place where Core ML runs; here answers are evaluated: edgefuse verify BUNDLE")]
    if importlib.util.find_spec("coremltools") is None:
        return [Lack(f"the package {PACKAGE}", "python -m pip install 'edgefuse[coreml]'")]
    return []


def found() -> Sequence[DeviceInfo]:
    """This Mac, once for each choice of compute units, and what is attached to it."""
    if missing():
        return []
    facts = _facts()
    return [*(_info(which, facts) for which in UNITS), *_attached()]


@contextmanager
def connect(which: str) -> Iterator[_Connection]:
    """This Mac with some of its compute units.

    Raises:
        UnknownDevice: there are no such units, and no such device is attached.
        DeviceRefused: it is an attached device.
    """
    if which not in UNITS:
        known = {info.spec: info.name for info in _attached()}
        if name := known.get(f"apple:{which}"):
            raise DeviceRefused(
                f"{name} is attached, and is not measured: {NOT_MEASURED}.", hint="Measure this Mac: --device apple"
            )
        there = ", ".join(_spec(each) for each in UNITS)
        raise UnknownDevice(f"There is no Apple device {which!r}.", hint=f"There are: {', '.join([there, *known])}")
    yield _Connection(_info(which, _facts()), which)


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:  # noqa: ARG001 - the protocol's argument
    """There is nothing to fetch or build."""
    raise UsageError(
        "There is nothing to set up for Core ML on a Mac.", hint=f"Install its package: python -m pip install {PACKAGE}"
    )


@dataclass(frozen=True, slots=True)
class _Connection:
    """This Mac with some of its compute units."""

    info: DeviceInfo
    which: str

    def refusal(self, artifact: Artifact) -> str | None:
        """Core ML runs its own artifacts alone."""
        return None if artifact.target == TARGET else f"Core ML runs {TARGET} artifacts, and this is one of {artifact.target}."

    def conditions(self) -> Mapping[str, str]:
        """Thermal state and battery."""
        return {"thermal": thermal_in(_said("pmset", "-g", "therm")), "battery": battery_in(_said("pmset", "-g", "batt"))}

    def run(self, job: Job) -> Run:
        """Run a job in a fresh Python.

        Raises:
            RunFailed: it died, hung, or said what nobody understands.
            UsageError: Core ML cannot do what is wanted.
        """
        if job.routine.cores or job.routine.threads > 1:
            raise UsageError("Core ML chooses threads and cores itself.", hint="Leave threads and cores out.")
        with tempfile.TemporaryDirectory(prefix="edgefuse-") as name:
            folder = Path(name)
            write_job(folder, job)
            argv = [sys.executable, "-P", "-m", "edgefuse_devices.apple_worker", name, UNITS[self.which][0], job.want]
            ended = process.checked(process.run(argv, limit_s=job.routine.limit_s, cwd=folder), "Core ML")
            run = read_run(folder, ended.stdout, job, "host")
            return profiled(run, ended.stdout) if job.want == "profile" else run


def write_job(folder: Path, job: Job) -> None:
    """What the worker reads."""
    write_plan(folder, job, model=MODEL)
    (folder / MODEL).symlink_to(job.artifact.path.resolve())
    how = job.artifact.streaming.get(job.entry)
    shapes = {spec.name: spec.shape for spec in job.artifact.inputs[job.entry]}
    (folder / SHAPES).write_text(json.dumps({"shapes": shapes, "holds": bool(how and how.held)}), encoding="utf-8")


def profiled(run: Run, stdout: str) -> Run:
    """The run with its operators: of each name and place how many, and their share of a call as Core ML estimates it.

    Raises:
        RunFailed: the worker told of none.
    """
    call_ns = round(statistics.median(run.samples.values))
    count: Counter[tuple[str, str]] = Counter()
    share: Counter[tuple[str, str]] = Counter()
    for name, device, weight in json.loads(stdout.strip().splitlines()[-1]).get("operators", ()):
        place = name.rpartition(".")[2], WHERE.get(device, device)
        count[place] += 1
        share[place] += weight
    if not count:
        raise RunFailed("Core ML has no plan for this artifact.", hint="Profile on another device, for example: --device host")
    rows = [
        OperatorTime(name, KINDS.get(name) or kind_of(name), where, count[name, where], round(share[name, where] * call_ns))
        for name, where in count
    ]
    told = {name: value for name, value in run.told.items() if name != "operators"}
    return replace(
        run,
        profile=tuple(sorted(rows, key=lambda row: -row.time_ns)),
        profiled_ns=call_ns,
        told={**told, "profile": "shares of a call as Core ML estimates them, not measured"},
    )


def devices_in(listing: str) -> Sequence[DeviceInfo]:
    """Attached devices, of what `xcrun devicectl list devices --json-output` writes; empty where it is something else."""
    try:
        devices = json.loads(listing)["result"]["devices"]
        return [_device(device) for device in devices]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def thermal_in(text: str) -> str:
    """The speed to which `pmset -g therm` says that the CPU is held down."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if limit:
        return f"CPU at {limit.group(1)} % of its speed"
    return "no warning" if "No thermal warning" in text else NOT_TOLD


def battery_in(text: str) -> str:
    """Where `pmset -g batt` says that power comes from, and how much the battery has."""
    source, charge = re.search(r"drawing from '([^']+)'", text), re.search(r"(\d+)%;\s*([^;]+)", text)
    told = [*([source.group(1)] if source else []), *([f"{charge.group(1)} %", charge.group(2).strip()] if charge else [])]
    return ", ".join(told) or NOT_TOLD


def _device(device: Mapping[str, Any]) -> DeviceInfo:
    properties, hardware, link = (device[f"{of}Properties"] for of in ("device", "hardware", "connection"))
    model = hardware.get("marketingName") or hardware.get("productType") or NOT_TOLD
    system = " ".join(each for each in (hardware.get("platform"), properties.get("osVersionNumber")) if each)
    return DeviceInfo(
        spec=f"apple:{hardware.get('udid') or device['identifier']}",
        name=str(properties.get("name") or model),
        clock="device",
        facts={
            "brand": "Apple",
            "model": f"{model} ({hardware.get('productType', NOT_TOLD)})",
            "system": system or NOT_TOLD,
            "developer mode": properties.get("developerModeStatus", NOT_TOLD),
            "connection": link.get("transportType", NOT_TOLD),
            "measured": f"no: {NOT_MEASURED}",
        },
    )


def _attached() -> Sequence[DeviceInfo]:
    with tempfile.TemporaryDirectory(prefix="edgefuse-") as name:
        listing = Path(name) / "devices.json"
        _said("xcrun", "devicectl", "list", "devices", "--json-output", str(listing))
        return devices_in(listing.read_text(encoding="utf-8", errors="replace")) if listing.exists() else []


def _info(which: str, facts: Mapping[str, str]) -> DeviceInfo:
    words = UNITS[which][1]
    return DeviceInfo(_spec(which), f"{facts['model']}, {words}", "host", {**facts, "compute units": words})


def _spec(which: str) -> str:
    return f"apple:{which}" if which else "apple"


def _facts() -> Mapping[str, str]:
    memory = _said("sysctl", "-n", "hw.memsize")
    return {
        "brand": "Apple",
        "model": _said("sysctl", "-n", "hw.model") or NOT_TOLD,
        "chip": _said("sysctl", "-n", "machdep.cpu.brand_string") or NOT_TOLD,
        "cores": _said("sysctl", "-n", "hw.ncpu") or NOT_TOLD,
        "memory": f"{int(memory) / 2**30:.1f} GiB" if memory.isdigit() else NOT_TOLD,
        "system": f"macOS {_said('sw_vers', '-productVersion') or NOT_TOLD}",
        "runtimes": "Core ML",
    }


def _said(*argv: str) -> str:
    """What a tool of the system prints; nothing where it is not there, or fails."""
    try:
        ended = process.run(argv, limit_s=LOOK_S)
    except RunFailed:
        return ""
    return ended.stdout.strip() if ended.well else ""

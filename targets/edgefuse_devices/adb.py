"""An Android device behind adb: the runners are shell binaries that bring their own C library, not an app.

A phone must have "USB debugging" switched on, and must have accepted this host. Android's own record comes from `getprop` and
`dumpsys`; a device that has neither says "not told" there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from edgefuse.device import Connection, Lack
from edgefuse.errors import DeviceError, DeviceGone, DeviceRefused, EdgefuseError, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import NOT_TOLD, DeviceInfo
from edgefuse_devices import process, toolbox
from edgefuse_devices.remote import (
    ASK_S,
    CONDITIONS,
    PROBE,
    PUSH_S,
    Said,
    Watch,
    cannot_write,
    conditions_in,
    facts_in,
    gone,
    last_line,
    remote,
    require_arm64,
    said_in,
    scripted,
    sections,
)

SUMMARY = "an Android device, as adb or adb:SERIAL; it must have accepted this host for USB debugging"
HERE = False

PLACES = ("/data/local/tmp",)  # where Android lets a shell run what it wrote
FOUND_S = 10  # a server that does not start quickly is not waited for
ABI = "arm64-v8a"
READY = "device"
HOW = "a shell binary with a C library of its own, not an app"
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
PROPERTIES: Mapping[str, Sequence[str]] = {  # ours: Android's, the first that says something
    "brand": ("ro.product.brand", "ro.product.manufacturer"),
    "model": ("ro.product.model",),
    "chip": ("ro.soc.model", "ro.hardware.chipname", "ro.board.platform", "ro.hardware"),
    "Android": ("ro.build.version.release",),
    "ABI": ("ro.product.cpu.abi",),
}
ANDROID_PROBE = f"""
echo "== properties"; getprop
{PROBE.strip()}
"""
ANDROID_CONDITIONS = f"""
echo "== battery"; dumpsys battery
echo "== thermal"; dumpsys thermalservice
{CONDITIONS.strip()}
"""


@dataclass(frozen=True, slots=True)
class Attached:
    """A line of `adb devices -l`.

    Attributes:
        serial: by which it is addressed.
        state: "device" where it can be used.
        told: what else the line says: model, product.
    """

    serial: str
    state: str
    told: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Adb:
    """A far shell behind adb; see `edgefuse_devices.remote.Far`."""

    name: str
    serial: str

    def shell(self, script: str, *, limit_s: float) -> Said:
        """Run a script there."""
        ended = _adb("-s", self.serial, "shell", scripted(script), limit_s=limit_s)
        if ended.why != "itself":
            raise process.failed(ended, f"What was asked of {self.name}")
        said = said_in(ended.output)
        if said is None:
            raise _gone(self.name, ended)
        return said

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Copy files into a folder there, all of a folder at once."""
        same: dict[str, list[Path]] = {}
        for name, path in files.items():
            to = PurePosixPath(name)
            if to.name == path.name:
                same.setdefault(f"{folder}/{to.parent}/", []).append(path)
            else:
                self._copied(_adb("-s", self.serial, "push", path, f"{folder}/{to}", limit_s=PUSH_S))
        for there, paths in same.items():
            self._copied(_adb("-s", self.serial, "push", *paths, there, limit_s=PUSH_S))

    def pull(self, path: str) -> bytes:
        """The content of a file there."""
        with TemporaryDirectory(prefix="edgefuse-pull-") as scratch:
            local = Path(scratch) / "pulled"
            ended = _adb("-s", self.serial, "pull", path, local, limit_s=PUSH_S)
            if not ended.well:
                self._answer()
                raise RunFailed(f"The runner left no answers on {self.name}.", hint="Run it once more.")
            return local.read_bytes()

    def _copied(self, ended: process.Ended) -> None:
        if ended.why != "itself":
            raise process.failed(ended, f"The push to {self.name}")
        if not ended.well:
            self._answer()
            raise cannot_write(self.name, ended.stdout + ended.stderr)

    def _answer(self) -> None:
        """Raise DeviceGone where the device is what failed, not the copy."""
        self.shell("true", limit_s=ASK_S)


def missing() -> Sequence[Lack]:
    """The adb client, and what runs on a 64-bit ARM."""
    absent = [] if shutil.which("adb") else [Lack("adb (adb)", "apt-get install adb")]
    return [*absent, *toolbox.missing()]


def found() -> Sequence[DeviceInfo]:
    """The devices that are attached and have accepted this host; none where adb does not answer at once."""
    if not shutil.which("adb"):
        return ()
    try:
        listed = attached(_adb("devices", "-l", limit_s=FOUND_S).stdout)
    except EdgefuseError:
        return ()
    return [DeviceInfo(f"adb:{each.serial}", _called(each), "device", each.told) for each in listed if each.state == READY]


@contextmanager
def connect(which: str) -> Iterator[Connection]:
    """The device of that serial number; without one the only one that is attached."""
    ended = _adb("devices", "-l", limit_s=ASK_S)
    if not ended.well:
        raise DeviceGone(f"adb does not answer: {last_line(ended.stderr) or 'it said nothing'}.", hint="Try: adb kill-server")
    device = chosen(attached(ended.stdout), which)
    far = Adb(_called(device), device.serial)
    told = sections(far.shell(f"exec 2> /dev/null\n{ANDROID_PROBE}", limit_s=ASK_S).text)
    require_arm64(far.name, next(iter(told.get("machine", ())), ""))
    facts = android_facts(told)
    _require_abi(far.name, properties(told.get("properties", ())))
    info = DeviceInfo(f"adb:{device.serial}", _name(facts, device), "device", facts)
    with remote(far, info, PLACES, taskset=bool(told.get("taskset")), watch=ANDROID) as connection:
        yield connection


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:  # noqa: ARG001 - the protocol's
    """Nothing of its own."""
    raise UsageError("There is nothing to set up for adb alone.", hint="Set up what runs on it: edgefuse devices setup arm64")


def attached(listing: str) -> Sequence[Attached]:
    """The devices that `adb devices -l` lists: a serial number, a state that may be two words, and name:value pairs."""
    lines = [line.strip() for line in listing.splitlines() if line.strip() and not line.startswith(("List of", "*"))]
    return [_attached(line) for line in lines]


def chosen(listed: Sequence[Attached], which: str) -> Attached:
    """The device that is meant, if it can be used.

    Raises:
        UsageError: several are attached, and none is named.
        UnknownDevice: it is not attached, or none is.
        DeviceRefused: it has not accepted this host.
        DeviceGone: it is attached and does not answer.
    """
    names = ", ".join(f"adb:{each.serial}" for each in listed)
    fits = [each for each in listed if not which or each.serial == which]
    if not fits and not which:
        raise UnknownDevice(
            "No Android device is attached.", hint="Attach one, and switch on USB debugging in its developer options."
        )
    if not fits:
        again = f"adb connect {which}" if re.search(r":\d+$", which) else "adb devices -l"
        raise UnknownDevice(f"adb knows no device {which}.", hint=f"There are: {names}" if names else f"Look with: {again}")
    if len(fits) > 1:
        raise UsageError(f"{len(fits)} Android devices are attached.", hint=f"Say which: {names}")
    return _usable(fits[0])


def android_facts(told: Mapping[str, Sequence[str]]) -> Mapping[str, str]:
    """The record of an Android device, by `getprop` and by what Linux tells."""
    known, linux = properties(told.get("properties", ())), facts_in(told)
    asked = {ours: next((known[each] for each in theirs if known.get(each)), NOT_TOLD) for ours, theirs in PROPERTIES.items()}
    cores = {"cores": linux["chip"], **{name: linux[name] for name in ("memory", "kernel", "runtimes")}}
    system = {} if asked["Android"] != NOT_TOLD else {"system": linux["system"]}
    return {**asked, **cores, **system, "run as": HOW}


def android_conditions(text: str) -> Mapping[str, str]:
    """Battery and thermal status, by `dumpsys`, and what Linux tells; Android's skin temperature where no zone can be read."""
    told = sections(text)
    linux, heat = conditions_in(text), told.get("thermal", ())
    level, warmth = battery(told.get("battery", ()))
    temperature = linux["temperature"] if linux["temperature"] != NOT_TOLD else skin(heat)
    return {
        **linux,
        "temperature": temperature,
        "battery": level,
        "battery temperature": warmth,
        "thermal status": thermal_status(heat),
    }


ANDROID = Watch(ANDROID_CONDITIONS, android_conditions)


def properties(lines: Sequence[str]) -> Mapping[str, str]:
    """What `getprop` says: lines of "[name]: [value]"; a value may go on over several lines, and then is not ours."""
    return {told[1]: told[2] for told in (re.fullmatch(r"\[([^\]]+)\]: \[(.*)\]", line) for line in lines) if told}


def battery(lines: Sequence[str]) -> tuple[str, str]:
    """Level and temperature, by `dumpsys battery`, which counts tenths of a degree."""
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    level, scale, tenths = told.get("level", ""), told.get("scale", ""), told.get("temperature", "")
    percent = f"{100 * int(level) // int(scale)} %" if level.isdecimal() and scale.isdecimal() and int(scale) else NOT_TOLD
    feeds = [name.removesuffix(" powered") for name, value in told.items() if name.endswith(" powered") and value == "true"]
    charging = f", powered by {' and '.join(feeds)}" if feeds and percent != NOT_TOLD else ""
    return f"{percent}{charging}", f"{int(tenths) / 10:.1f} °C" if re.fullmatch(r"-?\d+", tenths) else NOT_TOLD


def thermal_status(lines: Sequence[str]) -> str:
    """How far the device throttles, by `dumpsys thermalservice`; Android before 10 has no such service."""
    for line in lines:
        told = re.fullmatch(r"Thermal Status: (\d+)", line)
        if told and int(told[1]) < len(THERMAL):
            return THERMAL[int(told[1])]
    return NOT_TOLD


def skin(lines: Sequence[str]) -> str:
    """The temperature of its skin (type 3), by `dumpsys thermalservice`."""
    for line in lines:
        told = re.match(r"Temperature\{mValue=([-\d.]+), mType=3, mName=([^,]+),", line)
        if told:
            return f"{float(told[1]):.1f} °C ({told[2]})"
    return NOT_TOLD


def _attached(line: str) -> Attached:
    serial, _, rest = line.partition(" ") if "\t" not in line else line.partition("\t")
    pairs = [word for word in rest.split() if re.fullmatch(r"[a-z_]+:\S+", word)]
    state = " ".join(word for word in rest.split() if word not in pairs)
    told = dict(pair.split(":", 1) for pair in pairs)
    return Attached(serial, state, {name: told[name] for name in ("model", "product") if name in told})


def _usable(device: Attached) -> Attached:
    if device.state == READY:
        return device
    name = _called(device)
    if device.state == "unauthorized":
        raise DeviceRefused(
            f"{name} has not accepted this host.", hint='Unlock it, and answer "Allow USB debugging?" on its screen.'
        )
    if device.state.startswith("no permissions"):
        raise DeviceRefused(
            f"The system does not let you use {name}.",
            hint="Install Android's udev rules: apt-get install android-sdk-platform-tools-common",
        )
    if device.state == "offline":
        raise DeviceGone(f"{name} is offline.", hint="Attach it anew, or try: adb reconnect offline")
    raise DeviceRefused(f'{name} is in the state "{device.state}".', hint="Start its Android, and unlock it.")


def _require_abi(name: str, known: Mapping[str, str]) -> None:
    abis = known.get("ro.product.cpu.abilist", "")
    if abis and ABI not in abis.split(","):
        raise DeviceRefused(f"{name} runs {abis}; the runners are made for {ABI}.", hint="Choose a 64-bit ARM device.")


def _called(device: Attached) -> str:
    model = device.told.get("model", "").replace("_", " ")
    return f"{model} ({device.serial})" if model else device.serial


def _name(facts: Mapping[str, str], device: Attached) -> str:
    told = [facts[each] for each in ("brand", "model") if facts[each] != NOT_TOLD]
    return " ".join(told) or device.serial


def _gone(name: str, ended: process.Ended) -> DeviceError:
    complaint = ended.stderr or ended.stdout
    if "unauthorized" in complaint:
        return DeviceRefused(
            f"{name} has not accepted this host.", hint='Unlock it, and answer "Allow USB debugging?" on its screen.'
        )
    return gone(name, last_line(complaint).removeprefix("error: ").removeprefix("adb: "))


def _adb(*arguments: str | Path, limit_s: float) -> process.Ended:
    return process.run(["adb", *arguments], limit_s=limit_s)

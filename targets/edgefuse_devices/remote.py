"""What every device that is reached through a shell has in common: push, run, pull, and leave nothing behind.

A far shell is anything that runs a POSIX shell's script on another machine and moves files: ssh and adb are two. A script's end
and exit code are told in its own output, by a line that only a whole answer has: a connection that breaks is never taken for a
program that ended, and the exit codes that some transports swallow are not needed.

On the far machine everything lives in one fresh folder, which is removed when the connection ends, whatever ended it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgefuse.errors import DeviceError, DeviceGone, DeviceRefused, RunFailed, UsageError
from edgefuse.measurement import NOT_TOLD, DeviceInfo
from edgefuse_devices import process, toolbox
from edgefuse_devices.plan import ANSWERS, FEED, PLAN, read_run, write_plan

if TYPE_CHECKING:
    from edgefuse.measurement import Job, Run
    from edgefuse.values import Artifact

BEGUN, ENDED = "edgefuse-begun", "edgefuse-ended"
PLAIN = re.compile(r"/[\w./@+,:=-]+")  # a path that a shell takes for one word
ASK_S = 60  # for what takes a moment on a board, and a hundred times as long on an emulated one
PUSH_S = 600
SPARE_BYTES = 1 << 20  # for answers and for what the runner says
KIB = 1024
MACHINES = ("aarch64", "arm64", "armv8l")  # the last one is a 64-bit kernel that speaks to a 32-bit shell
SAID, COMPLAINED, PID = "stdout.txt", "stderr.txt", "pid"
TOLD_BYTES = 2000  # of what a runner complained about
TOLD = 300  # characters of it that an error quotes
FULL = "No space left on device"
MIB = 1 << 20
MOST_MILLI_C = 150_000
HINTS: Mapping[str, str] = {
    "SIGILL": "Its processor lacks instructions that the artifact's kernels use: export another precision.",
    "SIGKILL": "It may have had too little memory: try a smaller artifact.",
}
JOB = "job"
ARM_PARTS: Mapping[str, str] = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd48": "Cortex-X2",
    "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715",
    "0xd4e": "Cortex-X3",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
    "0xd82": "Cortex-X4",
}
PROBE = """
echo "== machine"; uname -m
echo "== kernel"; uname -r
echo "== cpus"; cat /proc/cpuinfo
echo "== memory"; cat /proc/meminfo
echo "== system"; cat /etc/os-release
echo "== model"; tr -d '\\000' < /proc/device-tree/model; echo
echo "== taskset"; command -v taskset
echo "== end"
"""
CONDITIONS = """
echo "== load"; cat /proc/loadavg
echo "== governor"; cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor
echo "== frequency"; cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq
echo "== zones"; for zone in /sys/class/thermal/thermal_zone*; do echo "$(cat $zone/temp) $(cat $zone/type)"; done
echo "== end"
"""


@dataclass(frozen=True, slots=True)
class Said:
    """What a script said, and the code with which it ended."""

    output: bytes
    code: int

    @property
    def text(self) -> str:
        """As text, with one kind of line ends."""
        return self.output.decode(errors="replace").replace("\r\n", "\n")


class Far(Protocol):
    """A shell on another machine."""

    @property
    def name(self) -> str:
        """By which errors speak of it."""
        ...

    def shell(self, script: str, *, limit_s: float) -> Said:
        """Run a script there.

        Raises:
            RunFailed: it took longer.
            DeviceGone: the connection broke.
        """
        ...

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Copy files into a folder that exists there, each to its path within it.

        Raises:
            RunFailed: the disk there is full, or the files cannot be written.
            DeviceGone: the connection broke.
        """
        ...

    def pull(self, path: str) -> bytes:
        """The content of a file there.

        Raises:
            RunFailed: there is none.
            DeviceGone: the connection broke.
        """
        ...


@dataclass(frozen=True, slots=True)
class Watch:
    """A script that asks a device for its conditions, and what reads its answer."""

    script: str
    read: Callable[[str], Mapping[str, str]]


@dataclass(slots=True)
class Remote:
    """A connection to a device behind a far shell.

    Attributes:
        info: its record.
        far: its shell.
        home: our folder there.
        taskset: whether a process can be bound to cores there.
        watch: how it is asked for its conditions.
        exact: whether its clock needs no repetition.
    """

    info: DeviceInfo
    far: Far
    home: str
    taskset: bool
    watch: Watch
    exact: bool = False
    _pushed: set[str] = field(default_factory=set)

    def refusal(self, artifact: Artifact) -> str | None:
        """There is a runner for it, or there is none."""
        return toolbox.refusal(artifact.target, "64-bit ARM")

    def conditions(self) -> Mapping[str, str]:
        """Load, temperature, governor, frequency, and what else its kind tells; nothing of an emulator, which has none."""
        if self.exact:
            return {}
        return self.watch.read(self.far.shell(f"exec 2> /dev/null\n{self.watch.script}", limit_s=ASK_S).text)

    def run(self, job: Job) -> Run:
        """Run a job in a fresh process; see `edgefuse.device.Connection`."""
        if job.want == "profile":
            raise UsageError(f"{self.info.spec} cannot tell where the time of a call goes.", hint="Profile on: --device host")
        if self.exact and job.routine.threads != 1:
            raise UsageError(f"{self.info.spec} has one core: several threads tell nothing.", hint="Use --threads 1")
        bound = self._bound(job.routine.cores)
        target = job.artifact.target
        runner = self._once(f"runner-{target}", lambda: toolbox.payload(target))
        name = f"model{job.artifact.path.suffix}"
        digest = hashlib.sha256(str(job.artifact.path).encode()).hexdigest()
        model = self._once(f"model-{digest[:16]}", lambda: {name: job.artifact.path})
        with tempfile.TemporaryDirectory(prefix="edgefuse-job-") as scratch:
            local = Path(scratch)
            write_plan(local, job, model=f"../{model}/{name}", exact=self.exact)
            self._put(JOB, {each: local / each for each in (PLAN, FEED)})
            command = toolbox.command(plan=f"{self.home}/{JOB}", at=f"{self.home}/{runner}")
            said = self._process([*bound, *command], job.routine.limit_s)
            (local / ANSWERS).write_bytes(self.far.pull(f"{self.home}/{JOB}/{ANSWERS}"))
            run = read_run(local, said, job, self.info.clock)
        # A clock that counts instructions leaps while it waits for a disk: reading from one takes any time by it.
        return replace(run, cold_load=None) if self.exact else run

    def _bound(self, cores: Sequence[int]) -> Sequence[str]:
        """What binds a process to cores."""
        if not cores:
            return ()
        if not self.taskset:
            raise UsageError(f"{self.info.spec} has no taskset and cannot bind to cores.", hint="Leave the cores out.")
        return ("taskset", f"{sum(1 << core for core in set(cores)):x}")

    def _once(self, name: str, files: Callable[[], Mapping[str, Path]]) -> str:
        """Push what stays the same for the whole connection."""
        if name not in self._pushed:
            self._put(name, files())
            self._pushed.add(name)
        return name

    def _put(self, name: str, files: Mapping[str, Path]) -> None:
        """Push files into a folder of ours that is empty before; what did not arrive whole is removed again."""
        folder = f"{self.home}/{name}"
        made = " ".join(sorted({shlex.quote(f"{folder}/{Path(each).parent}") for each in files}))
        self._ask(f"rm -rf {folder} && mkdir -p {made}")
        self._require_room(sum(path.stat().st_size for path in files.values()))
        try:
            self.far.push(files, folder)
            self._ask(f"chmod -R u+rwX {folder} && sync")  # what is written later would be written while something is timed
        except RunFailed:
            with suppress(DeviceError):
                self._ask(f"rm -rf {folder}")
            raise

    def _require_room(self, size_bytes: int) -> None:
        """Say so where the disk there is too small, before anything is copied."""
        free = free_bytes(self._ask(f"df -Pk {self.home} || df -k {self.home}").text)
        if free is not None and free < size_bytes + SPARE_BYTES:
            raise no_space(
                self.far.name, f"{free / MIB:.1f} MB are free, and {(size_bytes + SPARE_BYTES) / MIB:.1f} MB are needed"
            )

    def _process(self, argv: Sequence[str], limit_s: float) -> str:
        """What a runner says that ends well; one that does not end is killed there, too.

        Raises:
            RunFailed: it did not end well.
            DeviceGone: the connection broke.
        """
        job = f"{self.home}/{JOB}"
        script = f"{shlex.join(argv)} < /dev/null > {job}/{SAID} 2> {job}/{COMPLAINED} &\necho $! > {job}/{PID}\nwait $!"
        script += f"\ncode=$?\nrm -f {job}/{PID}\nexit $code"  # the number may be another process's next
        try:
            code = self.far.shell(script, limit_s=limit_s).code
        except RunFailed as error:
            self._kill()
            raise RunFailed(
                f"The runner took longer than {limit_s:g} s and was ended.", hint="Ask for less work: --routine quick"
            ) from error
        complained = self.far.shell(f"tail -c {TOLD_BYTES} {job}/{COMPLAINED}", limit_s=ASK_S).output if code else b""
        ended = process.told_by_a_shell(process.Ended(b"", complained, code, "", "itself", limit_s))
        process.checked(ended, hint=HINTS.get(ended.signal))
        return self.far.shell(f"cat {job}/{SAID}", limit_s=ASK_S).text

    def _kill(self) -> None:
        with suppress(DeviceError):
            self.far.shell(f"kill -9 $(cat {self.home}/{JOB}/{PID})", limit_s=ASK_S)

    def _ask(self, script: str) -> Said:
        """A script of ours that must end well."""
        said = self.far.shell(f"exec 2>&1\n{script}", limit_s=ASK_S)
        if said.code:
            raise cannot_write(self.far.name, said.text)
        return said


@contextmanager
def remote(
    far: Far, info: DeviceInfo, places: Sequence[str], *, taskset: bool, watch: Watch | None = None, exact: bool = False
) -> Iterator[Remote]:
    """A connection with a fresh folder in the first of `places` that takes one; both are gone behind the block.

    Raises:
        DeviceRefused: none of the places takes a folder, or its path has blanks in it or other signs of a shell.
    """
    name = f"edgefuse-{secrets.token_hex(8)}"
    tries = " || ".join(f'{{ mkdir -m 700 "{place}/{name}" && cd "{place}/{name}" && pwd; }}' for place in places)
    said = far.shell(f"exec 2> /dev/null\n{tries}", limit_s=ASK_S)
    if said.code:
        raise DeviceRefused(
            f"{far.name} lets us write to none of {', '.join(places)}.", hint="Free some space there, or change the permissions."
        )
    home = said.text.strip()
    if not PLAIN.fullmatch(home):
        with suppress(DeviceError):
            far.shell(f"rmdir {shlex.quote(home)}", limit_s=ASK_S)
        raise DeviceRefused(
            f"{far.name} lets us write to {home!r} alone, and its shell would take that for several words.",
            hint=f"Let us write to one of {', '.join(places)}.",
        )
    connection = Remote(info, far, home, taskset, watch or LINUX, exact)
    try:
        yield connection
    finally:
        clean_up(far, connection.home)


def clean_up(far: Far, home: str) -> None:
    """End what still runs there, and remove our folder; a device that does not answer any more keeps it."""
    with suppress(DeviceError):
        far.shell(f"kill -9 $(cat {home}/*/{PID}) 2> /dev/null\nrm -rf {home}", limit_s=ASK_S)


def scripted(script: str) -> str:
    """The same script, which tells its beginning, its end and its exit code: a profile of the user's may print before it."""
    return f"echo {BEGUN}\n(\n{script}\n)\ncode=$?\necho\necho {ENDED} $code\n"


def said_in(output: bytes) -> Said | None:
    """What a script said that was `scripted`; None where its end is not there."""
    _, _, begun = output.partition(f"{BEGUN}".encode())
    whole = re.fullmatch(rb"\r?\n(.*?)\r?\n" + ENDED.encode() + rb" (\d+)\s*", begun, re.DOTALL)
    return Said(whole[1], int(whole[2])) if whole else None


def sections(text: str) -> Mapping[str, Sequence[str]]:
    """The lines behind each heading "== NAME", without empty ones."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("== "):
            lines = found.setdefault(line[3:].strip(), [])
        elif line.strip():
            lines.append(line.strip())
    return found


def facts_in(told: Mapping[str, Sequence[str]]) -> Mapping[str, str]:
    """What a Linux board tells about itself, in words."""
    return {
        "model": _first(told, "model"),
        "chip": cores_in(told.get("cpus", ())),
        "memory": memory_in(told.get("memory", ())),
        "system": system_in(told.get("system", ())),
        "kernel": _first(told, "kernel"),
        "runtimes": ", ".join(runtime.name for runtime in toolbox.RUNTIMES.values()),
    }


def cores_in(cpuinfo: Sequence[str]) -> str:
    """Which cores there are, by /proc/cpuinfo: "4 x Cortex-A55, 4 x Cortex-A76"."""
    fields = [(name.strip(), value.strip().lower()) for name, _, value in (line.partition(":") for line in cpuinfo)]
    parts = Counter(value for name, value in fields if name == "CPU part")
    if not parts:
        cores = sum(name == "processor" for name, _ in fields)
        return f"{cores} cores" if cores else NOT_TOLD
    return ", ".join(f"{count} x {ARM_PARTS.get(part, f'ARM part {part}')}" for part, count in sorted(parts.items()))


def memory_in(meminfo: Sequence[str]) -> str:
    """How much memory there is, by /proc/meminfo."""
    for line in meminfo:
        if told := re.fullmatch(r"MemTotal:\s+(\d+) kB", line):
            return f"{int(told[1]) / KIB / KIB:.1f} GB"
    return NOT_TOLD


def system_in(release: Sequence[str]) -> str:
    """What /etc/os-release calls the system."""
    for line in release:
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'") or NOT_TOLD
    return NOT_TOLD


def conditions_in(text: str) -> Mapping[str, str]:
    """Load, temperature, governor and frequency, by what `CONDITIONS` printed."""
    told = sections(text)
    clocks = [int(each) for each in told.get("frequency", ()) if each.isdecimal()]
    return {
        "load": _first(told, "load").split(" ")[0] if told.get("load") else NOT_TOLD,
        "temperature": hottest(told.get("zones", ())),
        "governor": ", ".join(sorted(set(told.get("governor", ())))) or NOT_TOLD,
        "frequency": f"{max(clocks) // 1000} MHz" if clocks else NOT_TOLD,
    }


def hottest(zones: Sequence[str]) -> str:
    """The hottest of the thermal zones, each a line of a temperature in thousandths of a degree and a name.

    What no silicon can be is not believed: zones of sensors that are switched off say such things.
    """
    read = [(int(told[1]), told[2]) for told in (re.fullmatch(r"(-?\d+) (\S.*)", zone) for zone in zones) if told]
    believed = [(milli, name) for milli, name in read if 0 < milli < MOST_MILLI_C]
    if not believed:
        return NOT_TOLD
    milli, name = max(believed)
    return f"{milli / 1000:.1f} °C ({name})"


LINUX = Watch(CONDITIONS, conditions_in)


def free_bytes(df: str) -> int | None:
    """How much room there is, by `df -Pk`: the fourth column of the last line; None where it says something else."""
    columns = (df.strip().splitlines() or [""])[-1].split()
    place = next((number for number, column in enumerate(columns) if column.endswith("%")), 0)
    told = columns[place - 1] if place else ""
    return int(told) * KIB if told.isdecimal() else None


def no_space(name: str, why: str) -> RunFailed:
    """A full disk, in words."""
    return RunFailed(f"The disk of {name} is full: {why}.", hint="Free some space there, then run it again with: --resume")


def cannot_write(name: str, complaint: str) -> RunFailed:
    """Why nothing can be written there, in words."""
    if FULL in complaint:
        return no_space(name, "it has no room for what is needed")
    why = last_line(complaint)
    return RunFailed(f"Nothing can be written on {name}{f': {why}' if why else ''}.", hint="Is its disk read-only?")


def gone(name: str, complaint: str = "") -> DeviceGone:
    """A connection that broke, in words."""
    why = last_line(complaint)
    return DeviceGone(
        f"{name} does not answer any more{f': {why}' if why else ''}.", hint="Look after it, then go on with: --resume"
    )


def last_line(complaint: str) -> str:
    """What a program said last, as the end of a sentence."""
    return next((line for line in reversed(complaint.splitlines()) if line.strip()), "").strip()[:TOLD].rstrip(".")


def require_arm64(name: str, machine: str) -> None:
    """Refuse a machine that cannot run what we push.

    Raises:
        DeviceRefused: it is another one.
    """
    if machine not in MACHINES:
        raise DeviceRefused(
            f"{name} is {machine or 'a machine that does not say what it is'}; the runners are made for aarch64.",
            hint="Choose a 64-bit ARM device.",
        )


def _first(told: Mapping[str, Sequence[str]], name: str) -> str:
    return next(iter(told.get(name, ())), NOT_TOLD)

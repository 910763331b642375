"""Emulated arm64 CPUs: the real machine code of the runtimes, one instruction at a time.

QEMU's user-mode emulation runs the arm64 runner, and a plugin counts what it executes. The answers are those of ARM's kernels,
the counts are exact and the same wherever they are taken; how long an emulator takes says nothing, and is not told.

What could change a count is the same in every run: the environment is empty, no path that the guest sees depends on where it is
run, the seed of its random numbers is fixed, and it sees the `/proc/cpuinfo` and `/sys` of its CPU and not the host's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgefuse.device import Lack
from edgefuse.errors import RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import DeviceInfo, Instructions, Job, Run
from edgefuse_devices import toolbox
from edgefuse_devices.plan import garbage, read_run, write_plan
from edgefuse_devices.process import Ended, checked, run

if TYPE_CHECKING:
    from edgefuse.device import Connection
    from edgefuse.values import Artifact

SUMMARY = "emulated arm64 CPUs: answers of ARM's kernels, and exact counts of instructions"
HERE = False

COUNTS, MODEL, CPU, PLUGIN = "counts.jsonl", "model", "cpu", "count.so"  # names in the folder of a run
SEED = "1"
TOTAL = "instructions"
CALL, LOAD, RELOAD = 0, 2, 4  # the regions that a runner marks

NEON = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
DOT = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
HALF = "asimdhp"  # the kernel's name for arithmetic in fp16


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU as the emulator and the runtimes know it.

    Attributes:
        model: QEMU's name of it.
        part: its number in the main id register; runtimes choose kernels by it.
        features: the kernel's names of what it can.
        l2_kib: its second cache; runtimes cut their work by it.
    """

    model: str
    part: int
    features: str
    l2_kib: int


CPUS: Mapping[str, Cpu] = {
    "cortex-a53": Cpu("cortex-a53", 0xD03, NEON, 512),
    "cortex-a72": Cpu("cortex-a72", 0xD08, NEON, 1024),
    "cortex-a76": Cpu("cortex-a76", 0xD0B, DOT, 512),
    # QEMU 7.2 computes wrongly with int8 matrices as soon as it has SME as well
    "i8mm": Cpu("max,sme=off", 0xD4D, f"{DOT} i8mm bf16", 512),
}
USUAL = "cortex-a76"


def missing() -> Sequence[Lack]:
    """The emulator, the runners and the plugin."""
    if platform.system() != "Linux":
        return [Lack("Linux, where QEMU emulates single programs", "run edgefuse on Linux, or in a container")]
    return toolbox.missing(counting=True)


def found() -> Sequence[DeviceInfo]:
    """Every CPU, the usual one first."""
    return [] if missing() else [_info(name) for name in sorted(CPUS, key=lambda name: name != USUAL)]


@contextmanager
def connect(which: str) -> Iterator[Connection]:
    """An emulated CPU by its name; "" is the usual one.

    Raises:
        UnknownDevice: there is no such CPU.
        DeviceMissing: something has not been set up, or has changed since.
    """
    name = which or USUAL
    if name not in CPUS:
        raise UnknownDevice(
            f"There is no emulated CPU {name!r}.", hint=f"There are: {', '.join(f'arm64:{each}' for each in CPUS)}"
        )
    for target in toolbox.RUNTIMES:
        toolbox.payload(target)  # looks at the checksums, once
    toolbox.plugin()
    with tempfile.TemporaryDirectory(prefix="edgefuse-arm64-") as folder:
        _write_cpu(CPUS[name], Path(folder) / CPU)
        for target in toolbox.RUNTIMES:
            (Path(folder) / CPU / target).symlink_to(toolbox.home() / target)
        yield _Emulated(_info(name), name, Path(folder))


def setup(tell: toolbox.Tell) -> None:
    """Fetch and build the runners, the emulator where the system has none, and the plugin.

    Raises:
        SetupFailed: something could not be fetched or built.
    """
    toolbox.setup(tell)
    toolbox.setup_counting(tell)


@dataclass(slots=True)
class _Emulated:
    """A CPU and a folder of its own."""

    info: DeviceInfo
    name: str
    folder: Path

    def refusal(self, artifact: Artifact) -> str | None:
        """Runtimes that have no arm64 Linux build."""
        return toolbox.refusal(artifact.target, "arm64")

    def conditions(self) -> Mapping[str, str]:
        """Nothing that changes can change a count."""
        return {}

    def run(self, job: Job) -> Run:
        """Run the feed once, after one call that warms up, and count.

        Raises:
            RunFailed: the runner crashed, hung, or said what nobody understands.
            UsageError: something is wanted that has no meaning here.
        """
        _require_countable(job)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            ended = run(self._prepared(folder, job), limit_s=job.routine.limit_s, cwd=folder, env={})
            if ended.signal == "SIGILL":
                raise _unknown_instruction(self.name, job.artifact)
            checked(ended, "The runner", hint="Run it once more with -v, or on another CPU: --device arm64:cortex-a76")
            return _counted(read_run(folder, ended.stdout, job, "instructions"), folder, ended)

    def _prepared(self, folder: Path, job: Job) -> Sequence[str]:
        """Put everything that the runner needs into a folder; how it is started there."""
        model = MODEL + job.artifact.path.suffix
        write_plan(folder, job, model=model, exact=True)
        (folder / model).symlink_to(job.artifact.path.resolve())
        (folder / CPU).symlink_to(self.folder / CPU)
        (folder / PLUGIN).symlink_to(toolbox.home() / "count" / PLUGIN)
        emulator = [str(toolbox.emulator()), "-cpu", CPUS[self.name].model, "-L", CPU, "-seed", SEED]
        loader, *rest = toolbox.command(at=f"/{job.artifact.target}")  # as the guest sees it
        return [*emulator, "-plugin", f"./{PLUGIN},out={COUNTS}", f"{CPU}{loader}", *rest]


def _require_countable(job: Job) -> None:
    routine = job.routine
    if job.want == "memory":
        raise UsageError(
            "arm64 has no memory of its own: its process holds the emulator, too.",
            hint="Measure it elsewhere, or: --latency-only",
        )
    if job.want == "profile":
        raise UsageError("arm64 counts instructions, and has no time to be spent by operators.", hint="Profile on: --device host")
    if routine.threads != 1:
        raise UsageError(
            f"arm64 counts one thread, not {routine.threads}: several change the count from run to run.", hint="Use --threads 1"
        )
    if routine.paced:
        raise UsageError("arm64 counts instructions, which no pace changes.", hint="Leave --paced out.")


def _unknown_instruction(cpu: str, artifact: Artifact) -> RunFailed:
    """SIGILL in words."""
    if "fp16" in artifact.precision and HALF not in CPUS[cpu].features.split():
        return RunFailed(
            f"{artifact.path.name} needs fp16 arithmetic, which {cpu} has not.",
            hint="Export it in fp32 or int8 for such CPUs; one that has it is: --device arm64:cortex-a76",
        )
    return RunFailed(
        f"{artifact.path.name} needs an instruction that {cpu} has not (SIGILL).",
        hint="Try another CPU: --device arm64:cortex-a76",
    )


def _counted(told: Run, folder: Path, ended: Ended) -> Run:
    """A run by the counts of the plugin; what the runner says of nanoseconds and bytes is the emulator's."""
    try:
        regions = [json.loads(line) for line in (folder / COUNTS).read_text("ascii").splitlines()]
        counts = {kind: [each for each in regions if each["region"] == kind] for kind in (LOAD, CALL, RELOAD)}
        timed = counts[CALL][told.warm_up_calls :]
        classes: Counter[str] = Counter()
        for region in timed:
            classes.update({name: count for name, count in region.items() if name not in {"region", TOTAL}})
        samples = Instructions(tuple(region[TOTAL] for region in timed))
        if len(samples.values) != len(told.samples.values):
            raise ValueError(f"{len(samples.values)} regions")  # noqa: TRY301 - one place says what is wrong
        return dataclasses.replace(
            told,
            samples=samples,
            cold_load=counts[LOAD][0][TOTAL],
            warm_load=counts[RELOAD][0][TOTAL],
            first=counts[CALL][0][TOTAL],
            classes=dict(classes),
            peak_bytes=None,
            before_bytes=None,
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise garbage(ended.stdout) from error


def _info(name: str) -> DeviceInfo:
    facts = {
        "chip": f"{name}, part {CPUS[name].part:#05x}, one core",
        "features": CPUS[name].features,
        "emulated by": _emulator_version(),
        "system": "Linux arm64, one program",
        "runtimes": ", ".join(runtime.name for runtime in toolbox.RUNTIMES.values()),
        "runners": ", ".join(f"{target} {toolbox.digest(target)[:12]}" for target in toolbox.RUNTIMES),
    }
    return DeviceInfo(f"arm64:{name}", f"emulated {name}", "instructions", facts)


@functools.cache
def _emulator_version() -> str:
    """For example "qemu-user 7.2.22"."""
    words = run([toolbox.emulator(), "--version"], limit_s=60).stdout.split()
    return f"qemu-user {words[2]}" if len(words) > 2 else "qemu-user"  # noqa: PLR2004 - "qemu-aarch64 version 7.2.22"


def _write_cpu(cpu: Cpu, root: Path) -> None:
    """What the kernel of a machine with one such core would tell, and empty folders of libraries.

    The emulator shows them in the place of the host's; what is not here is the host's, and would change counts.
    """
    devices = "sys/devices/system/cpu"
    topology, frequency, caches = f"{devices}/cpu0/topology", f"{devices}/cpu0/cpufreq", f"{devices}/cpu0/cache"
    lists = ("core_siblings_list", "thread_siblings_list", "cluster_cpus_list", "package_cpus_list", "core_cpus_list")
    cpuinfo = {
        "processor": "0",
        "BogoMIPS": "100.00",
        "Features": cpu.features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": f"{cpu.part:#05x}",
        "CPU revision": "3",
    }
    files = {
        "proc/cpuinfo": "".join(f"{name}\t: {value}\n" for name, value in cpuinfo.items()),
        **{f"{devices}/{name}": "0" for name in ("possible", "present", "online", "kernel_max")},
        **{f"{topology}/{name}": "0" for name in ("physical_package_id", "core_id", "cluster_id", *lists)},
        **{f"{topology}/{name}": "1" for name in ("core_siblings", "thread_siblings")},
        f"{frequency}/cpuinfo_max_freq": "1500000",
        f"{frequency}/cpuinfo_min_freq": "600000",
    }
    for index, (level, kind, kib) in enumerate(((1, "Data", 32), (1, "Instruction", 32), (2, "Unified", cpu.l2_kib))):
        cache = {"level": level, "type": kind, "size": f"{kib}K", "shared_cpu_list": 0, "coherency_line_size": 64}
        files |= {f"{caches}/index{index}/{name}": str(value) for name, value in cache.items()}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n", encoding="ascii")
    for name in ("lib", "usr/lib", "lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu"):
        (root / name).mkdir(parents=True, exist_ok=True)

"""An emulated arm64 board with a clock that counts instructions: what it measures is repeatable, and no board's latency.

The board is a whole machine (its kernel, its sshd, its file system are real) that QEMU emulates on this host, reachable from it
alone. `board` emulates a Cortex-A76; `board:cortex-a53` and `board:cortex-a72` have no dot products of int8.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgefuse.device import Connection, Lack
from edgefuse.errors import DeviceGone, UnknownDevice
from edgefuse.measurement import DeviceInfo
from edgefuse_devices import board_image, process, toolbox
from edgefuse_devices.remote import remote
from edgefuse_devices.ssh import PLACES, opened, probed

SUMMARY = "an emulated arm64 board whose clock counts instructions: repeatable, no board's latency"
HERE = False

CPUS: Mapping[str, str] = {
    "cortex-a76": "Cortex-A76, with dot products",
    "cortex-a72": "Cortex-A72",
    "cortex-a53": "Cortex-A53",
}  # the first one is the usual one

HOST = "edgefuse-board"
LOOPBACK = "127.0.0.1"
MEMORY_MB = 2048
BOOT_S = 180  # on two busy cores it takes ten
LOOK_S = 0.2
GREETING_S = 5
TAIL = 300  # characters of the serial console that an error quotes
PANIC = "Kernel panic - not syncing: "  # what Linux says before the trace that nobody wants to read
TAKEN = "Could not set up host forwarding rule"
ATTEMPTS = 5  # another process may take a free port before QEMU does


@dataclass(frozen=True, slots=True)
class Booted:
    """A board that runs.

    Attributes:
        ssh_port: where its sshd listens, on loopback.
        adb_port: where its adbd listens, on loopback.
        image: its files, the keys among them.
        process: QEMU's number.
    """

    ssh_port: int
    adb_port: int
    image: board_image.Image
    process: int


def missing() -> Sequence[Lack]:
    """What makes and boots a board, its image, and what runs on a 64-bit ARM."""
    return [*board_image.lacking(), *toolbox.missing()]


def found() -> Sequence[DeviceInfo]:
    """One board for each processor that it can have."""
    return () if missing() else [_record(cpu, {}) for cpu in CPUS]


@contextmanager
def connect(which: str) -> Iterator[Connection]:
    """A board with that processor, booted for the length of the block."""
    cpu = which or next(iter(CPUS))
    if cpu not in CPUS:
        raise UnknownDevice(f"No emulated board has the processor {cpu}.", hint=f"There are: {', '.join(CPUS)}")
    with booted(cpu, exact=True) as board, tempfile.TemporaryDirectory(prefix="edgefuse-board-") as private:
        config = write_config(board, Path(private))
        with opened(HOST, config, name="The emulated board") as far:
            told, taskset = probed(far, "")
            with remote(far, _record(cpu, told.facts), PLACES, taskset=taskset, exact=True) as connection:
                yield connection


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:
    """Make its image."""
    board_image.make(tell)


def write_config(board: Booted, folder: Path) -> Path:
    """An ssh configuration, in a folder of ours, in which the board is called `HOST` and known by its key."""
    known, config = folder / "known_hosts", folder / "config"
    known.write_text(f"{HOST} {board.image.host_key.read_text(encoding='ascii')}", encoding="ascii")
    settings = {
        "HostName": LOOPBACK,
        "Port": board.ssh_port,
        "User": "root",
        "IdentityFile": f'"{board.image.key}"',
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "HostKeyAlias": HOST,
        "UserKnownHostsFile": f'"{known}"',
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "Ciphers": "aes128-ctr",  # it has instructions, which an emulator runs faster than arithmetic
    }
    config.write_text(
        "\n".join([f"Host {HOST}", *(f"  {name} {value}" for name, value in settings.items()), ""]), encoding="utf-8"
    )
    return config


def _record(cpu: str, facts: Mapping[str, str]) -> DeviceInfo:
    name = f"emulated board, {CPUS[cpu]}"
    emulation = {"emulated by": "QEMU, one core, one instruction a virtual nanosecond"}
    return DeviceInfo("board" if cpu == next(iter(CPUS)) else f"board:{cpu}", name, "virtual", {**facts, **emulation})


@contextmanager
def booted(cpu: str = "cortex-a76", *, exact: bool, cores: int = 1) -> Iterator[Booted]:
    """A board for the length of the block; its sshd answers when the block begins.

    With `exact` its clock counts instructions, one a nanosecond, on one core; without, it is this host's.

    Raises:
        SetupFailed: there is no image.
        DeviceGone: it did not boot; with what it said last.
    """
    image = board_image.image()
    with tempfile.TemporaryDirectory(prefix="edgefuse-board-") as scratch:
        for attempt in range(ATTEMPTS):
            ports = _free_port(), _free_port()
            console, complaints = Path(scratch) / f"console-{attempt}", Path(scratch) / f"complaints-{attempt}"
            with (
                complaints.open("wb") as stderr,
                process.running(_argv(image, cpu, ports, console, exact=exact, cores=cores), stderr=stderr) as child,
            ):
                if _wait(child, ports[0]):
                    yield Booted(*ports, image, child.pid)
                    return
            if TAKEN not in _text(complaints):
                break
        raise DeviceGone(_boot_failure(_text(complaints), _text(console)), hint="Make it anew with: edgefuse devices setup board")


def _argv(
    image: board_image.Image, cpu: str, ports: tuple[int, int], console: Path, *, exact: bool, cores: int
) -> Sequence[str | Path]:
    # restrict=on: the guest reaches nothing; it is reached through the two ports alone
    forwards = f"hostfwd=tcp:{LOOPBACK}:{ports[0]}-:22,hostfwd=tcp:{LOOPBACK}:{ports[1]}-:5555"
    how = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"] if exact else ["-accel", "tcg,thread=multi"]
    return [
        *_dying_with_us(),
        "qemu-system-aarch64",
        *("-M", "virt,gic-version=3", "-cpu", cpu, "-smp", str(cores), "-m", str(MEMORY_MB), *how),
        *("-kernel", image.kernel, "-initrd", image.initrd, "-append", "console=ttyAMA0 quiet panic=-1", "-no-reboot"),
        *("-drive", f"if=none,id=disk,file={_escaped(image.disk)},format=raw,snapshot=on"),
        *("-device", "virtio-blk-device,drive=disk", "-device", "virtio-rng-device"),
        *("-netdev", f"user,id=net,restrict=on,{forwards}", "-device", "virtio-net-device,netdev=net"),
        *("-nodefaults", "-display", "none", "-monitor", "none", "-serial", f"file:{_escaped(console)}"),
    ]


def _dying_with_us() -> Sequence[str]:
    """A prefix that ends the emulator when this process is killed with no time to do it."""
    return ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


def _wait(child: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the sshd behind the port has greeted; False where the board ended, or took too long."""
    until = time.monotonic() + BOOT_S
    while time.monotonic() < until and child.poll() is None:
        with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=GREETING_S) as connection:
            if connection.recv(4) == b"SSH-":
                return True
        time.sleep(LOOK_S)
    return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _escaped(path: Path) -> str:
    """A comma separates QEMU's options, and two of them are one in a name."""
    return str(path).replace(",", ",,")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _boot_failure(complaints: str, console: str) -> str:
    panics = [line for line in console.splitlines() if PANIC in line]
    said = complaints.strip() or (panics[0].partition(PANIC)[2] if panics else console)
    said = " ".join(said.split())[-TAIL:]
    return f"The emulated board did not boot{f'; it said: {said}' if said else ', and said nothing'}."

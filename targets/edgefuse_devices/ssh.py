"""A board behind ssh: any 64-bit ARM Linux that lets us in with a key; Python and the runtimes come along, nothing is installed.

Ports, users, keys and jumps come from the user's own ssh configuration, since it is the system's ssh that is used;
`EDGEFUSE_SSH_CONFIG` names another one. One connection is opened and shared by everything that is asked.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgefuse.device import Connection, Lack
from edgefuse.errors import DeviceError, DeviceGone, DeviceRefused, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import DeviceInfo
from edgefuse_devices import process, toolbox
from edgefuse_devices.remote import (
    ASK_S,
    PROBE,
    PUSH_S,
    Said,
    cannot_write,
    facts_in,
    gone,
    last_line,
    remote,
    require_arm64,
    said_in,
    scripted,
    sections,
)

SUMMARY = "a 64-bit ARM Linux board, as ssh:USER@HOST; hosts and keys as in your ssh configuration"
HERE = False

CONFIG = "EDGEFUSE_SSH_CONFIG"
CONNECT_S = 20
OPEN_S = 90  # for the whole greeting: an emulated board computes slowly
LOOK_S = 0.05
PLACES = ("/var/tmp", "/tmp", "$HOME")  # noqa: S108 - a fresh folder there, for us alone; the first one is on a disk, not in memory
SETTINGS: Mapping[str, object] = {
    "BatchMode": "yes",  # nobody is asked for a password in the middle of a benchmark
    "ConnectTimeout": CONNECT_S,
    "ServerAliveInterval": 10,
    "ServerAliveCountMax": 3,
    "LogLevel": "ERROR",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
}
CHANGED, UNKNOWN_KEY = "REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed"


@dataclass(frozen=True, slots=True)
class Ssh:
    """A far shell behind ssh; see `edgefuse_devices.remote.Far`."""

    name: str
    argv: Sequence[str]

    def shell(self, script: str, *, limit_s: float, given: bytes = b"") -> Said:
        """Run a script there; `given` is its stdin."""
        ended = process.run([*self.argv, f"exec sh -c {shlex.quote(scripted(script))}"], limit_s=limit_s, given=given)
        if ended.why != "itself":
            raise process.failed(ended, f"What was asked of {self.name}")
        said = said_in(ended.output)
        if said is None:
            raise gone(self.name)  # what ssh says then is about the connection that it may not open
        return said

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Copy files into a folder there, in one archive."""
        said = self.shell(f"exec 2>&1\ncd {folder} && tar -xf -", limit_s=PUSH_S, given=_archive(files))
        if said.code:
            raise cannot_write(self.name, said.text)

    def pull(self, path: str) -> bytes:
        """The content of a file there."""
        said = self.shell(f"cat {path}", limit_s=PUSH_S)
        if said.code:
            raise RunFailed(f"The runner left no answers on {self.name}.", hint="Run it once more.")
        return said.output


def missing() -> Sequence[Lack]:
    """The system's ssh, and what runs on a 64-bit ARM."""
    absent = [] if shutil.which("ssh") else [Lack("ssh (openssh-client)", "apt-get install openssh-client")]
    return [*absent, *toolbox.missing()]


def found() -> Sequence[DeviceInfo]:
    """None: which hosts are boards is not written anywhere."""
    return ()


@contextmanager
def connect(which: str) -> Iterator[Connection]:
    """The board of that host, or user and host, or name in the ssh configuration."""
    told = os.environ.get(CONFIG)
    with opened(which, Path(told) if told else None) as far:
        info, taskset = probed(far, f"ssh:{which}")
        with remote(far, info, PLACES, taskset=taskset) as connection:
            yield connection


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:  # noqa: ARG001 - the protocol's
    """Nothing of its own."""
    raise UsageError("There is nothing to set up for ssh alone.", hint="Set up what runs on it: edgefuse devices setup arm64")


@contextmanager
def opened(host: str, config: Path | None = None, *, name: str = "") -> Iterator[Ssh]:
    """A connection that everything shares, for the length of the block.

    Raises:
        UsageError: that is no host.
        UnknownDevice: nobody knows the host.
        DeviceRefused: it does not let us in.
        DeviceGone: it does not answer.
    """
    if not host or host.startswith("-") or re.search(r"\s", host):
        raise UsageError(f"ssh:{host} names no host.", hint="Write ssh:USER@HOST, or a name of your ssh configuration.")
    with tempfile.TemporaryDirectory(prefix="edgefuse-ssh-") as private:  # nobody else may enter it
        socket, complaints = Path(private) / "socket", Path(private) / "complaints"
        argv = ["ssh", *(("-F", str(config)) if config else ()), "-S", str(socket), *_options(SETTINGS)]
        with (
            complaints.open("wb") as stderr,
            process.running([*argv, "-M", "-N", "-o", "ControlPersist=no", host], stderr=stderr) as master,
        ):
            until = time.monotonic() + OPEN_S
            while not socket.exists():
                if master.poll() is not None or time.monotonic() > until:
                    raise refused(host, complaints.read_text(encoding="utf-8", errors="replace"))
                time.sleep(LOOK_S)
            # Without its master a command must not connect anew: it would run on a board that forgot everything.
            yield Ssh(name or host, [*argv, "-o", "ControlMaster=no", "-o", "ProxyCommand=false", host])


def probed(far: Ssh, spec: str, name: str = "") -> tuple[DeviceInfo, bool]:
    """The record of a board, and whether it can bind a process to cores.

    Raises:
        DeviceRefused: it is no 64-bit ARM.
    """
    told = sections(far.shell(f"exec 2> /dev/null\n{PROBE}", limit_s=ASK_S).text)
    require_arm64(far.name, next(iter(told.get("machine", ())), ""))
    return DeviceInfo(spec, name or far.name, "device", facts_in(told)), bool(told.get("taskset"))


def refused(host: str, complaint: str) -> DeviceError:
    """Why a connection was not opened, in words, by what ssh complains about."""
    if CHANGED in complaint:
        return DeviceRefused(
            f"{host} has another host key than the one that is known.",
            hint=f"If that is right (a new board, a new system), forget the old one: {_forget(host, complaint)}",
        )
    for words, answer in _COMPLAINTS.items():
        if words in complaint:
            return answer(host)
    why = last_line(complaint)
    if not why:
        return DeviceGone(f"{host} did not answer within {OPEN_S} s.", hint=f"Does it answer to: ssh {host}")
    return DeviceRefused(f"ssh could not reach {host}: {why}.", hint=f"See what it says to: ssh -v {host}")


def _silent(host: str) -> DeviceError:
    return DeviceGone(f"{host} does not answer.", hint="Is it switched on, and in the same network?")


_COMPLAINTS: Mapping[str, Callable[[str], DeviceError]] = {
    UNKNOWN_KEY: lambda host: DeviceRefused(
        f"The host key of {host} is not known yet.", hint=f"Look at it, and accept it, once: ssh {host}"
    ),
    "Permission denied": lambda host: DeviceRefused(
        f"{host} does not accept any of your keys.", hint=f"Give it one: ssh-copy-id {host}"
    ),
    "Too many authentication failures": lambda host: DeviceRefused(
        f"{host} was offered too many keys.",
        hint="Name the right one in your ssh configuration: IdentityFile, IdentitiesOnly yes",
    ),
    "Could not resolve hostname": lambda host: UnknownDevice(
        f"Nobody knows the host {host}.", hint="Is the name right? It may be an address, or a name of your ssh configuration."
    ),
    "Connection refused": lambda host: DeviceRefused(
        f"{host} refuses connections: no sshd listens there.", hint="Start its sshd, or name its port in your ssh configuration."
    ),
    "timed out": _silent,
    "No route to host": _silent,
    "Network is unreachable": _silent,
}


def _forget(host: str, complaint: str) -> str:
    """The command that forgets the old key: ssh's own proposal, if it makes one."""
    proposed = re.search(r"ssh-keygen -f \S+ -R \S+", complaint)
    return proposed[0] if proposed else f"ssh-keygen -R {host.rpartition('@')[2]}"


def _options(settings: Mapping[str, object]) -> Sequence[str]:
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _archive(files: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as archive:
        for name, path in files.items():
            archive.add(path, name, filter=_plain)
    return buffer.getvalue()


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without whom it belongs to here."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member

"""A real browser on this host: LiteRT.js in Chromium, in WebAssembly, with one thread (`browser`) or several (`browser:threads`).

Every job has a browser of its own, in a process of its own. Its clock is the page's: wall time of another runtime than the
host's, in steps of 5 microseconds, which is as fine as a page may have it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from edgefuse.device import Lack, cache
from edgefuse.errors import RunFailed, SetupFailed, UnknownDevice, UsageError
from edgefuse.measurement import NOT_TOLD, DeviceInfo
from edgefuse_devices import process
from edgefuse_devices.plan import read_run, write_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from edgefuse.measurement import Job, Run
    from edgefuse.values import Artifact

SUMMARY = "LiteRT.js in Chromium on this host: WebAssembly, one thread or several"
HERE = True

CHROMIUM = "EDGEFUSE_CHROMIUM"  # names the browser where it is not on the PATH
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLAYWRIGHT = "playwright==1.65.2"
RUNTIME, VERSION = "LiteRT.js", "2.5.3"
TARGET, MODEL = "tflite", "model.tflite"
VARIANTS: Mapping[str, str] = {"": "one thread", "threads": "several threads"}
USUAL_THREADS = 2
LOOK_S = 20  # for a version
FETCH_S = 600  # for 10 MB
AGAIN = "Run it once more; if it goes on, see whether the artifact runs elsewhere: --device host"


def missing() -> Sequence[Lack]:
    """The browser, the package that drives it, and the runtime that runs in it."""
    lacks = []
    if importlib.util.find_spec("playwright") is None:
        lacks.append(Lack(f"the package {PLAYWRIGHT}", "python -m pip install 'edgefuse[browser]'"))
    if _chromium() is None:
        told = os.environ.get(CHROMIUM)
        what = f"the browser that {CHROMIUM} names, which is not there: {told}" if told else "Chromium"
        lacks.append(Lack(what, f"unset {CHROMIUM}" if told else "apt-get install chromium"))
    if not _packages().exists():
        lacks.append(Lack(f"{RUNTIME} {VERSION}", "edgefuse devices setup browser"))
    return lacks


def found() -> Sequence[DeviceInfo]:
    """The browser, once with one thread and once with several."""
    return [] if missing() else [_info(which) for which in VARIANTS]


@contextmanager
def connect(which: str) -> Iterator[_Connection]:
    """A browser that is started for each job.

    Raises:
        UnknownDevice: it has no such variant.
    """
    if which not in VARIANTS:
        raise UnknownDevice(f"There is no browser {which!r}.", hint="There are: browser, browser:threads")
    yield _Connection(_info(which), which)


def setup(tell: Callable[[str], AbstractContextManager[object]]) -> None:
    """Fetch LiteRT.js with npm, which compares what it gets with the digests of our lock file.

    Raises:
        SetupFailed: npm is not there, or could not fetch it, or got something else.
    """
    folder = _packages()
    if folder.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise SetupFailed(f"{RUNTIME} is fetched with npm, which is not there.", hint="Install it: apt-get install npm")
    with tell(f"Fetching {RUNTIME} {VERSION}"):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".draft-") as draft:
                _fetch(npm, Path(draft) / folder.name)
                _put(Path(draft) / folder.name, folder)
        except OSError as error:
            raise SetupFailed(
                f"{folder} could not be written: {error.strerror}.", hint="Choose another EDGEFUSE_CACHE."
            ) from error


@dataclass(frozen=True, slots=True)
class _Connection:
    """The browser in one of its variants."""

    info: DeviceInfo
    which: str

    def refusal(self, artifact: Artifact) -> str | None:
        """Browsers run .tflite alone."""
        if artifact.target != TARGET:
            return f"In a browser {RUNTIME} runs {TARGET} artifacts, and this is one of {artifact.target}."
        return None

    def conditions(self) -> Mapping[str, str]:
        """The load of this host, where the browser runs."""
        return {"load": f"{psutil.getloadavg()[0]:.2f}"}

    def run(self, job: Job) -> Run:
        """Run a job in a browser of its own.

        Raises:
            RunFailed: the browser or its page died, hung, or stopped with an error.
            UsageError: a browser cannot do what is wanted.
        """
        if sentence := _impossible(job, self.which):
            raise UsageError(*sentence)
        threads = max(job.routine.threads, USUAL_THREADS) if self.which else 1
        with tempfile.TemporaryDirectory(prefix="edgefuse-") as name:
            folder = Path(name)
            write_plan(folder, replace(job, routine=replace(job.routine, threads=threads)), model=MODEL)
            (folder / MODEL).symlink_to(job.artifact.path.resolve())
            ended = process.run(_argv(folder), limit_s=job.routine.limit_s, cwd=folder, env={**os.environ, "TMPDIR": name})
            process.checked(ended, "The browser", hint=AGAIN)
            return read_run(folder, ended.stdout, job, "device")


def _impossible(job: Job, which: str) -> tuple[str, str] | None:
    """Why a browser cannot do what is wanted: a sentence and a hint."""
    if job.want == "profile":
        return f"{RUNTIME} has no profile of operators.", "Profile on another device, for example: --device host"
    if job.want == "memory" and not sys.platform.startswith("linux"):
        return "The memory of a browser's process is read from /proc, which only Linux has.", "Leave the memory out."
    if job.routine.cores:
        return "A browser's threads are not bound to cores.", "Leave the cores out."
    if job.routine.threads > 1 and not which:
        return "The device 'browser' has one thread.", "Give it several with: --device browser:threads"
    cores = psutil.cpu_count() or 1
    if which and max(job.routine.threads, USUAL_THREADS) > cores:
        return f"A browser on this host has {cores} threads at most.", f"Ask for no more threads than {cores}."
    return None


def _argv(folder: Path) -> list[str | Path]:
    chromium = _chromium()
    if chromium is None:
        raise RunFailed("Chromium is not there any more.", hint="Install it: apt-get install chromium")
    worker = [sys.executable, "-P", "-m", "edgefuse_devices.browser_worker"]
    return [*worker, folder, chromium, _native(), _packages()]


def _info(which: str) -> DeviceInfo:
    version = _version()
    return DeviceInfo(
        spec=f"browser:{which}" if which else "browser",
        name=f"{version}, {VARIANTS[which]}",
        clock="device",
        facts={
            "browser": version,
            "runtimes": f"{RUNTIME} {VERSION}",
            "kernels": f"WebAssembly, {VARIANTS[which]}",
            "cores": str(psutil.cpu_count()),
            "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
    )


def _version() -> str:
    """The browser's name and version, as it says itself."""
    chromium = _chromium()
    if chromium is None:
        return NOT_TOLD
    try:
        ended = process.run([chromium, "--version"], limit_s=LOOK_S)
    except RunFailed:
        return NOT_TOLD
    told = re.match(r".*?\d[\d.]*", ended.stdout.strip())
    return told.group() if ended.well and told else NOT_TOLD


def _chromium() -> str | None:
    """The browser's path."""
    told = os.environ.get(CHROMIUM)
    if told:
        return shutil.which(told)
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _native() -> Path:
    """The page: in a wheel it lies in this package, in the source tree beside it."""
    here = Path(__file__).parent
    return next(path for path in (here / "native" / "browser", here.parent / "native" / "browser") if path.exists())


def _packages() -> Path:
    return cache() / "browser" / f"litertjs-{VERSION}"


def _fetch(npm: str, folder: Path) -> None:
    """Let npm put exactly what the lock file says into a folder; it keeps what it has fetched, for the next time."""
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(_native() / name, folder / name)
    argv: list[str | Path] = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    ended = process.run(argv, limit_s=FETCH_S, cwd=folder)
    if not ended.well:
        raise SetupFailed(f"{RUNTIME} could not be fetched: {_why(ended)}.", hint="Try again: edgefuse devices setup browser")


def _why(ended: process.Ended) -> str:
    """What npm complained about, in its own words."""
    if ended.why == "time":
        return f"npm took longer than {ended.limit_s:g} s"
    lines = [line.removeprefix("npm error ").removeprefix("npm ERR! ").strip() for line in ended.stderr.splitlines()]
    told = [line for line in lines if line and not line.startswith(("code ", "errno ", "syscall ", "A complete log", "npm "))]
    return told[0].rstrip(".") if told else f"npm ended with {ended.code if ended.code is not None else ended.signal}"


def _put(draft: Path, folder: Path) -> None:
    """One rename; whoever else has set it up in the meantime has set up the same."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise

"""What runs artifacts on arm64 Linux and Android: a runner per runtime with every library that it needs, fetched and built once.

Nothing is installed: it all stands in `cache()/"arm64"`. Each step makes one folder, which appears whole or not at all, together
with a stamp: what it was made from, and the checksum of each file. A step whose stamp fits is not done again, so that a set-up
that was stopped goes on, and one whose sources have changed builds anew.

A runner brings its C library and loader along. It is the same file on a bare Linux, on Android and under an emulator.

The compiler and the emulator are the system's; where it has none, Debian's packages are unpacked here, for which nobody must be
root.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edgefuse import atomic
from edgefuse.device import Lack, cache
from edgefuse.errors import DeviceMissing, NotWritable, OutputError, RunFailed, SetupFailed
from edgefuse_devices.process import Ended, failed, run

Tell = Callable[[str], AbstractContextManager[object]]

SETUP = "edgefuse devices setup arm64"
RUNNER, LOADER, STAMP = "runner", "lib/ld-linux-aarch64.so.1", "stamp.json"
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64")  # glibc 2.28 or later is what we bring along
PYTHON = "311"  # the wheels differ by Python's version, the libraries in them do not
FETCH_S, BUILD_S = 1200, 600
C_LIBRARIES = (
    "ld-linux-aarch64.so.1",
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror")
APT = ("-oDebug::NoLocking=true", "-oAPT::Sandbox::User=root")  # nothing of the system's is written, so nothing is locked


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime as its project ships it for arm64, and what is built upon it.

    Attributes:
        name: with its version, as a runner says it.
        requirement: the wheel.
        sha256: of the wheel.
        source: of the runner.
        compiler: which one builds it.
        flags: of the compiler; `{wheel}` is where the wheel is unpacked.
        libraries: out of the wheel, that the runner needs.
        includes: folders of the wheel with headers.
    """

    name: str
    requirement: str
    sha256: str
    source: str
    compiler: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    includes: tuple[str, ...] = ()


RUNTIMES: Mapping[str, Runtime] = {
    "executorch": Runtime(
        name="ExecuTorch 1.5.1",
        requirement="executorch==1.5.1",
        sha256="8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a",
        source="executorch_runner.cpp",
        compiler="g++",
        flags=("-std=c++17", "-DC10_USING_CUSTOM_GENERATED_MACROS"),
        # the kernels and the delegate register themselves when they are loaded; nothing names them
        libraries=tuple(
            f"executorch/lib/libexecutorch{part}.so"
            for part in ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
        ),
        includes=("executorch/include", "executorch/include/executorch/runtime/core/portable_type/c10"),
    ),
    "tflite": Runtime(
        name="LiteRT 2.3.0",
        requirement="ai-edge-litert==2.3.0",
        sha256="853fc608f96da87bd5f3458465dfb9abbf18d5ae6b94eceacead407146f175ae",
        source="litert_runner.c",
        compiler="gcc",
        flags=("-std=c11",),
        libraries=("ai_edge_litert/libLiteRt.so",),
    ),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A program of the system, or of a package that is unpacked in the toolbox.

    Attributes:
        step: the folder there.
        program: what is started.
        package: Debian's name.
        what: what it is, for people.
    """

    step: str
    program: str
    package: str
    what: str


COMPILER = Tool("compiler", "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu", "C++ compiler for arm64")
EMULATOR = Tool("emulator", "qemu-aarch64", "qemu-user", "emulator of arm64 programs that takes plugins")


@dataclass(frozen=True, slots=True)
class Step:
    """One folder of the toolbox.

    Attributes:
        name: of the folder.
        sentence: what is being done, for the progress.
        of: digest of everything that it is made from.
        make: writes into the draft that it is given.
    """

    name: str
    sentence: str
    of: str
    make: Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a folder was made from, and the checksum of each of its files."""

    of: str
    files: Mapping[str, str]


def home() -> Path:
    """Where the toolbox stands."""
    return cache() / "arm64"


def missing(*, counting: bool = False) -> Sequence[Lack]:
    """What a device that runs arm64 programs lacks: the runners, and for counting an emulator and the plugin.

    A set-up mends it; where packages cannot be fetched, that of the tool must be installed before.
    """
    lacks = [
        Lack(f"the arm64 runner of {RUNTIMES[each].name}", SETUP) for each in RUNTIMES if not _stands(each, _of_runner(each))
    ]
    if lacks and not _program(COMPILER):
        lacks = [_lack(COMPILER), *lacks]
    if counting and not _program(EMULATOR):
        lacks = [_lack(EMULATOR), *lacks]
    if counting and not _stands("count", _of_plugin()):
        lacks.append(Lack("the plugin that counts instructions", SETUP))
    return lacks


def emulator() -> Path:
    """The program that emulates arm64 programs and takes plugins.

    Raises:
        DeviceMissing: there is none.
    """
    program = _program(EMULATOR)
    if not program:
        raise DeviceMissing(f"There is no {EMULATOR.what} here.", hint=_lack(EMULATOR).mend)
    return program


def payload(target: str) -> Mapping[str, Path]:
    """Everything that must lie on a bare arm64 device to run a target's artifacts: the path there, relative, and the file here.

    `RUNNER` and `LOADER` must be executable there.

    Raises:
        DeviceMissing: it has not been set up, or its files have changed since.
    """
    _require(target, _of_runner(target))
    folder = home() / target
    return {name: folder / name for name in _stamp(target).files}


def refusal(target: str, machine: str) -> str | None:
    """Why no artifact of a target runs on such a machine; None where there is a runner for it."""
    if target in RUNTIMES:
        return None
    told = "Core ML artifacts run on Apple devices only" if target == "coreml" else f"there is no runner for {target}"
    return f"{told}; {machine} runs {' and '.join(RUNTIMES)}"


def command(plan: str = ".", at: str = ".") -> tuple[str, ...]:
    """How to start a runner whose payload lies in the folder `at`, on the plan in the folder `plan`.

    The loader finds every library there, and does not look into the cache of those of the system.
    """
    return (f"{at}/{LOADER}", "--inhibit-cache", "--library-path", f"{at}/lib", f"{at}/{RUNNER}", plan)


def digest(target: str) -> str:
    """Of the whole payload: two runs with the same digest ran the same machine code."""
    return hashlib.sha256(json.dumps(_stamp(target).files, sort_keys=True).encode()).hexdigest()


def plugin() -> Path:
    """The plugin that counts instructions.

    Raises:
        DeviceMissing: it has not been set up, or has changed since.
    """
    _require("count", _of_plugin())
    return home() / "count" / "count.so"


def setup(tell: Tell) -> None:
    """Fetch and build the runners.

    Raises:
        SetupFailed: something could not be fetched or built.
        NoSpace: the disk is full.
        NotWritable: the folder may not be written.
    """
    with _ours_alone():
        for target, runtime in RUNTIMES.items():
            if _done(building := _building(target, runtime)):
                continue
            _provide(COMPILER, tell)
            _do(_fetching(target, runtime), tell)
            _do(building, tell)


def setup_counting(tell: Tell) -> None:
    """Fetch the emulator where there is none, and build the plugin that counts instructions; fails as `setup` does."""
    with _ours_alone():
        _provide(EMULATOR, tell)
        _do(Step("count", "Building the plugin that counts instructions", _of_plugin(), _build_plugin), tell)


def _provide(tool: Tool, tell: Tell) -> None:
    """Unpack the packages of a tool that the system does not have."""
    if _program(tool):
        return
    if not shutil.which("apt-get"):
        raise SetupFailed(
            f"There is no {tool.what} here, and no apt-get to fetch one.", hint=f"Install {tool.program}, then: {SETUP}"
        )
    _do(Step(tool.step, f"Fetching the {tool.what}", _of(repr(tool)), lambda draft: _fetch_packages(tool, draft)), tell)
    if not _program(tool):
        raise SetupFailed(f"The package {tool.package} of this system holds no {tool.what}.", hint="Debian 12 has one that is.")


def _fetch_packages(tool: Tool, draft: Path) -> None:
    """Debian's package and all that it needs and the system lacks, by lists of our own."""
    state = draft / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    apt = ["apt-get", "--quiet", *APT, f"-oDir::State::lists={state}/lists", f"-oDir::Cache={state}/cache"]
    run([*apt, "update"], limit_s=FETCH_S)  # one source of several may fail: what is lacking then is said below
    ended = run([*apt, "install", "--download-only", "--no-install-recommends", "--yes", tool.package], limit_s=FETCH_S)
    packages = sorted((state / "cache" / "archives").glob("*.deb"))
    if not ended.well or not packages:
        raise SetupFailed(
            f"{tool.package} could not be fetched: {_last_words(ended, 'E: ')}",
            hint=f"Try: apt-get install {tool.package}; {SETUP}",
        )
    for package in packages:
        _built(run(["dpkg", "-x", package, draft], limit_s=BUILD_S), package.name)
    shutil.rmtree(state)
    shutil.rmtree(draft / "usr" / "share", ignore_errors=True)
    for path in list(draft.rglob("*")):
        other_emulator = path.parent == draft / "usr" / "bin" and "aarch64" not in path.name
        leads_nowhere = path.is_symlink() and not path.exists()  # into packages that the system has
        if other_emulator or leads_nowhere:
            path.unlink()


def _program(tool: Tool) -> Path | None:
    """Where it is: the system's, or our own; None where neither is there, or fit."""
    own = home() / tool.step / "usr" / "bin" / tool.program
    for found in (shutil.which(tool.program), own if own.exists() else None):
        if found and (tool is not EMULATOR or _takes_plugins(str(found))):
            return Path(found)
    return None


@functools.cache
def _takes_plugins(program: str) -> bool:
    """A static build does not, not every version of QEMU has been built with them, and some are of another machine."""
    try:
        return "-plugin" in run([program, "-h"], limit_s=60).stdout
    except RunFailed:
        return False


def _lack(tool: Tool) -> Lack:
    return Lack(
        f"the {tool.what}", SETUP if shutil.which("apt-get") else f"install {tool.program} (Debian: {tool.package}); {SETUP}"
    )


def _fetching(target: str, runtime: Runtime) -> Step:
    def make(draft: Path) -> None:
        wanted = draft / "wanted.txt"
        wanted.write_text(f"{runtime.requirement} --hash=sha256:{runtime.sha256}\n", encoding="ascii")
        argv = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
        ]
        argv += [f"--platform={tag}" for tag in TAGS]
        argv += [f"--python-version={PYTHON}", "--only-binary=:all:", f"--dest={draft}", f"--requirement={wanted}"]
        ended = run(argv, limit_s=FETCH_S)
        if not ended.well or not list(draft.glob("*.whl")):
            raise SetupFailed(
                f"{runtime.name} for arm64 could not be fetched: {_last_words(ended, 'ERROR')}",
                hint=f"Is the package index reached? Then go on with: {SETUP}",
            )

    return Step(f"{target}-wheel", f"Fetching {runtime.name} for arm64", runtime.sha256, make)


def _building(target: str, runtime: Runtime) -> Step:
    def make(draft: Path) -> None:
        unpacked, libraries = draft / "wheel", draft / "lib"
        libraries.mkdir()
        _unpack(home() / f"{target}-wheel", unpacked, runtime)
        for name in runtime.libraries:
            shutil.copy(unpacked / name, libraries)
        for name in C_LIBRARIES:
            shutil.copy(_found_by_compiler(name), libraries)
        _compile(runtime, unpacked, draft)
        shutil.rmtree(unpacked)
        (draft / LOADER).chmod(0o755)

    return Step(target, f"Building the runner of {runtime.name}", _of_runner(target), make)


def _unpack(wheel: Path, folder: Path, runtime: Runtime) -> None:
    """The libraries and headers of a wheel, without the rest of it."""
    wanted = (*runtime.libraries, *(f"{include}/" for include in runtime.includes))
    with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])


def _compile(runtime: Runtime, wheel: Path, draft: Path) -> None:
    libraries = draft / "lib"
    argv = ["-O2", *runtime.flags, *WARNINGS, f'-DRUNTIME="{runtime.name}"']
    for include in runtime.includes:
        argv += ["-isystem", str(wheel / include)]  # their warnings are theirs
    argv += [str(_source(runtime.source)), "-o", str(draft / RUNNER), f"-L{libraries}", "-Wl,--no-as-needed"]
    argv += [f"-l{Path(name).stem.removeprefix('lib')}" for name in runtime.libraries]
    _built(_compile_for_arm64(runtime.compiler, *argv), f"the runner of {runtime.name}")


def _build_plugin(draft: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise SetupFailed("There is no C compiler to build the counting plugin.", hint=f"apt-get install gcc; {SETUP}")
    argv: list[str | Path] = [
        compiler,
        "-std=c11",
        "-O2",
        *WARNINGS,
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        _source("count.c"),
    ]
    _built(run([*argv, "-o", draft / "count.so"], limit_s=BUILD_S), "the counting plugin")


def _built(ended: Ended, what: str) -> None:
    if not ended.well:
        raise SetupFailed(
            f"{what[:1].upper()}{what[1:]} could not be built: {_last_words(ended, 'error')}", hint=f"Try again with: {SETUP}"
        )


def _compile_for_arm64(name: str, *arguments: str) -> Ended:
    """Start a compiler: the system's, or our own, which looks for everything below its folder."""
    program = _program(COMPILER)
    if not program:
        raise SetupFailed(f"There is no {COMPILER.what} here.", hint=_lack(COMPILER).mend)
    own = home() / COMPILER.step
    ours = program.is_relative_to(own)
    argv = [str(program.with_name(program.name.replace("g++", name))), *([f"--sysroot={own}"] if ours else []), *arguments]
    libraries = {"LD_LIBRARY_PATH": f"{own}/usr/lib/{platform.machine()}-linux-gnu"} if ours else {}
    return run(argv, limit_s=BUILD_S, env={**os.environ, **libraries})


def _found_by_compiler(library: str) -> Path:
    ended = _compile_for_arm64("g++", f"-print-file-name={library}")
    path = Path(ended.stdout.strip())
    if not ended.well or not path.is_file():
        raise SetupFailed(
            f"The compiler has no {library} for arm64.", hint=f"Install all of it with: apt-get install {COMPILER.package}"
        )
    return path


def _last_words(ended: Ended, sign: str) -> str:
    """Of a failed tool: the first line with the sign of an error, else how it ended."""
    lines = [line.strip() for line in ended.stderr.splitlines() if sign in line]
    return lines[0][:300] if lines and ended.why == "itself" else failed(ended, "The tool").sentence


def _source(name: str) -> Path:
    """A source file: beside us where we are installed, beside our folder in a checkout."""
    beside = Path(__file__).parent / "native" / name
    return beside if beside.exists() else Path(__file__).parents[1] / "native" / name


def _of_runner(target: str) -> str:
    runtime = RUNTIMES[target]
    return _of(repr(runtime), repr(C_LIBRARIES), _source("plan.h").read_text("utf-8"), _source(runtime.source).read_text("utf-8"))


def _of_plugin() -> str:
    return _of(_source("count.c").read_text("utf-8"))


def _of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _do(step: Step, tell: Tell) -> None:
    """Make the folder of a step, unless it stands there whole, made from the same."""
    folder = home() / step.name
    if _done(step):
        return
    try:
        with tell(step.sentence), atomic.draft(folder, overwrite=True, is_ours=lambda _: True) as draft:
            step.make(draft)
            stamp = Stamp(step.of, {name: _sha256(draft / name) for name in _files(draft)})
            (draft / STAMP).write_text(json.dumps(asdict(stamp), indent=1), encoding="utf-8")
    except RunFailed as error:  # a tool that could not even be started
        raise SetupFailed(error.sentence, hint=error.hint) from error
    except OutputError as error:
        raise type(error)(error.sentence, hint=f"Name another place by EDGEFUSE_CACHE, then go on with: {SETUP}") from error


def _done(step: Step) -> bool:
    return _stands(step.name, step.of) and not _changed(step.name)


def _require(name: str, of: str) -> None:
    if not _stands(name, of):
        raise DeviceMissing(
            "The arm64 runners have not been set up, or edgefuse has changed since.", hint=f"Set them up: {SETUP}"
        )
    if changed := _changed(name):
        raise DeviceMissing(f"{changed[0]} has changed since it was set up.", hint=f"Set it up again: {SETUP}")


def _stands(name: str, of: str) -> bool:
    """Whether a folder was made from the same; its files are not looked at."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(_stamp(name).of == of)
    return False


def _changed(name: str) -> Sequence[Path]:
    """Files of a folder that are not what they were when it was made."""
    folder = home() / name
    return [folder / file for file, sha256 in _stamp(name).files.items() if _sha256(folder / file) != sha256]


def _stamp(name: str) -> Stamp:
    told = json.loads((home() / name / STAMP).read_text("utf-8"))
    return Stamp(told["of"], told["files"])


def _files(folder: Path) -> Sequence[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


@contextmanager
def _ours_alone() -> Iterator[None]:
    """One set-up at a time; the second one waits, and then finds everything done."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise NotWritable(
            f"{home()} may not be written: {error.strerror}.", hint=f"Name another place by EDGEFUSE_CACHE, then: {SETUP}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

"""Children: started with an argument list, listened to, and ended with everything that they started themselves.

Every child leads a session of its own: its whole group can be killed at once, and it can ask nothing on our terminal.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from edgefuse.errors import RunFailed

if TYPE_CHECKING:
    from types import FrameType

MOST_BYTES = 64 << 20  # of output; what says more is not going to make sense, and would fill the memory
AT_ONCE = 1 << 16
LOOK_S = 0.1  # how often we look whether a silent child has ended
SHELL_SIGNAL = 128  # a shell adds it to the number of the signal that killed its child

Why = Literal["itself", "time", "talk"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended.

    Attributes:
        output: its stdout, as it is.
        errors: its stderr, as it is.
        code: its exit code; None where a signal killed it.
        signal: the signal's name, "SIGKILL"; "" where it ended by itself.
        why: whether it ended itself, or was killed because its time was over or because it talked without end.
        limit_s: the time that it had.
    """

    output: bytes
    errors: bytes
    code: int | None
    signal: str
    why: Why
    limit_s: float

    @property
    def stdout(self) -> str:
        """What it printed; bytes that are no text are marked."""
        return self.output.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it complained about; bytes that are no text are marked."""
        return self.errors.decode(errors="replace")

    @property
    def well(self) -> bool:
        """Whether it ended by itself, with 0."""
        return self.why == "itself" and self.code == 0


def run(
    argv: Sequence[str | Path],
    *,
    limit_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    given: bytes = b"",
) -> Ended:
    """Start a child, give it `given` on its stdin, and wait until it ends; after `limit_s` it is killed, with all its children.

    Raises:
        RunFailed: it could not be started.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(given)
        stdin.seek(0)
        with running(argv, cwd=cwd, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            (output, errors), why = _listen(child, limit_s)
    code = child.returncode
    return Ended(output, errors, code if code >= 0 else None, _signal(-code), why, limit_s)


@contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    stderr: IO[bytes] | int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that lives as long as the block, at most; then it is killed, with all its children, whatever ends the block.

    Raises:
        RunFailed: it could not be started.
    """
    with _orderly_end() as signals:
        try:
            child = subprocess.Popen(  # noqa: S603 - an argument list; no shell reads it
                [str(each) for each in argv],
                cwd=cwd,
                env=dict(env) if env is not None else None,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            name = Path(argv[0]).name
            raise RunFailed(f"{name} could not be started: {error.strerror}.", hint=f"Is {argv[0]} there?") from error
        try:
            signals.act()
            yield child
        finally:
            signals.wait()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for stream in (child.stdout, child.stderr):
                if stream:
                    stream.close()


def failed(ended: Ended, what: str = "The runner", hint: str | None = None) -> RunFailed:
    """A bad ending in words: that the time was over, which signal it was, or the exit code and the last thing it said."""
    if ended.why == "time":
        return RunFailed(f"{what} took longer than {ended.limit_s:g} s and was ended.", hint=hint)
    if ended.why == "talk":
        return RunFailed(f"{what} printed more than {MOST_BYTES >> 20} MiB and was ended.", hint=hint)
    if ended.signal:
        return RunFailed(f"{what} was killed by {ended.signal}.", hint=hint)
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    return RunFailed(f"{what} ended with {ended.code}{f': {lines[-1][:300]}' if lines else ', and did not say why'}", hint=hint)


def checked(ended: Ended, what: str = "The runner", hint: str | None = None) -> Ended:
    """The child as it ended, if it ended well.

    Raises:
        RunFailed: it did not, in words.
    """
    if not ended.well:
        raise failed(ended, what, hint)
    return ended


def told_by_a_shell(ended: Ended) -> Ended:
    """The same, where the child was a shell elsewhere (over ssh or adb) that tells of a signal by an exit code above 128."""
    name = _signal(ended.code - SHELL_SIGNAL) if ended.code and ended.code > SHELL_SIGNAL else ""
    return Ended(ended.output, ended.errors, None, name, ended.why, ended.limit_s) if name else ended


def _listen(child: subprocess.Popen[bytes], limit_s: float) -> tuple[tuple[bytes, bytes], Why]:
    """What it says on both streams until it ends, its time is over, or it has said too much.

    A child that has ended may have left children behind that hold its streams open: they are not waited for.
    """
    assert child.stdout  # noqa: S101 - both were asked for
    assert child.stderr  # noqa: S101
    until = time.monotonic() + limit_s
    heard: dict[IO[bytes], bytearray] = {child.stdout: bytearray(), child.stderr: bytearray()}
    why: Why = "itself"
    with selectors.DefaultSelector() as selector:
        for stream in heard:
            selector.register(stream, selectors.EVENT_READ)
        while True:
            over = child.poll() is not None
            if time.monotonic() > until and not over:
                why = "time"
                break
            ready = selector.select(0 if over else LOOK_S) if selector.get_map() else []
            for key, _ in ready:
                stream = child.stdout if key.fileobj is child.stdout else child.stderr
                piece = os.read(stream.fileno(), AT_ONCE)
                heard[stream] += piece
                if not piece:
                    selector.unregister(stream)
            if max(map(len, heard.values())) > MOST_BYTES:
                why = "talk"
                break
            if over and not ready:
                break
            if not over and not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
    return (bytes(heard[child.stdout]), bytes(heard[child.stderr])), why


class _Signals:
    """Signals that end us; while a child is born or buried they wait, since nobody else would end it then."""

    def __init__(self) -> None:
        self._waiting = True
        self._come: int | None = None
        self.before: dict[int, Any] = {}  # what each signal did, and does when its time has come

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's arguments
        self._come = number
        if not self._waiting:
            self.act()

    def wait(self) -> None:
        self._waiting = True

    def act(self) -> None:
        """Unwind the stack, if a signal has come; from now on, as soon as one comes."""
        self._waiting = False
        number, self._come = self._come, None
        if number is None:
            return
        if self.before[number] is signal.SIG_DFL:
            raise SystemExit(SHELL_SIGNAL + number)
        self.before[number](number, None)


@contextmanager
def _orderly_end() -> Iterator[_Signals]:
    """Within the block SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that no child outlives us.

    With what somebody else does at a signal it only waits; one that is ignored stays ignored.
    """
    signals = _Signals()
    if threading.current_thread() is threading.main_thread():  # only this one may say what a signal does
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is signal.SIG_DFL or callable(handler):
                signals.before[number] = handler
                signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for replaced, handler in signals.before.items():
            signal.signal(replaced, handler)
    signals.act()  # what came while the child was buried


def _signal(number: int) -> str:
    """Its name; "" of a number that is none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if 0 < number < SHELL_SIGNAL // 2 else ""

"""Children of every kind of ending."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edgefuse import cli
from edgefuse.errors import RunFailed
from edgefuse_devices import process
from edgefuse_devices.process import Ended, checked, failed, run, running, told_by_a_shell

MINUTES = 120


def shell(script: str, limit_s: float = 30, **how: object) -> Ended:
    return run(["sh", "-c", script], limit_s=limit_s, **how)


def comes_true(what: Callable[[], bool], within_s: float = 10) -> bool:
    until = time.monotonic() + within_s
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return what()


def gone(file: Path) -> bool:
    """Whether the process whose number is in the file has ended."""
    number = int(file.read_text())
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_a_child_that_ends_well_has_said_something() -> None:
    ended = checked(shell("cat; echo of course >&2", given=b"are you well? "))
    assert (ended.stdout, ended.stderr, ended.code, ended.signal) == ("are you well? ", "of course\n", 0, "")


def test_no_shell_reads_the_arguments(tmp_path: Path) -> None:
    assert run(["printf", "%s", "$HOME; * 'x'"], limit_s=30, cwd=tmp_path).stdout == "$HOME; * 'x'"


def test_the_environment_is_the_one_that_is_given() -> None:
    assert run(["/usr/bin/env"], limit_s=30, env={}).stdout == ""


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 1 >&2; echo 'no such entry' >&2; exit 3", "The runner ended with 3: no such entry"),
        ("exit 4", "The runner ended with 4, and did not say why"),
        ("kill -9 $$", "The runner was killed by SIGKILL."),
        ("kill -ILL $$", "The runner was killed by SIGILL."),
        ("sleep 60", "The runner took longer than 0.3 s and was ended."),
    ],
    ids=["exit code", "exit code alone", "killed", "illegal instruction", "hung"],
)
def test_a_bad_ending_is_a_sentence(script: str, sentence: str) -> None:
    ended = shell(script, limit_s=0.3 if "sleep" in script else 30)
    assert failed(ended).sentence == sentence
    with pytest.raises(RunFailed):
        checked(ended)


def test_a_signal_far_away_is_one_here() -> None:
    assert told_by_a_shell(shell("exit 137")).signal == "SIGKILL"
    assert told_by_a_shell(shell("exit 127")).code == 127
    assert told_by_a_shell(shell("exit 255")).code == 255


def test_what_talks_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MOST_BYTES", 1 << 20)
    ended = shell("yes")
    assert failed(ended).sentence == "The runner printed more than 1 MiB and was ended."


def test_bytes_that_are_no_text_are_no_crash() -> None:
    assert "�" in shell(r"printf '\377\376'").stdout


def test_a_program_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="nothing could not be started: No such file or directory"):
        run([tmp_path / "nothing"], limit_s=1)


def test_when_the_time_is_over_the_childs_children_end_too(tmp_path: Path) -> None:
    shell(f"sleep {MINUTES} & echo $! > {tmp_path}/number; wait", limit_s=0.5)
    assert comes_true(lambda: gone(tmp_path / "number"))


def test_a_child_that_leaves_a_child_behind_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = shell(f"sleep {MINUTES} & echo $! > {tmp_path}/number; echo done")
    assert (ended.stdout, ended.well) == ("done\n", True)
    assert time.monotonic() - start < MINUTES / 4
    assert comes_true(lambda: gone(tmp_path / "number"))


def test_a_child_ends_with_its_block_whatever_ends_it(tmp_path: Path) -> None:
    def interrupted() -> None:
        with running(["sleep", str(MINUTES)]) as child:
            (tmp_path / "number").write_text(str(child.pid))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(tmp_path / "number")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_a_child_does_not_outlive_us(tmp_path: Path, number: signal.Signals) -> None:
    script = f"echo $$ > {tmp_path}/draft; mv {tmp_path}/draft {tmp_path}/number; sleep {MINUTES}"
    program = f"from edgefuse_devices.process import run; run(['sh', '-c', {script!r}], limit_s={MINUTES})"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as us:
        assert comes_true((tmp_path / "number").exists, within_s=60)
        os.kill(us.pid, number)
        assert us.wait(60) != 0
    assert comes_true(lambda: gone(tmp_path / "number"))


@pytest.fixture(params=["nobody's", "the command line's"])
def handler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who says what SIGTERM does."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL if request.param == "nobody's" else cli._terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_child_that_is_being_born_when_we_are_ended_does_not_outlive_us(
    number: signal.Signals, ending: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    born: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(*args: object, **options: object) -> subprocess.Popen[bytes]:
        born.append(popen(*args, **options))
        os.kill(os.getpid(), number)
        return born[0]

    monkeypatch.setattr(process.subprocess, "Popen", interrupted)
    with pytest.raises(ending):
        run(["sleep", str(MINUTES)], limit_s=MINUTES)
    assert born[0].returncode == -signal.SIGKILL

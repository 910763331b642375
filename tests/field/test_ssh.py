"""The real ssh against a real sshd on an emulated board: jobs, the record, cleaning up, and every way to end badly."""

import dataclasses
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgefuse.bundle import Bundle
from edgefuse.device import connect
from edgefuse.errors import DeviceGone, DeviceRefused, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import DeviceTime, Job
from edgefuse_devices import board, remote, ssh, toolbox
from tests.field.boards import LEAST_DB, LONG, TARGETS, bundle_of, endless, job_of, meanwhile, set_up, snr_db, unplug

pytestmark = pytest.mark.field

SPEC, ANOTHER = f"ssh:{board.HOST}", f"ssh:root@{board.HOST}"
KEYGEN = ("/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f")


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    set_up()


@contextmanager
def a_board(folder: Path) -> Iterator[tuple[board.Booted, Path]]:
    """A board by wall time, and the ssh configuration that knows it."""
    with board.booted(exact=False, cores=2) as booted:
        yield booted, board.write_config(booted, folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[board.Booted, Path]]:
    with a_board(tmp_path_factory.mktemp("board")) as both:
        yield both


@pytest.fixture(autouse=True)
def config(running: tuple[board.Booted, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a user who has such a board."""
    monkeypatch.setenv(ssh.CONFIG, str(running[1]))
    return running[1]


@pytest.fixture(scope="module")
def connection(running: tuple[board.Booted, Path]) -> Iterator[remote.Remote]:
    """One for many tests: a runner is pushed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ssh.CONFIG, str(running[1]))
        with connect(SPEC) as opened:
            yield opened


@pytest.fixture
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("int8", tmp_path_factory)


def shell(config: Path, script: str) -> str:
    with ssh.opened(board.HOST, config) as far:
        return far.shell(script, limit_s=60).text


def otherwise(config: Path, folder: Path, **settings: object) -> Path:
    """The same configuration with other settings, which win since they come first."""
    other = folder / "config"
    lines = [f"  {name} {value}" for name, value in settings.items()]
    other.write_text("\n".join([f"Host {board.HOST}", *lines, config.read_text(encoding="utf-8")]), encoding="utf-8")
    return other


def refusal(config: Path, monkeypatch: pytest.MonkeyPatch, spec: str = ANOTHER) -> pytest.ExceptionInfo[DeviceRefused]:
    monkeypatch.setenv(ssh.CONFIG, str(config))
    with pytest.raises(DeviceRefused) as refused, connect(spec):
        pass
    return refused


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_board_answers_as_the_golden_vectors_do(
    target: str, precision: str, connection: remote.Remote, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = bundle_of(precision, tmp_path_factory)
    job = job_of(bundle, target)
    run = connection.run(job)
    assert snr_db(bundle, job, run) >= LEAST_DB[precision]
    assert type(run.samples) is DeviceTime
    assert len(run.samples.values) == len(job.feed)
    assert run.unsteady == 0
    assert run.cold_load


def test_a_board_tells_what_it_is_and_how_it_is(connection: remote.Remote) -> None:
    assert connection.info.clock == "device"
    assert connection.info.facts["chip"] == "2 x Cortex-A76"
    assert "Debian" in connection.info.facts["system"]
    conditions = connection.conditions()
    assert float(conditions["load"]) >= 0
    assert conditions["governor"] == conditions["temperature"] == conditions["frequency"] == "not told"


def test_a_process_runs_on_the_cores_that_it_is_bound_to(connection: remote.Remote, int8: Bundle) -> None:
    job = job_of(int8, "executorch", dataclasses.replace(LONG, cores=(1,)))
    allowed: list[str] = []

    def look() -> None:
        pid = f"$(cat {connection.home}/job/pid)"
        allowed.append(connection.far.shell(f"grep Cpus_allowed_list /proc/{pid}/status; kill {pid}", limit_s=60).text)

    with meanwhile(look, runner_of(connection)), pytest.raises(RunFailed, match="SIGTERM"):
        connection.run(job)
    assert re.fullmatch(r"Cpus_allowed_list:\s+1\n", allowed[0])


def test_a_runner_that_is_killed_is_a_failure_with_its_signal(connection: remote.Remote, int8: Bundle) -> None:
    killing = f"kill -SEGV $(cat {connection.home}/job/pid)"
    with (
        meanwhile(lambda: connection.far.shell(killing, limit_s=60), runner_of(connection)),
        pytest.raises(RunFailed, match="The runner was killed by SIGSEGV"),
    ):
        connection.run(job_of(int8, "executorch", LONG))


def test_a_runner_that_hangs_is_ended_there_too(connection: remote.Remote, int8: Bundle) -> None:
    with pytest.raises(RunFailed, match="took longer than 4 s"):
        connection.run(job_of(int8, "executorch", dataclasses.replace(LONG, limit_s=4)))
    assert not runner_of(connection)()


def test_a_runner_that_says_nonsense_is_a_failure(
    connection: remote.Remote, int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonsense = 'echo I am fine; : > "$0/answers.bin"'
    monkeypatch.setattr(toolbox, "command", lambda plan, at: ("sh", "-c", nonsense, plan))  # noqa: ARG005 - as it is called
    with pytest.raises(RunFailed, match="I am fine"):
        connection.run(job_of(int8, "executorch"))


def test_an_artifact_that_is_cut_short_is_a_failure_in_the_runners_words(
    connection: remote.Remote, int8: Bundle, tmp_path: Path
) -> None:
    job = job_of(int8, "executorch")
    cut = tmp_path / "model.pte"
    cut.write_bytes(job.artifact.path.read_bytes()[:100_000])
    with pytest.raises(RunFailed, match=r"The runner ended with \d+: .*model.pte"):
        connection.run(dataclasses.replace(job, artifact=dataclasses.replace(job.artifact, path=cut)))


def test_nothing_is_left_on_the_board_whatever_ended_the_connection(
    config: Path, int8: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless(monkeypatch, tmp_path)
    homes: list[str] = []
    with pytest.raises(KeyboardInterrupt), connect(ANOTHER) as connection:
        interrupt(connection, job_of(int8, "executorch", LONG), homes)
    home = homes[0]
    assert shell(config, f"ls -d {home} 2>&1; ps | grep endless | grep -v grep") == f"ls: {home}: No such file or directory\n"


def test_a_disk_that_is_too_small_is_told_before_anything_is_copied(config: Path, int8: Bundle) -> None:
    with (
        small_disk(config),
        connect(ANOTHER) as connection,
        pytest.raises(RunFailed, match=r"is full: 2\.0 MB are free, and \d+\.\d MB are needed"),
    ):
        connection.run(job_of(int8, "executorch"))


def test_a_disk_that_fills_up_while_something_is_copied_is_told_and_emptied(
    config: Path, int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "free_bytes", lambda df: None)  # noqa: ARG005 - as it is called
    with small_disk(config), connect(ANOTHER) as connection:
        with pytest.raises(RunFailed, match=r"The disk of .*edgefuse-board is full"):
            connection.run(job_of(int8, "executorch"))
        assert connection.far.shell(f"ls {connection.home}", limit_s=60).text == ""


def test_a_port_on_which_nobody_listens_refuses(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusal(otherwise(config, tmp_path, Port=1), monkeypatch)
    assert "refuses connections" in refused.value.sentence


def test_a_key_that_the_board_does_not_know_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    subprocess.run([*KEYGEN, key], check=True, timeout=60)
    refused = refusal(other_key(config, tmp_path, key), monkeypatch)
    assert "does not accept any of your keys" in refused.value.sentence
    assert "ssh-copy-id" in refused.value.hint


def test_a_host_key_that_has_changed_is_refused_with_the_command_that_forgets_the_old_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, known = tmp_path / "key", tmp_path / "known"
    subprocess.run([*KEYGEN, key], check=True, timeout=60)
    known.write_text(f"{board.HOST} {key.with_suffix('.pub').read_text(encoding='ascii')}", encoding="ascii")
    refused = refusal(otherwise(config, tmp_path, UserKnownHostsFile=known), monkeypatch)
    assert "another host key" in refused.value.sentence
    forget = re.search(r"ssh-keygen .*", refused.value.hint)
    subprocess.run(forget[0].replace('"', "").split(), check=True, timeout=60, capture_output=True)
    assert board.HOST not in known.read_text(encoding="ascii")


def test_a_host_key_that_nobody_has_seen_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusal(otherwise(config, tmp_path, UserKnownHostsFile="/dev/null"), monkeypatch)
    assert "not known yet" in refused.value.sentence


def test_a_host_that_nobody_knows_is_unknown() -> None:
    with pytest.raises(UnknownDevice, match="Nobody knows the host"), connect("ssh:nobody@board.invalid"):
        pass


@pytest.mark.parametrize("which", ["", "-oProxyCommand=true", "a b"])
def test_what_is_no_host_is_no_option_either(which: str) -> None:
    with pytest.raises(UsageError, match="names no host"), connect(f"ssh:{which}"):
        pass


@pytest.mark.parametrize("accident", ["push", "run"])
def test_a_board_that_loses_power_is_gone(accident: str, int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_board(tmp_path) as (booted, config):
        monkeypatch.setenv(ssh.CONFIG, str(config))
        if accident == "run":
            endless(monkeypatch, tmp_path)
        with pytest.raises(DeviceGone, match="does not answer any more"), connect(ANOTHER) as connection:
            run_until(connection, job_of(int8, "executorch", LONG), accident, booted)


def run_until(connection: remote.Remote, job: Job, accident: str, booted: board.Booted) -> None:
    when = runner_of(connection) if accident == "run" else arriving(connection)
    with meanwhile(unplug(booted), when):
        connection.run(job)


def interrupt(connection: remote.Remote, job: Job, homes: list[str]) -> None:
    """What Ctrl-C does while a runner works."""
    homes.append(connection.home)
    with meanwhile(lambda: os.kill(os.getpid(), signal.SIGINT), runner_of(connection)):
        connection.run(job)


@contextmanager
def small_disk(config: Path) -> Iterator[None]:
    """The board has room for two megabytes."""
    shell(config, "mount -t tmpfs -o size=2m tmpfs /var/tmp")
    try:
        yield
    finally:
        shell(config, "umount /var/tmp")


def other_key(config: Path, folder: Path, key: Path) -> Path:
    """Keys add up in a configuration: the right one must not be there at all."""
    other = folder / "config"
    text = re.sub(r"IdentityFile .*", f"IdentityFile {key}", config.read_text(encoding="utf-8"))
    other.write_text(text, encoding="utf-8")
    return other


def runner_of(connection: remote.Remote) -> Callable[[], bool]:
    """Whether the runner works there."""
    script = f'[ -d /proc/"$(cat {connection.home}/job/pid)"/fd ]'
    return lambda: connection.far.shell(script, limit_s=60).code == 0


def arriving(connection: remote.Remote) -> Callable[[], bool]:
    """Whether something of the runner has arrived there."""
    script = f"[ -s {connection.home}/runner-executorch/lib/libexecutorch.so ]"
    return lambda: connection.far.shell(script, limit_s=60).code == 0

"""The real adb client against the real adbd on an emulated board, a Linux without Android: its own words are absent.

The server is one of our own, on a port of its own, and is ended with the tests.
"""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgefuse.bundle import Bundle
from edgefuse.device import connect
from edgefuse.errors import DeviceGone, RunFailed, UnknownDevice
from edgefuse.measurement import DeviceTime, Job
from edgefuse_devices import adb, board, remote, toolbox
from tests.field.boards import (
    LEAST_DB,
    LONG,
    TARGETS,
    bundle_of,
    endless,
    free_port,
    job_of,
    meanwhile,
    set_up,
    snr_db,
    told,
    unplug,
)

pytestmark = pytest.mark.field

ADB = shutil.which("adb") or "adb"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    set_up()
    if not shutil.which("adb"):
        pytest.skip("adb is missing: apt-get install adb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        yield
        subprocess.run([ADB, "kill-server"], check=False, timeout=60, capture_output=True)


@pytest.fixture(scope="module")
def running(_server: None) -> Iterator[board.Booted]:
    with board.booted(exact=False, cores=2) as booted:
        yield booted


@pytest.fixture(scope="module")
def serial(running: board.Booted) -> str:
    return attach(running)


@pytest.fixture(scope="module")
def connection(serial: str) -> Iterator[remote.Remote]:
    """One for many tests: a runner is pushed once."""
    with connect(f"adb:{serial}") as opened:
        yield opened


@pytest.fixture
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("int8", tmp_path_factory)


def attach(booted: board.Booted) -> str:
    """The serial number of a board, as of a phone in the same network."""
    serial = f"{board.LOOPBACK}:{booted.adb_port}"
    for _ in range(20):
        if "connected" in told([ADB, "connect", serial]) and adb.found():
            return serial
        told([ADB, "disconnect"])
    pytest.fail("adbd does not answer")


def test_a_server_that_a_list_starts_stays(serial: str) -> None:
    assert [each.spec for each in adb.found()] == [f"adb:{serial}"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_device_answers_as_the_golden_vectors_do(
    target: str, precision: str, connection: remote.Remote, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = bundle_of(precision, tmp_path_factory)
    job = job_of(bundle, target)
    run = connection.run(job)
    assert snr_db(bundle, job, run) >= LEAST_DB[precision]
    assert type(run.samples) is DeviceTime
    assert len(run.samples.values) == len(job.feed)
    assert run.unsteady == 0


def test_a_device_without_android_does_not_tell_what_android_would(connection: remote.Remote) -> None:
    facts, conditions = connection.info.facts, connection.conditions()
    assert facts["brand"] == facts["chip"] == facts["Android"] == "not told"
    assert facts["cores"] == "2 x Cortex-A76"
    assert "Debian" in facts["system"]
    assert facts["run as"] == adb.HOW
    assert conditions["battery"] == conditions["thermal status"] == "not told"
    assert float(conditions["load"]) >= 0


def test_a_runner_that_is_killed_is_a_failure_with_its_signal(connection: remote.Remote, int8: Bundle) -> None:
    killing = f"kill -KILL $(cat {connection.home}/job/pid)"
    with (
        meanwhile(lambda: connection.far.shell(killing, limit_s=60), runner_of(connection)),
        pytest.raises(RunFailed, match="The runner was killed by SIGKILL"),
    ):
        connection.run(job_of(int8, "executorch", LONG))


def test_a_runner_that_hangs_is_ended_there_too(connection: remote.Remote, int8: Bundle) -> None:
    with pytest.raises(RunFailed, match="took longer than 4 s"):
        connection.run(job_of(int8, "executorch", dataclasses.replace(LONG, limit_s=4)))
    assert not runner_of(connection)()


def test_a_runner_that_leaves_no_answers_is_a_failure(
    connection: remote.Remote, int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolbox, "command", lambda plan, at: ("echo", plan, at))
    with pytest.raises(RunFailed, match="left no answers"):
        connection.run(job_of(int8, "executorch"))


def test_a_disk_that_is_full_is_told_and_emptied(
    connection: remote.Remote, int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, small = connection.far, f"{connection.home}/small"
    far.shell(f"mkdir {small} && mount -t tmpfs -o size=2m tmpfs {small}", limit_s=60)
    cramped = remote.Remote(connection.info, far, small, taskset=True, watch=connection.watch)
    with pytest.raises(RunFailed, match=r"is full: 2\.0 MB are free"):
        cramped.run(job_of(int8, "executorch"))
    monkeypatch.setattr(remote, "free_bytes", lambda df: None)  # noqa: ARG005 - as it is called
    with pytest.raises(RunFailed, match=r"The disk of .* is full"):
        cramped.run(job_of(int8, "executorch"))
    assert far.shell(f"ls {small}; umount {small}; rmdir {small}", limit_s=60).text == ""


def test_nothing_is_left_on_the_device_when_the_connection_ends(
    serial: str, int8: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless(monkeypatch, tmp_path)
    with adb.connect(serial) as connection:
        home, far = connection.home, connection.far
        with pytest.raises(RunFailed, match="took longer than 2 s"):
            connection.run(job_of(int8, "executorch", dataclasses.replace(LONG, limit_s=2)))
        assert far.shell(f"ls -d {home}", limit_s=60).text == f"{home}\n"
    assert far.shell(f"ls -d {home} 2>&1; ps | grep endless | grep -v grep", limit_s=60).text == (
        f"ls: {home}: No such file or directory\n"
    )


def test_a_serial_number_that_is_not_attached_is_unknown(serial: str) -> None:
    with pytest.raises(UnknownDevice) as unknown, connect("adb:nobody"):
        pass
    assert serial in unknown.value.hint


@pytest.mark.parametrize("accident", ["push", "run"])
def test_a_device_that_is_unplugged_is_gone(accident: str, int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with board.booted(exact=False, cores=2) as booted:
        serial = f"{board.LOOPBACK}:{booted.adb_port}"
        told([ADB, "connect", serial])
        if accident == "run":
            endless(monkeypatch, tmp_path)
        with pytest.raises(DeviceGone, match="does not answer any more"), connect(f"adb:{serial}") as connection:
            run_until(connection, job_of(int8, "executorch", LONG), accident, booted)
    told([ADB, "disconnect", serial])


def run_until(connection: remote.Remote, job: Job, accident: str, booted: board.Booted) -> None:
    when = runner_of(connection) if accident == "run" else arriving(connection)
    with meanwhile(unplug(booted), when):
        connection.run(job)


def runner_of(connection: remote.Remote) -> Callable[[], bool]:
    """Whether the runner works there."""
    script = f'[ -d /proc/"$(cat {connection.home}/job/pid)"/fd ]'
    return lambda: connection.far.shell(script, limit_s=60).code == 0


def arriving(connection: remote.Remote) -> Callable[[], bool]:
    """Whether something of the runner has arrived there."""
    script = f"[ -d {connection.home}/runner-executorch/lib ]"
    return lambda: connection.far.shell(script, limit_s=60).code == 0

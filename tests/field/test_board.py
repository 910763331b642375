"""The emulated board: made, booted, repeatable by its clock, and ended whatever ends us."""

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from edgefuse.device import connect
from edgefuse.errors import DeviceGone, UnknownDevice
from edgefuse.measurement import VirtualTime
from edgefuse_devices import board, board_image
from tests.field.boards import LEAST_DB, TARGETS, bundle_of, job_of, set_up, snr_db

pytestmark = pytest.mark.field

BOOT = "from edgefuse_devices import board\nwith board.booted(exact=True) as it:\n print(it.process, flush=True)\n input()\n"


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    set_up()


def test_two_boots_take_the_same_time_and_answer_rightly(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = bundle_of("int8", tmp_path_factory)
    jobs = [job_of(bundle, target) for target in TARGETS]
    medians = []
    for _ in range(2):
        with connect("board") as connection:
            runs = [connection.run(job) for job in jobs]
        assert all(type(run.samples) is VirtualTime and run.cold_load is None and run.warm_load for run in runs)
        assert all(snr_db(bundle, job, run) >= LEAST_DB["int8"] for job, run in zip(jobs, runs, strict=True))
        medians.append([statistics.median(run.samples.values) for run in runs])
    for one, other in zip(*medians, strict=True):
        assert other == pytest.approx(one, rel=0.01)


def test_a_board_without_dot_products_takes_longer_for_int8(tmp_path_factory: pytest.TempPathFactory) -> None:
    job = job_of(bundle_of("int8", tmp_path_factory), "executorch", calls=1)
    took = {}
    for which in ("board", "board:cortex-a53"):
        with connect(which) as connection:
            took[which] = connection.run(job).samples.values[0]
            assert connection.info.spec == which
            assert connection.info.clock == "virtual"
            assert connection.conditions() == {}
    assert took["board:cortex-a53"] > 1.5 * took["board"]


def test_a_processor_that_no_board_has_is_unknown() -> None:
    with pytest.raises(UnknownDevice, match="has the processor pentium"), connect("board:pentium"):
        pass


def test_a_board_that_does_not_boot_quotes_its_console(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = board_image.image()
    monkeypatch.setattr(board_image, "image", lambda: board_image.Image(whole.kernel, whole.kernel, *[whole.disk] * 3))
    with pytest.raises(DeviceGone, match=r"did not boot; it said: .*root") as gone, board.booted(exact=False):
        pass
    assert "edgefuse devices setup board" in gone.value.hint


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_emulator_outlives_us(ending: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what is killed at once cleans nothing up
    with subprocess.Popen(
        [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as us:
        emulator = psutil.Process(int(us.stdout.readline()))
        assert "qemu" in emulator.name()
        os.kill(us.pid, ending)
        us.wait(timeout=60)
        assert gone(emulator)


def test_a_damaged_image_is_made_again_and_a_whole_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = board_image.image()
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path))
    for part in ("apt", "board"):
        (tmp_path / part).symlink_to(image.key.parents[1] / part)
    made = image.key.stat().st_mtime_ns
    board_image.make(lambda _: nullcontext())
    assert image.key.stat().st_mtime_ns == made
    (tmp_path / "board").unlink()
    board_image.make(lambda _: nullcontext())
    monkeypatch.setattr(board_image, "_fetch", lambda: pytest.fail("a whole image needs nothing"))
    board_image.make(lambda _: nullcontext())
    disk = board_image.image().kernel
    with disk.open("r+b") as stream:
        stream.write(b"damaged!")
    with pytest.raises(pytest.fail.Exception):
        board_image.make(lambda _: nullcontext())


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, or does so now."""
    until = time.monotonic() + 10
    while time.monotonic() < until and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

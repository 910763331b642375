"""What the tests of emulated boards share: the board, tiny jobs from real exports, and accidents.

Everything that is emulated is slow: a job is a few chunks of one stream. Bundles are taken from the folder that EDGEFUSE_BUNDLES
names, or exported once, which takes some minutes.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from edgefuse import pipeline
from edgefuse.bench.feed import feed_of, judged
from edgefuse.bundle import Bundle, Golden
from edgefuse.errors import SetupFailed
from edgefuse.lower import Chunks
from edgefuse.measurement import Job, Routine, Run
from edgefuse.quantize.scheme import SCHEMES
from edgefuse.store import read_bundle
from edgefuse_devices import board, board_image, toolbox

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo_app" / "shared" / "models" / "fusionformer-tiny"
CALIBRATION = ROOT / "demo_app" / "shared" / "calibration"
LEAST_DB = {"fp32": 90.0, "int8": 20.0}
TARGETS = ("executorch", "tflite")
CALLS = 3
TINY = Routine(
    "custom", processes=1, warm_up_calls=1, warm_up_ms=0, calls=CALLS, duration_ms=0, most_calls=CALLS, most_ms=1, cool_down_ms=0
)
LONG = dataclasses.replace(TINY, calls=100_000, most_calls=100_000, most_ms=600_000)
PATIENCE_S = 60


def set_up() -> None:
    """The runners and the image, or a loud skip."""
    try:
        toolbox.setup(lambda _: nullcontext())
        board_image.make(lambda _: nullcontext())
    except SetupFailed as failure:
        pytest.skip(f"{failure.sentence} {failure.hint}")
    if lacking := board.missing():
        pytest.skip("; ".join(f"{lack.what} is missing: {lack.mend}" for lack in lacking))


TOLD = os.environ.get("EDGEFUSE_BUNDLES", "")
BUNDLES = Path(TOLD).resolve()  # now: a test may go elsewhere


def bundle_of(precision: str, folders: pytest.TempPathFactory) -> Bundle:
    name = MODEL.name if precision == "fp32" else f"{MODEL.name}-{precision}"
    if TOLD:
        return read_bundle(BUNDLES / name)
    folder = folders.getbasetemp() / "bundles" / name
    if not folder.exists():
        scheme = SCHEMES.get(precision, "fp32")
        order = pipeline.Order(TARGETS, scheme, seconds=(5.12,), chunks=(Chunks(640, 2560),), calibration=CALIBRATION)
        pipeline.export(MODEL, folder, order)
    return read_bundle(folder)


def job_of(bundle: Bundle, target: str, routine: Routine = TINY, calls: int = CALLS) -> Job:
    artifact = next(export.artifact for export in bundle.exports if export.artifact.target == target)
    entry = next(mode.name for mode in artifact.modes if mode.streaming)
    return Job(artifact, entry, feed_of(artifact, entry, bundle.references[entry].goldens, few=True)[:calls], routine)


def snr_db(bundle: Bundle, job: Job, run: Run) -> float:
    """How right the answers are, against as much of the golden vectors as was fed."""
    return judged(job.feed, run.answers, [_cut(golden, job) for golden in bundle.references[job.entry].goldens])[0]


def _cut(golden: Golden, job: Job) -> Golden:
    frames = sum(call.frames for call in job.feed if call.utterance == golden.identity)
    return dataclasses.replace(golden, logits=golden.logits[:frames])


@contextmanager
def meanwhile(accident: Callable[[], object], when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """While the block works, an accident happens, as soon as it is time for it."""
    over = threading.Event()

    def watch() -> None:
        until = time.monotonic() + PATIENCE_S
        while not over.is_set() and time.monotonic() < until:
            if when():
                accident()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def unplug(booted: board.Booted) -> Callable[[], None]:
    """The accident that a board is without power."""
    return lambda: os.kill(booted.process, signal.SIGKILL)


def told(argv: Sequence[str], **options: object) -> str:
    """What a program says."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=PATIENCE_S, **options).stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((board.LOOPBACK, 0))
        return int(listener.getsockname()[1])


def endless(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A runner that is small, quickly there, and never ends by itself."""
    script = folder / "endless.sh"
    script.write_text("while :; do sleep 1; done\n", encoding="ascii")
    patch.setattr(toolbox, "payload", lambda _: {"endless.sh": script})
    patch.setattr(toolbox, "command", lambda plan, at: ("sh", f"{at}/endless.sh", plan))

"""A real Chromium runs real bundles: answers, threads, memory, pace, and every way to end badly.

Bundles are taken from the folder that EDGEFUSE_BUNDLES names, or exported once, which takes some minutes.
"""

import dataclasses
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from edgefuse.bench.feed import feed_of, judged
from edgefuse.bundle import Bundle
from edgefuse.errors import RunFailed, SetupFailed
from edgefuse.measurement import QUICK, DeviceTime, Job, Routine, Run, Want
from edgefuse.values import Artifact
from edgefuse_devices import browser
from tests.field.boards import LEAST_DB, bundle_of

pytestmark = pytest.mark.field

MARK = "EDGEFUSE_TEST"
LOADED_BYTES = 200 << 20  # a page with a model is larger
OFFLINE, STREAM = "offline_5120ms", "stream_640ms"
WHICH = {"": 1, "threads": 2}
ENDLESS = dataclasses.replace(QUICK, duration_ms=120_000, most_ms=240_000, most_calls=10**6)


@pytest.fixture(scope="module", autouse=True)
def a_browser() -> None:
    """Chromium, Playwright and LiteRT.js; the last one is set up here."""
    try:
        browser.setup(lambda _: nullcontext())
    except SetupFailed as failure:
        pytest.skip(f"{failure.sentence} {failure.hint}")
    if lacking := browser.missing():
        pytest.skip("; ".join(f"{lack.what} is missing: {lack.mend}" for lack in lacking))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of a precision."""
    return functools.cache(lambda precision: bundle_of(precision, tmp_path_factory))


@pytest.fixture(scope="module")
def fp32(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("fp32")


def artifact_of(bundle: Bundle) -> Artifact:
    return next(export.artifact for export in bundle.exports if export.artifact.target == "tflite")


def job_of(bundle: Bundle, entry: str, routine: Routine = QUICK, want: Want = "latency") -> Job:
    artifact = artifact_of(bundle)
    return Job(artifact, entry, feed_of(artifact, entry, goldens_of(bundle, entry)), routine, want)


def goldens_of(bundle: Bundle, entry: str) -> tuple:
    mode = next(mode for mode in artifact_of(bundle).modes if entry in mode.inputs)
    return bundle.references[mode.name].goldens


def run(job: Job, which: str = "") -> Run:
    with browser.connect(which) as connection:
        return connection.run(job)


def chromiums(among: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of a browser, dead ones without."""
    alive = []
    for each in among:
        with suppress(psutil.NoSuchProcess):
            if "chrom" in each.name() and each.status() != psutil.STATUS_ZOMBIE:
                alive.append(each)
    return alive


@pytest.fixture(autouse=True)
def no_browser_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours have a mark in their environment: other browsers may run beside them."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    yield
    until = time.monotonic() + 5
    while (left := [each for each in chromiums(psutil.process_iter()) if marked(each, mark)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def marked(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ().get(MARK) == mark
    return False


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("entry", [OFFLINE, STREAM])
@pytest.mark.parametrize("precision", LEAST_DB)
def test_a_browser_answers_right(bundles: Callable[[str], Bundle], precision: str, entry: str, which: str) -> None:
    bundle = bundles(precision)
    job = job_of(bundle, entry, dataclasses.replace(QUICK, threads=WHICH[which]))
    told = run(job, which)
    snr_db, agreeing, frames = judged(job.feed, told.answers, goldens_of(bundle, entry))
    assert snr_db >= LEAST_DB[precision]
    assert agreeing >= 0.98 * frames
    assert told.unsteady == 0
    assert isinstance(told.samples, DeviceTime)
    assert len(told.samples.values) >= max(QUICK.calls, len(job.feed))
    assert told.warm_up_calls >= QUICK.warm_up_calls
    assert all(value and value > 0 for value in (told.cold_load, told.warm_load, told.first))
    assert ("and threads" in told.told["kernels"], told.told["threads"]) == (bool(which), str(WHICH[which]))
    assert float(told.told["clock_resolution_us"]) <= 20


def test_several_threads_are_two_unless_more_are_asked_for(fp32: Bundle) -> None:
    assert run(job_of(fp32, STREAM), "threads").told["threads"] == "2"


def test_memory_is_that_of_the_process_that_holds_the_model(fp32: Bundle) -> None:
    job = job_of(fp32, OFFLINE, want="memory")
    told = run(job)
    assert told.peak_bytes is not None
    assert told.before_bytes is not None
    assert told.before_bytes + job.artifact.path.stat().st_size < told.peak_bytes < 4 << 30


def test_paced_chunks_come_at_the_pace_of_speech(fp32: Bundle) -> None:
    routine = dataclasses.replace(QUICK, paced=True, warm_up_calls=1, warm_up_ms=0, calls=1, duration_ms=0)
    job = job_of(fp32, STREAM, routine)
    begun = time.monotonic()
    told = run(job)
    assert time.monotonic() - begun > 0.64 * (len(job.feed) - 1)
    assert judged(job.feed, told.answers, goldens_of(fp32, STREAM))[0] >= LEAST_DB["fp32"]


def test_a_cap_is_told_and_leaves_an_answer_to_every_call(fp32: Bundle) -> None:
    job = job_of(fp32, STREAM, dataclasses.replace(QUICK, duration_ms=60_000, most_ms=1))
    told = run(job)
    assert told.capped
    assert len(told.answers) == len(told.samples.values) == len(job.feed)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "Failed to load model"), (b"no model" * 1000, "Failed to load model"), (None, "could not be read: 404")],
    ids=["empty", "garbage", "gone"],
)
def test_a_broken_model_is_a_sentence(fp32: Bundle, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "broken.tflite"
    if content is not None:
        path.write_bytes(content)
    job = job_of(fp32, OFFLINE)
    with pytest.raises(RunFailed, match=sentence):
        run(dataclasses.replace(job, artifact=dataclasses.replace(job.artifact, path=path)))


def test_an_entry_that_the_model_lacks_is_a_sentence(fp32: Bundle) -> None:
    artifact = artifact_of(fp32)
    other = dataclasses.replace(
        artifact, inputs={"other": artifact.inputs[OFFLINE]}, outputs={"other": artifact.outputs[OFFLINE]}
    )
    with pytest.raises(RunFailed, match="the model has no signature other"):
        run(dataclasses.replace(job_of(fp32, OFFLINE), artifact=other, entry="other"))


def test_a_page_that_never_ends_is_ended(fp32: Bundle) -> None:
    begun = time.monotonic()
    with pytest.raises(RunFailed, match="took longer than 8 s"):
        run(job_of(fp32, OFFLINE, dataclasses.replace(ENDLESS, limit_s=8)))
    assert time.monotonic() - begun < 12


@contextmanager
def killing(kind: str) -> Iterator[None]:
    """Kill the largest process of a kind ("" the browser itself) among our children, as soon as a page holds a model."""

    def kill() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(0.2)
            with suppress(psutil.NoSuchProcess):
                ours = {each: kind_of(each) for each in chromiums(psutil.Process().children(recursive=True))}
                sizes = {each: each.memory_info().rss for each, of in ours.items() if of == kind}
                if any(of == "renderer" and each.memory_info().rss > LOADED_BYTES for each, of in ours.items()):
                    max(sizes, key=lambda each: sizes[each]).kill()
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


def kind_of(process: psutil.Process) -> str:
    return next((word.removeprefix("--type=") for word in process.cmdline() if word.startswith("--type=")), "")


@pytest.mark.parametrize(("kind", "sentence"), [("renderer", "the page's process died"), ("", "it died")])
def test_a_process_that_dies_is_a_sentence(fp32: Bundle, kind: str, sentence: str) -> None:
    with killing(kind), pytest.raises(RunFailed, match=sentence):
        run(job_of(fp32, OFFLINE, ENDLESS))

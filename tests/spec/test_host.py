"""The host: a fresh process for each job, the call timed alone, and every way in which a process can fail."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgefuse import device as devices
from edgefuse import store
from edgefuse.bench.feed import feed_of, judged
from edgefuse.errors import RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import QUICK, HostTime, Job
from edgefuse_devices import host, host_worker

SHORT = replace(QUICK, warm_up_calls=2, warm_up_ms=0, calls=4, duration_ms=0, most_calls=6)
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANGING = "import time; time.sleep(60)"
BABBLING = "print('all is well')"
COMPLAINING = "import sys; sys.exit('no memory left')"


@pytest.fixture(autouse=True)
def locks_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def offline(whole_bundle: Path):
    """The job of one entry, and the right answers."""
    bundle = store.read_bundle(whole_bundle)
    artifact = bundle.exports[0].artifact
    goldens = bundle.references["offline"].goldens
    (entry,) = artifact.inputs
    return Job(artifact, entry, feed_of(artifact, entry, goldens), SHORT), goldens


def run(job: Job):
    with devices.connect("host") as connection:
        return connection.run(job)


def instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another process than the worker."""
    monkeypatch.setattr(host, "_argv", lambda _folder: [sys.executable, "-c", code])


def test_there_is_always_one_host_and_nothing_is_missing():
    (info,) = host.found()
    assert (info.spec, info.clock) == ("host", "host")
    assert not host.missing()
    assert all(info.facts.values())


def test_another_host_is_unknown():
    with pytest.raises(UnknownDevice), devices.connect("host:other"):
        pass


def test_there_is_nothing_to_set_up():
    with pytest.raises(UsageError):
        host.setup(lambda _: pytest.fail("something was done"))


def test_conditions_are_words():
    with devices.connect("host") as connection:
        told = connection.conditions()
    assert set(told) == {"load", "running", "governor", "frequency", "temperature"}
    assert all(isinstance(each, str) and each for each in told.values())


def test_a_job_is_timed_and_its_answers_are_right(offline):
    job, goldens = offline
    found = run(job)
    assert isinstance(found.samples, HostTime)
    assert len(found.samples.values) == max(SHORT.calls, len(job.feed))
    assert min(found.cold_load, found.warm_load, found.first, *found.samples.values) > 0
    assert found.warm_up_calls == SHORT.warm_up_calls
    assert found.unsteady == 0
    snr_db, agreeing, frames = judged(job.feed, found.answers, goldens)
    assert snr_db > 90
    assert agreeing == frames > 0


def test_chunks_go_on_from_each_other(both):
    bundle = both.bundle
    artifact = bundle.exports[0].artifact
    (entry,) = artifact.streaming
    goldens = bundle.references[entry].goldens
    feed = feed_of(artifact, entry, goldens, few=True)
    assert sum(call.begins for call in feed) == 2 < len(feed)
    found = run(Job(artifact, entry, feed, SHORT))
    assert judged(feed, found.answers, goldens)[0] > 90


def test_memory_is_that_of_the_model_alone(offline):
    found = run(replace(offline[0], want="memory"))
    assert len(found.samples.values) == len(offline[0].feed)
    assert 0 < found.before_bytes <= found.peak_bytes
    if found.told["peak"] == "from the load on":
        assert found.peak_bytes - found.before_bytes < 200 << 20  # PyTorch alone takes more when it is imported


def test_a_runtime_without_a_profiler_says_so(offline):
    with pytest.raises(UsageError, match="no profile"):
        run(replace(offline[0], want="profile"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes to cores")
def test_a_core_that_is_not_there_is_refused_in_words(offline):
    with pytest.raises(UsageError, match="no core 4096"):
        run(replace(offline[0], routine=replace(SHORT, cores=(4096,))))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes to cores")
def test_a_process_is_bound_to_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bound = []
    host_worker.Asked("reference", {}, {}, cores=(3,)).write(tmp_path)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append((process, list(cores))))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["host_worker", str(tmp_path)])
    with pytest.raises(FileNotFoundError):  # there is no plan
        host_worker.main()
    assert bound == [(0, [3])]


def test_no_library_makes_more_threads_than_the_runtime_may():
    told = host._environment(3)
    assert {told[name] for name in host.POOLS} == {"3"}


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (KILLED, "killed by SIGKILL"),
        (BABBLING, "did not say what a runner says, but: all is well"),
        (COMPLAINING, "ended with 1: no memory left"),
    ],
    ids=["killed", "babbling", "complaining"],
)
def test_a_process_that_fails_is_a_sentence(offline, monkeypatch, code: str, sentence: str):
    instead(monkeypatch, code)
    with pytest.raises(RunFailed, match=sentence):
        run(offline[0])


def test_a_process_that_hangs_is_ended(offline, monkeypatch):
    instead(monkeypatch, HANGING)
    with pytest.raises(RunFailed, match="took longer than 1 s"):
        run(replace(offline[0], routine=replace(SHORT, limit_s=1)))


def test_a_damaged_artifact_is_a_sentence_of_its_target(offline, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(offline[0].artifact.path.read_bytes()[:100])
    job = replace(offline[0], artifact=replace(offline[0].artifact, path=path))
    with pytest.raises(RunFailed, match="PyTorch cannot read"):
        run(job)


def test_what_is_evaluated_here_is_refused_in_words(offline, monkeypatch):
    monkeypatch.setattr(host.platform, "system", lambda: "Linux")
    with devices.connect("host") as connection:
        assert connection.refusal(offline[0].artifact) is None
        assert "no latency" in connection.refusal(replace(offline[0].artifact, target="coreml"))
        assert "no target 'other'" in connection.refusal(replace(offline[0].artifact, target="other"))


class Changing:
    """A session that answers with a number that it counts up, once it has answered everything for the first time."""

    def __init__(self, steady: int) -> None:
        self.calls, self.steady = 0, steady

    def give(self, _entry, inputs) -> None:
        self.given = inputs

    def call(self, _entry) -> None:
        self.calls += 1

    def answers(self, _entry):
        number = 0 if self.calls <= self.steady else self.calls
        return {"logits": np.array([number], np.float32), "after": self.given["before"] + 1}


def a_plan(**changes):
    from edgefuse_devices.plan import Plan

    told = {
        "model": Path("model"),
        "entry": "stream",
        "inputs": {"heard": 1, "before": 1},
        "renewed": {"before": "after"},
        "outputs": {"logits": 1, "after": 1},
        "calls": 2,
        "begins": (0,),
        "warm_up": (3, 0),
        "measure": (4, 0, 8, 0),
        "threads": 1,
        "pace_ns": 0,
    }
    return Plan(**{**told, **changes})


FEED = [{"heard": np.zeros(1, np.float32), "before": np.zeros(1, np.float32)}, {"heard": np.ones(1, np.float32)}]


def test_answers_that_change_are_counted():
    sight = host_worker._measure(Changing(steady=3), a_plan(), FEED)
    assert (len(sight.latency_ns), len(sight.answers), sight.unsteady) == (4, 2, 1)


def test_a_chunk_has_the_caches_of_the_one_before_and_an_utterance_begins_anew():
    session = Changing(steady=9)
    calls, seen = host_worker._endless(session, a_plan(), FEED), []
    for _ in range(4):
        next(calls)
        seen.append(float(session.given["before"][0]))
    assert seen == [0, 1, 0, 1]


def test_a_duration_that_is_not_reached_ends_at_the_cap():
    sight = host_worker._measure(Changing(steady=99), a_plan(measure=(4, 60_000_000_000, 8, 0)), FEED)
    assert (len(sight.latency_ns), sight.capped) == (8, True)


def test_calls_come_at_the_pace_of_speech():
    import time

    before = time.perf_counter()
    host_worker._measure(Changing(steady=99), a_plan(pace_ns=20_000_000), FEED)
    assert time.perf_counter() - before >= 3 * 0.02

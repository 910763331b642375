"""The routine of bench: in turns, answers checked, nothing lost when a device goes.

The device is scripted, for only so can it fail when it should; what it answers is computed by the real artifact.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from edgefuse import cli, device, store
from edgefuse.bench.feed import feed_of, judged
from edgefuse.bench.result import read_result
from edgefuse.bench.routine import Inquiry, bench, require_whole
from edgefuse.errors import BenchFailed, DeviceBusy, DeviceGone, DeviceMissing, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import QUICK, TYPES, DeviceInfo, Job, Run, routine_of
from edgefuse.pipeline import silent
from edgefuse.target import find
from edgefuse.verify import wer
from edgefuse.verify.wer import WordErrors

FAST = routine_of("quick", processes=4)
LATENCY = ("latency",)


class Scripted:
    """A kind of device, and the connection to the only one: `acts` are done one a job, and None is to do nothing wrong."""

    SUMMARY = "a device that follows a script"
    HERE = False

    def __init__(self, *acts, clock="device", lacks=(), refuses=None):
        self.acts, self.lacks, self.refuses = list(acts), lacks, refuses
        self.info = DeviceInfo("scripted", "a script", clock)
        self.jobs: list[Job] = []

    def missing(self):
        return self.lacks

    def found(self):
        return [self.info]

    @contextmanager
    def connect(self, which: str) -> Iterator["Scripted"]:
        if which:
            raise UnknownDevice(f"There is no {which}.")
        yield self

    def refusal(self, _artifact) -> str | None:
        return self.refuses

    def conditions(self) -> Mapping[str, str]:
        return {"load": str(len(self.jobs))}

    def run(self, job: Job) -> Run:
        self.jobs.append(job)
        act = self.acts.pop(0) if self.acts else None
        if isinstance(act, BaseException):
            raise act
        session = find(job.artifact.target).open(job.artifact)
        answers = [next(iter(session.run(job.entry, call.inputs).values()))[0] for call in job.feed]
        if act == "noise":
            answers[-1] = answers[-1] + np.float32(0.1)
        samples = TYPES[self.info.clock](tuple(range(100, 100 + len(job.feed))))
        return Run(
            samples, 9, 8, 7, 3, capped=False, answers=tuple(answers), unsteady=2 if act == "unsteady" else 0, peak_bytes=5
        )


@pytest.fixture
def put(monkeypatch, tmp_path):
    """Put a device on the shelf, in place of all others."""
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path / "cache"))

    def on_the_shelf(scripted: Scripted) -> Scripted:
        monkeypatch.setattr(device, "kind", lambda _: scripted)
        return scripted

    return on_the_shelf


def measure(folder: Path, *bundles: Path, wants=LATENCY, how=FAST, **more):
    inquiry = Inquiry(bundles, ("scripted",), how, wants=wants)
    return bench(inquiry, folder / "r.jsonl", tell=silent, **more)


def test_every_artifact_is_measured_in_turns_and_every_answer_is_right(put, whole_bundle, tmp_path):
    other = Path(shutil.copytree(whole_bundle, tmp_path / "other"))
    scripted = put(Scripted())
    result = measure(tmp_path, whole_bundle, other)
    models = [job.artifact.path.parent.name for job in scripted.jobs]
    assert sorted(models) == ["bundle"] * 4 + ["other"] * 4
    assert all({"bundle", "other"} == {*models[turn : turn + 2]} for turn in range(0, 8, 2))
    assert [len(each.valid) for each in result.measurements] == [4, 4]
    assert all(
        visit.snr_db > 90 and visit.agreeing_frames == visit.frames for each in result.measurements for visit in each.visits
    )
    assert result.measurements[0].visits[0].conditions == {"load": ("0", "1")}
    require_whole(result)


def test_the_speech_is_that_of_the_golden_vectors(whole_bundle):
    bundle = store.read_bundle(whole_bundle)
    (export,), reference = bundle.exports, bundle.references["offline"]
    (entry,) = export.artifact.inputs
    feed = feed_of(export.artifact, entry, reference.goldens)
    assert [call.utterance for call in feed] == [golden.identity for golden in reference.goldens]
    right = [np.zeros((50, golden.logits.shape[1]), np.float32) for golden in reference.goldens]
    for answer, golden in zip(right, reference.goldens, strict=True):
        answer[: len(golden.logits)] = golden.logits
    assert judged(feed, right, reference.goldens)[0] > 100


def test_a_stream_is_fed_chunk_by_chunk_and_its_caches_once_an_utterance(both):
    artifact = both.bundle.exports[0].artifact
    goldens = both.bundle.references["stream_640ms"].goldens
    feed = feed_of(artifact, "stream_640ms", goldens)
    assert [call.utterance for call in feed if call.begins] == [golden.identity for golden in goldens]
    caches = set(artifact.streaming["stream_640ms"].states)
    assert all(caches <= set(call.inputs) if call.begins else not caches & set(call.inputs) for call in feed)
    assert sum(call.frames for call in feed) == sum(len(golden.logits) for golden in goldens)


@pytest.mark.parametrize(("act", "why"), [("noise", "Its answers are wrong"), ("unsteady", "2 of its answers changed")])
def test_a_wrong_answer_voids_the_number(put, whole_bundle, tmp_path, act, why):
    put(Scripted(None, act))
    (measurement,) = measure(tmp_path, whole_bundle).measurements
    assert [visit.round for visit in measurement.valid] == [0, 2, 3]
    assert why in measurement.visits[1].void
    with pytest.raises(BenchFailed, match=why):
        require_whole(read_result(tmp_path / "r.jsonl"))


def test_the_memory_of_a_process_that_answers_wrongly_is_not_believed(put, whole_bundle, tmp_path):
    put(Scripted(*[None] * 4, "noise"))
    (measurement,) = measure(tmp_path, whole_bundle, wants=("latency", "memory")).measurements
    assert measurement.memory is None
    assert [(each.want, each.reason.partition(":")[0]) for each in measurement.failures] == [("memory", "Its answers are wrong")]


def test_a_process_that_fails_is_a_row_and_the_others_are_measured(put, whole_bundle, tmp_path):
    put(Scripted(None, RunFailed("The runner was killed by SIGKILL.", hint="Look at the memory.")))
    result = measure(tmp_path, whole_bundle)
    (measurement,) = result.measurements
    assert [(failure.round, failure.reason) for failure in measurement.failures] == [(1, "The runner was killed by SIGKILL.")]
    assert len(measurement.valid) == 3
    with pytest.raises(BenchFailed, match="killed by SIGKILL") as told:
        require_whole(result)
    assert "--resume" in told.value.hint


def test_a_device_that_vanishes_loses_nothing_and_resume_goes_on_behind_it(put, whole_bundle, tmp_path):
    first = put(Scripted(None, None, DeviceGone("The board does not answer any more.", hint="Plug it in.")))
    result = measure(tmp_path, whole_bundle)
    assert [visit.round for visit in result.measurements[0].visits] == [0, 1]
    assert [absence.reason for absence in result.absences] == ["The board does not answer any more."]
    assert len(first.jobs) == 3
    again = put(Scripted())
    result = measure(tmp_path, whole_bundle, resume=True)
    assert len(again.jobs) == 2
    assert [visit.round for visit in result.measurements[0].visits] == [0, 1, 2, 3]
    require_whole(result)
    assert measure(tmp_path, whole_bundle, resume=True).measurements == result.measurements
    assert len(again.jobs) == 2


def test_a_device_that_calls_itself_otherwise_than_it_was_asked_for_is_not_measured_twice(put, whole_bundle, tmp_path):
    own = DeviceInfo("scripted:one", "a script", "device")
    put(Scripted(None, None, DeviceGone("The board does not answer any more."))).info = own
    assert len(measure(tmp_path, whole_bundle).absences) == 1
    again = put(Scripted())
    again.info = own
    result = measure(tmp_path, whole_bundle, resume=True)
    assert len(again.jobs) == 2
    require_whole(result)


def test_processes_of_two_machines_are_not_put_together(put, whole_bundle, tmp_path):
    put(Scripted(None, DeviceGone("The board does not answer any more.")))
    measure(tmp_path, whole_bundle)
    other = put(Scripted())
    other.info = DeviceInfo("scripted", "a script", "device", {"chip": "another one"})
    (absence,) = measure(tmp_path, whole_bundle, resume=True).absences
    assert other.jobs == []
    assert "its chip is another one, and was not told" in absence.reason


def test_what_a_device_refused_is_not_missing_when_it_is_gone(put, whole_bundle, tmp_path):
    put(Scripted(*[None] * 4, UsageError("It has no profiler.")))
    measure(tmp_path, whole_bundle, wants=("latency", "profile"))
    put(Scripted(lacks=(device.Lack("a cable", "buy one"),)))
    require_whole(measure(tmp_path, whole_bundle, wants=("latency", "profile"), resume=True))


def test_a_device_that_goes_behind_a_whole_run_does_not_take_it_along(put, whole_bundle, tmp_path, monkeypatch):
    scripted = put(Scripted())
    answers = [{}, {}, {}, DeviceGone("It does not answer any more."), DeviceGone("It does not answer any more.")]

    def conditions():
        answer = answers.pop(0)
        if isinstance(answer, DeviceGone):
            raise answer
        return answer

    monkeypatch.setattr(scripted, "conditions", conditions)
    result = measure(tmp_path, whole_bundle)
    assert [visit.round for visit in result.measurements[0].visits] == [0, 1]
    assert len(result.absences) == 1


def test_a_device_that_is_not_named_well_enough_does_not_keep_the_others_from_being_measured(put, whole_bundle, tmp_path):
    scripted = put(Scripted())

    @contextmanager
    def connect(which):
        if which:
            raise UsageError("2 devices are attached.", hint="Say which")
        yield scripted

    scripted.connect = connect
    result = bench(
        Inquiry((whole_bundle,), ("scripted:some", "scripted"), FAST, wants=LATENCY), tmp_path / "r.jsonl", tell=silent
    )
    assert [absence.reason for absence in result.absences] == ["2 devices are attached."]
    assert len(result.measurements[0].valid) == 4


def test_a_part_of_the_test_set_without_a_word_has_no_word_error_rate(put, whole_bundle, tmp_path, monkeypatch):
    put(Scripted())
    monkeypatch.setattr(wer, "total", lambda _: WordErrors(0, 0, 0, 0, 1))
    assert measure(tmp_path, whole_bundle).measurements[0].subject.wer_percent == {}


def test_an_interruption_loses_nothing(put, whole_bundle, tmp_path):
    put(Scripted(None, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, whole_bundle)
    result = read_result(tmp_path / "r.jsonl")
    assert not result.ended
    assert [visit.round for visit in result.measurements[0].visits] == [0]


def test_what_a_device_cannot_look_at_is_told_once_and_is_no_failure(put, whole_bundle, tmp_path):
    scripted = put(Scripted(*[None] * 5, UsageError("It has no profiler.")))
    result = measure(tmp_path, whole_bundle, wants=("latency", "memory", "profile"))
    (measurement,) = result.measurements
    assert measurement.refusals == {"profile": "It has no profiler."}
    assert measurement.memory.peak_bytes == 5
    assert [job.want for job in scripted.jobs] == ["latency"] * 4 + ["memory", "profile"]
    require_whole(result)


def test_an_artifact_that_a_device_cannot_run_is_not_tried(put, whole_bundle, tmp_path):
    scripted = put(Scripted(refuses="Only Apple's systems run Core ML."))
    result = measure(tmp_path, whole_bundle)
    assert scripted.jobs == []
    assert result.measurements[0].refusals == {"latency": "Only Apple's systems run Core ML."}
    with pytest.raises(BenchFailed, match="Only Apple's systems"):
        require_whole(result)


def test_a_clock_that_counts_needs_hardly_any_repetition(put, whole_bundle, tmp_path):
    scripted = put(Scripted(clock="instructions"))
    (measurement,) = measure(tmp_path, whole_bundle, how=routine_of("thorough")).measurements
    assert len(measurement.visits) == len(scripted.jobs) == 3


def test_what_is_missing_is_told_with_what_mends_it(put, whole_bundle, tmp_path):
    put(Scripted(lacks=(device.Lack("a cable", "buy one"),)))
    (absence,) = measure(tmp_path, whole_bundle).absences
    assert (absence.reason, absence.hint) == ("The device 'scripted' needs a cable.", "Mend it with: buy one")
    with pytest.raises(DeviceMissing, match="needs a cable"), device.connect("scripted"):
        pass


def test_two_benchmarks_at_once_on_one_device_are_one_too_many(put):
    put(Scripted())
    busy = pytest.raises(DeviceBusy, match="Another benchmark runs on scripted")
    with device.connect("scripted"), busy, device.connect("scripted"):
        pass
    with device.connect("scripted"):
        pass


def test_what_computes_on_this_machine_is_measured_one_at_a_time_whatever_it_is_called(put):
    put(Scripted()).HERE = True
    busy = pytest.raises(DeviceBusy, match="Another benchmark runs on this machine")
    with device.connect("host"), busy, device.connect("browser"):
        pass


def test_an_unknown_kind_is_told_before_anything_is_written(whole_bundle, tmp_path):
    with pytest.raises(UnknownDevice, match="toaster"):
        bench(Inquiry((whole_bundle,), ("toaster:9",), QUICK), tmp_path / "r.jsonl", tell=lambda _: nullcontext())
    assert list(tmp_path.glob("r.jsonl*")) == []


def test_two_bundles_of_one_name_are_not_told_apart_by_chance(put, whole_bundle, tmp_path):
    put(Scripted())
    twin = Path(shutil.copytree(whole_bundle, tmp_path / "elsewhere" / whole_bundle.name))
    with pytest.raises(UsageError, match="Two bundles are called"):
        measure(tmp_path, whole_bundle, twin)


def test_the_command_prints_what_failed_and_ends_with_its_code(put, whole_bundle, tmp_path, capsys):
    put(Scripted(None, RunFailed("The runner was killed by SIGSEGV.")))
    code = cli.run(["bench", str(whole_bundle), "-d", "scripted", "--quick", "--latency-only", "-o", str(tmp_path / "r.jsonl")])
    out, err = capsys.readouterr()
    assert code == BenchFailed.exit_code
    assert "killed by SIGSEGV" in out
    assert "--resume" in err
    assert "Traceback" not in err

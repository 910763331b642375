"""What runners read and say: every fact comes back, and nothing else is believed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgefuse.errors import RunFailed
from edgefuse.measurement import QUICK, Call, DeviceTime, HostTime, Instructions, Job
from edgefuse.values import Artifact, Streaming, TensorSpec
from edgefuse_devices.plan import ANSWERS, FEED, fed, read_plan, read_run, write_plan

STREAM, WHOLE = "stream_640ms", "offline_1280ms"
SHAPES = {"features": (1, 4, 3), "past": (1,), "keys": (1, 2, 5)}
FRAMES, TOKENS = 2, 7
SAID = {
    "schema": 1,
    "runtime": "a runtime 1.2",
    "cold_load_ns": 12,
    "warm_load_ns": None,
    "first_ns": 9,
    "warm_up_calls": 3,
    "latency_ns": [5, 6, 7],
    "capped": True,
    "unsteady": 1,
    "peak_bytes": 2048,
    "before_bytes": 1024,
    "kernels": "fast",
}


def specs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, shape, "float32", "a test") for name, shape in shapes.items())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two utterances, of two chunks and of one."""
    states = {"past": "past_next", "keys": "keys_next"}
    outputs = {"logits": (1, FRAMES, TOKENS), **{after: SHAPES[before] for before, after in states.items()}}
    artifact = Artifact(
        "tflite",
        tmp_path / "model.tflite",
        "fp32",
        {STREAM: specs(SHAPES), WHOLE: specs({"features": SHAPES["features"]})},
        {STREAM: specs(outputs), WHOLE: specs({"logits": outputs["logits"]})},
        parent="0" * 64,
        streaming={STREAM: Streaming(chunk=16, left=64, frame_ms=40, states=states)},
    )
    generator = np.random.default_rng(0)
    feed = []
    for utterance, begins in (("a", True), ("a", False), ("b", True)):
        names = SHAPES if begins else ("features",)
        inputs = {name: generator.normal(size=SHAPES[name]).astype(np.float32) for name in names}
        feed.append(Call(inputs, begins, utterance, FRAMES))
    return Job(artifact, STREAM, tuple(feed), dataclasses.replace(QUICK, threads=2))


@pytest.fixture
def ran(tmp_path: Path, job: Job) -> Path:
    """The folder of a runner that has answered."""
    np.arange(len(job.feed) * FRAMES * TOKENS, dtype="<f4").tofile(tmp_path / ANSWERS)
    return tmp_path


def said(**changes: object) -> str:
    return "INFO: loading\n" + json.dumps({**SAID, **changes}) + "\n"


def test_a_runner_reads_what_was_written(tmp_path: Path, job: Job) -> None:
    write_plan(tmp_path, job, model="model.tflite")
    plan = read_plan(tmp_path)
    assert (plan.model, plan.entry, plan.threads, plan.pace_ns) == (tmp_path / "model.tflite", STREAM, 2, 0)
    assert dict(plan.inputs) == {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert list(plan.outputs) == ["logits", "past_next", "keys_next"]
    assert dict(plan.renewed) == {"past": "past_next", "keys": "keys_next"}
    assert (plan.calls, plan.begins) == (3, (0, 2))
    assert plan.warm_up == (QUICK.warm_up_calls, QUICK.warm_up_ms * 10**6)
    assert plan.measure == (QUICK.calls, QUICK.duration_ms * 10**6, QUICK.most_calls, QUICK.most_ms * 10**6)


def test_the_feed_is_the_speech_call_by_call(tmp_path: Path, job: Job) -> None:
    write_plan(tmp_path, job, model="model.tflite")
    calls = fed(read_plan(tmp_path), np.fromfile(tmp_path / FEED, "<f4"))
    for given, call in zip(calls, job.feed, strict=True):
        assert list(given) == list(call.inputs)
        assert all((given[name] == call.inputs[name].ravel()).all() for name in given)


def test_an_exact_clock_needs_one_pass_after_one_call(tmp_path: Path, job: Job) -> None:
    write_plan(tmp_path, job, model="model.tflite", exact=True)
    plan = read_plan(tmp_path)
    assert (plan.warm_up, plan.measure) == ((1, 0), (3, 0, 3, 0))


def test_every_call_of_a_feed_is_measured_however_few_were_asked_for(tmp_path: Path, job: Job) -> None:
    write_plan(
        tmp_path, dataclasses.replace(job, routine=dataclasses.replace(QUICK, calls=1, most_calls=2)), model="model.tflite"
    )
    assert read_plan(tmp_path).measure[0::2] == (3, 3)


def test_chunks_come_at_the_pace_of_speech_where_that_was_asked_for(tmp_path: Path, job: Job) -> None:
    write_plan(tmp_path, dataclasses.replace(job, routine=dataclasses.replace(QUICK, paced=True)), model="model.tflite")
    assert read_plan(tmp_path).pace_ns == 640 * 10**6


def test_a_whole_utterance_has_no_caches_and_no_pace(tmp_path: Path, job: Job) -> None:
    features = np.zeros(SHAPES["features"], np.float32)
    whole = Job(job.artifact, WHOLE, (Call({"features": features}, True, "a", FRAMES),), dataclasses.replace(QUICK, paced=True))
    write_plan(tmp_path, whole, model="model.tflite")
    plan = read_plan(tmp_path)
    assert (plan.renewed, plan.pace_ns, plan.begins) == ({}, 0, (0,))


@pytest.mark.parametrize(("clock", "kind"), [("host", HostTime), ("device", DeviceTime), ("instructions", Instructions)], ids=str)
def test_what_a_runner_says_is_a_run_by_its_clock(ran: Path, job: Job, clock: str, kind: type) -> None:
    run = read_run(ran, said(), job, clock)
    assert run.samples == kind((5, 6, 7))
    assert (run.cold_load, run.warm_load, run.first, run.warm_up_calls) == (12, None, 9, 3)
    assert (run.capped, run.unsteady, run.peak_bytes, run.before_bytes) == (True, 1, 2048, 1024)
    assert run.told == {"runtime": "a runtime 1.2", "kernels": "fast"}
    assert [answer.shape for answer in run.answers] == [(FRAMES, TOKENS)] * 3
    assert run.answers[1][0, 0] == FRAMES * TOKENS


@pytest.mark.parametrize(
    "stdout",
    [
        "",
        "\n\n",
        "Segmentation fault\n",
        said() + "one more line\n",
        said()[:-20],
        "[1, 2, 3]",
        "17",
        "null",
        said(schema=2),
        said(latency_ns=[]),
        said(latency_ns=[5, -6]),
        said(latency_ns=[5, 6, 10**400]),
        "[" * 100_000,
        said(latency_ns=[5, "6"]),
        said(latency_ns=[5, True]),
        said(latency_ns=[5.5]),
        said(latency_ns=None),
        said(first_ns=None),
        said(peak_bytes="2048"),
        json.dumps({name: value for name, value in SAID.items() if name != "unsteady"}),
    ],
)
def test_what_is_no_answer_is_refused_in_words(ran: Path, job: Job, stdout: str) -> None:
    with pytest.raises(RunFailed, match="did not say what a runner says"):
        read_run(ran, stdout, job, "device")


@pytest.mark.parametrize("floats", [0, 1, 2 * FRAMES * TOKENS, 4 * FRAMES * TOKENS])
def test_answers_that_are_not_those_of_the_feed_are_refused_in_words(tmp_path: Path, job: Job, floats: int) -> None:
    np.zeros(floats, "<f4").tofile(tmp_path / ANSWERS)
    with pytest.raises(RunFailed, match="did not say what a runner says"):
        read_run(tmp_path, said(), job, "device")


def test_a_runner_that_left_no_answers_is_refused_in_words(tmp_path: Path, job: Job) -> None:
    with pytest.raises(RunFailed, match="did not say what a runner says"):
        read_run(tmp_path, said(), job, "device")

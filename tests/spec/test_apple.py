"""Apple devices without any: what is said where there is no Mac, and the worker's loop and the parsers.

The fixtures in `tests/recorded/apple` are written after the documented formats, not recorded.
"""

import dataclasses
import importlib.util
import json
import platform
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from edgefuse.errors import DeviceRefused, RunFailed, UnknownDevice, UsageError
from edgefuse.measurement import QUICK, Call, HostTime, Job, Routine, Run, Want
from edgefuse.values import Artifact, Streaming, TensorSpec
from edgefuse_devices import apple, apple_worker
from edgefuse_devices.plan import Plan

WRITTEN = Path(__file__).parents[1] / "recorded" / "apple"
FEATURES, PAST = TensorSpec("features", (1, 2, 3), "float32", "a test"), TensorSpec("past", (1,), "float32", "a test")
LOGITS, NEXT = TensorSpec("logits", (1, 2, 4), "float32", "a test"), TensorSpec("past_next", (1,), "float32", "a test")
SPEECH = [np.full((1, 2, 3), value, np.float32) for value in (1, 2, 3)]
RIGHT = (6.0, 18.0, 18.0)  # sums of features, over the calls of an utterance; the third call begins another
ROUTINE = dataclasses.replace(QUICK, warm_up_ms=0, calls=7, duration_ms=0)


def a_job(path: Path = Path("model.mlpackage"), want: Want = "latency", routine: Routine = ROUTINE) -> Job:
    artifact = Artifact(
        "coreml",
        path,
        "fp16",
        {"stream": (FEATURES, PAST)},
        {"stream": (LOGITS, NEXT)},
        "0" * 64,
        {"stream": Streaming(16, 64, 40, {"past": "past_next"})},
    )
    nothing = np.zeros(1, np.float32)
    feed = (
        Call({"features": SPEECH[0], "past": nothing}, begins=True, utterance="one", frames=2),
        Call({"features": SPEECH[1]}, begins=False, utterance="one", frames=2),
        Call({"features": SPEECH[2], "past": nothing}, begins=True, utterance="two", frames=2),
    )
    return Job(artifact, "stream", feed, routine, want)


def a_plan(**changes: object) -> Plan:
    usual = Plan(
        Path("m"), "stream", {"features": 6, "past": 1}, {"past": "past_next"}, {"logits": 8, "past_next": 1}, 3, (0, 2),
        warm_up=(2, 0), measure=(5, 0, 100, 10**12), threads=1, pace_ns=0,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def a_feed() -> list[dict[str, np.ndarray]]:
    return [dict(call.inputs) for call in a_job().feed]


def a_model(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = inputs["past"] + inputs["features"].sum()
    return {"past_next": total, "logits": np.full((1, 2, 4), total[0], np.float32)}


@pytest.fixture
def a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a Mac with an attached phone and a stand-in for Core ML Tools; its tools are scripts."""
    says = {
        "sysctl": 'case $2 in hw.model) echo Mac15,3;; hw.memsize) echo 17179869184;; *ncpu) echo 8;; *) echo "Apple M3";; esac',
        "sw_vers": "echo 15.1",
        "pmset": f'/bin/cat "{WRITTEN}"/$([ $2 = therm ] && echo thermal_fine || echo battery_plugged).txt',
        "xcrun": f'/bin/cp "{WRITTEN}/devices.json" "$5"',
    }
    for name, script in says.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(WRITTEN))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


def run_there(tmp_path: Path, content: str = "sound", which: str = "", **changes: object) -> Run:
    package = tmp_path / "package"
    package.mkdir()
    (package / "content").write_text(content)
    with apple.connect(which) as connection:
        return connection.run(dataclasses.replace(a_job(package), **changes))


def test_without_a_mac_one_thing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    (lack,) = apple.missing()
    assert lack.what == "macOS"
    assert "Mac" in lack.mend
    assert apple.found() == []


def test_there_is_nothing_to_set_up() -> None:
    with pytest.raises(UsageError, match="nothing to set up"):
        apple.setup(lambda _: nullcontext())


@pytest.mark.usefixtures("a_mac")
def test_a_mac_is_found_with_every_choice_of_units_and_what_is_attached() -> None:
    devices = {info.spec: info for info in apple.found()}
    assert [*devices][:5] == ["apple", "apple:cpu", "apple:cpu+gpu", "apple:cpu+ne", "apple:00000000-0000000000000001"]
    mac = devices["apple:cpu+ne"]
    assert (mac.name, mac.clock) == ("Mac15,3, CPU and Neural Engine", "host")
    assert (mac.facts["chip"], mac.facts["memory"], mac.facts["system"]) == ("Apple M3", "16.0 GiB", "macOS 15.1")


@pytest.mark.usefixtures("a_mac")
def test_an_attached_phone_is_refused_and_an_unknown_one_is_unknown() -> None:
    with (
        pytest.raises(DeviceRefused, match="A phone is attached, and is not measured"),
        apple.connect("00000000-0000000000000001"),
    ):
        pass
    with pytest.raises(UnknownDevice) as caught, apple.connect("cpu+fpga"):
        pass
    assert "apple:cpu+ne" in str(caught.value.hint)


@pytest.mark.usefixtures("a_mac")
def test_the_state_of_a_mac_is_told_in_words() -> None:
    with apple.connect("") as connection:
        assert connection.conditions() == {"thermal": "no warning", "battery": "AC Power, 85 %, charging"}


@pytest.mark.usefixtures("a_mac")
def test_a_worker_says_what_a_runner_says(tmp_path: Path) -> None:
    told = run_there(tmp_path, which="cpu+gpu")
    assert isinstance(told.samples, HostTime)
    assert len(told.samples.values) == 7
    assert [answer[0, 0] for answer in told.answers] == [*RIGHT]
    assert (told.unsteady, told.capped, told.warm_up_calls) == (0, False, 3)
    assert told.peak_bytes is not None
    assert told.told["compute units"] == "CPU_AND_GPU"


@pytest.mark.usefixtures("a_mac")
def test_a_profile_says_where_core_ml_prefers_to_run_what(tmp_path: Path) -> None:
    told = run_there(tmp_path, want="profile")
    call_ns = told.profiled_ns
    assert call_ns
    assert [(row.name, row.kind, row.where, row.count, row.time_ns) for row in told.profile] == [
        ("linear", "linear", "Neural Engine", 2, round(0.6 * call_ns)),
        ("matmul", "attention product", "Neural Engine", 1, round(0.25 * call_ns)),
        ("softmax", "softmax", "CPU", 1, round(0.1 * call_ns)),
    ]
    assert "estimates" in told.told["profile"]
    assert "operators" not in told.told


@pytest.mark.usefixtures("a_mac")
def test_a_broken_package_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the package is cut short"):
        run_there(tmp_path, content="cut short")


@pytest.mark.usefixtures("a_mac")
@pytest.mark.parametrize("changes", [{"threads": 2}, {"cores": (0,)}])
def test_core_ml_chooses_threads_itself(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="chooses threads"):
        run_there(tmp_path, routine=dataclasses.replace(ROUTINE, **changes))


def test_core_ml_refuses_what_is_not_its_own() -> None:
    with apple.connect("cpu") as connection:
        assert connection.refusal(a_job().artifact) is None
        assert "tflite" in str(connection.refusal(dataclasses.replace(a_job().artifact, target="tflite")))


def test_the_feed_goes_round_with_its_caches() -> None:
    seen = apple_worker.follow(a_plan(), a_feed(), a_model)
    assert [answer[0, 0, 0] for answer in seen.answers] == [*RIGHT]
    assert (len(seen.latency_ns), seen.warm_up_calls, seen.unsteady, seen.capped) == (5, 2, 0, False)


def test_an_answer_that_changes_is_counted() -> None:
    calls = iter(range(100))
    seen = apple_worker.follow(
        a_plan(warm_up=(1, 0)), a_feed(), lambda inputs: {**a_model(inputs), "logits": np.float32([next(calls) // 4])}
    )
    assert seen.unsteady == 2


def test_a_cap_ends_behind_one_pass() -> None:
    seen = apple_worker.follow(a_plan(measure=(50, 0, 2, 10**12)), a_feed(), a_model)
    assert (len(seen.latency_ns), seen.capped) == (3, True)


def test_paced_calls_wait_for_the_speech() -> None:
    begun = apple_worker.time.perf_counter_ns()
    apple_worker.follow(a_plan(pace_ns=20_000_000, warm_up=(1, 0), measure=(3, 0, 3, 10**12)), a_feed(), a_model)
    assert apple_worker.time.perf_counter_ns() - begun >= 40_000_000


def test_a_listing_of_devices_is_read_and_what_is_absent_is_not_told() -> None:
    phone, tablet = apple.devices_in((WRITTEN / "devices.json").read_text())
    assert (phone.spec, phone.name, phone.facts["model"]) == (
        "apple:00000000-0000000000000001",
        "A phone",
        "iPhone 15 Pro (iPhone16,1)",
    )
    assert (phone.facts["system"], phone.facts["connection"], phone.facts["developer mode"]) == ("iOS 18.0", "wired", "enabled")
    assert (tablet.spec, tablet.facts["system"]) == ("apple:00000000-0000-0000-0000-000000000002", "not told")


@pytest.mark.parametrize("listing", ["", "{}", "[]", json.dumps({"result": {"devices": [{}]}}), json.dumps({"result": 1})])
def test_a_listing_that_nobody_understands_lists_nothing(listing: str) -> None:
    assert apple.devices_in(listing) == []


def test_thermal_state_and_battery_are_read() -> None:
    assert apple.thermal_in((WRITTEN / "thermal_held_down.txt").read_text()) == "CPU at 75 % of its speed"
    assert apple.thermal_in((WRITTEN / "thermal_fine.txt").read_text()) == "no warning"
    assert apple.thermal_in("") == "not told"
    assert apple.battery_in((WRITTEN / "battery_none.txt").read_text()) == "AC Power"
    assert apple.battery_in("") == "not told"

"""What the profilers of the runtimes tell; nothing here depends on how fast the machine is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgefuse import device as devices
from edgefuse import target as targets
from edgefuse.errors import Refused
from edgefuse.fold import fold
from edgefuse.lower import Chunks, lower
from edgefuse.measurement import QUICK, Call, Job, OperatorTime, Profile
from edgefuse.profile import Profiled
from edgefuse.report.profile_rows import PROFILE, profile_json, profile_rows
from edgefuse_targets import profiles
from edgefuse_targets.profile_tflite import events
from edgefuse_targets.profiles import Event, kind_of, profile_of
from tests.conftest import a_checkpoint

ENTRIES = ("offline_640ms", "stream_160ms")
TELLING = ("executorch", "tflite")


@pytest.fixture(scope="module", params=TELLING)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if lacking := targets.shelf()[request.param].load().missing():
        pytest.skip(f"{request.param} needs {', '.join(lacking)}")
    program = lower(fold(a_checkpoint()), (0.64,), "fp32", [Chunks(160, 320)])
    return targets.find(request.param).export(program, tmp_path_factory.mktemp("artifact"), "model")


def zeros(artifact, entry: str):
    return {spec.name: np.zeros(spec.shape, np.float32) for spec in artifact.inputs[entry]}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_kind_of_operator_is_named_and_all_add_up_to_the_call(artifact, entry: str, monkeypatch) -> None:
    monkeypatch.setattr(profiles, "MOST", profiles.LEAST)
    found = targets.find(artifact.target).profile(artifact, entry, zeros(artifact, entry))
    kinds = {each.kind for each in found.operators}
    assert {"linear", "convolution", "attention product", "softmax", "layout", "elementwise", "runtime"} <= kinds
    assert {each.where for each in found.operators} <= {"XNNPACK", "outside"}
    assert sum(each.time_ns for each in found.operators) >= found.call_ns - len(found.operators)  # of rounding
    named = {each.name: each.count for each in found.operators}
    assert sum(count for name, count in named.items() if "Softmax" in name) == 2  # of two layers


@pytest.mark.parametrize("want", ["latency", "profile"])
def test_the_host_runs_it(artifact, want: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path))
    entry = ENTRIES[0]
    length = {"length": np.array([16], np.float32)}
    features = np.random.default_rng(0).standard_normal((1, 64, 80)).astype(np.float32)
    call = Call({"features": features, **length}, begins=True, utterance="a", frames=16)
    job = Job(artifact, entry, (call,), replace(QUICK, calls=3, duration_ms=0, warm_up_ms=0), want)
    with devices.connect("host") as host:
        found = host.run(job)
    wanted = targets.find(artifact.target).open(artifact).run(entry, call.inputs)["logits"][0]
    assert np.array_equal(found.answers[0], wanted)
    assert found.unsteady == 0
    assert bool(found.profile) == (want == "profile")


@pytest.mark.parametrize("target", ["reference", "coreml"])
def test_who_has_no_profiler_refuses(target: str) -> None:
    with pytest.raises(Refused):
        targets.shelf()[target].load().profile(None, "offline", {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Fully Connected (NC, QS8, QC8W) GEMM", "linear"),
        ("Convolution (NHWC, QC8) DWConv", "convolution"),
        ("Batch Matrix Multiply (NC, F32) GEMM", "attention product"),
        ("Softmax (NC, F32)", "softmax"),
        ("Convert (NC)", "conversion"),
        ("Transpose (ND, X32)", "layout"),
        ("Copy (NC, X32)", "layout"),
        ("Add (ND)", "elementwise"),
        ("dim_order_ops::_to_dim_order_copy.out", "conversion"),
        ("aten::slice_copy.Tensor_out", "layout"),
        ("aten::addmm.out", "linear"),
        ("FULLY_CONNECTED", "linear"),
        ("DEPTHWISE_CONV_2D", "convolution"),
        ("DEQUANTIZE", "conversion"),
        ("BATCH_MATMUL", "attention product"),
        ("LOGISTIC", "elementwise"),
    ],
)
def test_an_operator_is_of_the_kind_that_its_name_says(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_disturbed_calls_do_not_count() -> None:
    quiet = [(1000, [Event("Add", "XNNPACK", 300), Event("Add", "XNNPACK", 300)])] * 2
    disturbed = [(9000 + number, [Event("Add", "XNNPACK", 8000), Event("Add", "XNNPACK", 300)]) for number in range(6)]
    found = profile_of([*disturbed, *quiet])
    assert found.call_ns == 1000
    assert found.operators == (
        OperatorTime("Add", "elementwise", "XNNPACK", 2, 600),
        OperatorTime(profiles.REST, "runtime", "outside", 1, 400),
    )


def test_a_table_of_litert_is_read_line_by_line() -> None:
    table = """
==== Run Order ====
              [node type]    [start]    [first]   [avg ms]        [%]     [cdf%]   [mem KB] [times called]   [Name]
   Delegate/Softmax (NC, F32)      0.000      0.046      0.048     0.276%    24.651%      0.000             10   [Delegate]:26
                     CONV_2D      0.000      0.046      1.500     0.276%    24.651%      0.000             10   [a/b;c]:27

==== Top by Computation Time ====
   Delegate/Softmax (NC, F32)      0.000      0.046      0.048     0.276%    24.651%      0.000             10   [Delegate]:26
"""
    assert list(events(table)) == [Event("Softmax (NC, F32)", "XNNPACK", 48_000), Event("CONV_2D", "outside", 1_500_000)]


def test_rows_are_of_kinds_and_of_their_operators() -> None:
    operators = (
        OperatorTime("Fully Connected", "linear", "XNNPACK", 4, 600_000),
        OperatorTime("CONV_2D", "convolution", "outside", 1, 200_000),
        OperatorTime("Add", "elementwise", "XNNPACK", 3, 1_000),
        OperatorTime(profiles.REST, "runtime", "outside", 1, 199_000),
    )
    found = [
        Profiled("tflite", "int8", "offline", Profile(operators, 1_000_000)),
        Profiled("reference", "int8", "offline", None, "It has no profile."),
    ]
    assert profile_rows(found) == [
        ("tflite, int8", "offline", "a call", "", "", "1.000", "100.0 %"),
        ("", "", "linear", "", "4", "0.600", "60.0 %"),
        ("", "", "", "Fully Connected", "4", "0.600", "60.0 %"),
        ("", "", "convolution", "", "1", "0.200", "20.0 %"),
        ("", "", "", "CONV_2D, outside the delegate", "1", "0.200", "20.0 %"),
        ("", "", "runtime", "", "1", "0.199", "19.9 %"),
        ("", "", "elementwise", "", "3", "0.001", "0.1 %"),
        ("reference, int8", "offline", "It has no profile.", "", "", "", ""),
    ]
    assert all(len(row) == len(PROFILE) for row in profile_rows(found))
    told = profile_json(found)
    assert told[0]["shares"]["linear"] == 0.6
    assert told[1]["refusal"] == "It has no profile."

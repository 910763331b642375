"""A result on disk: written as it comes, sealed line by line, resumed where it was cut off."""

import dataclasses
import json

import pytest

from edgefuse.bench.result import Order, begin_result, key_of, read_result, visit_json
from edgefuse.errors import ChangedResult, NotAResult, NotWritable, OutputExists, UsageError
from edgefuse.measurement import QUICK, Absence, DeviceInfo, DeviceTime, Failure, HostTime, Instructions, Subject, Visit

HOST = DeviceInfo("host", "this host", "host", {"chip": "a chip"})
SUBJECT = Subject("model", "tflite", "fp32", "stream_640ms", 640, True, "c", "f", "a" * 64, 1000, 1, 9, 0, {"seen": 2.5})
ORDER = Order(("host",), (key_of(SUBJECT),), QUICK, ("latency",))


SAMPLES = HostTime((5, 6, 7))


def a_visit(round_: int, samples=SAMPLES, **more) -> Visit:
    return Visit(round_, samples, 90, None, 9, 3, False, 3, 120.0, 30, 30, 0, **more)


def write(path, *visits, order=ORDER, end=True, resume=False, overwrite=False):
    with begin_result(path, order, {"edgefuse": "0"}, resume=resume, overwrite=overwrite) as writer:
        writer.write("subject", key=key_of(SUBJECT), subject=dataclasses.asdict(SUBJECT))
        writer.write("device", device=dataclasses.asdict(HOST))
        for visit in visits:
            writer.write("visit", device="host", subject=key_of(SUBJECT), visit=visit_json(visit))
        if end:
            writer.write("end")
    return path


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "r.jsonl", a_visit(0), a_visit(1, conditions={"load": ("0.1", "0.2")}))


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_two_benchmarks_do_not_write_into_one_result(whole, how):
    with begin_result(whole, ORDER, {}, resume=True, overwrite=False) as writer:
        with pytest.raises(NotWritable, match="Another benchmark is writing"):
            write(whole, **how)
        writer.write("end")
    assert read_result(write(whole, **how)).ended


def test_what_is_read_is_what_was_written(whole):
    result = read_result(whole)
    (measurement,) = result.measurements
    assert (measurement.device, measurement.subject, measurement.routine) == (HOST, SUBJECT, QUICK)
    assert measurement.visits == (a_visit(0), a_visit(1, conditions={"load": ("0.1", "0.2")}))
    assert result.ended
    assert result.order == ORDER


@pytest.mark.parametrize("kind", [HostTime, DeviceTime, Instructions])
def test_samples_keep_their_clock(tmp_path, kind):
    (measurement,) = read_result(write(tmp_path / "r.jsonl", a_visit(0, kind((1, 2, 3))))).measurements
    assert measurement.visits[0].samples == kind((1, 2, 3))


def test_a_changed_number_is_found(whole):
    text = whole.read_text(encoding="utf-8")
    assert "[5, 6, 7]" in text
    whole.write_text(text.replace("[5, 6, 7]", "[4, 6, 7]", 1), encoding="utf-8")
    with pytest.raises(ChangedResult, match="line 4"):
        read_result(whole)


def test_a_line_less_is_found(whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(ChangedResult, match="line 4"):
        read_result(whole)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_that_is_cut_off_is_told_and_goes_on_behind_its_last_whole_line(whole, cut):
    content = whole.read_bytes()
    whole.write_bytes(content[: -1 - cut])
    with pytest.raises(ChangedResult, match="cut off"):
        read_result(whole)
    write(whole, a_visit(2), resume=True)
    (measurement,) = read_result(whole).measurements
    assert {visit.round for visit in measurement.visits} >= {0, 2}
    assert read_result(whole).ended


def test_an_interrupted_result_can_be_read_and_says_so(tmp_path):
    path = write(tmp_path / "r.jsonl", a_visit(0), end=False)
    assert not read_result(path).ended


def test_an_edited_result_is_not_resumed_and_stays_as_it_is(whole):
    changed = whole.read_bytes().replace(b"[5, 6, 7]", b"[4, 6, 7]")
    whole.write_bytes(changed)
    with pytest.raises(ChangedResult):
        write(whole, resume=True)
    assert whole.read_bytes() == changed


def test_what_was_asked_for_otherwise_is_not_resumed(whole):
    before = whole.read_bytes()
    with pytest.raises(UsageError, match="other devices: host, not board"):
        write(whole, order=dataclasses.replace(ORDER, devices=("board",)), resume=True)
    assert whole.read_bytes() == before


def test_another_schema_is_told_with_what_to_do(whole):
    first, *_ = whole.read_bytes().splitlines(keepends=True)
    fields = json.loads(first)
    del fields["seal"]
    from edgefuse.bench.result import _sealed

    line, _ = _sealed({**fields, "schema": 99}, "")
    whole.write_bytes(line)
    with pytest.raises(NotAResult, match="schema 99"):
        read_result(whole)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"{}\n", b"[1, 2]\n", b'{"kind": "begin"}\n', b"\x00\xff\n", b'{"seal": "x"}\n']
)
def test_another_file_is_no_result(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises((NotAResult, ChangedResult)):
        read_result(path)


def test_a_result_is_replaced_only_when_asked_and_another_file_never(whole, tmp_path):
    with pytest.raises(OutputExists, match="exists already"):
        write(whole)
    write(whole, a_visit(7), overwrite=True)
    assert [visit.round for visit in read_result(whole).measurements[0].visits] == [7]
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary\n", encoding="utf-8")
    with pytest.raises(OutputExists, match="not written by edgefuse"):
        write(diary, overwrite=True)
    assert diary.read_text(encoding="utf-8") == "dear diary\n"


def test_a_failure_that_went_well_later_is_none(tmp_path):
    path, where = tmp_path / "r.jsonl", {"device": "host", "subject": key_of(SUBJECT)}
    with begin_result(path, ORDER, {}, resume=False, overwrite=False) as writer:
        writer.write("subject", key=key_of(SUBJECT), subject=dataclasses.asdict(SUBJECT))
        writer.write("device", device=dataclasses.asdict(HOST))
        for round_ in (0, 1):
            writer.write("failure", **where, failure=dataclasses.asdict(Failure(round_, "latency", "It died.")))
        writer.write("visit", **where, visit=visit_json(a_visit(0)))
    (measurement,) = read_result(path).measurements
    assert [failure.round for failure in measurement.failures] == [1]


def test_a_device_that_comes_back_is_not_missing(tmp_path):
    path = tmp_path / "r.jsonl"
    with begin_result(path, ORDER, {}, resume=False, overwrite=False) as writer:
        writer.write("absence", absence=dataclasses.asdict(Absence("host", "It is gone.")))
    assert read_result(path).absences == (Absence("host", "It is gone."),)
    write(path, resume=True)
    assert read_result(path).absences == ()

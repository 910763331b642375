"""Results become pages, tables and files that say what was measured and nothing more: word for word in tests/golden/report.

Write the pages again, and read what has changed, with: EDGEFUSE_GOLDEN=write pytest tests/spec/test_report.py
"""

import csv
import dataclasses
import errno
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgefuse.bench import budget as budgets
from edgefuse.bench.match import against, models_in_turns, pairs_of, precisions_in_turns
from edgefuse.errors import BadBudget, ChangedResult, MissingFile, NoSpace, NotAResult, NotWritable, OutputExists, UsageError
from edgefuse.measurement import HostTime, Instructions
from edgefuse.report import bench_files, bench_page, bench_rows, plots
from edgefuse.report.bench_summary import summary
from edgefuse.report.report import report
from edgefuse.store import read_bundle
from tests import results
from tests.results import BOARD, COUNTER, HOST, PHONE, a_result, a_subject, a_visit, steady

GOLDEN = Path(__file__).parent.parent / "golden" / "report"
BASE = a_subject("conformer-tiny")


def must_equal_golden(name: str, page: str) -> None:
    path = GOLDEN / name
    if os.environ.get("EDGEFUSE_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    return results.write(results.small(), tmp_path / "result.jsonl")


@pytest.mark.parametrize("suffix", ["html", "md", "csv", "json"])
def test_a_report_says_word_for_word_what_was_measured(suffix, result_file, tmp_path):
    page = report([result_file], tmp_path / f"report.{suffix}").read_text(encoding="utf-8")
    if suffix == "json":
        page = json.dumps([each | {"result": ""} for each in json.loads(page)["ratios"]], indent=1) + "\n"
    must_equal_golden(f"report.{suffix}", re.sub(r"\b[0-9a-f]{64}\b", lambda seal: seal[0][:4], page))


def test_the_terminal_and_the_comparison_say_word_for_word_what_was_measured():
    tables = [f"{each.title}\n{lines([each.columns, *each.rows])}" for each in bench_rows.result_tables(results.small())]
    pairs = against(results.small().measurements, [steady(HOST, a_subject(), 1.7e6), steady(PHONE)])
    compared = lines([bench_rows.COMPARED, *bench_rows.compared_rows(pairs.compared)])
    told = [*tables, "\n".join(bench_rows.failure_lines(results.small())) + "\n", compared, "\n".join(pairs.remarks) + "\n"]
    must_equal_golden("terminal.txt", "\n".join(told))


def lines(rows: list[tuple[str, ...]]) -> str:
    return "".join(" | ".join(row) + "\n" for row in rows)


def test_a_report_is_the_same_bytes_every_time(result_file, tmp_path):
    first, second = (report([result_file], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_clocks_never_share_a_section_a_table_or_a_ratio():
    every = a_result([steady(device, a_subject(name)) for device in (HOST, PHONE, COUNTER, BOARD) for name in ("one", "two")])
    by_clock = bench_rows.places([every])
    assert [*by_clock] == ["host", "device", "virtual", "instructions"]
    assert all(
        {each.device.clock for each in place.measurements} == {clock} for clock, those in by_clock.items() for place in those
    )
    assert len(bench_rows.result_tables(every)) == 4
    assert all(each.base.device.spec == each.new.device.spec for each in models_in_turns(every.measurements))
    columns = next(csv.reader(io.StringIO(bench_files.comma_separated([every]))))
    assert {"host_p50_ns", "device_p50_ns", "virtual_p50_ns", "instructions_per_call"} <= set(columns)
    assert not {"p50", "p50_ns", "p50_ms"} & set(columns)


def test_samples_of_another_clock_than_the_device_has_are_no_table():
    odd = dataclasses.replace(steady(HOST), visits=(a_visit(0, [1, 2, 3], COUNTER),))
    assert isinstance(odd.visits[0].samples, Instructions)
    with pytest.raises(ValueError, match="another clock"):
        bench_rows.places([a_result([odd])])
    assert isinstance(steady(HOST).visits[0].samples, HostTime)


def test_a_percentile_that_too_few_samples_support_is_a_dash_with_its_reason():
    few = a_result([steady(processes=3, calls=20)])
    (place,) = bench_rows.places([few])["host"]
    table = bench_rows.latency_table(place)
    told = dict(zip(table.columns, table.rows[0], strict=True))
    assert told["p50, ms"] != "-"
    assert told["p90, ms"] == told["p99, ms"] == "-"
    assert any("p90 takes 100 samples" in note for note in table.notes)
    assert "too few for an interval" in table.doubts[0]


def test_a_doubt_that_all_have_is_told_once_and_others_beside_their_number():
    one = steady(HOST, a_subject("one"), processes=3)
    two = dataclasses.replace(
        steady(HOST, a_subject("two"), processes=3),
        visits=tuple(dataclasses.replace(each, capped=True) for each in steady(processes=3).visits),
    )
    (place,) = bench_rows.places([a_result([one, two])])["host"]
    table = bench_rows.latency_table(place)
    assert table.doubts[0] == ""
    assert "cap" in table.doubts[1]
    assert sum("Only 3 processes" in note for note in table.notes) == 1


def test_a_wrong_answer_is_the_first_thing_that_a_report_says():
    told = summary([results.small()])["Whether it is right, and whole"]
    assert told[0].startswith("NOT ALL ANSWERS WERE RIGHT: 2 of")
    right = summary([a_result([steady()])])["Whether it is right, and whole"]
    assert right[0].startswith("All answers of all 10 processes were right")


@pytest.mark.parametrize("make", [results.small, results.large])
def test_a_page_is_whole_asks_nothing_of_a_network_and_runs_nothing(make):
    page = bench_page.page([make()])
    parser = _Tags()
    parser.feed(page)
    assert not parser.names & {"script", "link[stylesheet]", "img", "iframe", "object", "embed"}
    assert not re.search(r"""(src|href)=(?!["']?(#|data:))""", page)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"\b(nan|inf)\b|%-\d|None", page)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.names.add(f"link[{told['rel']}]" if tag == "link" else tag)


def test_what_a_bundle_or_a_device_calls_itself_is_never_markup():
    nasty = "<script>alert(1)</script>|`x`"
    device = dataclasses.replace(HOST, name=nasty, facts={nasty: nasty})
    result = a_result([steady(device, a_subject(nasty, entry=nasty)), steady(device, a_subject("other", entry=nasty))])
    assert "<script" not in bench_page.page([result])
    table = [line for line in bench_files.markdown([result]).splitlines() if line.startswith(("| device | model", "| host | "))]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:3]}) == 1


def test_a_number_that_is_not_there_breaks_no_report():
    empty = a_result([dataclasses.replace(steady(), visits=(), memory=None, refusals={"latency": "There is no kernel for it."})])
    nothing = a_result([], [results.GONE])
    for result in (empty, nothing):
        assert bench_page.page([result])
        assert bench_files.markdown([result])
        assert bench_files.comma_separated([result])
        assert json.loads(bench_files.everything([result]))
    assert "There is no kernel for it." in bench_page.page([empty])
    assert results.GONE.hint in bench_page.page([nothing])


def test_json_has_every_sample_every_statistic_and_every_doubt():
    told = json.loads(bench_files.everything([results.small()]))
    first, broken = told["results"][0]["measurements"][0], told["results"][0]["measurements"][2]
    assert len(first["visits"]) == 10
    assert len(first["visits"][0]["samples"]) == 100
    assert first["statistics"]["p50"] == first["one_call"]
    assert broken["doubts"]
    assert broken["statistics"]["p50"] is None
    assert {each["word"] for each in told["ratios"]} == {"FASTER"}


def test_the_base_is_the_model_that_was_named_or_the_slowest():
    quick, slow = steady(HOST, a_subject("quick"), 1e6), steady(HOST, a_subject("slow"), 2e6)
    (usual,) = models_in_turns([quick, slow])
    assert (usual.base.subject.model, usual.ratio.word) == ("slow", "FASTER")
    (named,) = models_in_turns([quick, slow], "quick")
    assert (named.base.subject.model, named.ratio.word) == ("quick", "SLOWER")


def test_precisions_of_one_checkpoint_are_held_against_its_floats():
    floats, ints = steady(HOST, a_subject(), 2e6), steady(HOST, a_subject("fusionformer-tiny-int8", precision="int8"), 1e6)
    (pair,) = precisions_in_turns([floats, ints, steady(HOST, a_subject("other-int8", precision="int8"), 1e6)])
    assert pair.base is floats
    assert pair.ratio.median == pytest.approx(0.5, rel=1e-3)


def test_two_results_meet_by_place_and_by_model_only_where_there_are_several():
    renamed = against([steady(HOST, a_subject("old"))], [steady(HOST, a_subject("new"))])
    assert len(renamed.compared) == 1
    assert renamed.remarks == ()
    several = against([steady(HOST, a_subject("a")), steady(HOST, BASE)], [steady(HOST, BASE), steady(HOST, a_subject("c"))])
    assert [each.new.subject.model for each in several.compared] == ["conformer-tiny"]
    assert several.remarks == (
        "Only the base has a, executorch, fp32, stream_640ms on host.",
        "Only the new result has c, executorch, fp32, stream_640ms on host.",
    )
    assert against([steady(HOST)], [steady(PHONE)]).compared == ()


def test_another_machine_behind_the_same_name_and_another_routine_are_told():
    before = steady(HOST)
    after = dataclasses.replace(
        before, device=dataclasses.replace(HOST, name="Example B2"), routine=dataclasses.replace(before.routine, threads=4)
    )
    assert against([before], [after]).remarks == (
        "host is another machine: Example B2, the base's was Example A1, 8 cores.",
        "Measured otherwise: threads is 4, the base's was 1.",
    )


def test_one_result_is_compared_with_itself_only_where_models_took_turns(result_file, tmp_path):
    assert {each.base.subject.model for each in pairs_of(result_file, None).compared} == {"conformer-tiny"}
    with pytest.raises(UsageError, match="No model is called 'gpt'"):
        pairs_of(result_file, None, "gpt")
    with pytest.raises(UsageError, match="took turns"):
        pairs_of(results.write(a_result([steady()]), tmp_path / "alone.jsonl"), None)


def test_marks_that_would_cover_each_other_move_apart_and_the_front_is_what_nothing_beats():
    points = [plots.Point(str(i), 1.0, 5.0, 0) for i in range(5)]
    heights = plots._apart([(50.0, 100.0)] * 5)
    assert all(abs(a - b) >= 2 * plots.MARK for i, a in enumerate(heights) for b in heights[:i])
    assert plots.front([*points, plots.Point("worse", 2.0, 5.0, 0), plots.Point("slower, righter", 3.0, 4.0, 0)]) == [
        points[0],
        plots.Point("slower, righter", 3.0, 4.0, 0),
    ]


def test_a_clock_that_is_too_coarse_for_a_call_breaks_no_picture():
    assert plots.strips([plots.Strip("x", [0.0] * 5, [0.0], 0.0, "", 0)], "ms", "title")
    assert plots.pareto([plots.Point("x", 0.0, 0.0, 0)] * 2, "x", "y", "title")
    assert plots.bars([plots.Bar("x", {"a": 0.0}, "")], "ms", "title", {"a": 0})
    assert plots.intervals([plots.Interval("x", 1.0, None, None, "")], "title")


def test_a_row_with_another_number_of_cells_is_no_table():
    with pytest.raises(ValueError, match="another number of cells"):
        bench_rows.Table("A", ("b", "c"), (("d",),))


# The verb


def test_a_suffix_that_no_report_has_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError) as told:
        report([tmp_path / "nothing.jsonl"], tmp_path / "report.pdf")
    assert ".html, .md, .csv, .json" in told.value.hint


def test_an_output_that_exists_stays_unless_it_is_ours_and_may_be_replaced(result_file, tmp_path):
    output = report([result_file], tmp_path / "report.md")
    with pytest.raises(OutputExists):
        report([result_file], output)
    assert report([result_file], output, overwrite=True) == output
    for name in ("diary.md", "diary.html", "diary.csv", "diary.json"):
        diary = tmp_path / name
        diary.write_text("Dear diary", encoding="utf-8")
        with pytest.raises(OutputExists, match="not written by edgefuse"):
            report([result_file], diary, overwrite=True)
        assert diary.read_text(encoding="utf-8") == "Dear diary"


@pytest.mark.parametrize("suffix", ["html", "md", "csv", "json"])
def test_every_report_knows_itself_again(suffix, result_file, tmp_path):
    output = report([result_file], tmp_path / f"report.{suffix}")
    assert report([result_file], output, overwrite=True).stat().st_size > 0


def test_a_folder_below_a_file_is_told_in_words(result_file, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(NotWritable):
        report([result_file], tmp_path / "file" / "report.html")


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EACCES, NotWritable)])
def test_a_disk_that_does_not_take_it_is_told_in_words_and_the_old_report_stays(number, kind, result_file, tmp_path, monkeypatch):
    output = report([result_file], tmp_path / "report.md")
    before = output.read_bytes()

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(kind):
        report([result_file], output, overwrite=True)
    assert output.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"report.md", "result.jsonl"}


def test_what_is_no_result_or_was_changed_is_no_report(result_file, tmp_path):
    with pytest.raises(MissingFile):
        report([tmp_path / "nothing.jsonl"], tmp_path / "report.md")
    with pytest.raises(NotAResult):
        report([Path(__file__)], tmp_path / "report.md")
    result_file.write_bytes(result_file.read_bytes().replace(b'"capped": false', b'"capped": true ', 1))
    with pytest.raises(ChangedResult):
        report([result_file], tmp_path / "report.md")
    assert not (tmp_path / "report.md").exists()


def test_a_result_that_is_named_twice_is_read_once(result_file, tmp_path):
    page = report([result_file, result_file], tmp_path / "report.csv").read_text(encoding="utf-8")
    assert len(page.splitlines()) == 1 + len(results.small().measurements)


# Budgets


def a_budget(tmp_path: Path, text: str) -> budgets.Budget:
    path = tmp_path / "budgets.toml"
    path.write_text(f"[[budget]]\n{text}", encoding="utf-8")
    return budgets.read_budget(path)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        ("size_mb = 4.33", True),
        ("size_mb = 4.32", False),
        ("partitions = 3", True),
        ("partitions = 2", False),
        ("outside_percent = 5", True),
        ("outside_percent = 4.9", False),
        ("wer_percent = 14.71", True),
        ("wer_percent = 14.7", False),
        ("wer_percent = {seen = 3.0, unseen = 20.0}", True),
        ("wer_percent = {seen = 2.0}", False),
        ("peak_mb = 41", True),
        ("peak_mb = 40", False),
        ("latency_p50_ms = 2.1", True),
        ("latency_p50_ms = 1.9", False),
        ("latency_p99_ms = 2.1", True),
    ],
)
def test_a_limit_is_kept_up_to_its_number(limit, kept, tmp_path):
    checks = budgets.check(a_budget(tmp_path, limit), [steady()])
    assert all(each.passed for each in checks) is kept


def test_instructions_are_of_one_call_on_average_and_a_budget_far_above_them_can_be_lowered(tmp_path):
    measurement = steady(COUNTER, latency=12.0e6)  # 16 calls, each 1000 instructions longer than the one before
    (exact,) = budgets.check(a_budget(tmp_path, "instructions = 12_007_500"), [measurement])
    assert exact.passed
    assert exact.measured == "12007500"
    (spare,) = budgets.check(a_budget(tmp_path, "instructions = 12_200_000"), [measurement])
    assert spare.measured == "12007500, 1.6 % below: the budget can be lowered"
    (over,) = budgets.check(a_budget(tmp_path, "instructions = 12_007_499"), [measurement])
    assert not over.passed


def test_a_budget_speaks_only_of_what_its_filters_name_and_of_every_such_thing(tmp_path):
    every = [steady(HOST), steady(HOST, BASE), steady(PHONE, BASE), steady(COUNTER, BASE)]
    budget = a_budget(tmp_path, 'model = "conformer-tiny"\nlatency_p50_ms = 5\nsize_mb = 5')
    assert [each.name for each in budgets.check(budget, every)] == [
        "budget 1: latency_p50_ms of host, conformer-tiny, executorch, fp32, stream_640ms",
        "budget 1: latency_p50_ms of adb:R58M, conformer-tiny, executorch, fp32, stream_640ms",
        "budget 1: size_mb of conformer-tiny, executorch, fp32",
    ]


@pytest.mark.parametrize(
    ("limit", "measurement", "reason"),
    [
        ("latency_p50_ms = 9", dataclasses.replace(steady(), visits=()), "it was not run"),
        ("latency_p99_ms = 9", steady(calls=20), "200 samples are too few"),
        ("partitions = 9", steady(HOST, a_subject(partitions=None)), "the runtime does not delegate"),
        ("peak_mb = 99", dataclasses.replace(steady(), memory=None, refusals={"memory": "It is silent."}), "It is silent."),
        ("wer_percent = {noisy = 9.0}", steady(), "the test set has no part 'noisy', only seen, unseen"),
        ("wer_percent = 9.0", steady(HOST, a_subject(wer_percent={"seen": float("nan")})), "no word was said in the test set"),
    ],
)
def test_a_number_that_is_not_there_keeps_no_limit(limit, measurement, reason, tmp_path):
    (check,) = budgets.check(a_budget(tmp_path, limit), [measurement])
    assert not check.passed
    assert check.measured == f"not measured: {reason}"


def test_what_is_known_without_a_device_is_held_against_a_budget_and_nothing_else(bundle_folder, tmp_path):
    bundle = read_bundle(bundle_folder)
    checks = budgets.check_exports(a_budget(tmp_path, "size_mb = 1000\nwer_percent = 1000"), bundle, bundle.exports)
    assert all(each.passed for each in checks)
    (alone,) = (each for each in checks if "size_mb" in each.name)
    assert alone.name == f"budget 1: size_mb of {bundle_folder.name}, reference, fp32"
    (over,) = budgets.check_exports(a_budget(tmp_path, "size_mb = 0"), bundle, bundle.exports)
    assert not over.passed
    with pytest.raises(BadBudget) as told:
        budgets.check_exports(a_budget(tmp_path, "instructions = 9"), bundle, bundle.exports)
    assert "edgefuse bench" in told.value.hint


BAD_BUDGETS = {
    "unknown_key": "size_kb = 3",
    "unknown_table": "size_mb = 3\n[device]",
    "text_for_a_number": 'size_mb = "3"',
    "a_truth_for_a_number": "size_mb = true",
    "negative": "size_mb = -1",
    "not_finite": "size_mb = nan",
    "number_for_a_text": "target = 3\nsize_mb = 3",
    "no_limit": 'target = "executorch"',
    "no_parts": "wer_percent = {}",
    "parts_of_another_limit": "size_mb = {seen = 3.0}",
    "not_toml": "size_mb = ",
    "nothing_that_was_measured": 'target = "coreml"\nsize_mb = 3',
    "another_clock": "instructions = 3",
}


def test_a_bad_budget_is_refused_word_for_word(tmp_path):
    told = []
    for name, text in BAD_BUDGETS.items():
        with pytest.raises(BadBudget) as error:
            budgets.check(a_budget(tmp_path, text), [steady()])
        told.append(f"{name}\nerror: {error.value.sentence}\n  hint: {error.value.hint}\n".replace(str(tmp_path), "HERE"))
    must_equal_golden("budgets.txt", "\n".join(told))


def test_a_file_without_budgets_is_refused_and_so_is_none(tmp_path):
    (tmp_path / "empty.toml").write_text("", encoding="utf-8")
    with pytest.raises(BadBudget, match="no \\[\\[budget\\]\\]"):
        budgets.read_budget(tmp_path / "empty.toml")
    with pytest.raises(MissingFile):
        budgets.read_budget(tmp_path / "nothing.toml")

"""What can go wrong around devices and results: a sentence, a hint, an exit code, word for word, and nothing is lost.

What devices themselves say when they are not there, or fail, is in the tests of each device.
"""

import json
from pathlib import Path

import pytest

from edgefuse.bench.result import _sealed
from tests.results import a_result, small, steady, write
from tests.spec.test_cli_errors import must_be_an_error, must_equal_golden, said

BUDGETS = {
    "unknown": "[[budget]]\nminutes = 3\n",
    "text": "dear diary\n",
    "empty": "",
    "negative": "[[budget]]\nsize_mb = -1\n",
    "elsewhere": '[[budget]]\ntarget = "gameboy"\nsize_mb = 1\n',
    "tight": "[[budget]]\nsize_mb = 0.000001\n",
    "unmeasured": "[[budget]]\ninstructions = 1\n",
}
COMMANDS = {
    "unknown_kind": ["bench", "HERE/bundle", "-d", "toaster"],
    "another_host": ["bench", "HERE/bundle", "-d", "host:other", "-o", "HERE/new.jsonl"],
    "no_bundle": ["bench", "HERE/nowhere"],
    "nothing_to_measure": ["bench", "HERE/bundle", "-t", "gameboy"],
    "one_target_of_none": ["bench", "HERE/bundle", "-t", "reference", "-t", "gameboy"],
    "one_entry_of_none": ["bench", "HERE/bundle", "--entry", "offline", "--entry", "backwards"],
    "negative_cores": ["bench", "HERE/bundle", "--cores", "0,-1"],
    "no_cores": ["bench", "HERE/bundle", "--cores", "first"],
    "no_processes": ["bench", "HERE/bundle", "--processes", "0"],
    "result_exists": ["bench", "HERE/bundle", "-o", "HERE/small.jsonl"],
    "result_is_not_ours": ["bench", "HERE/bundle", "-o", "HERE/diary.txt", "--overwrite"],
    "nothing_to_resume": ["bench", "HERE/bundle", "-o", "HERE/new.jsonl", "--resume"],
    "another_result_to_resume": ["bench", "HERE/bundle", "-o", "HERE/small.jsonl", "--resume"],
    "setup_of_a_toaster": ["devices", "setup", "toaster"],
    "setup_of_the_host": ["devices", "setup", "host"],
    "report_of_nothing": ["report", "HERE/nowhere.jsonl", "-o", "HERE/new.html"],
    "report_of_another_file": ["report", "HERE/diary.txt", "-o", "HERE/new.html"],
    "report_of_another_schema": ["report", "HERE/schema.jsonl", "-o", "HERE/new.html"],
    "report_of_a_cut_off_result": ["report", "HERE/cut.jsonl", "-o", "HERE/new.html"],
    "report_of_an_edited_result": ["report", "HERE/edited.jsonl", "-o", "HERE/new.html"],
    "report_in_no_format": ["report", "HERE/small.jsonl", "-o", "HERE/new.pdf"],
    "report_exists": ["report", "HERE/small.jsonl", "-o", "HERE/diary.txt.html"],
    "report_in_no_folder": ["report", "HERE/small.jsonl", "-o", "HERE/diary.txt/new.html"],
    "report_against_nobody": ["report", "HERE/small.jsonl", "-o", "HERE/new.html", "--base", "gameboy"],
    "compare_one_model": ["compare", "HERE/one.jsonl"],
    "compare_with_a_model_too_many": ["compare", "HERE/one.jsonl", "HERE/one.jsonl", "--base-model", "a"],
    "compare_with_no_percentage": ["compare", "HERE/one.jsonl", "HERE/slow.jsonl", "--fail-if-slower", "much"],
    "budget_missing": ["verify", "HERE/bundle", "--budget", "HERE/no.toml"],
    "budget_unknown": ["bench", "HERE/bundle", "--budget", "HERE/unknown.toml"],
    "budget_text": ["bench", "HERE/bundle", "--budget", "HERE/text.toml"],
    "budget_empty": ["bench", "HERE/bundle", "--budget", "HERE/empty.toml"],
    "budget_negative": ["bench", "HERE/bundle", "--budget", "HERE/negative.toml"],
    "profile_of_nothing": ["profile", "HERE/nowhere"],
    "profile_of_another_target": ["profile", "HERE/bundle", "-t", "gameboy"],
    "profile_of_the_reference": ["profile", "HERE/bundle"],
    "new_of_no_size": ["new", "--preset", "huge", "-o", "HERE/new"],
    "new_exists": ["new", "--preset", "tiny", "-o", "HERE/bundle"],
}


@pytest.fixture
def here(bundle_folder, tmp_path, monkeypatch):
    """A folder with a bundle, and results of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    (tmp_path / "diary.txt").write_text("Dear diary\n", encoding="utf-8")
    (tmp_path / "diary.txt.html").write_text("Dear diary\n", encoding="utf-8")
    for name, text in BUDGETS.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    whole = write(small(), tmp_path / "small.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[:-20])
    (tmp_path / "edited.jsonl").write_bytes(whole.replace(b'"round": 0', b'"round": 1', 1))
    first = json.loads(whole.splitlines()[0])
    del first["seal"]
    (tmp_path / "schema.jsonl").write_bytes(_sealed({**first, "schema": 99}, "")[0])
    write(a_result([steady(latency=1e6)]), tmp_path / "one.jsonl")
    write(a_result([steady(latency=2e6)]), tmp_path / "slow.jsonl")
    assert bundle_folder.name == "bundle"
    return tmp_path


@pytest.mark.parametrize("wrong", COMMANDS)
def test_what_cannot_be_measured_or_read_is_refused_word_for_word(wrong, here, capsys):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and "locks" not in path.parts}
    page = said([word.replace("HERE", str(here)) for word in COMMANDS[wrong]], here, capsys)
    must_be_an_error(page)
    must_equal_golden(f"bench_{wrong}", page)
    after = {path: path.read_bytes() for path in before}
    assert after == before
    left = {path.name for path in here.rglob("*") if path.is_file() and "locks" not in path.parts} - {p.name for p in before}
    assert left <= {"new.jsonl"}  # a result keeps what was measured, and here that nothing was


@pytest.mark.parametrize("budget", ["elsewhere", "tight", "unmeasured"])
def test_a_bundle_that_is_held_against_a_budget_fails_word_for_word(budget, here, speech, capsys):
    arguments = ["verify", str(here / "bundle"), "--speech", str(speech), "--budget", str(here / f"{budget}.toml")]
    page = said(arguments, here, capsys)
    told = page[page.index("error:") :]
    must_be_an_error(told)
    must_equal_golden(f"bench_budget_{budget}", told)


def test_slower_is_told_and_has_a_code(here, capsys):
    page = said(["compare", str(here / "one.jsonl"), str(here / "slow.jsonl"), "--fail-if-slower", "5%"], here, capsys)
    must_be_an_error(page)
    assert page.endswith("exit code 112\n")
    assert "SLOWER" in page
    assert Path(here / "one.jsonl").is_file()

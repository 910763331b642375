"""What foreign code prints goes to the log, and what it raises becomes ours."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from edgefuse.errors import ChangedBundle, ExportFailed, GateFailed, MissingPackage, NotABundle, Refused
from edgefuse_targets.foreign import exporting, quiet, reading


def test_whatever_is_printed_on_whatever_level_goes_to_the_log(capfd, caplog):
    with caplog.at_level(logging.DEBUG, logger="edgefuse_targets"), quiet():
        print("from Python")  # noqa: T201 - that is the point
        print("from Python, angrily", file=sys.stderr)  # noqa: T201
        os.write(1, b"from C++\n")
        os.write(2, b"from C++, angrily\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        warnings.warn("from a library", stacklevel=1)
    assert capfd.readouterr() == ("", "")
    assert "from Python" in caplog.text
    assert "from C++, angrily" in caplog.text
    assert "from a child" in caplog.text


def test_afterwards_everything_prints_again(capfd):
    with pytest.raises(ValueError, match="on the way"), quiet():
        raise ValueError("on the way")
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")


def test_a_log_handler_that_a_library_made_meanwhile_still_works_afterwards(capfd):
    with quiet():
        handler = logging.StreamHandler()
    handler.handle(logging.makeLogRecord({"msg": "later"}))
    assert capfd.readouterr().err == "later\n"


def test_silence_within_silence_is_silence(capfd):
    with quiet():
        with quiet():
            os.write(2, b"deep")
        os.write(2, b"less deep")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("raised", "told"),
    [(RuntimeError("no such kernel\nand a page of IR"), ExportFailed), (ImportError("no flatc"), MissingPackage)],
)
def test_what_an_exporter_raises_is_told_in_one_line(raised, told):
    with pytest.raises(told) as error, exporting("Runtime", []):
        raise raised
    assert error.value.sentence.startswith("Runtime ")
    assert "IR" not in error.value.sentence
    assert error.value.__cause__ is raised


def test_our_own_errors_pass_unchanged():
    ours = GateFailed("ours")
    with pytest.raises(GateFailed) as error, exporting("Runtime", []):
        raise ours
    assert error.value is ours


def test_a_refused_program_is_not_begun():
    begun = []
    with pytest.raises(Refused, match="too wide"), exporting("Runtime", ["It is too wide."]):
        begun.append(1)
    assert not begun


def test_a_file_that_is_not_there_and_one_that_cannot_be_read_are_told_apart(tmp_path: Path):
    with pytest.raises(NotABundle), reading("Runtime", tmp_path / "model"):
        pass
    (tmp_path / "model").write_bytes(b"")
    with pytest.raises(ChangedBundle, match="cannot read"), reading("Runtime", tmp_path / "model"):
        raise IndexError("list index out of range")

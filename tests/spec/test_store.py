"""Bundles on disk: whole or not at all, whatever happens on the way; every byte is watched."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefuse import atomic, cli, pipeline, store
from edgefuse.errors import ChangedBundle, GateFailed, NoSpace, NotABundle, NotWritable, OutputExists
from edgefuse.values import OFFLINE

KILLED = """
import os, pathlib, signal, sys
from edgefuse import atomic

point, output = sys.argv[1], pathlib.Path(sys.argv[2])
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
real = atomic._exchange
if point == "flushing":
    atomic._flush = die
elif point == "before the exchange":
    atomic._exchange = die
elif point == "after the exchange":
    atomic._exchange = lambda *names: (real(*names), die())
elif point == "between two renames":
    atomic._exchange = lambda *_: False
    atomic.Path.rename = lambda self, new, rename=atomic.Path.rename: (rename(self, new), die())
with atomic.draft(output, overwrite=True, is_ours=lambda _: True) as folder:
    (folder / "one").write_text("new")
    if point == "writing":
        die()
    (folder / "two").write_text("new")
"""


def ours(_: Path) -> bool:
    return True


def write(output: Path, word: str, *, overwrite: bool = True) -> None:
    with atomic.draft(output, overwrite=overwrite, is_ours=ours) as folder:
        (folder / "one").write_text(word)
        (folder / "two").write_text(word)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    write(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.mark.parametrize("point", ["writing", "flushing", "before the exchange", "after the exchange", "between two renames"])
def test_a_run_that_is_killed_leaves_one_whole_folder_and_the_next_run_cleans_up(point, old):
    ended = subprocess.run([sys.executable, "-c", KILLED, point, str(old)], check=False)
    assert ended.returncode == -signal.SIGKILL
    if point == "between two renames":  # only where folders cannot be exchanged: the old one waits, whole, for the next run
        assert not old.exists()
        atomic.sweep(old)
    word = "new" if point == "after the exchange" else "old"
    assert content(old) == {"one": word, "two": word}
    write(old, "newest")
    assert content(old) == {"one": "newest", "two": "newest"}
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_an_export_that_is_killed_leaves_the_old_bundle_as_it_was(whole_checkpoint, bundle_folder, speech):
    before = {path: path.read_bytes() for path in bundle_folder.rglob("*") if path.is_file()}
    program = (
        "import os, signal, sys; from edgefuse import cli, store;"
        "store.to_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"  # everything is written but edgefuse.json
        "cli.run(sys.argv[1:])"
    )
    command = ["export", str(whole_checkpoint), "-t", "reference", "--seconds", "2", "--speech", str(speech)]
    arguments = [*command, "-o", str(bundle_folder), "--overwrite"]
    ended = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in bundle_folder.rglob("*") if path.is_file()} == before
    (draft,) = bundle_folder.parent.glob(".bundle.edgefuse-draft-*")
    assert (draft / "model.safetensors").is_file()
    with pytest.raises(NotABundle):
        store.read_bundle(draft)
    atomic.sweep(bundle_folder)
    assert not draft.exists()


def test_a_draft_of_a_living_run_is_left_alone(tmp_path):
    with atomic.draft(tmp_path / "out", overwrite=False, is_ours=ours) as folder:
        (folder / "one").write_text("first")
        atomic.sweep(tmp_path / "out")
        assert folder.exists()
    assert content(tmp_path / "out") == {"one": "first"}


def test_of_two_runs_to_the_same_place_the_second_to_end_is_refused(tmp_path):
    def overtaken() -> None:
        with atomic.draft(tmp_path / "out", overwrite=False, is_ours=ours) as folder:
            (folder / "one").write_text("late")
            write(tmp_path / "out", "early", overwrite=False)

    with pytest.raises(OutputExists, match="appeared"):
        overtaken()
    assert content(tmp_path / "out") == {"one": "early", "two": "early"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_run_that_ends_early_removes_its_draft_and_touches_nothing(end, old):
    def stop(folder: Path) -> None:
        (folder / "one").write_text("new")
        raise end

    with pytest.raises(end), atomic.draft(old, overwrite=True, is_ours=ours) as folder:
        stop(folder)
    assert content(old) == {"one": "old", "two": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_run_that_is_asked_to_terminate_removes_its_draft(old):
    program = (
        "import os, pathlib, signal, sys; from edgefuse import atomic, cli; signal.signal(signal.SIGTERM, cli._terminate)\n"
        "with atomic.draft(pathlib.Path(sys.argv[1]), overwrite=True, is_ours=lambda _: True) as folder:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    )
    assert subprocess.run([sys.executable, "-c", program, str(old)], check=False).returncode == 143
    assert content(old) == {"one": "old", "two": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_what_edgefuse_has_not_written_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for output in (tmp_path / "home", tmp_path / "link", tmp_path / "home" / "thesis.tex"):
        with pytest.raises(OutputExists), store.new_bundle(output, overwrite=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


@contextmanager
def files_of_at_most(size: int):
    """No file may grow beyond this: what a full disk feels like to one who writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_during_an_export_leaves_the_old_bundle(whole_checkpoint, bundle_folder, order):
    before = store.digest_of(bundle_folder)
    with files_of_at_most(20_000), pytest.raises(NoSpace, match=r"no space left for .*bundle"):
        pipeline.export(whole_checkpoint, bundle_folder, order, overwrite=True)
    assert store.digest_of(bundle_folder) == before
    assert store.read_bundle(bundle_folder).passed
    assert not list(bundle_folder.parent.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_recognised_however_deep_an_exporter_buries_it(number, tmp_path):
    def exporter() -> None:
        full = OSError(number, os.strerror(number), "weights.bin")
        raise RuntimeError("serialization failed") from full

    with pytest.raises(NoSpace) as caught, atomic.draft(tmp_path / "out", overwrite=False, is_ours=ours):
        exporter()
    assert caught.value.exit_code == 32
    assert not list(tmp_path.iterdir())


@contextmanager
def without_privileges():
    """As an ordinary user: the superuser may write everywhere, and would see no refusal."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        with without_privileges(), pytest.raises(NotWritable) as caught:
            write(locked / "out", "new")
    finally:
        locked.chmod(0o755)
    assert caught.value.exit_code == 31
    assert not list(locked.iterdir())


def test_a_permission_that_is_missing_elsewhere_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError), atomic.draft(tmp_path / "out", overwrite=False, is_ours=ours):
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")


def test_ctrl_c_in_the_middle_of_an_export_leaves_the_old_bundle(whole_checkpoint, bundle_folder, speech, monkeypatch, capsys):
    from edgefuse_targets import reference

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = store.digest_of(bundle_folder)
    monkeypatch.setattr(reference, "structure", interrupt)
    command = ["export", str(whole_checkpoint), "-t", "reference", "--seconds", "2", "--speech", str(speech)]
    assert cli.run([*command, "-o", str(bundle_folder), "--overwrite"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert store.digest_of(bundle_folder) == before
    assert not list(bundle_folder.parent.glob(".*"))


def test_two_exports_give_the_same_bytes(whole_checkpoint, whole_bundle, order, tmp_path):
    pipeline.export(whole_checkpoint, tmp_path / "again", order)
    first = {p.relative_to(whole_bundle): p.read_bytes() for p in whole_bundle.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_a_bundle_reads_back_as_it_was_written(whole_bundle, order):
    bundle = store.read_bundle(whole_bundle)
    assert bundle.passed
    assert bundle.exports[0].verdict.parent == store.digest_of(whole_bundle / "model.safetensors")
    assert bundle.exports[0].artifact.parent == bundle.folded
    assert bundle.references[OFFLINE].errors.utterances == 2
    assert {golden.identity for golden in bundle.references[OFFLINE].goldens} >= {"full_offline_2000ms"}
    assert bundle.precision == order.precision
    assert {"edgefuse", "python", "torch"} <= set(bundle.tools)


def test_the_description_says_what_an_application_needs(whole_bundle):
    fields = json.loads((whole_bundle / "edgefuse.json").read_text(encoding="utf-8"))
    (artifact,) = fields["artifacts"]
    entry = artifact["entries"]["offline_2000ms"]
    assert [(spec["name"], spec["shape"], spec["dtype"]) for spec in entry["inputs"]] == [
        ("features", [1, 200, 80], "float32"),
        ("length", [1], "float32"),
    ]
    assert [(spec["name"], spec["shape"]) for spec in entry["outputs"]] == [("logits", [1, 50, 29])]
    assert all(spec["meaning"] for spec in (*entry["inputs"], *entry["outputs"]))
    assert fields["frontend"]["sample_rate_hz"] == 16_000
    assert len(fields["frontend"]["mean"]) == len(fields["frontend"]["istd"]) == 80
    assert set(fields["lineage"]) == {"checkpoint", "folded", "artifacts"}
    assert set(fields["files"]) == {
        path.relative_to(whole_bundle).as_posix() for path in whole_bundle.rglob("*") if path.is_file()
    } - {"edgefuse.json"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_a_bundle_can_change_unnoticed(whole_bundle, position, bit):
    files = sorted(path for path in whole_bundle.rglob("*") if path.is_file())
    offset = int(position * sum(path.stat().st_size for path in files))
    for path in files:
        if offset < path.stat().st_size:
            break
        offset -= path.stat().st_size
    before = path.read_bytes()
    changed = bytearray(before)
    changed[offset] ^= 1 << bit
    try:
        path.write_bytes(changed)
        with pytest.raises(ChangedBundle):
            store.read_bundle(whole_bundle)
    finally:
        path.write_bytes(before)
    assert path.read_bytes() == before


def test_a_bundle_that_does_not_pass_is_kept_beside_its_place_and_never_in_it(
    whole_checkpoint, bundle_folder, order, monkeypatch
):
    from edgefuse.values import Structure
    from edgefuse_targets import reference

    before = store.digest_of(bundle_folder)
    monkeypatch.setattr(reference, "structure", lambda _: Structure({"layer_norm": {"fp32": 1}}, ("a layer_norm",)))
    with pytest.raises(GateFailed, match="normalizations is 1, required 0") as caught:
        pipeline.export(whole_checkpoint, bundle_folder, order, overwrite=True)
    failed = bundle_folder.with_name("bundle.failed")
    assert caught.value.hint == f"See every check with: edgefuse verify {failed}"
    assert store.digest_of(bundle_folder) == before
    assert not store.read_bundle(failed).passed
    assert sorted(path.name for path in bundle_folder.parent.iterdir()) == ["bundle", "bundle.failed"]


def test_a_folded_model_on_disk_keeps_its_plan_and_the_digest_of_its_parent(whole_checkpoint, order, tmp_path):
    from edgefuse import checkpoint
    from edgefuse.inspection import inspect
    from edgefuse.refold import refold

    folded, exact = refold(whole_checkpoint, tmp_path / "folded")
    assert exact.end_to_end < 1e-10
    assert inspect(tmp_path / "folded").plan == folded.plan == inspect(whole_checkpoint).plan
    direct = pipeline.export(whole_checkpoint, tmp_path / "direct", order).bundle
    resumed = pipeline.export(tmp_path / "folded", tmp_path / "resumed", order).bundle
    assert resumed.checkpoint == direct.checkpoint == checkpoint.read(whole_checkpoint).digest
    assert resumed.exports[0].digest == direct.exports[0].digest

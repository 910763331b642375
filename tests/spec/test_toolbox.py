"""The steps of a set-up: whole or not at all, never twice, and every failure in words. Nothing is fetched or built here."""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgefuse.errors import DeviceMissing, EdgefuseError, NoSpace, NotWritable, SetupFailed
from edgefuse_devices import toolbox
from edgefuse_devices.process import Ended

WELL = Ended(b"", b"", 0, "", "itself", 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def tell(told: list[str]) -> Callable[[str], object]:
    @contextmanager
    def progress(sentence: str) -> Iterator[None]:
        told.append(sentence)
        yield

    return progress


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetching and building that always succeed; what was done."""
    done: list[str] = []

    def fetching(target: str, runtime: toolbox.Runtime) -> toolbox.Step:
        def make(draft: Path) -> None:
            done.append(f"fetch {target}")
            (draft / "a.whl").write_text(target)

        return toolbox.Step(f"{target}-wheel", f"Fetching {runtime.name}", runtime.sha256, make)

    def building(target: str, runtime: toolbox.Runtime) -> toolbox.Step:
        def make(draft: Path) -> None:
            done.append(f"build {target}")
            (draft / "lib").mkdir()
            for name in (toolbox.RUNNER, toolbox.LOADER):
                (draft / name).write_text(f"{name} of {target}")

        return toolbox.Step(target, f"Building {runtime.name}", toolbox._of_runner(target), make)

    monkeypatch.setattr(toolbox, "_fetching", fetching)
    monkeypatch.setattr(toolbox, "_building", building)
    monkeypatch.setattr(toolbox, "_program", lambda _: Path("/there"))
    return done


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolbox.shutil, "which", lambda _: None)


def fails(monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """Every tool that is started ends like that."""
    monkeypatch.setattr(toolbox, "run", lambda *_, **__: ended)


def test_before_a_set_up_the_command_that_mends_it_is_said(works: list[str]) -> None:
    assert [lack.what for lack in toolbox.missing()] == [f"the arm64 runner of {each.name}" for each in toolbox.RUNTIMES.values()]
    assert {lack.mend for lack in toolbox.missing(counting=True)} == {"edgefuse devices setup arm64"}
    for asked in (lambda: toolbox.payload("executorch"), toolbox.plugin):
        with pytest.raises(DeviceMissing, match="have not been set up"):
            asked()
    assert works == []


@pytest.mark.usefixtures("no_tools")
def test_without_a_package_manager_the_tool_is_named() -> None:
    told = "; ".join(f"{lack.what}: {lack.mend}" for lack in toolbox.missing(counting=True))
    assert "install aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu); edgefuse devices setup arm64" in told
    assert "install qemu-aarch64 (Debian: qemu-user); edgefuse devices setup arm64" in told


def test_a_set_up_tells_what_it_does_and_leaves_nothing_missing(works: list[str], tell: toolbox.Tell, told: list[str]) -> None:
    toolbox.setup(tell)
    assert works == ["fetch executorch", "build executorch", "fetch tflite", "build tflite"]
    assert told[0] == "Fetching ExecuTorch 1.5.1"
    assert len(told) == 4
    assert toolbox.missing() == []


def test_what_stands_is_not_done_again(works: list[str], tell: toolbox.Tell) -> None:
    toolbox.setup(tell)
    works.clear()
    toolbox.setup(tell)
    assert works == []


@pytest.mark.usefixtures("works")
def test_the_payload_is_everything_that_must_lie_on_a_bare_device(tell: toolbox.Tell, cache: Path) -> None:
    toolbox.setup(tell)
    assert toolbox.payload("tflite") == {name: cache / "arm64" / "tflite" / name for name in (toolbox.LOADER, toolbox.RUNNER)}
    argv = toolbox.command("plan", at="/data/local/tmp/x")
    assert argv[0] == f"/data/local/tmp/x/{toolbox.LOADER}"
    assert argv[-2:] == (f"/data/local/tmp/x/{toolbox.RUNNER}", "plan")


def test_a_set_up_that_failed_goes_on_where_it_was(works: list[str], tell: toolbox.Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    building = toolbox._building

    def stops(target: str, runtime: toolbox.Runtime) -> toolbox.Step:
        def make(draft: Path) -> None:
            (draft / "half").write_text("half a runner")
            raise KeyboardInterrupt

        step = building(target, runtime)
        return toolbox.Step(step.name, step.sentence, step.of, make) if target == "tflite" else step

    monkeypatch.setattr(toolbox, "_building", stops)
    with pytest.raises(KeyboardInterrupt):
        toolbox.setup(tell)
    assert not (toolbox.home() / "tflite").exists()
    assert [lack.what for lack in toolbox.missing()] == ["the arm64 runner of LiteRT 2.3.0"]
    monkeypatch.setattr(toolbox, "_building", building)
    works.clear()
    toolbox.setup(tell)
    assert works == ["build tflite"]
    assert not list(toolbox.home().glob(".*"))


def test_a_runner_whose_source_has_changed_is_built_anew_and_fetched_once(
    works: list[str], tell: toolbox.Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolbox.setup(tell)
    works.clear()
    before = toolbox._of_runner
    monkeypatch.setattr(toolbox, "_of_runner", lambda target: before(target) + "changed" * (target == "tflite"))
    assert [lack.what for lack in toolbox.missing()] == ["the arm64 runner of LiteRT 2.3.0"]
    with pytest.raises(DeviceMissing, match="edgefuse has changed since"):
        toolbox.payload("tflite")
    toolbox.setup(tell)
    assert works == ["build tflite"]


@pytest.mark.parametrize("accident", [lambda path: path.write_text("!"), lambda path: path.unlink()], ids=["changed", "gone"])
def test_a_file_that_is_not_what_it_was_is_not_used_and_made_again(
    accident: Callable[[Path], object], works: list[str], tell: toolbox.Tell
) -> None:
    toolbox.setup(tell)
    works.clear()
    accident(toolbox.home() / "executorch" / toolbox.RUNNER)
    with pytest.raises(DeviceMissing, match="executorch/runner has changed since it was set up"):
        toolbox.payload("executorch")
    toolbox.setup(tell)
    assert works == ["build executorch"]
    assert toolbox.payload("executorch")


@pytest.mark.usefixtures("works")
def test_a_stamp_that_is_garbage_is_none(tell: toolbox.Tell) -> None:
    toolbox.setup(tell)
    for content in ("", "[]", '{"of": 1}', "null"):
        (toolbox.home() / "executorch" / toolbox.STAMP).write_text(content)
        assert [lack.what for lack in toolbox.missing()] == ["the arm64 runner of ExecuTorch 1.5.1"]


@pytest.mark.usefixtures("works")
def test_payloads_that_differ_have_other_digests(tell: toolbox.Tell) -> None:
    toolbox.setup(tell)
    assert toolbox.digest("executorch") != toolbox.digest("tflite")


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EROFS, NotWritable)],
    ids=["full", "quota", "read-only"],
)
def test_a_disk_that_takes_nothing_is_a_sentence(
    number: int, kind: type[EdgefuseError], tell: toolbox.Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(draft: Path) -> None:
        raise OSError(number, "it does not fit", str(draft / "a.whl"))

    monkeypatch.setattr(toolbox, "_fetching", lambda target, _: toolbox.Step(target, "Fetching", "of", make))
    with pytest.raises(kind) as failure:
        toolbox.setup(tell)
    assert "EDGEFUSE_CACHE" in (failure.value.hint or "")


def test_a_cache_that_cannot_be_a_folder_is_a_sentence(cache: Path, tell: toolbox.Tell) -> None:
    cache.write_text("a file")
    with pytest.raises(NotWritable, match="may not be written"):
        toolbox.setup(tell)


@pytest.mark.parametrize(
    ("ended", "sentence"),
    [
        (
            Ended(b"", b"WARNING: slow\nERROR: No matching distribution found\n", 1, "", "itself", 1),
            "could not be fetched: ERROR: No matching distribution found",
        ),
        (Ended(b"", f"{sys.executable}: No module named pip\n".encode(), 1, "", "itself", 1), "No module named pip"),
        (Ended(b"", b"", None, "SIGKILL", "time", 1200), "The tool took longer than 1200 s and was ended"),
        (WELL, "could not be fetched"),
    ],
    ids=["not there", "no pip", "no answer", "nothing came"],
)
def test_a_package_that_cannot_be_fetched_is_a_sentence_and_leaves_nothing(
    ended: Ended, sentence: str, tell: toolbox.Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolbox, "_program", lambda _: Path("/there"))
    fails(monkeypatch, ended)
    with pytest.raises(SetupFailed) as failure:
        toolbox.setup(tell)
    assert failure.value.sentence.startswith("ExecuTorch 1.5.1 for arm64 could not be fetched")
    assert sentence in failure.value.sentence
    assert "edgefuse devices setup arm64" in (failure.value.hint or "")
    assert [path.name for path in toolbox.home().iterdir()] == ["lock"]


@pytest.mark.usefixtures("works")
def test_a_compiler_that_complains_is_a_sentence(tell: toolbox.Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = b"In file included from plan.h\nplan.h:1:2: error: expected ';'\n2 errors\n"
    fails(monkeypatch, Ended(b"", complaint, 1, "", "itself", 1))
    with pytest.raises(SetupFailed, match=r"The counting plugin could not be built: plan\.h:1:2: error: expected ';'"):
        toolbox.setup_counting(tell)


@pytest.mark.usefixtures("no_tools")
def test_without_a_compiler_and_a_way_to_fetch_one_it_is_named(tell: toolbox.Tell) -> None:
    with pytest.raises(SetupFailed) as failure:
        toolbox.setup(tell)
    assert failure.value.sentence == "There is no C++ compiler for arm64 here, and no apt-get to fetch one."


def test_an_emulator_without_plugins_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, option in (("static", "-strace"), ("dynamic", "-plugin")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {option}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(toolbox.shutil, "which", lambda _: str(tmp_path / "static"))
    assert toolbox._program(toolbox.EMULATOR) is None
    monkeypatch.setattr(toolbox.shutil, "which", lambda _: str(tmp_path / "dynamic"))
    assert toolbox._program(toolbox.EMULATOR) == tmp_path / "dynamic"


def test_sources_are_there_whether_installed_or_not() -> None:
    for name in ("plan.h", "count.c", *(runtime.source for runtime in toolbox.RUNTIMES.values())):
        assert toolbox._source(name).is_file()


def test_an_emulator_that_cannot_even_be_started_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "broken").chmod(0o755)
    assert not toolbox._takes_plugins(str(tmp_path / "broken"))

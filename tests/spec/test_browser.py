"""What the browser says and serves without a browser: what is missing, what it refuses, what a page may read, and its set-up."""

import dataclasses
import http.client
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from edgefuse.errors import SetupFailed, UnknownDevice, UsageError
from edgefuse.measurement import QUICK, Call, Job, Routine, Want
from edgefuse.values import Artifact, TensorSpec
from edgefuse_devices import browser, browser_worker
from edgefuse_devices.plan import write_plan

SPECS = TensorSpec("features", (1, 2, 3), "float32", "a test"), TensorSpec("logits", (1, 2, 4), "float32", "a test")
ROOT = Path(__file__).parents[2]


def a_job(path: Path = Path("model.tflite"), target: str = "tflite", want: Want = "latency", routine: Routine = QUICK) -> Job:
    artifact = Artifact(target, path, "fp32", {"offline": SPECS[:1]}, {"offline": SPECS[1:]}, "0" * 64)
    feed = (Call({"features": np.ones((1, 2, 3), np.float32)}, begins=True, utterance="one", frames=2),)
    return Job(artifact, "offline", feed, routine, want)


def a_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of the PATH that is ours, first; no set-up yet."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEFUSE_CHROMIUM", raising=False)
    return folder


def set_up(tools: Path) -> None:
    a_tool(tools, "npm", "exec /bin/mkdir -p node_modules/@litertjs/core")
    browser.setup(lambda _: nullcontext())


@pytest.mark.usefixtures("tools")
def test_everything_that_is_missing_is_named_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert [(lack.what, lack.mend) for lack in browser.missing()] == [
        (f"the package {browser.PLAYWRIGHT}", "python -m pip install 'edgefuse[browser]'"),
        ("Chromium", "apt-get install chromium"),
        (f"LiteRT.js {browser.VERSION}", "edgefuse devices setup browser"),
    ]
    assert browser.found() == []


def test_a_browser_that_is_named_and_not_there_is_not_replaced_by_another(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_tool(tools, "chromium", "echo Chromium 1.2.3.4")
    monkeypatch.setenv("EDGEFUSE_CHROMIUM", "/no/such/browser")
    assert any("EDGEFUSE_CHROMIUM" in lack.what and "/no/such/browser" in lack.what for lack in browser.missing())


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("Chromium 156.0.8078.108 built on Debian GNU/Linux 12 (bookworm)", "Chromium 156.0.8078.108"),
        ("Google Chrome 140.0.1.2 ", "Google Chrome 140.0.1.2"),
        ("", "not told"),
    ],
)
def test_the_browser_is_found_twice_by_the_name_that_it_gives_itself(
    tools: Path, monkeypatch: pytest.MonkeyPatch, says: str, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    a_tool(tools, "google-chrome", f"echo '{says}'")
    set_up(tools)
    devices = browser.found()
    assert [(device.spec, device.name) for device in devices] == [
        ("browser", f"{name}, one thread"),
        ("browser:threads", f"{name}, several threads"),
    ]
    assert {device.clock for device in devices} == {"device"}


def test_a_set_up_fetches_once(tools: Path) -> None:
    set_up(tools)
    a_tool(tools, "npm", "exit 1")
    browser.setup(lambda _: nullcontext())
    assert [path.name for path in (tools.parent / "cache" / "browser").iterdir()] == [f"litertjs-{browser.VERSION}"]


@pytest.mark.parametrize(
    ("npm", "sentence"),
    [
        (None, "npm, which is not there"),
        (
            "echo 'npm error code EINTEGRITY' >&2; echo 'npm error sha512-x integrity checksum failed' >&2; exit 1",
            "checksum failed",
        ),
        ("printf 'npm error code X\nnpm error syscall connect\nnpm error request failed.\n' >&2; exit 1", ": request failed"),
        ("exit 7", "npm ended with 7"),
        ("kill -9 $$", "npm ended with SIGKILL"),
    ],
)
def test_a_set_up_that_fails_says_why_and_leaves_nothing(tools: Path, npm: str | None, sentence: str) -> None:
    if npm:
        a_tool(tools, "npm", npm)
    with pytest.raises(SetupFailed, match=sentence) as caught:
        browser.setup(lambda _: nullcontext())
    assert caught.value.hint
    assert not list((tools.parent / "cache").rglob("*litertjs*"))
    assert browser.missing()


def test_a_cache_that_cannot_be_written_fails_in_words(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_tool(tools, "npm", "exit 0")
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tools / "npm" / "below a file"))
    with pytest.raises(SetupFailed, match="could not be written: Not a directory"):
        browser.setup(lambda _: nullcontext())


def test_the_lock_names_what_is_fetched_by_its_digest_and_from_nowhere() -> None:
    lock = json.loads((ROOT / "targets/native/browser/package-lock.json").read_text())
    fetched = {name: package for name, package in lock["packages"].items() if name}
    assert fetched["node_modules/@litertjs/core"]["version"] == browser.VERSION
    assert all(package["integrity"].startswith("sha512-") for package in fetched.values())
    assert not any("resolved" in package for package in fetched.values())


def test_there_are_two_browsers() -> None:
    with pytest.raises(UnknownDevice) as caught, browser.connect("webgpu"):
        pass
    assert "browser:threads" in str(caught.value.hint)


def test_a_browser_refuses_what_is_not_for_litert() -> None:
    with browser.connect("") as connection:
        assert connection.refusal(a_job().artifact) is None
        assert "executorch" in str(connection.refusal(a_job(target="executorch").artifact))


@pytest.mark.parametrize(
    ("which", "job", "sentence"),
    [
        ("", a_job(want="profile"), "no profile"),
        ("", a_job(routine=dataclasses.replace(QUICK, cores=(0,))), "not bound to cores"),
        ("", a_job(routine=dataclasses.replace(QUICK, threads=2)), "one thread"),
        ("threads", a_job(routine=dataclasses.replace(QUICK, threads=10_000)), "at most"),
    ],
)
def test_a_browser_says_what_it_cannot_do(which: str, job: Job, sentence: str) -> None:
    with browser.connect(which) as connection, pytest.raises(UsageError, match=sentence) as caught:
        connection.run(job)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Page.evaluate: Error: no signature x\n    at compiled", "the page stopped: Error: no signature x"),
        ("Page.evaluate: Target crashed \nCall log:\n", "the page's process died"),
        ("Page.evaluate: Target page, context or browser has been closed\n[pid=1][err] ERROR:dbus", "it died"),
        ("BrowserType.launch: Target page, context or browser has been closed\n[1:FATAL:zygote.cc] No usable sandbox!",
         "it died: zygote.cc] No usable sandbox!"),
        ("BrowserType.launch: it has been closed\nChromium sandboxing failed!",
         "its sandbox could not be set up: let users have namespaces, as it asks for"),
        ("", "the page stopped: it did not say why"),
    ],
)  # fmt: skip
def test_a_failing_browser_is_one_sentence(message: str, sentence: str) -> None:
    assert browser_worker.in_words(message) == sentence


def test_memory_is_read_of_a_process_and_is_nothing_when_it_is_gone() -> None:
    now, most = (browser_worker.resident(os.getpid(), field) for field in ("VmRSS", "VmHWM"))
    assert 0 < now <= most
    assert browser_worker.resident(2**22 + 1, "VmRSS") == 0


class Page:
    """What a page may do."""

    def __init__(self, address: str, folder: Path) -> None:
        self.folder = folder
        self.host, _, self.path = address.removeprefix("http://").partition("/")

    def ask(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, timeout=10)
        connection.request(method, path if path.startswith("//") else f"/{self.path}{path}", body)
        answer = connection.getresponse()
        told = answer.status, answer.read(), dict(answer.getheaders())
        connection.close()
        return told


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    folder = tmp_path / "job"
    folder.mkdir()
    write_plan(folder, a_job(), model="model.tflite")
    (folder / "model.tflite").write_bytes(b"a model")
    (folder / "secret").write_text("not for pages")
    module = tmp_path / "packages" / "node_modules" / "@litertjs" / "core" / "wasm" / "some.wasm"
    module.parent.mkdir(parents=True)
    module.write_bytes(b"\0asm")
    files = browser_worker.serves(folder, ROOT / "targets/native/browser", tmp_path / "packages")
    with browser_worker.serving(files, folder / "answers.bin") as address:
        yield Page(address, folder)


@pytest.mark.parametrize("path", ["", "runner.js", "job/plan.txt", "job/feed.bin", "job/model.tflite"])
def test_a_page_reads_its_job_isolated(page: Page, path: str) -> None:
    status, body, headers = page.ask(path)
    assert (status, bool(body)) == (200, True)
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_a_page_reads_the_runtime_as_what_it_is(page: Page) -> None:
    status, body, headers = page.ask("npm/@litertjs/core/wasm/some.wasm")
    assert (status, body, headers["Content-Type"]) == (200, b"\0asm", "application/wasm")


@pytest.mark.parametrize("path", ["job/secret", "job/../job/plan.txt", "npm/../../job/secret", "//etc/passwd", "//job/plan.txt"])
def test_a_page_reads_nothing_else(page: Page, path: str) -> None:
    assert page.ask(path)[:2] == (404, b"")


def test_a_page_leaves_its_answers_and_nothing_else(page: Page) -> None:
    assert page.ask("job/answers.bin", "POST", b"answers")[0] == 200
    assert (page.folder / "answers.bin").read_bytes() == b"answers"
    assert page.ask("job/plan.txt", "POST", b"another plan")[0] == 404
    assert page.ask("job/plan.txt")[1] != b"another plan"


@pytest.mark.skipif(shutil.which("node") is None, reason="it needs node: apt-get install nodejs")
def test_the_page_is_javascript(tmp_path: Path) -> None:
    from edgefuse_devices import process

    shutil.copyfile(ROOT / "targets/native/browser/runner.js", tmp_path / "runner.mjs")
    assert process.run(["node", "--check", tmp_path / "runner.mjs"], limit_s=20).well

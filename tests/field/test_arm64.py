"""Emulated arm64 CPUs: right answers, exact counts, bad endings in words; and the parts of the native runners and the plugin."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgefuse.bundle import Bundle
from edgefuse.device import Connection, connect
from edgefuse.errors import DeviceMissing, RunFailed, SetupFailed, UnknownDevice, UsageError
from edgefuse.measurement import Instructions, Job, Run
from edgefuse_devices import arm64, toolbox
from edgefuse_devices.plan import ANSWERS, FEED, PLAN
from edgefuse_devices.process import Ended, run
from tests.field.boards import LEAST_DB, TARGETS, TINY, bundle_of, job_of, meanwhile, snr_db

pytestmark = pytest.mark.field

CALLS = 2
NATIVE = Path(toolbox._source("plan.h")).parent
CROSS = "aarch64-linux-gnu-gcc"


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """The emulator, the runners and the plugin; the last ones are set up here."""
    try:
        arm64.setup(lambda _: nullcontext())
    except SetupFailed as failure:
        pytest.skip(f"{failure.sentence} {failure.hint}")
    if lacking := arm64.missing():
        pytest.skip("; ".join(f"{lack.what} is missing: {lack.mend}" for lack in lacking))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    return lambda precision: bundle_of(precision, tmp_path_factory)


@pytest.fixture(scope="module")
def a76() -> Iterator[Connection]:
    with connect("arm64") as connection:
        yield connection


@pytest.fixture
def small(a76: Connection, bundle: Callable[[str], Bundle]) -> tuple[Connection, Job]:
    """What is quick to run."""
    return a76, job_of(bundle("int8"), "executorch", calls=1)


# ---- answers and counts


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cpu", arm64.CPUS)
def test_an_emulated_cpu_answers_right_and_is_counted(
    cpu: str, target: str, precision: str, bundle: Callable[[str], Bundle]
) -> None:
    job = job_of(bundle(precision), target, calls=CALLS)
    with connect(f"arm64:{cpu}") as connection:
        assert connection.refusal(job.artifact) is None
        told = connection.run(job)
    assert snr_db(bundle(precision), job, told) >= LEAST_DB[precision]
    assert isinstance(told.samples, Instructions)
    assert len(told.samples.values) == CALLS
    assert all(10**6 < each < 10**9 for each in (*told.samples.values, told.first, told.cold_load, told.warm_load))
    assert (told.unsteady, told.peak_bytes, told.before_bytes) == (0, None, None)
    assert told.told["runtime"] == toolbox.RUNTIMES[target].name
    assert told.classes["load_store"] + told.classes["simd_fp"] < sum(told.samples.values)
    busiest = {"fp32": "fma", "int8": {"cortex-a76": "dot", "i8mm": "mmla"}.get(cpu, "integer_mac")}[precision]
    assert told.classes[busiest] == max(told.classes[each] for each in ("fma", "integer_mac", "dot", "mmla"))


@pytest.mark.parametrize("target", TARGETS)
def test_counts_are_the_same_to_the_digit_whoever_counts_and_wherever(
    target: str, bundle: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> Run:
        with connect("arm64:cortex-a76") as connection:
            return connection.run(job_of(bundle("int8"), target, calls=1))

    told = [counted() for _ in range(2)]
    elsewhere = tmp_path / "a place with spaces, and a name that is longer than others"
    elsewhere.mkdir()
    monkeypatch.setenv("EDGEFUSE_CACHE", str(toolbox.cache().resolve()))
    for name, value in {"HOME": str(elsewhere), "LC_ALL": "C", "LD_BIND_NOW": "1", "PADDING": "x" * 5000}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    told.append(counted())
    for each in told[1:]:
        for what in ("samples", "classes", "first", "cold_load", "warm_load"):
            assert getattr(each, what) == getattr(told[0], what)
        assert all((one == other).all() for one, other in zip(each.answers, told[0].answers, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_the_host_is_seen(target: str, a76: Connection, bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    emulator, *rest = a76._prepared(tmp_path, job_of(bundle("int8"), target, calls=1))
    ended = run([emulator, "-strace", *rest], limit_s=120, cwd=tmp_path, env={})
    assert ended.well, ended.stderr[-300:]
    seen = {name for name in re.findall(r'"(/[^"]*)"', ended.stderr) if Path(name).exists()}
    hosts = {name for name in seen if not (tmp_path / arm64.CPU / name[1:]).exists()}
    assert hosts == {"/proc/self/status"}  # a runner's own memory, which is not told


def test_an_emulated_cpu_says_what_it_is(a76: Connection) -> None:
    assert (a76.info.spec, a76.info.clock) == ("arm64:cortex-a76", "instructions")
    assert re.fullmatch(r"qemu-user \d+\.\d+\.\d+.*", a76.info.facts["emulated by"])
    assert "asimddp" in a76.info.facts["features"]
    assert "ExecuTorch 1.5.1" in a76.info.facts["runtimes"]
    found = arm64.found()
    assert (found[0].spec, len(found)) == (a76.info.spec, len(arm64.CPUS))


# ---- bad endings


HALF = '__asm__(".arch armv8.2-a+fp16\\n fadd h0, h0, h0"); return 0;'


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a72"])
@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("fp16", "model.pte needs fp16 arithmetic, which {} has not."),
        ("int8", "model.pte needs an instruction that {} has not (SIGILL)."),
    ],
)
def test_an_illegal_instruction_is_a_sentence(
    precision: str, sentence: str, cpu: str, bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """By a runner that adds in fp16: XNNPACK itself takes other kernels on these CPUs, as far as was seen."""
    job = job_of(bundle("int8"), "executorch", calls=1)
    job = dataclasses.replace(job, artifact=dataclasses.replace(job.artifact, precision=precision))
    with (
        connect(f"arm64:{cpu}") as connection,
        another_runner(HALF, connection, "executorch", tmp_path),
        pytest.raises(RunFailed) as failure,
    ):
        connection.run(job)
    assert failure.value.sentence == sentence.format(cpu)


def emulators() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith(toolbox.EMULATOR.program[:12])]


def test_a_runner_that_is_killed_is_a_sentence(a76: Connection, bundle: Callable[[str], Bundle]) -> None:
    job = job_of(bundle("fp32"), "executorch", calls=CALLS)
    with (
        meanwhile(lambda: emulators()[0].send_signal(signal.SIGKILL), lambda: bool(emulators())),
        pytest.raises(RunFailed, match=r"The runner was killed by SIGKILL\."),
    ):
        a76.run(job)


def test_a_runner_that_hangs_is_ended_and_said_so(a76: Connection, bundle: Callable[[str], Bundle]) -> None:
    job = job_of(bundle("fp32"), "executorch", calls=CALLS)
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"The runner took longer than 1 s and was ended\."):
        a76.run(dataclasses.replace(job, routine=dataclasses.replace(TINY, limit_s=1)))
    assert time.monotonic() - start < 10
    assert not emulators()


def test_the_next_job_does_better(small: tuple[Connection, Job], tmp_path: Path) -> None:
    connection, job = small
    with pytest.raises(RunFailed):
        connection.run(damaged(job, tmp_path))
    assert connection.run(job).samples.values


def damaged(job: Job, folder: Path) -> Job:
    """The same, of an artifact that is cut off."""
    path = folder / job.artifact.path.name
    path.write_bytes(job.artifact.path.read_bytes()[:1000])
    return dataclasses.replace(job, artifact=dataclasses.replace(job.artifact, path=path))


@pytest.mark.parametrize("target", TARGETS)
def test_an_artifact_that_cannot_be_loaded_is_a_sentence(
    target: str, a76: Connection, bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    # LiteRT does not check what it reads
    sentences = {
        "executorch": "The runner ended with 3: ExecuTorch cannot load",
        "tflite": "The runner (ended with 3|was killed by)",
    }
    with pytest.raises(RunFailed, match=sentences[target]):
        a76.run(damaged(job_of(bundle("int8"), target, calls=CALLS), tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_an_entry_that_the_artifact_lacks_is_a_sentence(target: str, a76: Connection, bundle: Callable[[str], Bundle]) -> None:
    job = job_of(bundle("int8"), target, calls=CALLS)
    artifact, entry = job.artifact, "stream_320ms"
    other = dataclasses.replace(
        artifact,
        inputs={entry: artifact.inputs[job.entry]},
        outputs={entry: artifact.outputs[job.entry]},
        streaming={entry: artifact.streaming[job.entry]},
    )
    with pytest.raises(RunFailed, match=r"The runner ended with 3: .*stream_320ms"):
        a76.run(dataclasses.replace(job, artifact=other, entry=entry))


@contextmanager
def another_runner(program: str, connection: Connection, target: str, folder: Path) -> Iterator[None]:
    """In the place of a runner a C program."""
    link = connection.folder / arm64.CPU / target
    (folder / "lib").symlink_to(toolbox.home() / target / "lib")
    (folder / "runner.c").write_text(f"#include <stdio.h>\n#include <stdlib.h>\nint main(void) {{ {program} }}")
    subprocess.run([CROSS, folder / "runner.c", "-o", folder / "runner"], check=True)
    link.unlink()
    link.symlink_to(folder)
    try:
        yield
    finally:
        link.unlink()
        link.symlink_to(toolbox.home() / target)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ('puts("Hello"); return 0;', r"did not say what a runner says, but: Hello\."),
        ("return 0;", "did not say what a runner says; it said nothing"),
        ('fputs("no memory\\n", stderr); return 7;', "The runner ended with 7: no memory"),
        ("abort();", r"The runner was killed by SIGABRT\."),
        ("return *(volatile int *)8;", r"The runner was killed by SIGSEGV\."),
    ],
    ids=["garbage", "silence", "an exit code", "an abort", "a wild pointer"],
)
def test_a_runner_that_misbehaves_is_a_sentence(
    program: str, sentence: str, a76: Connection, bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    job = job_of(bundle("int8"), "executorch", calls=1)
    with another_runner(program, a76, "executorch", tmp_path), pytest.raises(RunFailed, match=sentence):
        a76.run(job)


def test_a_runner_that_was_tampered_with_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("executorch", "tflite", "count"):
        shutil.copytree(toolbox.home() / name, tmp_path / name)
    monkeypatch.setattr(toolbox, "home", lambda: tmp_path)
    with (tmp_path / "tflite" / "runner").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DeviceMissing, match="tflite/runner has changed since it was set up"), arm64.connect(""):
        pass


# ---- what has no meaning here


def test_a_cpu_that_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownDevice, match="There is no emulated CPU 'cortex-a99'"), connect("arm64:cortex-a99"):
        pass


def test_an_artifact_for_another_runtime_is_refused_in_words(small: tuple[Connection, Job]) -> None:
    connection, job = small
    refusal = connection.refusal(dataclasses.replace(job.artifact, target="coreml"))
    assert refusal == "Core ML artifacts run on Apple devices only; arm64 runs executorch and tflite"


@pytest.mark.parametrize(
    ("want", "changes", "sentence"),
    [
        ("memory", {}, "no memory of its own"),
        ("profile", {}, "counts instructions"),
        ("latency", {"threads": 2}, "counts one thread, not 2"),
        ("latency", {"paced": True}, "no pace changes"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_words(
    want: str, changes: dict[str, object], sentence: str, small: tuple[Connection, Job]
) -> None:
    connection, job = small
    with pytest.raises(UsageError, match=sentence):
        connection.run(dataclasses.replace(job, want=want, routine=dataclasses.replace(job.routine, **changes)))


# ---- the plugin

COUNTED = {
    "fma": ("fmla v0.4s, v1.4s, v2.4s", "fmls v0.2d, v1.2d, v2.d[1]", "fmla s0, s1, v2.s[1]", "fnmsub d0, d1, d2, d3"),
    "integer_mac": (
        "mla v0.8h, v1.8h, v2.8h",
        "mls v0.8h, v1.8h, v2.h[1]",
        "smlal v0.8h, v1.8b, v2.8b",
        "umlal2 v0.2d, v1.4s, v2.s[3]",
    ),
    "dot": ("sdot v0.4s, v1.16b, v2.16b", "udot v0.4s, v1.16b, v2.4b[1]", "usdot v0.4s, v1.16b, v2.16b"),
    "mmla": ("smmla v0.4s, v1.16b, v2.16b", "ummla v0.4s, v1.16b, v2.16b", "usmmla v0.4s, v1.16b, v2.16b"),
    "simd_fp": ("fmul v0.4s, v1.4s, v2.s[1]", "fadd s0, s1, s2", "smull v0.4s, v1.4h, v2.4h", "pmull v0.8h, v1.8b, v2.8b"),
    "load_store": ("ldr x3, [sp]", "ldp q0, q1, [sp]", "ld1 {v0.16b-v1.16b}, [x4]", "prfm pldl1keep, [sp]"),
    "branch": ("b 1f\n1:", "cbz xzr, 1f\n1:", "tbz xzr, #3, 1f\n1:", "b.al 1f\n1:"),
    "nothing": ("add x3, x3, x3", "nop", "mrs x3, nzcv", "madd x3, x3, x3, x3", "adr x3, ."),
}
AMONG_THEM = {"simd_fp": ("fma", "integer_mac", "dot", "mmla")}  # they are vector instructions, too


def test_each_instruction_is_counted_once_in_its_class(tmp_path: Path) -> None:
    turns = dict(zip(COUNTED, itertools.count(3), strict=False))
    body = [f"{line}\n" * turns[kind] for kind, lines in COUNTED.items() for line in lines]
    mark = "mov x8, #155\nmov x0, #{0:#x}\nmovk x0, #0x4544, lsl #16\nsvc #0\n"
    source = ".globl _start\n_start:\nmov x4, sp\n" + mark.format(0x4700) + "".join(body) + mark.format(0x4701)
    (tmp_path / "a.s").write_text(source + "mov x8, #93\nmov x0, #0\nsvc #0\n")
    subprocess.run(
        [CROSS, "-march=armv8.6-a", "-nostdlib", "-static", tmp_path / "a.s", "-o", tmp_path / "a"], check=True, cwd=tmp_path
    )
    emulator = [toolbox.emulator(), "-cpu", "max,sme=off", "-plugin", f"{toolbox.plugin()},out=counts", "./a"]
    assert run(emulator, limit_s=60, cwd=tmp_path).well
    (region,) = [json.loads(line) for line in (tmp_path / "counts").read_text().splitlines()]
    wanted = {kind: turns[kind] * len(lines) for kind, lines in COUNTED.items()}
    total = sum(wanted.values()) + 4  # what marks the end
    wanted = {kind: count + sum(wanted[each] for each in AMONG_THEM.get(kind, ())) for kind, count in wanted.items()}
    del wanted["nothing"]
    assert region == {"region": 0, "instructions": total, "sve": 0, **wanted}


# ---- what the runners share, with a runtime that is a few lines long

FAKE = """
#include "plan.h"
static float fed, cache = -1, answer[2];
static int calls;
static void *load(const struct plan *plan) { return (void *)plan; }
static void give(void *loaded, int input, const float *values) { (void)loaded; *(input ? &cache : &fed) = *values; }
static void renew(void *loaded, int input, int output) { (void)loaded, (void)input, (void)output; cache = answer[1]; }
static void call(void *loaded)
{
    (void)loaded;
    usleep(SLEEP_US);
    answer[0] = fed + cache + (++calls == ODD);
    answer[1] = cache + 1;
}
static void take(void *loaded, int output, float *values) { (void)loaded; *values = answer[output]; }
static void release(void *loaded) { (void)loaded; }
int main(int count, char **arguments)
{
    const struct runtime fake = {"fake 1", NULL, load, give, renew, call, take, release};
    return follow_plan(&fake, count, arguments);
}
"""
PLANNED = """edgefuse-plan 1
model model.fake
entry stream
input fed 1 fed
input cache 1 cache next
output answer 1
output next 1
calls 3
begins 0 2
warm_up {warm_up}
measure {measure}
threads 1
pace_ns {pace_ns}
"""


@dataclasses.dataclass
class Fake:
    """A folder in which a fake runner is run."""

    folder: Path

    def write(self, warm_up: str = "1 0", measure: str = "3 0 3 0", pace_ns: int = 0, plan: str = PLANNED) -> None:
        (self.folder / PLAN).write_text(plan.format(warm_up=warm_up, measure=measure, pace_ns=pace_ns))
        np.array([10, 100, 20, 30, 200], "<f4").tofile(self.folder / FEED)  # two inputs, one, two
        (self.folder / "model.fake").touch()

    def run(self, sleep_us: int = 0, odd: int = 0) -> Ended:
        flags = [f"-DSLEEP_US={sleep_us}", f"-DODD={odd}", f"-I{NATIVE}", *toolbox.WARNINGS]
        (self.folder / "fake.c").write_text(FAKE)
        subprocess.run(["/usr/bin/gcc", "-O1", *flags, self.folder / "fake.c", "-o", self.folder / "fake"], check=True)
        return run([self.folder / "fake", self.folder], limit_s=60)

    def said(self, **how: int) -> dict[str, object]:
        ended = self.run(**how)
        assert ended.well, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_cache_is_what_the_call_before_made_of_it_until_an_utterance_begins(fake: Fake) -> None:
    fake.write(measure="7 0 7 0")
    said = fake.said()
    assert np.fromfile(fake.folder / ANSWERS, "<f4").tolist() == [10 + 100, 20 + 101, 30 + 200]
    assert (said["unsteady"], said["warm_up_calls"], len(said["latency_ns"]), said["capped"]) == (0, 1, 7, False)


def test_an_answer_that_is_not_that_of_the_first_time_is_unsteady(fake: Fake) -> None:
    fake.write(measure="7 0 7 0")
    assert fake.said(odd=1 + 5)["unsteady"] == 1


def test_both_a_count_and_a_duration_are_reached(fake: Fake) -> None:
    fake.write(warm_up="2 30000000", measure="4 100000000 1000 0")
    said = fake.said(sleep_us=5000)
    assert said["warm_up_calls"] >= 4
    assert 10 <= len(said["latency_ns"]) <= 20
    assert min(said["latency_ns"]) >= 5_000_000
    assert not said["capped"]


@pytest.mark.parametrize("measure", ["4 60000000000 8 0", "1000000 0 2000000 50000000"], ids=["by count", "by duration"])
def test_a_cap_ends_it_and_is_said(fake: Fake, measure: str) -> None:
    fake.write(measure=measure)
    said = fake.said(sleep_us=2000)
    assert said["capped"]
    assert 8 <= len(said["latency_ns"]) <= 30


def test_a_cap_does_not_cut_a_pass_short(fake: Fake) -> None:
    fake.write(measure="3 0 3 1")
    assert len(fake.said(sleep_us=2000)["latency_ns"]) == 3


def test_calls_begin_at_the_pace_of_speech(fake: Fake) -> None:
    fake.write(measure="6 0 6 0", pace_ns=30_000_000)
    start = time.monotonic()
    said = fake.said()
    assert time.monotonic() - start >= 5 * 0.03
    assert max(said["latency_ns"]) < 30_000_000


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("edgefuse-plan 1", "edgefuse-plan 2", "plan.txt is of another version."),
        ("threads 1", "", "plan.txt is not whole."),
        ("threads 1", "thread 1", "plan.txt speaks of thread, which this runner does not know."),
        ("calls 3", "calls three", "plan.txt has three where a number belongs."),
        ("calls 3", "calls 4", "feed.bin has 20 bytes where the plan needs 24."),
        ("begins 0 2", "begins 1 2", "Call 0 of the plan does not begin an utterance."),
        ("begins 0 2", "begins 0 9", "plan.txt begins an utterance with call 9, which the feed does not have."),
        ("cache next", "cache gone", "The cache cache cannot become gone."),
        ("output next 1", "output next 2", "The cache cache cannot become next."),
        ("input fed 1 fed", "input fed 1 guessed", "plan.txt says that fed is guessed; it can be fed or a cache."),
        ("model model.fake", "model other.fake", "other.fake cannot be read: No such file or directory."),
        ("model model.fake", f"model {'m' * 200}", f"A name in plan.txt is too long: {'m' * 200}."),
        ("measure {measure}", "measure 3 0", "A line of plan.txt ends too early."),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_words(fake: Fake, before: str, after: str, sentence: str) -> None:
    fake.write(plan=PLANNED.replace(before, after))
    ended = fake.run()
    assert (ended.code, ended.stderr.strip()) == (2, sentence)


def test_a_folder_without_a_plan_is_refused_in_words(fake: Fake) -> None:
    ended = fake.run()
    assert (ended.code, ended.stderr.strip()) == (2, "plan.txt cannot be read: No such file or directory.")


def test_the_emulator_leaves_nothing_behind(small: tuple[Connection, Job]) -> None:
    connection, job = small
    connection.run(job)
    assert [path.name for path in connection.folder.iterdir()] == [arm64.CPU]

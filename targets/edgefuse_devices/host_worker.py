"""One job on this host, in a Python process that does nothing else: `python -m edgefuse_devices.host_worker FOLDER`.

The folder holds a plan (see `plan.py`) and `asked.json`, what a runtime in Python must be told besides: the target, the shapes,
the cores, and whether a profile is wanted. The process binds itself to its cores before it imports anything that makes threads,
imports the runtime before any clock runs, and times the call alone: inputs are put in before it, answers taken out behind it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.target import Opened, Target
    from edgefuse.values import Artifact
    from edgefuse_devices.plan import Plan

    Inputs = Mapping[str, NDArray[np.float32]]

ASKED, PROFILE = "asked.json", "profile.json"
RESET_PEAK = "5"  # what /proc/self/clear_refs takes to forget the highest resident size
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Asked:
    """What a plan does not say.

    Attributes:
        target: the runtime.
        inputs: shapes by name.
        outputs: the same.
        cores: to be bound to; none of them means that the system decides.
        profile: whether the operators are looked at behind the calls.
    """

    target: str
    inputs: Mapping[str, Sequence[int]]
    outputs: Mapping[str, Sequence[int]]
    cores: Sequence[int] = ()
    profile: bool = False

    def write(self, folder: Path) -> None:
        """Write `asked.json`."""
        (folder / ASKED).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


@dataclass(slots=True)
class Sight:
    """What is seen: latencies, answers, and how often one was not that of the first time."""

    latency_ns: list[int] = field(default_factory=list)
    answers: list[NDArray[np.float32]] = field(default_factory=list)
    unsteady: int = 0
    capped: bool = False


def main() -> int:
    """Do what the folder asks, and end stdout with one line of JSON; a failure in words goes to stderr, with its exit code."""
    folder = Path(sys.argv[1])
    asked = Asked(**json.loads((folder / ASKED).read_text(encoding="utf-8")))
    if asked.cores:
        os.sched_setaffinity(0, asked.cores)
    told = os.dup(1)
    os.dup2(2, 1)  # runtimes print where they like; what is told is the line of JSON alone
    from edgefuse.errors import EdgefuseError

    try:
        line = json.dumps(_told(folder, asked))
    except EdgefuseError as error:
        sys.stderr.write(f"{error.sentence}\n")
        return error.exit_code
    os.write(told, f"{line}\n".encode())
    return 0


def _told(folder: Path, asked: Asked) -> Mapping[str, Any]:
    import numpy as np

    from edgefuse import target as targets
    from edgefuse_devices.plan import ANSWERS, FEED, SCHEMA, fed, read_plan

    plan = read_plan(folder)
    content = np.fromfile(folder / FEED, "<f4")
    calls = [{name: value.reshape(asked.inputs[name]) for name, value in call.items()} for call in fed(plan, content)]
    target, artifact = targets.find(asked.target), _artifact(plan, asked)
    target.ready(plan.threads)
    evicted = _evict(plan.model)
    gc.collect()
    reset = _reset_peak()
    before_bytes = _resident("VmRSS")
    session, cold_load_ns = _loaded(target, artifact, plan)
    gc.disable()
    first_ns, warm_up_calls = _warm_up(session, plan, calls)
    sight = _measure(session, plan, calls)
    gc.enable()
    peak_bytes = _resident("VmHWM")
    del session
    _, warm_load_ns = _loaded(target, artifact, plan)
    np.concatenate(sight.answers, axis=None).astype("<f4").tofile(folder / ANSWERS)
    if asked.profile:
        _write_profile(folder, target.profile(artifact, plan.entry, calls[0], plan.threads))
    return {
        "schema": SCHEMA,
        "runtime": asked.target,
        "cold_load_ns": cold_load_ns,
        "warm_load_ns": warm_load_ns,
        "first_ns": first_ns,
        "warm_up_calls": warm_up_calls,
        "latency_ns": sight.latency_ns,
        "capped": sight.capped,
        "unsteady": sight.unsteady,
        "peak_bytes": peak_bytes,
        "before_bytes": before_bytes,
        "cold load": evicted,
        "peak": "from the load on" if reset else "from the start of the process on: the system does not let it begin later",
    }


def _artifact(plan: Plan, asked: Asked) -> Artifact:
    """The artifact with one entry: an application loads no other."""
    from edgefuse.values import Artifact, TensorSpec

    inputs, outputs = (
        {plan.entry: tuple(TensorSpec(name, tuple(shape), "float32", "") for name, shape in specs.items())}
        for specs in (asked.inputs, asked.outputs)
    )
    return Artifact(asked.target, plan.model, "fp32", inputs, outputs, parent="")


def _loaded(target: Target, artifact: Artifact, plan: Plan) -> tuple[Opened, int]:
    before = time.perf_counter_ns()
    session = target.open(artifact, plan.threads, warm=False)
    return session, time.perf_counter_ns() - before


def _warm_up(session: Opened, plan: Plan, calls: Sequence[Inputs]) -> tuple[int, int]:
    """Nanoseconds of the first call, and how many there were."""
    least_calls, least_ns = plan.warm_up
    given, done, first_ns, start = _endless(session, plan, calls), 0, 0, time.perf_counter_ns()
    while done < max(1, least_calls) or time.perf_counter_ns() - start < least_ns:
        _keep_pace(start, done, plan.pace_ns)
        taken, _ = next(given)
        first_ns = first_ns or taken
        done += 1
    return first_ns, done


def _measure(session: Opened, plan: Plan, calls: Sequence[Inputs]) -> Sight:
    sight, start = Sight(), time.perf_counter_ns()
    given = _endless(session, plan, calls)
    while _goes_on(sight, plan, time.perf_counter_ns() - start):
        done = len(sight.latency_ns)
        _keep_pace(start, done, plan.pace_ns)
        taken, answer = next(given)
        sight.latency_ns.append(taken)
        if done < plan.calls:
            sight.answers.append(answer)
        else:
            sight.unsteady += sight.answers[done % plan.calls].tobytes() != answer.tobytes()
    return sight


def _goes_on(sight: Sight, plan: Plan, elapsed_ns: int) -> bool:
    """One pass is always finished, since every answer is judged; then both a count and a duration are reached, or a cap."""
    least_calls, least_ns, most_calls, most_ns = plan.measure
    done = len(sight.latency_ns)
    if done < plan.calls:
        return True
    if done >= least_calls and elapsed_ns >= least_ns:
        return False
    sight.capped = done >= most_calls or 0 < most_ns <= elapsed_ns
    return not sight.capped


def _endless(session: Opened, plan: Plan, calls: Sequence[Inputs]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Nanoseconds and the answer of each call of the feed, again and again; caches are what the call before made of them."""
    caches: Inputs = {}
    answer = next(iter(plan.outputs))
    while True:
        for inputs in calls:
            session.give(plan.entry, {**caches, **inputs})
            before = time.perf_counter_ns()
            session.call(plan.entry)
            taken = time.perf_counter_ns() - before
            outputs = session.answers(plan.entry)
            caches = {name: outputs[renewed] for name, renewed in plan.renewed.items()}
            yield taken, outputs[answer]


def _keep_pace(start_ns: int, done: int, pace_ns: int) -> None:
    """Wait until it is time for the next call, if calls come at a pace."""
    early_ns = start_ns + done * pace_ns - time.perf_counter_ns()
    if pace_ns and early_ns > 0:
        time.sleep(early_ns / 1e9)


def _evict(path: Path) -> str:
    """Make the system forget a file's pages, and say whether it did: it keeps those that another process uses."""
    if not hasattr(os, "posix_fadvise"):
        return "from wherever the system has the file: it cannot be told to forget it"
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for each in files:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that have not been written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return "from the system's memory, which did not forget the file" if any(map(_is_cached, files)) else "from the disk"


def _is_cached(path: Path) -> bool:
    """Whether the first block of a file can be had without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(BLOCK)], 0, os.RWF_NOWAIT) > 0
    except OSError:
        return False  # it would have to wait, or the filesystem does not tell
    finally:
        os.close(descriptor)


def _reset_peak() -> bool:
    """Let the highest resident size begin anew, so that imports are not in it, where the system does that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        return True
    return False


def _resident(fact: str) -> int:
    """Resident bytes now (VmRSS) or at most (VmHWM)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{fact}:"):
                return int(line.split()[1]) * 1024
    if fact == "VmRSS":
        import psutil

        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac, which is what has no /proc


def _write_profile(folder: Path, profile: Profile) -> None:
    (folder / PROFILE).write_text(json.dumps(dataclasses.asdict(profile)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

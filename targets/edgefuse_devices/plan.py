"""What every runner reads and says, whatever the language it is written in and the device it runs on.

A runner is started in a folder with the artifact, `plan.txt` and `feed.bin`. It loads the artifact, calls the entry as the plan
says, writes `answers.bin`, and ends its stdout with one line of JSON.

`plan.txt`, one fact a line:

    edgefuse-plan 1
    model model.tflite                  relative to the folder
    entry stream_640ms                  the method or signature
    input features 5120 fed             in the order of the entry; floats; given by every call of the feed,
    input past 1 cache past_next        or given where an utterance begins, else what the call before made of it
    output logits 8192                  in the order of the entry; the first one is the answer
    output past_next 1
    calls 24                            of one pass through the feed; call 0 always begins an utterance
    begins 0 12
    warm_up 10 300000000                calls and nanoseconds, both reached; the first call of all is one of them
    measure 50 1000000000 2000 10000000000     calls and nanoseconds, both reached; or most calls, or most nanoseconds
    threads 1
    pace_ns 0                           of speech between the beginnings of two calls; 0 is full speed

Of `measure`, most nanoseconds 0 are no cap, and one pass through the feed is always completed, even beyond a cap. The pace holds
while it warms up, too. `peak_bytes` is taken before the artifact is loaded a second time.

`feed.bin` has float32, little-endian: call after call its fed inputs in their order; where an utterance begins all inputs.
After the warm-up the feed begins again at call 0; after its last call it begins again, too. What is timed is the call alone.

`answers.bin` has the answer of each call of the feed, from its first timed time. Each later answer to the same call is compared
with it, bit for bit.

The line of JSON: `schema` 1, `runtime` (text), `cold_load_ns`, `warm_load_ns` (or null), `first_ns`, `warm_up_calls`,
`latency_ns` (a list), `capped`, `unsteady`, `peak_bytes`, `before_bytes`; whatever else it holds is `told` as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefuse.errors import RunFailed
from edgefuse.measurement import TYPES, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgefuse.measurement import Clock, Job

PLAN, FEED, ANSWERS = "plan.txt", "feed.bin", "answers.bin"
VERSION = SCHEMA = 1
NS_PER_MS = 1_000_000
NUMBERS = ("cold_load_ns", "first_ns", "warm_up_calls", "unsteady", "peak_bytes", "before_bytes")
MOST = 1 << 63  # of a count, or of nanoseconds: a runner counts in 64 bits
KNOWN = ("schema", "warm_load_ns", "latency_ns", "capped", *NUMBERS)


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan as a runner in Python reads it.

    Attributes:
        model: the artifact's path.
        entry: the way in.
        inputs: names and floats, in order.
        renewed: of each cache the output that it becomes.
        outputs: names and floats, in order.
        calls: of one pass.
        begins: calls with which an utterance begins.
        warm_up: calls and nanoseconds.
        measure: calls, nanoseconds, most calls, most nanoseconds.
        threads: of the runtime.
        pace_ns: between the beginnings of two calls.
    """

    model: Path
    entry: str
    inputs: Mapping[str, int]
    renewed: Mapping[str, str]
    outputs: Mapping[str, int]
    calls: int
    begins: tuple[int, ...]
    warm_up: tuple[int, int]
    measure: tuple[int, int, int, int]
    threads: int
    pace_ns: int


def write_plan(folder: Path, job: Job, *, model: str, exact: bool = False) -> None:
    """Write `plan.txt` and `feed.bin` for an artifact that is called `model` there.

    With `exact` the feed is run once, after one call that warms up: for clocks that need no repetition.
    """
    artifact, entry, routine, calls = job.artifact, job.entry, job.routine, len(job.feed)
    how = artifact.streaming.get(entry)
    renewed = dict(how.states) if how else {}
    begins = [number for number, call in enumerate(job.feed) if call.begins]
    few, duration = (calls, 0) if exact else (max(routine.calls, calls), routine.duration_ms * NS_PER_MS)
    most, longest = (calls, 0) if exact else (max(routine.most_calls, calls), routine.most_ms * NS_PER_MS)
    warm = (1, 0) if exact else (max(1, routine.warm_up_calls), routine.warm_up_ms * NS_PER_MS)
    pace = (job.chunk_ms or 0) * NS_PER_MS if routine.paced else 0
    lines = [
        f"edgefuse-plan {VERSION}",
        f"model {model}",
        f"entry {entry}",
        *(
            f"input {spec.name} {math.prod(spec.shape)} {f'cache {renewed[spec.name]}' if spec.name in renewed else 'fed'}"
            for spec in artifact.inputs[entry]
        ),
        *(f"output {spec.name} {math.prod(spec.shape)}" for spec in artifact.outputs[entry]),
        f"calls {calls}",
        f"begins {' '.join(map(str, begins))}",
        f"warm_up {warm[0]} {warm[1]}",
        f"measure {few} {duration} {most} {longest}",
        f"threads {routine.threads}",
        f"pace_ns {pace}",
    ]
    (folder / PLAN).write_text("\n".join(lines) + "\n", encoding="ascii")
    with (folder / FEED).open("wb") as stream:
        for call in job.feed:
            for spec in artifact.inputs[entry]:
                if call.begins or spec.name not in renewed:
                    stream.write(np.ascontiguousarray(call.inputs[spec.name], "<f4").tobytes())


def read_plan(folder: Path) -> Plan:
    """Read what `write_plan` wrote."""
    facts: dict[str, list[list[str]]] = {}
    for line in (folder / PLAN).read_text(encoding="ascii").splitlines():
        name, *rest = line.split()
        facts.setdefault(name, []).append(rest)
    most = [int(each) for each in facts["measure"][0]]
    warm = [int(each) for each in facts["warm_up"][0]]
    return Plan(
        model=folder / facts["model"][0][0],
        entry=facts["entry"][0][0],
        inputs={name: int(floats) for name, floats, *_ in facts["input"]},
        renewed={name: how[1] for name, _, *how in facts["input"] if how[0] == "cache"},
        outputs={name: int(floats) for name, floats in facts["output"]},
        calls=int(facts["calls"][0][0]),
        begins=tuple(int(each) for each in facts["begins"][0]),
        warm_up=(warm[0], warm[1]),
        measure=(most[0], most[1], most[2], most[3]),
        threads=int(facts["threads"][0][0]),
        pace_ns=int(facts["pace_ns"][0][0]),
    )


def read_run(folder: Path, stdout: str, job: Job, clock: Clock) -> Run:
    """What a runner said, and the answers that it left in the folder.

    Raises:
        RunFailed: it said or left something else.
    """
    try:
        fields = json.loads((stdout.strip().splitlines() or [""])[-1])
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']}")  # noqa: TRY301 - one place says what is wrong
        numbers = {name: _whole(fields[name]) for name in NUMBERS}
        warm, latency_ns = fields["warm_load_ns"], tuple(_whole(each) for each in fields["latency_ns"])
        if len(latency_ns) < len(job.feed):
            raise ValueError(f"{len(latency_ns)} calls")  # noqa: TRY301 - as above
        return Run(
            samples=TYPES[clock](latency_ns),
            cold_load=numbers["cold_load_ns"],
            warm_load=None if warm is None else _whole(warm),
            first=numbers["first_ns"],
            warm_up_calls=numbers["warm_up_calls"],
            capped=bool(fields["capped"]),
            answers=read_answers(folder, job),
            unsteady=numbers["unsteady"],
            peak_bytes=numbers["peak_bytes"],
            before_bytes=numbers["before_bytes"],
            told={name: str(value) for name, value in fields.items() if name not in KNOWN},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise garbage(stdout) from error


def read_answers(folder: Path, job: Job) -> tuple[NDArray[np.float32], ...]:
    """The logits (T, V) of each call of the feed; a ValueError or OSError where they are not what the feed asks for."""
    shape = job.artifact.outputs[job.entry][0].shape
    values = np.fromfile(folder / ANSWERS, "<f4").reshape(len(job.feed), *shape[1:])
    return tuple(np.asarray(each) for each in values)


def garbage(stdout: str) -> RunFailed:
    """What is said of a runner that nobody understands."""
    told = " ".join(stdout.split())[-120:]
    return RunFailed(
        f"The runner did not say what a runner says{f', but: {told}' if told else '; it said nothing'}.",
        hint="Run it once more with -v; if it goes on, set it up again: edgefuse devices setup arm64",
    )


def _whole(value: Any) -> int:  # noqa: ANN401 - what JSON holds
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise ValueError(f"{value!r} is no count")
    return value


def fed(plan: Plan, content: NDArray[np.float32]) -> Sequence[Mapping[str, NDArray[np.float32]]]:
    """`feed.bin`, call by call, by the names of the inputs; flat."""
    calls, start = [], 0
    for number in range(plan.calls):
        given = {}
        for name, floats in plan.inputs.items():
            if number in plan.begins or name not in plan.renewed:
                given[name] = content[start : start + floats]
                start += floats
        calls.append(given)
    return calls

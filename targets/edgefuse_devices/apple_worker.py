"""One job with Core ML on a Mac: `python -m edgefuse_devices.apple_worker FOLDER UNITS WANT`.

It is a runner by the contract of `plan.py`, and reads one file more, `shapes.json`: the shape of every input, and whether the
artifact holds a state. What it times is Core ML Tools' `predict`: Core ML, and the copies between Python and it. For a profile it
adds Core ML's own plan: which operator it prefers to run where, and its estimate of each one's share of a call.

Without a Mac only the loop is tested, with other models in Core ML's place.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefuse_devices.plan import ANSWERS, FEED, SCHEMA, Plan, fed, read_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHAPES = "shapes.json"
Inputs = Mapping[str, "NDArray[np.float32]"]
Model = Callable[[Inputs], Inputs]
TICK_NS = 1_000_000_000


@dataclass(slots=True)
class Seen:
    """What was seen while the plan was followed."""

    first_ns: int = 0
    warm_up_calls: int = 0
    latency_ns: list[int] = field(default_factory=list)
    answers: list[NDArray[np.float32]] = field(default_factory=list)
    unsteady: int = 0
    capped: bool = False


def follow(plan: Plan, feed: Sequence[Inputs], model: Model) -> Seen:
    """Warm a model up, then go round the feed until it is enough; one pass is always finished."""
    seen = Seen()
    past: Inputs = {}
    begun = time.perf_counter_ns()
    while seen.warm_up_calls < max(1, plan.warm_up[0]) or time.perf_counter_ns() - begun < plan.warm_up[1]:
        _wait(plan, begun, seen.warm_up_calls)
        past, taken = _call(plan, feed, seen.warm_up_calls, model, past)
        seen.first_ns = seen.first_ns or taken
        seen.warm_up_calls += 1
    begun, past = time.perf_counter_ns(), {}
    while _goes_on(plan, seen, time.perf_counter_ns() - begun):
        number = len(seen.latency_ns)
        _wait(plan, begun, number)
        past, taken = _call(plan, feed, number, model, past)
        seen.latency_ns.append(taken)
        answer = np.array(past[next(iter(plan.outputs))], np.float32)
        if number < plan.calls:
            seen.answers.append(answer)
        else:
            seen.unsteady += answer.tobytes() != seen.answers[number % plan.calls].tobytes()
    return seen


def _call(plan: Plan, feed: Sequence[Inputs], number: int, model: Model, past: Inputs) -> tuple[Inputs, int]:
    """The answers to a call of the feed, its caches those of the call before, and what it took in nanoseconds."""
    given = feed[number % plan.calls]
    inputs = {name: given[name] if name in given else past[plan.renewed[name]] for name in plan.inputs}
    begun = time.perf_counter_ns()
    answers = model(inputs)
    return answers, time.perf_counter_ns() - begun


def _goes_on(plan: Plan, seen: Seen, elapsed_ns: int) -> bool:
    few, duration, most, longest = plan.measure
    timed = len(seen.latency_ns)
    if timed < plan.calls:
        return True
    if timed >= few and elapsed_ns >= duration:
        return False
    seen.capped = timed >= most or 0 < longest <= elapsed_ns
    return not seen.capped


def _wait(plan: Plan, begun: int, number: int) -> None:
    """Until a chunk of speech would be there, if the plan has a pace."""
    time.sleep(max(0, begun + number * plan.pace_ns - time.perf_counter_ns()) / TICK_NS if plan.pace_ns else 0)


def shaped(plan: Plan, content: NDArray[np.float32], shapes: Mapping[str, Sequence[int]]) -> list[Inputs]:
    """The feed, call by call, each input in its shape."""
    return [{name: value.reshape(shapes[name]) for name, value in call.items()} for call in fed(plan, content)]


def load(plan: Plan, units: str, *, holds: bool) -> tuple[Any, Model]:
    """Core ML's model, and how it is called."""
    import coremltools

    whole = coremltools.models.MLModel(
        str(plan.model), compute_units=getattr(coremltools.ComputeUnit, units), function_name=plan.entry
    )
    state = {"state": whole.make_state()} if holds else {}
    return whole, lambda inputs: whole.predict(dict(inputs), **state)


def operators(whole: Any, plan: Plan, units: str) -> list[tuple[str, str, float]]:  # noqa: ANN401 - Core ML Tools has no types
    """Of Core ML's plan for an entry: each operator, where it is preferred to run, and its estimated share of a call."""
    import coremltools
    from coremltools.models.compute_plan import MLComputePlan

    told = MLComputePlan.load_from_path(whole.get_compiled_model_path(), getattr(coremltools.ComputeUnit, units))
    rows = []
    for operator in told.model_structure.program.functions[plan.entry].block.operations:
        usage = told.get_compute_device_usage_for_mlprogram_operation(operator)
        cost = told.get_estimated_cost_for_mlprogram_operation(operator)
        if usage is not None:  # constants are run nowhere
            rows.append((operator.operator_name, type(usage.preferred_compute_device).__name__, cost.weight if cost else 0.0))
    return rows


def main() -> None:
    """Run the job of a folder."""
    import resource

    import coremltools
    import psutil

    folder, units, want = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    plan, more = read_plan(folder), json.loads((folder / SHAPES).read_text(encoding="utf-8"))
    feed = shaped(plan, np.fromfile(folder / FEED, "<f4"), more["shapes"])
    before = psutil.Process().memory_info().rss
    begun = time.perf_counter_ns()
    whole, model = load(plan, units, holds=more["holds"])
    cold = time.perf_counter_ns() - begun
    seen = follow(plan, feed, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
    begun = time.perf_counter_ns()
    load(plan, units, holds=more["holds"])
    warm = time.perf_counter_ns() - begun
    np.concatenate([answer.ravel() for answer in seen.answers]).astype("<f4").tofile(folder / ANSWERS)
    said: dict[str, Any] = {
        "schema": SCHEMA,
        "runtime": f"Core ML through Core ML Tools {coremltools.__version__}",
        "cold_load_ns": cold,
        "warm_load_ns": warm,
        "first_ns": seen.first_ns,
        "warm_up_calls": seen.warm_up_calls,
        "latency_ns": seen.latency_ns,
        "capped": seen.capped,
        "unsteady": seen.unsteady,
        "peak_bytes": peak,
        "before_bytes": before,
        "compute units": units,
    }
    if want == "profile":
        said["operators"] = operators(whole, plan, units)
    print(json.dumps(said))  # noqa: T201 - a runner says what it has to say on stdout


if __name__ == "__main__":
    main()

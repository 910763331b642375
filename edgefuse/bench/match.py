"""Which measurements may be divided by each other: those of one device, clock, target, precision and way in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefuse.bench.compare import compare
from edgefuse.bench.result import read_result
from edgefuse.bench.summary import exact, summary_of
from edgefuse.errors import UsageError
from edgefuse.measurement import NOT_TOLD

if TYPE_CHECKING:
    from pathlib import Path

    from edgefuse.bench.compare import Compared
    from edgefuse.measurement import Measurement

Place = tuple[str, ...]  # device, clock, target, precision, entry
RECORD = ("model", "chip")  # of a device: two boards may have one name
MEANINGFUL = ("threads", "cores", "paced")  # of a routine: what changes what is measured, not how often


@dataclass(frozen=True, slots=True)
class Pairs:
    """What of two results belongs together, and in words what does not, or not quite."""

    compared: tuple[Compared, ...]
    remarks: tuple[str, ...]


def one_call(measurement: Measurement) -> float | None:
    """What one call takes, in the clock's unit: the median, of counted instructions the average of one pass; None without any."""
    if not measurement.valid:
        return None
    if measurement.device.clock == "instructions":
        return exact(measurement.valid[0]) / measurement.valid[0].calls
    summary = summary_of(measurement)
    return summary.p50 if summary else None


def against(base: Sequence[Measurement], new: Sequence[Measurement]) -> Pairs:
    """Pair the measurements of two results; models are told apart by their names only where one side has several."""
    before, after = _places(base), _places(new)
    pairs: list[tuple[Measurement, Measurement]] = []
    remarks: list[str] = []
    for place in dict.fromkeys((*before, *after)):
        olds, news = before.get(place, {}), after.get(place, {})
        if len(olds) == len(news) == 1:
            pairs.append((*olds.values(), *news.values()))  # type: ignore[arg-type]  # one of each
            continue
        pairs += [(olds[model], news[model]) for model in olds if model in news]
        remarks += [_only(place, model, "base") for model in olds if model not in news]
        remarks += [_only(place, model, "new result") for model in news if model not in olds]
    remarks += dict.fromkeys(remark for pair in pairs for remark in _differences(*pair))
    return Pairs(tuple(compare(one, other, in_turns=False) for one, other in pairs), tuple(remarks))


def pairs_of(base: Path, new: Path | None, base_model: str | None = None) -> Pairs:
    """What two results have in common; of one alone, the models that took turns in it.

    Raises:
        UsageError: one result holds one model, none of that name, or `base_model` is named where two results are compared.
    """
    before = read_result(base).measurements
    if new is not None:
        if base_model is not None:
            raise UsageError("--base-model is for models of one result.", hint="Leave it away, or leave NEW away.")
        return against(before, read_result(new).measurements)
    require_model(before, base_model)
    compared = models_in_turns(before, base_model)
    if not compared:
        raise UsageError(f"No two models took turns in {base}.", hint="Name another result to compare it with.")
    return Pairs(compared, ())


def require_model(measurements: Sequence[Measurement], name: str | None) -> None:
    """Raise a `UsageError` where a model is named that was not measured."""
    models = dict.fromkeys(each.subject.model for each in measurements)
    if name is not None and name not in models:
        raise UsageError(f"No model is called {name!r}.", hint=f"There are: {', '.join(models) or 'none'}")


def models_in_turns(measurements: Sequence[Measurement], base: str | None = None) -> tuple[Compared, ...]:
    """Of one result in which models took turns: each of a place against `base`, or the slowest where that is not there."""
    return tuple(
        compare(first, other, in_turns=True)
        for found in _places(measurements).values()
        if len(found) > 1
        for first in [found.get(base or "") or _slowest(tuple(found.values()))]
        for other in found.values()
        if other is not first
    )


def precisions_in_turns(measurements: Sequence[Measurement]) -> tuple[Compared, ...]:
    """Of one result: what fewer bits bring, each precision of one checkpoint against its fp32 on the same device and target."""
    floats = {_origin(each): each for each in measurements if each.subject.precision == "fp32"}
    return tuple(
        compare(floats[_origin(each)], each, in_turns=True)
        for each in measurements
        if each.subject.precision != "fp32" and _origin(each) in floats
    )


def _places(measurements: Sequence[Measurement]) -> dict[Place, dict[str, Measurement]]:
    """By place and model; of a model that is there twice, the last."""
    found: dict[Place, dict[str, Measurement]] = {}
    for each in measurements:
        device, subject = each.device, each.subject
        place = (device.spec, device.clock, subject.target, subject.precision, subject.entry)
        found.setdefault(place, {})[subject.model] = each
    return found


def _origin(each: Measurement) -> Place:
    device, subject = each.device, each.subject
    return device.spec, device.clock, subject.target, subject.entry, subject.checkpoint


def _slowest(measurements: Sequence[Measurement]) -> Measurement:
    return max(measurements, key=lambda each: one_call(each) or 0.0)


def _only(place: Place, model: str, side: str) -> str:
    device, _, target, precision, entry = place
    return f"Only the {side} has {model}, {target}, {precision}, {entry} on {device}."


def _differences(base: Measurement, new: Measurement) -> Iterator[str]:
    """What makes a ratio say something else than that the artifact has changed."""
    if base.device.name != new.device.name:
        yield f"{base.device.spec} is another machine: {new.device.name}, the base's was {base.device.name}."
    elif others := [name for name in RECORD if base.device.facts.get(name) != new.device.facts.get(name)]:
        now, then = (each.device.facts.get(others[0], NOT_TOLD) for each in (new, base))
        yield f"{base.device.spec} is another machine: its {others[0]} is {now}, the base's was {then}."
    for name in MEANINGFUL:
        then, now = getattr(base.routine, name), getattr(new.routine, name)
        if then != now:
            yield f"Measured otherwise: {name} is {now or 'none'}, the base's was {then or 'none'}."

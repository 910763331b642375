"""The cheapest scheme of a checkpoint on a target within bounds.

A folder holds what was found out (`search.json`, written after every step, from which a search that was stopped goes on), the
scheme (`scheme.toml`, for `edgefuse export --precision`) and the picture of what was measured (`front.svg`). The same notes
bring the same scheme; only latencies differ from run to run, and they are measured once.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgefuse.bench.contender import contender
from edgefuse.bench.turns import Turns, interleave
from edgefuse.errors import NothingFits, OutputExists, UsageError
from edgefuse.explore import Ground, Inquiry, stand
from edgefuse.foreign import in_words
from edgefuse.pipeline import Tell, silent
from edgefuse.quantize.mixes import PICTURE, WORTH, Bounds, Measured, binding, cheapest, mixes, scheme_of_mix, spread
from edgefuse.quantize.scheme import CLIPPINGS, ROUNDINGS, SCHEMES, LayerPrecision, Scheme, scheme_of
from edgefuse.quantize.sensitivity import alone, extents, module_of
from edgefuse.quantize.trial import Trial
from edgefuse.report.picture import draw_front
from edgefuse.store import size_bytes
from edgefuse.target import Session, Target, find
from edgefuse.values import Artifact
from edgefuse.verify.wer import WordErrors

NOTES, SCHEME = "search.json", "scheme.toml"
ALL = replace(SCHEMES["int8"], name="all", table={}, features="int8", logits="int8")  # so that every layer is a choice
FLOAT = Scheme("fp32", "fp32", positions="fp32")
WAYS: tuple[dict[str, Any], ...] = (  # to be tried one after another, each with what was best of the ones before
    *({"clipping": way} for way in CLIPPINGS),
    *({"equalize": way} for way in (True, False)),
    *({"rounding": way} for way in ROUNDINGS),
)
FAST: tuple[LayerPrecision, ...] = ("int8", "int8-dynamic")
SMALL: tuple[LayerPrecision, ...] = (
    "int8-weights",
    "int4-weights",
    "palette4-weights",
)  # slower than the others: only where size counts
STEPS = 7  # mixes that are exported, evenly along the hull
REFINEMENTS = 3  # and so many more, between the chosen one and the next cheaper one
QUICK = 16  # utterances on which a layer's noise is measured: it is the same for all but a little, unlike word errors
TIMED = Turns(rounds=25, warm_up=3)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        measured: every scheme that was measured, uniform ones first.
        chosen: the cheapest within the bounds.
        binding: which bound keeps it from being cheaper, in words.
    """

    measured: tuple[Measured, ...]
    chosen: Measured
    binding: str


def search(inquiry: Inquiry, output: Path, bounds: Bounds, *, resume: bool = False, tell: Tell = silent) -> Found:
    """Search, and write what was found; `resume` goes on with the notes in `output`, perhaps within other bounds.

    Raises:
        UsageError: no bound, or a latency that a target has not here; notes of another search.
        NothingFits: no scheme stays within the bounds; the notes are kept.
    """
    _require_bounds(bounds)
    target = find(inquiry.target)
    _claim(output, resume=resume)
    ground = stand(inquiry, tell)
    notes = _Notes(output, _asked(ground, inquiry.target))
    with TemporaryDirectory() as workshop, in_words(inquiry.target, "could not be searched"):
        bench = _Bench(target, ground, Path(workshop), notes, tell)
        measured = _measured(bench, bounds)
    chosen = cheapest(measured, bounds)
    draw_front(output / PICTURE, measured, chosen)
    if chosen is None:
        nearest = min(measured, key=lambda each: (len(each.broken(bounds)), each.size_bytes))
        raise NothingFits(
            f"None of {len(measured)} schemes stays within the bounds. The nearest, {nearest.scheme.name}, has "
            f"{', '.join(nearest.broken(bounds))}.",
            hint=f"Search on with wider bounds and --resume; all that was measured is in {output / PICTURE}",
        )
    (output / SCHEME).write_text(chosen.scheme.to_toml(), encoding="utf-8")
    return Found(measured, chosen, binding(measured, chosen, bounds))


def _measured(bench: _Bench, bounds: Bounds) -> tuple[Measured, ...]:
    """Uniform schemes, mixes along the hull, and some more around the best one."""
    if bounds.latency_ms is not None and bench.evaluated:
        raise UsageError("The target is evaluated here, not run: it has no latency.", hint="Bound the size with: --max-mb")
    small = bounds.megabytes is not None or bench.evaluated
    able = bench.able(FAST + SMALL if small else FAST)
    uniform = [bench.measure(each) for each in (FLOAT, *(SCHEMES[name] for name in able))]
    like = bench.ways()
    corners = mixes(bench.noises(like, able), bench.extents, WORTH if small else 0.0)
    schemes = [scheme_of_mix(f"mix {number}", mix, like) for number, mix in enumerate(corners) if set(mix.values()) != {"fp32"}]
    mixed = {each.name: bench.measure(each) for each in spread(schemes, STEPS)}
    for _ in range(REFINEMENTS):
        between = _between(schemes, tuple(mixed.values()), bounds)
        if between is None:
            break
        mixed[between.name] = bench.measure(between)
    return (*uniform, *mixed.values())


def _between(schemes: Sequence[Scheme], measured: Sequence[Measured], bounds: Bounds) -> Scheme | None:
    """The mix in the middle between the cheapest within the bounds and the next one along the hull that was measured."""
    best = cheapest(measured, bounds)
    if best is None:
        return None
    here = schemes.index(best.scheme)
    behind = [number for number in (schemes.index(each.scheme) for each in measured) if number > here]
    middle = (here + min(behind)) // 2 if behind else here
    return schemes[middle] if middle != here else None


class _Bench:
    """A target that measures schemes, each once: what is in the notes is not measured again."""

    def __init__(self, target: Target, ground: Ground, workshop: Path, notes: _Notes, tell: Tell) -> None:
        self._target, self._ground, self._workshop, self._notes, self._tell = target, ground, workshop, notes, tell
        self._trials, self._quick = ground.trials(), ground.trials(QUICK)
        (entry,) = ground.program.entries
        self.extents = extents(entry)
        with tell("Exporting fp32"):
            self._float = target.export(ground.program, workshop, "fp32")
            self._opened = target.open(self._float)
        self.evaluated = self._opened.how == "evaluated"

    def able(self, wanted: Sequence[LayerPrecision]) -> tuple[LayerPrecision, ...]:
        """Which precisions the target has."""
        return tuple(each for each in wanted if not self._target.refusals(self._ground.quantized(SCHEMES[each])))

    def ways(self) -> Scheme:
        """The ranges, the equalization and the rounding with the least noise."""

        def best() -> dict[str, Any]:
            like, least = ALL, math.inf
            with self._tell("Trying every way to choose ranges, units and integers"):
                for way in (each for each in WAYS if self._ground.calibration.listen or each != {"rounding": "gptq"}):
                    noise = self._quick.of(replace(like, **way)).noise
                    like, least = (replace(like, **way), noise) if noise < least else (like, least)
            return like.to_json()

        return scheme_of(self._notes.once("ways", best))

    def noises(self, like: Scheme, able: Sequence[LayerPrecision]) -> dict[str, dict[LayerPrecision, float]]:
        """Of each layer alone in each precision that it can have."""
        found: dict[str, dict[LayerPrecision, float]] = {layer: {"fp32": 0.0} for layer in self.extents}
        for precision in able:
            kept = self._quick.plan(replace(like, layers=precision)).kept
            for module, layers in groupby((layer for layer in found if layer not in kept), key=module_of):
                with self._tell(f"Listening with each layer of {module} in {precision} alone"):
                    for layer in layers:
                        noise = self._noise(like, layer, precision)
                        found[layer][precision] = self._notes.once(f"{layer} {precision}", noise)
        return found

    def _noise(self, like: Scheme, layer: str, precision: LayerPrecision) -> Callable[[], float]:
        return lambda: self._quick.of(alone(like, layer, precision)).noise

    def measure(self, scheme: Scheme) -> Measured:
        """Export a scheme, hear the speech with the artifact, and time it in turns with fp32."""
        key = json.dumps({**scheme.to_json(), "name": ""}, sort_keys=True)
        told = self._notes.once(key, lambda: _to_json(self._measure(scheme)))
        return _measured_of(told, scheme)

    def _measure(self, scheme: Scheme) -> Measured:
        artifact, session = self._float, self._opened
        with self._tell(f"Measuring {scheme.name}"):
            if scheme != FLOAT:
                artifact = self._target.export(self._ground.quantized(scheme), self._workshop, "scheme")
                session = self._target.open(artifact)
            trial = self._trials.heard_by(session, artifact)
            ratio, p50 = self._pace(session, artifact)
        layers = dict(Counter(artifact.layers.values()))
        loss = trial.errors.wer_percent - self._trials.exact.errors.wer_percent
        return Measured(scheme, layers, trial, loss, size_bytes(artifact.path), ratio, p50)

    def _pace(self, session: Session, artifact: Artifact) -> tuple[float | None, float | None]:
        if self.evaluated:
            return None, None
        (mode,) = artifact.modes
        turns = {"this": contender(session, artifact, mode), "fp32": contender(self._opened, self._float, mode)}
        samples = interleave(turns, TIMED)
        return 1.0 if session is self._opened else samples.ratio("this", to="fp32"), samples.p50_ms("this")


class _Notes:
    """What was found out, on disk."""

    def __init__(self, folder: Path, asked: Mapping[str, str]) -> None:
        self._path, self._asked = folder / NOTES, asked
        self._found: dict[str, Any] = {}
        if self._path.is_file():
            told = _read(self._path)
            if changed := [name for name in asked if told["asked"].get(name) != asked[name]]:
                raise UsageError(f"{folder} holds a search with another {' and '.join(changed)}.", hint="Choose another -o.")
            self._found = told["found"]

    def once(self, what: str, find_out: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
        """What was found out before, or is now."""
        if what not in self._found:
            self._found[what] = find_out()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(".new")
            draft.write_text(json.dumps({"asked": self._asked, "found": self._found}, indent=1), encoding="utf-8")
            draft.replace(self._path)
        return self._found[what]


def _asked(ground: Ground, target: str) -> dict[str, str]:
    """What notes are about."""
    (entry,) = ground.program.entries
    return {
        "model": ground.folded.digest,
        "target": target,
        "shape": f"{entry.name} {entry.streaming}",
        "calibration": ground.calibration.speech,
        "speech": ground.speech,
    }


def _claim(output: Path, *, resume: bool) -> None:
    if not resume and output.exists():
        raise OutputExists(f"{output} exists already.", hint="Go on with --resume, or choose another -o.")
    if resume and output.exists() and not (output / NOTES).is_file():
        raise OutputExists(f"{output} holds no search to go on with.", hint="Leave --resume away, and choose another -o.")


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told["asked"], dict) and isinstance(told["found"], dict):
            return told
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} holds no notes of a search.", hint="Choose another -o.")


def _require_bounds(bounds: Bounds) -> None:
    told = [bound for bound in astuple(bounds) if bound is not None]
    if not told:
        raise UsageError("A search needs a bound.", hint="For example: --max-wer-loss 0.3")
    if not all(math.isfinite(bound) for bound in told):
        raise UsageError("A bound is a number.", hint="For example: --max-wer-loss 0.3")


def _to_json(measured: Measured) -> dict[str, Any]:
    fields = asdict(measured)
    del fields["scheme"]
    return fields


def _measured_of(fields: Mapping[str, Any], scheme: Scheme) -> Measured:
    trial = fields["trial"]
    return Measured(**{**fields, "scheme": scheme, "trial": Trial(**{**trial, "errors": WordErrors(**trial["errors"])})})

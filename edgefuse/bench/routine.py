"""The routine: every artifact of some bundles on some devices, in turns, each answer checked, each number written as it comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefuse import device as devices
from edgefuse import store
from edgefuse.bench.feed import feed_of, judged
from edgefuse.bench.result import Order, Result, Writer, begin_result, key_of, read_result, visit_json
from edgefuse.errors import BenchFailed, DeviceError, RunFailed, UsageError
from edgefuse.frontend.intake import intake_of
from edgefuse.measurement import NOT_TOLD, USUAL, WANTS, Absence, Failure, Job, Memory, Routine, Subject, Visit
from edgefuse.packages import extras, versions
from edgefuse.recognize import capacity
from edgefuse.verify.gate import BARS
from edgefuse.verify.wer import rates_by_part

if TYPE_CHECKING:
    from edgefuse.bundle import Bundle, Export, Golden
    from edgefuse.device import Connection
    from edgefuse.measurement import Call, Clock, DeviceInfo, Run, Want
    from edgefuse.values import Artifact, Mode

Tell = Callable[[str], AbstractContextManager[object]]
EMULATED = ("instructions", "virtual")  # clocks of devices on which a call takes seconds
COUNTED_PROCESSES = 3  # of instructions: to see that each gives the same number


@dataclass(frozen=True, slots=True)
class Candidate:
    """A subject, and what is needed to run it."""

    subject: Subject
    artifact: Artifact
    entry: str
    goldens: tuple[Golden, ...]
    least_snr_db: float

    @property
    def key(self) -> str:
        """What it is called in a result."""
        return key_of(self.subject)

    def feed(self, clock: Clock) -> tuple[Call, ...]:
        """What it is fed with."""
        return feed_of(self.artifact, self.entry, self.goldens, few=clock in EMULATED)


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What is to be measured where.

    Attributes:
        folders: bundles; their folders' names tell them apart.
        specs: devices, see `edgefuse.device`.
        routine: how.
        targets: only these; all if empty.
        entries: only these, or these modes; all if empty.
        wants: what is looked at.
    """

    folders: tuple[Path, ...]
    specs: tuple[str, ...]
    routine: Routine = USUAL
    targets: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    wants: tuple[Want, ...] = WANTS


def bench(inquiry: Inquiry, output: Path, *, resume: bool = False, overwrite: bool = False, tell: Tell) -> Result:
    """Measure every artifact of the bundles on every device, one device after the other, and read the result back.

    What goes wrong on a device is a line of the result, and the others are measured all the same.

    Raises:
        UsageError: there is nothing to measure, or nothing of one target or entry, or two bundles have one name.
        UnknownDevice: a specification that names no kind of device.
    """
    specs = tuple(dict.fromkeys(inquiry.specs))
    for spec in specs:
        devices.kind(devices.split(spec)[0])
    with tell("Checking the checksums"):
        bundles = [store.read_bundle(folder) for folder in inquiry.folders]
    candidates = tuple(_candidates(bundles, inquiry.targets, inquiry.entries))
    if not candidates:
        raise UsageError(
            "There is nothing to measure in what was named.", hint="See what a bundle holds with: edgefuse verify BUNDLE"
        )
    _require_each(bundles, inquiry.targets, inquiry.entries)
    order = Order(specs, tuple(each.key for each in candidates), inquiry.routine, inquiry.wants)
    with begin_result(output, order, versions(extras()), resume=resume, overwrite=overwrite) as writer:
        for candidate in candidates:
            writer.write("subject", key=candidate.key, subject=dataclasses.asdict(candidate.subject))
        for spec in specs:
            _measure_on(spec, candidates, order, writer, tell)
        writer.write("end")
    return read_result(output)


def require_whole(result: Result) -> None:
    """Raise `BenchFailed` where something was tried and failed, answered wrongly, or could not be measured on a whole device."""
    failures = [failure for each in result.measurements for failure in each.failures]
    wrong = [visit.void for each in result.measurements for visit in each.visits if visit.void]
    reasons = [*(each.reason for each in result.absences), *(each.reason for each in failures), *wrong]
    for spec in result.order.devices:
        there = [each for each in result.measurements if each.device.spec == _own(spec, result)]
        if there and not any(each.valid for each in there) and not reasons:
            reasons.append(next(iter(there[0].refusals.values()), f"Nothing was measured on {spec}."))
    if reasons:
        more = f" And {len(reasons) - 1} more." if len(reasons) > 1 else ""
        first = next(filter(None, [*(each.hint for each in result.absences), *(each.hint for each in failures)]), "")
        raise BenchFailed(
            f"Not everything could be measured: {reasons[0]}{more}",
            hint="; ".join(filter(None, [first.rstrip("."), "what was measured is kept, and --resume goes on from there"])),
        )


def _candidates(bundles: Sequence[Bundle], targets: Sequence[str], entries: Sequence[str]) -> Iterator[Candidate]:
    names = [_name(bundle) for bundle in bundles]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"Two bundles are called {min(twice)}.", hint="Rename a folder: results tell bundles by their names.")
    for name, bundle in zip(names, bundles, strict=True):
        for export in bundle.exports:
            if targets and export.artifact.target not in targets:
                continue
            for mode in export.artifact.modes:
                for entry in mode.inputs:
                    if not entries or entry in entries or mode.name in entries:
                        yield _candidate(name, bundle, export, mode, entry)


def _require_each(bundles: Sequence[Bundle], targets: Sequence[str], entries: Sequence[str]) -> None:
    """Raise a `UsageError` where one of what was named is in no bundle: it would be left out in silence."""
    asked = [*((each, (each,), entries) for each in targets), *((each, targets, (each,)) for each in entries)]
    for name, some_targets, some_entries in asked:
        if not any(True for _ in _candidates(bundles, some_targets, some_entries)):
            raise UsageError(
                f"There is nothing called {name!r} in what was named.",
                hint="See what a bundle holds with: edgefuse verify BUNDLE",
            )


def _answered_ms(artifact: Artifact, entry: str) -> int:
    """How much speech a call of an entry answers."""
    how, specs = artifact.streaming.get(entry), artifact.inputs[entry]
    return how.chunk_ms if how else capacity(specs) * intake_of(specs).frame_ms


def _name(bundle: Bundle) -> str:
    return bundle.folder.resolve().name


def _candidate(name: str, bundle: Bundle, export: Export, mode: Mode, entry: str) -> Candidate:
    artifact = export.artifact
    subject = Subject(
        model=name,
        target=artifact.target,
        precision=artifact.precision,
        entry=entry,
        audio_ms=_answered_ms(artifact, entry),
        streaming=mode.streaming is not None,
        checkpoint=bundle.checkpoint,
        folded=bundle.folded,
        artifact=export.digest,
        size_bytes=export.size_bytes,
        partitions=export.structure.partitions,
        operators=sum(export.structure.operators.values()),
        outside=sum(export.structure.outside.values()),
        wer_percent=rates_by_part(export.findings[mode.name].words, bundle.references[mode.name].parts),
    )
    bar = export.verdict.moved.get("snr_db", BARS[artifact.precision].snr_db)
    return Candidate(subject, artifact, entry, bundle.references[mode.name].goldens, bar)


def _measure_on(spec: str, candidates: Sequence[Candidate], order: Order, writer: Writer, tell: Tell) -> None:
    """Everything on one device; that it is not there, or not any more, is written down."""
    waiting = _waiting(spec, candidates, order, writer.result)
    if not waiting:
        return
    try:
        with devices.connect(spec) as connection:
            _require_same(spec, connection.info, writer)
            writer.write("device", asked=spec, device=dataclasses.asdict(connection.info))
            refused = set(_refused(connection, candidates, writer))
            for turn in waiting:
                want, round_, candidate = turn
                if (want, candidate.key) in refused or round_ >= _rounds(connection.info, order.routine):
                    continue
                if not _one(connection, turn, order.routine, writer, tell):
                    refused.add((want, candidate.key))
    except (DeviceError, UsageError) as error:
        writer.write("absence", absence=dataclasses.asdict(Absence(spec, error.sentence, error.hint or "")))


Turn = tuple["Want", int, Candidate]


def _waiting(spec: str, candidates: Sequence[Candidate], order: Order, before: Result | None) -> list[Turn]:
    """What is left to do, in turns: round by round, the order turned by one and reversed from round to round."""
    done = _done(spec, before, order.routine)
    turns: list[Turn] = []
    for round_ in range(order.routine.processes):
        start = round_ % len(candidates)
        turned = [*candidates[start:], *candidates[:start]]
        turns += [("latency", round_, each) for each in (reversed(turned) if round_ % 2 else turned)]
    looks: tuple[Want, ...] = ("memory", "profile")
    turns += [(want, 0, each) for want in looks for each in candidates]
    return [turn for turn in turns if turn[0] in order.wants and (turn[0], turn[1], turn[2].key) not in done]


def _done(spec: str, before: Result | None, routine: Routine) -> set[tuple[Want, int, str]]:
    """What was measured, or refused: a device does not learn to do it."""
    done: set[tuple[Want, int, str]] = set()
    for each in before.measurements if before else ():
        if before is None or each.device.spec != _own(spec, before):
            continue
        key = key_of(each.subject)
        refused = set(WANTS) if "latency" in each.refusals else set(each.refusals)
        rounds = {visit.round for visit in each.visits} | set(range(_rounds(each.device, routine), routine.processes))
        done |= {("latency", round_, key) for round_ in (range(routine.processes) if "latency" in refused else rounds)}
        looks: tuple[tuple[Want, object], ...] = (("memory", each.memory), ("profile", each.profile))
        done |= {(want, 0, key) for want, found in looks if found or want in refused}
    return done


def _own(spec: str, result: Result) -> str:
    """What a device calls itself that was asked for by a specification: `arm64` is `arm64:cortex-a76`."""
    return result.devices[spec].spec if spec in result.devices else spec


def _require_same(spec: str, info: DeviceInfo, writer: Writer) -> None:
    """Raise a `UsageError` where what was measured before comes from another machine, or one that has changed since."""
    before = writer.result.devices.get(spec) if writer.result else None
    if before is None or before == info:
        return
    then, now = ({"name": each.name, **each.facts, "specification": each.spec} for each in (before, info))
    what = next((name for name in {**then, **now} if then.get(name) != now.get(name)), "clock")
    raise UsageError(
        f"{spec} is not what it was when {writer.path} was begun: its {what} is {now.get(what, NOT_TOLD)}, "
        f"and was {then.get(what, NOT_TOLD)}.",
        hint="Measure it into another result, with another -o",
    )


def _refused(connection: Connection, candidates: Sequence[Candidate], writer: Writer) -> Iterator[tuple[Want, str]]:
    """What the device cannot run at all: written down, and not tried."""
    for candidate in candidates:
        if reason := connection.refusal(candidate.artifact):
            writer.write("refusal", device=connection.info.spec, subject=candidate.key, want="latency", reason=reason)
            yield from ((want, candidate.key) for want in WANTS)


def _one(connection: Connection, turn: Turn, routine: Routine, writer: Writer, tell: Tell) -> bool:
    """One process: a visit, a look at memory or operators, or a failure in words; whether the device can do such a thing."""
    want, round_, candidate = turn
    info, subject = connection.info, candidate.subject
    where = {"device": info.spec, "subject": candidate.key}
    job = Job(candidate.artifact, candidate.entry, candidate.feed(info.clock), routine, want)
    time.sleep(routine.cool_down_ms / 1000)
    what = f"round {round_ + 1} of {_rounds(info, routine)}" if want == "latency" else want
    with tell(f"{info.spec}: {subject.model}, {subject.target}, {subject.precision}, {subject.entry}: {what}"):
        before = connection.conditions()
        try:
            run = connection.run(job)
        except UsageError as error:
            writer.write("refusal", **where, want=want, reason=error.sentence)
            return False
        except RunFailed as error:
            failure = Failure(round_, want, error.sentence, error.hint or "")
            writer.write("failure", **where, failure=dataclasses.asdict(failure))
            return True
        after: Mapping[str, str] = {}
        with suppress(DeviceError):  # a run that is whole counts; whether the device is gone, the next turn finds out
            after = connection.conditions()
    conditions = {name: (told, after.get(name, NOT_TOLD)) for name, told in before.items()}
    writer.write(**_line(candidate, run, job, round_, conditions), **where)
    return True


def _rounds(info: DeviceInfo, routine: Routine) -> int:
    return min(routine.processes, COUNTED_PROCESSES) if info.clock == "instructions" else routine.processes


def _line(candidate: Candidate, run: Run, job: Job, round_: int, conditions: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The line of what was wanted; of what answered wrongly nothing is believed, not its memory either."""
    visit = _visit(candidate, run, job, round_, conditions)
    if job.want == "latency":
        return {"kind": "visit", "visit": visit_json(visit)}
    if visit.void:
        return {"kind": "failure", "failure": dataclasses.asdict(Failure(round_, job.want, visit.void))}
    if job.want == "memory":
        return {"kind": "memory", "memory": dataclasses.asdict(Memory(run.peak_bytes or 0, run.before_bytes or 0))}
    operators = [dataclasses.asdict(each) for each in run.profile]
    return {"kind": "profile", "profile": {"operators": operators, "call_ns": run.profiled_ns or 0}}


def _visit(candidate: Candidate, run: Run, job: Job, round_: int, conditions: Mapping[str, tuple[str, str]]) -> Visit:
    """A process, judged by its answers."""
    snr_db, agreeing, frames = judged(job.feed, run.answers, candidate.goldens)
    void = ""
    if snr_db < candidate.least_snr_db:
        void = f"Its answers are wrong: {snr_db:.1f} dB against the golden vectors, {candidate.least_snr_db:g} dB required."
    elif run.unsteady:
        void = f"{run.unsteady} of its answers changed from one time to the next."
    return Visit(
        round_,
        run.samples,
        run.cold_load,
        run.warm_load,
        run.first,
        run.warm_up_calls,
        run.capped,
        calls=len(job.feed),
        snr_db=snr_db,
        agreeing_frames=agreeing,
        frames=frames,
        unsteady=run.unsteady,
        classes=run.classes,
        conditions=conditions,
        told=run.told,
        void=void,
    )

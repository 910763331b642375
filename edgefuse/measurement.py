"""The nouns of measurement: what is run, where, by which clock it is timed, and whether its answers were right.

Numbers of different clocks are of different types, and what divides or compares two of them takes two of one type: wall time of
this host, wall time of another device, virtual time of an emulator and counted instructions cannot meet in a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgefuse.values import Artifact

Clock = Literal["host", "device", "virtual", "instructions"]
CLOCKS: tuple[Clock, ...] = get_args(Clock)
Want = Literal["latency", "memory", "profile"]
WANTS: tuple[Want, ...] = get_args(Want)
NOT_TOLD = "not told"  # what a device does not say about itself


@dataclass(frozen=True, slots=True)
class _Samples:
    """One number per call, in the order of the calls."""

    values: tuple[int, ...]


class HostTime(_Samples):
    """Wall time on the host that runs edgefuse, in nanoseconds."""

    __slots__ = ()


class DeviceTime(_Samples):
    """Wall time by a device's own monotonic clock, in nanoseconds."""

    __slots__ = ()


class VirtualTime(_Samples):
    """Time by an emulator's clock, which counts instructions, in virtual nanoseconds: repeatable, and no device's latency."""

    __slots__ = ()


class Instructions(_Samples):
    """Instructions executed, counted by an emulator: exact, and no device's latency."""

    __slots__ = ()


Samples = HostTime | DeviceTime | VirtualTime | Instructions
S = TypeVar("S", HostTime, DeviceTime, VirtualTime, Instructions)  # two of one clock
TYPES: Mapping[Clock, type[Samples]] = MappingProxyType(
    {"host": HostTime, "device": DeviceTime, "virtual": VirtualTime, "instructions": Instructions}
)


def clock_of(samples: Samples) -> Clock:
    """By which clock they were taken."""
    return next(clock for clock, kind in TYPES.items() if type(samples) is kind)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The record of a device.

    Attributes:
        spec: what finds it again, for example "adb:emulator-5554".
        name: what people call it.
        clock: by which it is timed.
        facts: what else it tells about itself, in words: brand, model, chip, cores, memory, system, runtimes; "not told" where
            it is asked and does not say.
    """

    spec: str
    name: str
    clock: Clock
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Routine:
    """How something is timed.

    A process is fresh; it loads, calls once, warms up, and is then timed until both a count and a duration are reached, or a cap.
    The artifacts that are compared take turns, process by process.

    Attributes:
        name: "quick", "usual" or "thorough"; and "changed" behind it where something is not as usual.
        processes: how many of each artifact and entry.
        warm_up_calls: calls that are not timed, at least.
        warm_up_ms: for how long, at least.
        calls: timed calls, at least.
        duration_ms: for how long, at least.
        most_calls: the cap; a process that ends there is marked.
        most_ms: the same, of duration.
        cool_down_ms: the pause before a process.
        threads: of the runtime.
        cores: the cores that it is bound to, where the device can; none of them means that it is not.
        paced: chunks come at the pace of speech, not at full speed.
        limit_s: a process that takes longer is ended, and has failed.
    """

    name: str = "usual"
    processes: int = 12
    warm_up_calls: int = 10
    warm_up_ms: int = 300
    calls: int = 50
    duration_ms: int = 1000
    most_calls: int = 2000
    most_ms: int = 10_000
    cool_down_ms: int = 100
    threads: int = 1
    cores: tuple[int, ...] = ()
    paced: bool = False
    limit_s: int = 600


QUICK = Routine("quick", processes=3, warm_up_calls=3, warm_up_ms=100, calls=20, duration_ms=200, cool_down_ms=0)
USUAL = Routine()
THOROUGH = Routine("thorough", processes=30, calls=100, duration_ms=2000, most_calls=5000, most_ms=20_000, cool_down_ms=500)
ROUTINES: Mapping[str, Routine] = MappingProxyType({each.name: each for each in (QUICK, USUAL, THOROUGH)})


def routine_of(name: str | None, **changes: object) -> Routine:
    """A named routine, the usual one if no name is given, with some values changed; None changes nothing."""
    routine = USUAL if name is None else ROUTINES[name]
    changed = replace(routine, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    return changed if changed == routine else replace(changed, name=f"{routine.name}, changed")


@dataclass(frozen=True, slots=True)
class Call:
    """What an application gives to an entry at once.

    Attributes:
        inputs: by name; of a stream that goes on, without the caches, which are those of the call before.
        begins: whether an utterance begins: every cache is given then.
        utterance: of which golden vector it is a piece.
        frames: how many frames of its answer are valid.
    """

    inputs: Mapping[str, NDArray[np.float32]]
    begins: bool
    utterance: str
    frames: int


@dataclass(frozen=True, slots=True)
class Job:
    """One process on a device.

    Attributes:
        artifact: what is run.
        entry: which way in.
        feed: real speech, call by call; after the last one it begins again.
        routine: how; on a device that counts instructions the feed is run exactly once, after one call that is not counted.
        want: what is looked at: memory and profile have processes of their own.
    """

    artifact: Artifact
    entry: str
    feed: tuple[Call, ...]
    routine: Routine
    want: Want = "latency"

    @property
    def chunk_ms(self) -> int | None:
        """How much speech a call brings, if the entry streams."""
        how = self.artifact.streaming.get(self.entry)
        return how.chunk_ms if how else None


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """What the calls of one operator take, of one call of the entry.

    Attributes:
        name: the runtime's name of it, perhaps with its place.
        kind: what it computes: linear, convolution, attention product, softmax, conversion, layout, elementwise, or the runtime.
        where: the delegate that runs it, or "outside".
        count: how many there are of it.
        time_ns: of all of them, per call of the entry.
    """

    name: str
    kind: str
    where: str
    count: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class Run:
    """What a device tells of a job, unjudged.

    Attributes:
        samples: one per timed call; call i of them is call i (modulo its length) of the feed.
        cold_load: loading, the file not in the system's memory where the device can see to that; in the clock's unit.
        warm_load: loading once more in the same process, where the device does that.
        first: the first call after loading.
        warm_up_calls: how many were not timed.
        capped: whether a cap ended it.
        answers: per call of the feed the logits (T, V) of its first timed time.
        unsteady: timed answers that were not, bit for bit, those of the first time.
        classes: instructions by class, over the timed calls, where they are counted.
        peak_bytes: most resident memory of the process, where memory was wanted.
        before_bytes: resident memory before anything was loaded.
        profile: where that was wanted.
        profiled_ns: what one call of the entry took while it was profiled.
        told: what else the runner says, in words: versions, kernels.
    """

    samples: Samples
    cold_load: int | None
    warm_load: int | None
    first: int | None
    warm_up_calls: int
    capped: bool
    answers: tuple[NDArray[np.float32], ...]
    unsteady: int
    classes: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    before_bytes: int | None = None
    profile: tuple[OperatorTime, ...] = ()
    profiled_ns: int | None = None
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: one entry of one artifact, and what is known of it from its bundle.

    Attributes:
        model: the bundle's folder name: what people tell it by.
        target: the runtime.
        precision: of its arithmetic.
        entry: the way in.
        audio_ms: how much speech one full call takes.
        streaming: whether the calls are chunks.
        checkpoint: digest of the checkpoint.
        folded: digest of the folded model.
        artifact: digest of the artifact.
        size_bytes: of the artifact.
        partitions: delegated pieces, where the runtime delegates.
        operators: how many the artifact has, in all entries.
        outside: how many of them stand outside every delegate.
        wer_percent: of the artifact by part of the test set, in this mode, as its bundle says.
    """

    model: str
    target: str
    precision: str
    entry: str
    audio_ms: int
    streaming: bool
    checkpoint: str
    folded: str
    artifact: str
    size_bytes: int
    partitions: int | None
    operators: int
    outside: int
    wer_percent: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Visit:
    """One process, judged: its answers were compared with the golden vectors, and the number is void where they are wrong.

    Attributes:
        round: which turn of the subject on the device it was, from 0.
        samples: one per timed call.
        cold_load: see `Run`.
        warm_load: see `Run`.
        first: see `Run`.
        warm_up_calls: see `Run`.
        capped: see `Run`.
        calls: of one pass through the feed.
        snr_db: of the answers against the golden vectors, the worst utterance.
        agreeing_frames: frames with the right best token.
        frames: all of them.
        unsteady: see `Run`.
        classes: see `Run`.
        conditions: what the device said of its state before and after: temperature, governor, load.
        told: see `Run`.
        void: why the number does not count, in words; "" where it does.
    """

    round: int
    samples: Samples
    cold_load: int | None
    warm_load: int | None
    first: int | None
    warm_up_calls: int
    capped: bool
    calls: int
    snr_db: float
    agreeing_frames: int
    frames: int
    unsteady: int
    classes: Mapping[str, int] = field(default_factory=dict)
    conditions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)
    void: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A process that did not end well: a row like the others.

    Attributes:
        round: which turn it was.
        want: what it was looking for.
        reason: one sentence.
        hint: what to do about it.
    """

    round: int
    want: Want
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Absence:
    """A device that was not there, or not any more.

    Attributes:
        spec: which.
        reason: one sentence.
        hint: what to do about it.
    """

    spec: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Most resident memory of a process of its own, and what it had before anything was loaded."""

    peak_bytes: int
    before_bytes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of one call goes, in a process of its own."""

    operators: tuple[OperatorTime, ...]
    call_ns: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was measured of one subject on one device.

    Attributes:
        device: where.
        subject: what.
        routine: how.
        visits: its processes, in the order of their rounds; those that are void too.
        failures: what did not end well.
        memory: if it was looked at.
        profile: if it was looked at.
        refusals: why the device cannot run it, or cannot look at its memory or its operators, in words.
    """

    device: DeviceInfo
    subject: Subject
    routine: Routine
    visits: tuple[Visit, ...] = ()
    failures: tuple[Failure, ...] = ()
    memory: Memory | None = None
    profile: Profile | None = None
    refusals: Mapping[Want, str] = field(default_factory=dict)

    @property
    def valid(self) -> tuple[Visit, ...]:
        """The visits whose numbers count."""
        return tuple(visit for visit in self.visits if not visit.void)

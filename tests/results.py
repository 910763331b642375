"""Results of `edgefuse bench` made by hand: a small one for expected pages, and a large one to look at."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from edgefuse.bench.result import Order, Result, Writer, begin_result, key_of, read_result, visit_json
from edgefuse.measurement import (
    QUICK,
    TYPES,
    USUAL,
    WANTS,
    Absence,
    DeviceInfo,
    Failure,
    Measurement,
    Memory,
    OperatorTime,
    Profile,
    Routine,
    Subject,
    Visit,
)

FACTS = {"cpu": "Example A1, 8 cores", "memory": "16 GB", "system": "Linux 6.1", "executorch": "1.5.1"}
HOST = DeviceInfo("host", "Example A1, 8 cores", "host", FACTS)
PHONE = DeviceInfo("adb:R58M", "Example Phone 7", "device", {**FACTS, "brand": "Example", "thermal": "not told"})
COUNTER = DeviceInfo("arm64:cortex-a76", "qemu-aarch64, cortex-a76", "instructions", {"emulator": "qemu 7.2"})
BOARD = DeviceInfo("board:cortex-a53", "qemu-system-aarch64, cortex-a53", "virtual", {"emulator": "qemu 7.2"})
GONE = Absence("ssh:pi@board", "ssh:pi@board does not answer.", "Is it on? Try: ssh pi@board")
KINDS = {"linear": 0.5, "convolution": 0.2, "attention product": 0.12, "softmax": 0.05, "layout": 0.06, "elementwise": 0.04}
CLASSES = {"vector": 0.55, "load and store": 0.25, "integer": 0.12, "branch": 0.05, "scalar float": 0.03}


def a_subject(model: str = "fusionformer-tiny", **changes: object) -> Subject:
    made = Subject(
        model=model,
        target="executorch",
        precision="fp32",
        entry="stream_640ms",
        audio_ms=640,
        streaming=True,
        checkpoint=_digest(model.removesuffix("-int8")),
        folded=_digest(f"{model.removesuffix('-int8')} folded"),
        artifact="",
        size_bytes=4_321_000,
        partitions=3,
        operators=240,
        outside=12,
        wer_percent={"seen": 2.13, "unseen": 14.71},
    )
    made = dataclasses.replace(made, **changes)
    return dataclasses.replace(made, artifact=_digest(f"{made.model} {made.target} {made.precision}"))


def a_visit(round_: int, values: Sequence[int], device: DeviceInfo = HOST, **changes: object) -> Visit:
    first = int(values[0] * 1.8)
    made = Visit(
        round_,
        TYPES[device.clock](tuple(values)),
        first * 9,
        first * 4,
        first,
        10,
        False,
        min(16, len(values)),
        61.25,
        512,
        512,
        0,
    )
    return dataclasses.replace(made, **changes)


def steady(
    device: DeviceInfo = HOST, subject: Subject | None = None, latency: float = 2.0e6, processes: int = 10, calls: int = 100
) -> Measurement:
    """Ten processes of a hundred calls, alike but for a little that is the same every time; exact where the clock is."""
    if device.clock == "instructions":
        visits = [a_visit(i, [int(latency + 1000 * k) for k in range(16)], device, classes=_classes(latency)) for i in range(3)]
    else:
        visits = [
            a_visit(i, [int(latency * (1 + 0.002 * (i * 7 % 5) + 0.0004 * (k * 37 % 50))) for k in range(calls)], device)
            for i in range(processes)
        ]
    return Measurement(device, subject or a_subject(), USUAL, tuple(visits), memory=Memory(41_000_000, 23_000_000))


def a_result(
    measurements: Sequence[Measurement], absences: Sequence[Absence] = (), routine: Routine = USUAL, **changes: object
) -> Result:
    """As if it had been read."""
    order = Order(
        tuple(dict.fromkeys(each.device.spec for each in measurements)),
        tuple(dict.fromkeys(key_of(each.subject) for each in measurements)),
        routine,
        WANTS,
    )
    made = Result(
        Path("result.jsonl"),
        _digest("result"),
        {"edgefuse": "0.1.0", "torch": "2.13.0"},
        order,
        tuple(measurements),
        tuple(absences),
        True,
    )
    return dataclasses.replace(made, **changes)


def write(result: Result, path: Path) -> Path:
    """The same, on the disk."""
    with begin_result(path, result.order, result.tools, resume=False, overwrite=False) as writer:
        for each in {key_of(each.subject): each.subject for each in result.measurements}.values():
            writer.write("subject", key=key_of(each), subject=dataclasses.asdict(each))
        for device in {each.device.spec: each.device for each in result.measurements}.values():
            writer.write("device", device=dataclasses.asdict(device))
        for each in result.measurements:
            _write(each, writer)
        for absence in result.absences:
            writer.write("absence", absence=dataclasses.asdict(absence))
        if result.ended:
            writer.write("end")
    read_result(path)
    return path


def _write(each: Measurement, writer: Writer) -> None:
    where = {"device": each.device.spec, "subject": key_of(each.subject)}
    for visit in each.visits:
        writer.write("visit", **where, visit=visit_json(visit))
    for failure in each.failures:
        writer.write("failure", **where, failure=dataclasses.asdict(failure))
    for want, reason in each.refusals.items():
        writer.write("refusal", **where, want=want, reason=reason)
    if each.memory:
        writer.write("memory", **where, memory=dataclasses.asdict(each.memory))
    if each.profile:
        writer.write("profile", **where, profile=dataclasses.asdict(each.profile))


def small() -> Result:
    """Two models that took turns on the host and on an emulator; a device that was not there, an answer that was wrong."""
    conformer = a_subject(
        "conformer-tiny", wer_percent={"seen": 2.2, "unseen": 14.71}, size_bytes=4_900_000, outside=30, partitions=9
    )
    wrong = steady(HOST, a_subject("broken", target="tflite", partitions=None), processes=2)
    void = tuple(
        dataclasses.replace(each, snr_db=3.25, void="Its answers are wrong: 3.2 dB, 40 dB required.") for each in wrong.visits
    )
    return a_result(
        [
            dataclasses.replace(steady(HOST, a_subject(), 2.0e6), profile=_profile(2.1e6, 3)),
            steady(HOST, conformer, 2.5e6),
            dataclasses.replace(wrong, visits=void, memory=None, refusals={"memory": "It does not tell its memory."}),
            dataclasses.replace(
                steady(COUNTER, a_subject(), 12.0e6), failures=(Failure(0, "profile", "It died.", "Try again."),)
            ),
            steady(COUNTER, conformer, 15.0e6),
        ],
        [GONE],
    )


def large() -> Result:
    """Four bundles, two runtimes, two ways in, four devices: with noise, drifts, doubts, failures."""
    dice = random.Random(5)  # noqa: S311 - made-up numbers
    measurements = [
        _noisy(dice, device, subject, pace * slowness)
        for device, slowness in ((HOST, 1.0), (PHONE, 2.7), (COUNTER, 5.2), (BOARD, 9.0))
        for subject, pace in _subjects()
    ]
    measurements[3] = dataclasses.replace(
        measurements[3],
        failures=(Failure(4, "latency", "The process was killed by signal 9.", "Is there enough memory? See: dmesg"),),
    )
    bad = measurements[18]
    measurements[18] = dataclasses.replace(
        bad,
        visits=tuple(
            dataclasses.replace(
                each, snr_db=12.3, void="Its answers are wrong: 12.3 dB against the golden vectors, 20 dB required."
            )
            for each in bad.visits
        ),
    )
    measurements[21] = dataclasses.replace(
        measurements[21],
        visits=(),
        memory=None,
        profile=None,
        refusals={"latency": "The runtime has no kernel for quantized_decomposed::choose_qparams on this device."},
    )
    return a_result(measurements, [GONE], routine=dataclasses.replace(QUICK, name="custom", processes=10), ended=False)


def _subjects() -> list[tuple[Subject, float]]:
    made = []
    for model, slow, wer in (("fusionformer-tiny", 1.0, 14.7), ("conformer-tiny", 1.24, 14.4)):
        for precision, quick, worse in (("fp32", 1.0, 0.0), ("int8", 0.58, 0.6)):
            for target, times in (("executorch", 1.0), ("tflite", 1.3)):
                for entry, audio_ms, streaming, cost in (
                    ("offline_5120ms", 5120, False, 11.0e6),
                    ("stream_640ms", 640, True, 2.0e6),
                ):
                    name = model if precision == "fp32" else f"{model}-int8"
                    rates = {
                        "seen": 2.1 + worse,
                        "unseen": wer + worse + (0.9 if streaming else 0) + (0.11 if target == "tflite" else 0),
                    }
                    subject = a_subject(
                        name,
                        target=target,
                        precision=precision,
                        entry=entry,
                        audio_ms=audio_ms,
                        streaming=streaming,
                        wer_percent=rates,
                        size_bytes=int(4.3e6 * (0.3 if precision == "int8" else 1)),
                        partitions=3 if target == "executorch" else None,
                    )
                    made.append((subject, cost * slow * quick * times))
    return made


def _noisy(dice: random.Random, device: DeviceInfo, subject: Subject, latency: float) -> Measurement:
    if device.clock in ("instructions", "virtual"):
        made = steady(device, subject, latency * 6, processes=3, calls=40)
        return dataclasses.replace(made, memory=None, refusals={"memory": "An emulator's memory is not the device's."})
    visits = []
    for round_ in range(10):
        own = latency * dice.gauss(1, 0.02)
        values = [int(own * (1 + abs(dice.gauss(0, 0.03)) + (dice.random() < 0.03) * dice.random() * 2)) for _ in range(160)]
        conditions = {"load": ("3.1", "3.0"), "temperature": ("41.0", "44.5"), "governor": ("schedutil", "schedutil")}
        visits.append(a_visit(round_, values, device, conditions=conditions))
    memory = Memory(int(dice.uniform(35e6, 60e6)), 23_000_000)
    return Measurement(device, subject, USUAL, tuple(visits), memory=memory, profile=_profile(latency * 1.05, 20))


def _profile(call_ns: float, count: int) -> Profile:
    operators = [
        OperatorTime(
            f"{kind.replace(' ', '_')}_{index}",
            kind,
            "xnnpack" if kind != "layout" else "outside",
            1 + index % 3,
            int(call_ns * share / count),
        )
        for kind, share in KINDS.items()
        for index in range(count)
    ]
    return Profile(tuple(operators), int(call_ns))


def _classes(latency: float) -> dict[str, int]:
    return {name: int(share * latency * 16) for name, share in CLASSES.items()}


def _digest(told: str) -> str:
    import hashlib

    return hashlib.sha256(told.encode()).hexdigest()

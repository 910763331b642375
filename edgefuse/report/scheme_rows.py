"""Ranges, sensitivities and searches of quantization schemes, as tables of words."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from edgefuse.quantize.mixes import front
from edgefuse.quantize.scheme import CLIPPINGS
from edgefuse.report.speech_rows import errors_json
from edgefuse.report.terminal import megabytes, or_dash

if TYPE_CHECKING:
    from edgefuse.explore import Costs
    from edgefuse.quantize.calibrate import Calibration
    from edgefuse.quantize.trial import Trial
    from edgefuse.search import Found

RANGES = ("mode", "value", "smallest", "largest", *(f"for {way}" for way in CLIPPINGS))
SENSITIVITIES = (
    "layer",
    "precision",
    "share of the error",
    "SNR, alone",
    "without it",
    "tokens, alone",
    "without it",
    "WER, alone",
    "without it",
    "latency",
    "size",
)
FOUND = ("scheme", "layers", "SNR", "tokens", "WER loss", "file size", "p50 here", "/ fp32", "on the front", "")


def range_rows(seen: Calibration) -> list[tuple[str, ...]]:
    """Per mode and value: the ends that were seen, and the range that each way of clipping chooses."""
    return [
        (mode, path, f"{each.low:.3g}", f"{each.high:.3g}", *(_span(each.range(way)) for way in CLIPPINGS))
        for mode, values in seen.modes.items()
        for path, each in values.items()
    ]


def calibration_json(seen: Calibration) -> dict[str, Any]:
    """The same, without the histograms."""
    return {
        mode: {
            path: {"low": each.low, "high": each.high, **{way: each.range(way) for way in CLIPPINGS}}
            for path, each in values.items()
        }
        for mode, values in seen.modes.items()
    }


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]:.3g} to {span[1]:.3g}"


def sensitivity_rows(costs: Costs) -> list[tuple[str, ...]]:
    """One row per layer and line, in the order of `SENSITIVITIES`, what brings the most error first."""
    noise = sum(each.alone.noise for each in costs.parts) or 1.0
    latency = sum(costs.latency_ms.values())
    return [
        (
            each.name,
            each.precision,
            f"{100 * each.alone.noise / noise:.1f} %",
            *(f"{trial.snr_db:.1f} dB" for trial in (each.alone, each.without)),
            *(f"{trial.agreement_percent:.2f} %" for trial in (each.alone, each.without)),
            f"{each.alone.errors.wer_percent - costs.exact.errors.wer_percent:+.2f}",
            f"{each.without.errors.wer_percent - costs.whole.errors.wer_percent:+.2f}",
            f"{100 * costs.latency_ms[each.name] / latency:.1f} %" if each.name in costs.latency_ms and latency else "-",
            f"{100 * each.extent.weights / costs.weights:.1f} %" if each.extent else "-",
        )
        for each in sorted(costs.parts, key=lambda each: -each.alone.noise)
    ]


def sensitivity_line(costs: Costs) -> str:
    """What the scheme as a whole does."""
    return (
        f"All of it: {costs.whole.snr_db:.1f} dB, {costs.whole.agreement_percent:.2f} % of the tokens, WER "
        f"{costs.whole.errors.wer_percent:.2f} %, float {costs.exact.errors.wer_percent:.2f} % ({costs.exact.errors.words} words)"
    )


def sensitivity_json(costs: Costs) -> dict[str, Any]:
    """The same for programs."""
    return {
        "float": _trial_json(costs.exact),
        "all": _trial_json(costs.whole),
        "weights": costs.weights,
        "parts": [
            {
                "name": each.name,
                "precision": each.precision,
                "alone": _trial_json(each.alone),
                "without": _trial_json(each.without),
                "latency_ms": costs.latency_ms.get(each.name),
                "extent": dataclasses.asdict(each.extent) if each.extent else None,
            }
            for each in costs.parts
        ],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "snr_db": trial.snr_db,
        "agreement_percent": trial.agreement_percent,
        "frames": trial.frames,
        "errors": errors_json(trial.errors),
    }


def found_rows(found: Found) -> list[tuple[str, ...]]:
    """One row per scheme that was measured, in the order of `FOUND`, the cheapest first."""
    best = front(found.measured)
    return [
        (
            each.scheme.name,
            ", ".join(f"{count} {precision}" for precision, count in sorted(each.layers.items())),
            f"{each.trial.snr_db:.1f} dB",
            f"{each.trial.agreement_percent:.2f} %",
            f"{each.wer_loss:+.2f}",
            megabytes(each.size_bytes),
            or_dash(each.latency_ms, "{:.2f} ms"),
            or_dash(each.latency_ratio, "{:.3f}"),
            "yes" if each in best else "",
            "chosen" if each is found.chosen else "",
        )
        for each in sorted(found.measured, key=lambda each: each.cost)
    ]


def found_json(found: Found) -> dict[str, Any]:
    """The same for programs."""
    return {
        "chosen": found.chosen.scheme.to_json(),
        "binding": found.binding,
        "measured": [
            {
                "scheme": each.scheme.to_json(),
                "layers": dict(each.layers),
                **_trial_json(each.trial),
                "wer_loss": each.wer_loss,
                "size_bytes": each.size_bytes,
                "latency_ms": each.latency_ms,
                "latency_ratio": each.latency_ratio,
            }
            for each in found.measured
        ],
    }

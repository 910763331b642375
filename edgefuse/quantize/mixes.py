"""The cheapest mix of precisions within bounds.

The errors of layers are nearly independent (see `sensitivity`), so a mix's noise n is about the sum of its layers', and for any
price of time the best mix gives each layer the precision p that minimizes

    noise(layer, p) + price * macs(layer) time(p) + worth * weights(layer) bits(p)

with both costs as shares of the float network's. As the price rises one layer after another becomes cheaper, and what it passes
through are the corners of the lower convex hull of noise over cost: nothing beside them is better for any price. `time` and
`bits` only put the mixes into this order; what counts of a mix is measured on its artifact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgefuse.quantize.scheme import LAYER_PRECISIONS, LayerPrecision, Scheme

if TYPE_CHECKING:
    from edgefuse.quantize.sensitivity import Extent
    from edgefuse.quantize.trial import Trial

TIME: Mapping[LayerPrecision, float] = {  # per multiply-accumulate, of fp32's; about what XNNPACK takes on x86 [M]
    "fp32": 1.0,
    "int8": 0.3,
    "int8-dynamic": 0.45,
    "int8-weights": 1.0,
    "int4-weights": 0.55,
    "palette4-weights": 1.0,
    "int8-a16": 1.0,
}
PICTURE = "front.svg"  # of what a search measured, beside its scheme
FLOAT_BITS = 32
BITS: Mapping[LayerPrecision, int] = {
    precision: {"fp32": FLOAT_BITS, "int4-weights": 4, "palette4-weights": 4}.get(precision, 8) for precision in LAYER_PRECISIONS
}
PRICES = tuple(10 ** (exponent / 20) for exponent in range(-220, 41))  # of time, in noise: from nothing to everything
WORTH = 4.0  # of weights against time, where size has a bound: 4 bits are slower than 8 but smaller
ALIKE = 0.02  # of two latencies: closer ones are not told apart
Noises = Mapping[str, Mapping[LayerPrecision, float]]
Mix = Mapping[str, LayerPrecision]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a mix must stay within; None is no bound.

    Attributes:
        wer_loss: points of word error rate above the float model's, on the speech that is tried on.
        latency_ms: median on this host, one thread.
        megabytes: of the artifact, 10^6 bytes.
    """

    wer_loss: float | None = None
    latency_ms: float | None = None
    megabytes: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A scheme, measured on its artifact.

    Attributes:
        scheme: what was exported.
        layers: how many layers have which precision, those that the scheme asks for and the model keeps from it in fp32.
        trial: what the artifact says of the speech.
        wer_loss: points above the float model's.
        size_bytes: of the artifact.
        latency_ratio: median over the rounds of its latency divided by that of the fp32 artifact; None where it is evaluated.
        latency_ms: its median.
    """

    scheme: Scheme
    layers: Mapping[LayerPrecision, int]
    trial: Trial
    wer_loss: float
    size_bytes: int
    latency_ratio: float | None
    latency_ms: float | None

    @property
    def cost(self) -> float:
        """What is made small: latency, or where there is none the size."""
        return float(self.size_bytes) if self.latency_ratio is None else self.latency_ratio

    def broken(self, bounds: Bounds) -> tuple[str, ...]:
        """Which bounds it does not stay within, in words."""
        found = {
            "WER loss": (self.wer_loss, bounds.wer_loss, "{:+.2f} points"),
            "latency": (self.latency_ms, bounds.latency_ms, "{:.2f} ms"),
            "size": (self.size_bytes / 1e6, bounds.megabytes, "{:.2f} MB"),
        }
        return tuple(
            f"{name} {form.format(is_)} (at most {bound:g})"
            for name, (is_, bound, form) in found.items()
            if is_ is not None and bound is not None and is_ > bound
        )


def mixes(noises: Noises, extents: Mapping[str, Extent], worth: float) -> tuple[Mix, ...]:
    """The corners of the hull, from the most accurate to the cheapest; `noises` are of each layer alone, 0 in fp32."""
    macs, weights = sum(each.macs for each in extents.values()), sum(each.weights for each in extents.values())

    def best(layer: str, price: float) -> LayerPrecision:
        extent = extents[layer]

        def costs(precision: LayerPrecision) -> float:
            time: float = extent.macs / macs * TIME[precision]
            size: float = extent.weights / weights * BITS[precision] / FLOAT_BITS
            return noises[layer][precision] + price * (time + worth * size)

        return min(noises[layer], key=costs)

    corners = [{layer: best(layer, price) for layer in noises} for price in PRICES]
    return tuple({tuple(corner.items()): corner for corner in corners}.values())


def spread(corners: Sequence[Scheme], most: int) -> tuple[Scheme, ...]:
    """At most so many of them, evenly, with both ends."""
    if len(corners) <= most:
        return tuple(corners)
    return tuple(corners[round(i * (len(corners) - 1) / (most - 1))] for i in range(most))


def scheme_of_mix(name: str, mix: Mix, like: Scheme) -> Scheme:
    """A mix as a scheme that people can read: the most frequent precision, and a table of the exceptions."""
    usual = Counter(mix.values()).most_common(1)[0][0]
    return replace(like, name=name, layers=usual, table={layer: each for layer, each in mix.items() if each != usual})


def cheapest(measured: Sequence[Measured], bounds: Bounds) -> Measured | None:
    """The cheapest within the bounds; of those that cost about the same, the one with the least noise."""
    fits = [each for each in measured if not each.broken(bounds)]
    if not fits:
        return None
    least = min(each.cost for each in fits)
    return min((each for each in fits if each.cost <= least * (1 + ALIKE)), key=lambda each: (each.wer_loss, each.trial.noise))


def binding(measured: Sequence[Measured], chosen: Measured, bounds: Bounds) -> str:
    """Which bound keeps the search from something cheaper, in a sentence."""
    cheaper = [each for each in measured if each.cost < chosen.cost and each.broken(bounds)]
    if not cheaper:
        return "No bound binds: nothing cheaper was found."
    nearest = max(cheaper, key=lambda each: each.cost)
    return f"{nearest.scheme.name} would be cheaper, but: {', '.join(nearest.broken(bounds))}."


def front(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    """Those that nothing else beats in both WER and cost, from the cheapest on."""
    ordered = sorted(measured, key=lambda each: (each.cost, each.wer_loss, each.trial.noise))
    kept: list[Measured] = []
    for each in ordered:
        if not kept or each.wer_loss < kept[-1].wer_loss:
            kept.append(each)
    return tuple(kept)

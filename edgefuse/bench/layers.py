"""What each layer of an entry takes of its time on a runtime: every layer is an artifact's entry of its own, timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from edgefuse.bench.turns import Turns, interleave
from edgefuse.lower.sites import network_of
from edgefuse.values import Entry, Program, TensorSpec

if TYPE_CHECKING:
    from edgefuse.quantize.sensitivity import Extent
    from edgefuse.target import Target

NOTHING = "nothing"  # an entry that computes next to nothing: what a call costs
SMALL = (1, 8)
FEW = Turns(rounds=20, warm_up=3)


def layer_latencies_ms(target: Target, entry: Entry, extents: Mapping[str, Extent]) -> dict[str, float]:
    """Median latency of each layer in float on this host, one thread, less that of a call; layers of one shape share theirs.

    Nothing where the target is evaluated here, not run.
    """
    network = network_of(entry.graph)
    alike: dict[tuple[object, ...], list[str]] = {}
    for path, extent in extents.items():
        alike.setdefault((str(network.get_submodule(path)), extent.takes), []).append(path)
    alone = {f"layer_{number}": paths for number, paths in enumerate(alike.values())}
    entries = [
        _alone(name, network.get_submodule(paths[0]), extents[paths[0]].takes, extents[paths[0]].makes)
        for name, paths in alone.items()
    ]
    program = Program((*entries, _alone(NOTHING, nn.ReLU(), SMALL, SMALL)), "fp32", parent="")
    with tempfile.TemporaryDirectory() as folder:
        session = target.open(target.export(program, Path(folder), "layers"))
        if session.how == "evaluated":
            return {}
        given = {each.name: {"x": _noise(each.inputs[0].shape)} for each in program.entries}
        samples = interleave({name: partial(session.run, name, inputs) for name, inputs in given.items()}, FEW)
    call = samples.p50_ms(NOTHING)
    return {path: max(0.0, samples.p50_ms(name) - call) for name, paths in alone.items() for path in paths}


class _Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _alone(name: str, layer: nn.Module, takes: tuple[int, ...], makes: tuple[int, ...]) -> Entry:
    given, answer = TensorSpec("x", takes, "float32", "what a layer takes"), TensorSpec("y", makes, "float32", "what it makes")
    return Entry(name, _Alone(layer).eval().requires_grad_(requires_grad=False), (given,), (answer,))


def _noise(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

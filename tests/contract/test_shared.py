"""A block that runs several times is stored once, in every artifact, whole utterances and chunks together."""

from pathlib import Path

import pytest

from edgefuse import store
from edgefuse import target as targets
from edgefuse.fold import fold
from edgefuse.lower import Chunks, lower
from edgefuse.model.cost import parameters
from tests.conftest import a_checkpoint, a_config

WIDE = {"dimension": 64, "heads": 4, "feed_forward": 192, "kernel": 15, "subsampling_channels": 4}
BYTES = 4  # of a float32
SLOW = pytest.mark.slow


def size(name: str, folder: Path, layers: int, *, shared: bool) -> int:
    """Of an artifact with two entries."""
    folded = fold(a_checkpoint(**WIDE, layers=layers, shared_blocks=shared))
    program = lower(folded, (0.64,), "fp32", (Chunks(320, 640),))
    place = folder / f"{name}-{layers}-{shared}"
    place.mkdir()
    return store.size_bytes(targets.find(name).export(program, place, "model").path)


def block_bytes() -> int:
    """Of the folded weights of one block."""
    two, one = (parameters(a_config(**WIDE, layers=layers, folded=True)).stored for layers in (2, 1))
    return BYTES * (two - one)


@pytest.fixture(params=["tflite", pytest.param("executorch", marks=SLOW), pytest.param("coreml", marks=SLOW)])
def name(request: pytest.FixtureRequest) -> str:
    """The name of a target whose packages are there."""
    lacking = targets.shelf()[request.param].load().missing()
    if lacking:
        pytest.skip(f"{request.param} needs {', '.join(lacking)}")
    return str(request.param)


def test_a_shared_block_that_runs_more_often_adds_its_graph_and_none_of_its_weights(name, tmp_path):
    once, thrice = (size(name, tmp_path, layers, shared=True) for layers in (1, 3))
    assert 0 < thrice - once < block_bytes() / 4


@SLOW
def test_blocks_that_are_not_shared_are_each_stored(name, tmp_path):
    shared, apart = (size(name, tmp_path, 8, shared=shared) for shared in (True, False))
    assert apart - shared > 6.9 * block_bytes()

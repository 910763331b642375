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


def size(name: str, folder: Path, layers: int, *, shared: bool, streams: bool = True) -> int:
    """Of an artifact with an entry for whole utterances, and mostly one for chunks."""
    folded = fold(a_checkpoint(**WIDE, layers=layers, shared_blocks=shared))
    program = lower(folded, (0.64,), "fp32", (Chunks(320, 640),) if streams else ())
    place = folder / f"{name}-{layers}-{shared}-{streams}"
    place.mkdir()
    return store.size_bytes(targets.find(name).export(program, place, "model").path)


def block_bytes() -> int:
    """Of the folded weights of one block."""
    two, one = (parameters(a_config(**WIDE, layers=layers, folded=True)).stored for layers in (2, 1))
    return BYTES * (two - one)


def require(name: str) -> None:
    """Skip where the packages of a target are not there."""
    if lacking := targets.shelf()[name].load().missing():
        pytest.skip(f"{name} needs {', '.join(lacking)}")


every_target = pytest.mark.parametrize("name", ["tflite", "executorch", "coreml"])


def test_a_shared_block_that_runs_twice_adds_its_graph_and_none_of_its_weights(tmp_path):
    require("tflite")
    once, twice = (size("tflite", tmp_path, layers, shared=True, streams=False) for layers in (1, 2))
    assert 0 < twice - once < block_bytes() / 10


@pytest.mark.slow
@every_target
def test_eight_blocks_that_are_one_are_stored_once_for_whole_utterances_and_chunks_together(name, tmp_path):
    require(name)
    one, eight = (size(name, tmp_path, layers, shared=True) for layers in (1, 8))
    apart = size(name, tmp_path, 8, shared=False)
    assert 0 < eight - one < block_bytes() / 2  # the graph of seven more
    assert apart - eight > 6.9 * block_bytes()

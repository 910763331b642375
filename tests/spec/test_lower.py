"""The deployment graph: exact, of fixed shape, and deaf to what lies behind the end of an utterance."""

import pytest
import torch

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.fold import fold
from edgefuse.lower import DeploymentGraph, lower
from tests.conftest import a_checkpoint

CONFIGS = [
    {},
    {"positions": "none"},
    {"conv_expansion": 2},
    {"norm_positions": True},
    {"norm_residual": "block"},
    {"norm": "layer"},
    {"norm": "layer", "conv_norm": "batch"},
]


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "as trained"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_shorter_utterance_gets_the_answer_that_it_gets_alone(changes, folded):
    checkpoint = a_checkpoint(**changes)
    encoder = encoder_of(fold(checkpoint).checkpoint if folded else checkpoint, torch.float64)
    graph = DeploymentGraph(encoder, 40).double().eval()
    features = torch.randn(1, 160, 80).double()
    for frames in (160, 99, 8):
        behind = features.clone()
        behind[:, frames:] = 1e3  # whatever it is, no valid frame may notice
        wanted, _ = encoder(features[:, :frames], torch.tensor([frames]))
        got = graph(behind, torch.tensor([float(frames // 4)]).double())
        torch.testing.assert_close(got[:, : frames // 4], wanted, rtol=1e-9, atol=1e-9)


def test_the_folded_graph_multiplies_by_no_constant_but_the_mask(fusionformer):
    program = lower(fold(fusionformer), [1.0], "fp32")
    exported = torch.export.export(program.entries[0].graph, program.entries[0].example())
    operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert operators.count("aten.mul.Tensor") == 1
    assert not [name for name in operators if "norm" in name]


def test_lengths_are_rounded_up_to_whole_encoder_frames_and_sorted(fusionformer):
    program = lower(fold(fusionformer), [2.0, 0.99, 1.0], "fp32")
    assert [entry.name for entry in program.entries] == ["offline_1000ms", "offline_2000ms"]
    assert program.entries[0].inputs[0].shape == (1, 100, 80)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e5])
def test_an_impossible_length_is_refused(fusionformer, seconds):
    with pytest.raises(UsageError):
        lower(fold(fusionformer), [seconds], "fp32")


def test_half_precision_is_refused_where_it_cannot_count_the_frames(fusionformer):
    with pytest.raises(UsageError, match=r"81\.92 seconds"):
        lower(fold(fusionformer), [82.0], "fp16")
    assert lower(fold(fusionformer), [81.92], "fp16").entries

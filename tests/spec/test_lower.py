"""The deployment graph: exact, of fixed shape, and deaf to what lies behind the end of an utterance."""

import pytest
import torch

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.fold import fold
from edgefuse.lower import Chunks, DeploymentGraph, StreamingGraph, lower, program_of
from edgefuse.model import Context
from tests.conftest import a_checkpoint

CONFIGS = [
    {},
    {"positions": "none"},
    {"conv_expansion": 2},
    {"conv_paths": 2},
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


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "as trained"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_chunks_with_caches_get_the_answer_of_the_whole_recording(changes, folded):
    checkpoint = a_checkpoint(**changes)
    encoder = encoder_of(fold(checkpoint).checkpoint if folded else checkpoint, torch.float64)
    features = torch.randn(1, 163, 80).double()
    for chunk, left, ahead in ((4, 8, 0), (4, 3, 0), (16, 64, 0), (5, 1, 0), (4, 8, 3), (3, 8, 7), (16, 4, 2)):
        asked, context = Chunks(40 * chunk, 40 * left, look_ahead_ms=40 * ahead), Context(chunk, left, ahead)
        entry = program_of(checkpoint, (), "fp32", [asked]).entries[0]
        graph = StreamingGraph(encoder, context).double().eval()
        wanted, _ = encoder(features, torch.tensor([163]), context)
        caches = [torch.zeros(spec.shape).double() for spec in entry.inputs[2:]]
        answers = []
        for start in range(0, 40, chunk):
            frames = min(chunk + ahead, 40 - start)
            given = torch.full((1, 4 * (chunk + ahead), 80), 1e3).double()  # what is behind the end, no valid frame may notice
            given[:, : 4 * frames] = features[:, 4 * start : 4 * (start + frames)]
            logits, *caches = graph(given, torch.tensor([float(frames)]).double(), *caches)
            answers.append(logits[:, : min(chunk, frames)])
        torch.testing.assert_close(torch.cat(answers, 1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "rep", "none"])
def test_padding_that_no_norm_makes_small_is_as_zeros_to_the_bit(norm):
    checkpoint = a_checkpoint(norm=norm)
    offline, stream = program_of(checkpoint, [1.0], "fp32", [Chunks(640, 640)]).entries
    for entry, valid in ((offline, 20.0), (stream, 6.0)):
        silent = torch.randn(entry.inputs[0].shape)
        silent[:, 4 * int(valid) :] = 0
        loud = silent.clone()
        loud[:, 4 * int(valid) :] = 1e30
        rest = [torch.tensor([valid]), *(torch.zeros(spec.shape) for spec in entry.inputs[2:])]
        answers = zip(entry.graph(silent, *rest), entry.graph(loud, *rest), strict=True)
        assert all(torch.equal(*each) for each in answers)


def test_a_streaming_entry_names_its_caches_and_where_they_go_on(fusionformer):
    offline, stream = lower(fold(fusionformer), [1.0], "fp32", [Chunks(150, 310)]).entries
    assert (offline.name, offline.streaming) == ("offline_1000ms", None)
    assert stream.name == "stream_160ms"
    assert stream.streaming is not None
    assert (stream.streaming.chunk, stream.streaming.left) == (4, 8)
    shapes = {spec.name: spec.shape for spec in (*stream.inputs, *stream.outputs)}
    assert shapes["features"] == (1, 16, 80)
    assert all(shapes[given] == shapes[renewed] for given, renewed in stream.streaming.states.items())
    assert [*stream.streaming.states][:5] == ["past", "history", "keys_0", "values_0", "inputs_0"]
    answers = stream.graph(*stream.example())
    assert [tuple(answer.shape) for answer in answers] == [spec.shape for spec in stream.outputs]


def test_a_look_ahead_is_named_and_makes_what_is_taken_longer_than_what_is_answered(fusionformer):
    (entry,) = lower(fold(fusionformer), (), "fp32", [Chunks(160, 320, look_ahead_ms=100)]).entries
    assert entry.name == "stream_160ms_ahead_120ms"
    assert (entry.streaming.chunk_ms, entry.streaming.look_ahead_ms) == (160, 120)
    assert (entry.inputs[0].shape, entry.outputs[0].shape) == ((1, 28, 80), (1, 4, 29))
    (without,) = lower(fold(fusionformer), (), "fp32", [Chunks(160, 320)]).entries
    assert entry.inputs[2:] == without.inputs[2:]  # the caches are the same


@pytest.mark.parametrize(
    "chunks",
    [
        Chunks(0, 2560),
        Chunks(640, 0),
        Chunks(float("nan"), 1),
        Chunks(640, 1e6),
        *(Chunks(640, 640, look_ahead_ms=wrong) for wrong in (-40, 10, 1e6, float("nan"))),
    ],
)
def test_an_impossible_chunk_is_refused(fusionformer, chunks):
    with pytest.raises(UsageError):
        lower(fold(fusionformer), (), "fp32", [chunks])


def test_no_entry_at_all_is_refused(fusionformer):
    with pytest.raises(UsageError, match="needs an entry"):
        lower(fold(fusionformer), (), "fp32")


def test_the_folded_graph_multiplies_by_no_constant_but_the_masks(fusionformer):
    program = lower(fold(fusionformer), [1.0], "fp32")
    exported = torch.export.export(program.entries[0].graph, program.entries[0].example())
    operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert operators.count("aten.mul.Tensor") == 2
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

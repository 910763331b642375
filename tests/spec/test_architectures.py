"""Blocks that are not all alike, frames that grow fewer, a second pass: one model, offline, in chunks and lowered."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import BadConfig, UsageError
from edgefuse.fold import exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.lower import Chunks, DeploymentGraph, SecondPassGraph, StreamingGraph, program_of
from edgefuse.model import Context, Encoder, EncoderConfig
from edgefuse.model.config import Stage
from edgefuse.model.cost import cost
from edgefuse.model.performer import attend_linearly, phi
from tests.conftest import a_checkpoint, a_config

ARCHITECTURES = {
    "convolution-only": {"layers": 3, "stages": (Stage(2, "none", kernel=7), Stage(1))},
    "narrower": {"stages": (Stage(1, heads=1, attention_dimension=8, feed_forward=12, left=3), Stage(1))},
    "performer": {"stages": (Stage(2, "performer"),)},
    "mixed": {"layers": 3, "stages": (Stage(1, "performer"), Stage(1, "none"), Stage(1, left=2))},
    "shared": {"layers": 3, "shared_blocks": True},
    "by 6": {"subsampling": 6},
    "by 8": {"subsampling": 8},
    "funnel": {"layers": 3, "stages": (Stage(1), Stage(2, stride=2))},
    "two funnels by 6": {"layers": 3, "subsampling": 6, "stages": (Stage(1, stride=2), Stage(2, stride=2, left=5))},
    "cascade": {"layers": 3, "second_pass": 1},
    "cascade behind a funnel": {"layers": 3, "second_pass": 1, "stages": (Stage(1, stride=2), Stage(1, "performer"), Stage(1))},
    "two paths": {"conv_paths": 2, "activation": "relu"},
    "gate shift": {"gate_shift": True, "activation": "swish"},
    "no positions": {"positions": "none", "stages": (Stage(1), Stage(1, "none"))},
}
architectures = pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
norms = pytest.mark.parametrize("norm", ["batch", "layer"])


def deployed(changes, norm="batch"):
    """The folded model in float64."""
    return encoder_of(fold(a_checkpoint(norm, **changes)).checkpoint, torch.float64)


@architectures
@norms
def test_padding_changes_no_valid_frame(changes, norm, padded_batch):
    encoder = Encoder(a_config(norm, **changes)).double().eval()
    features, lengths = padded_batch
    for context in (Context(), Context(4), Context(4, 8)):
        logits, valid = encoder(features.double(), lengths, context)
        for row, length, count in zip(range(3), lengths.tolist(), valid.tolist(), strict=True):
            assert count == length // encoder.config.reduction
            alone, _ = encoder(features[row : row + 1, :length].double(), lengths[row : row + 1], context)
            torch.testing.assert_close(logits[row, :count], alone[0, :count], rtol=1e-9, atol=1e-9)


@architectures
@norms
def test_a_chunk_sees_nothing_behind_it(changes, norm):
    encoder = Encoder(a_config(norm, **changes)).double().eval()
    reduction, features = encoder.config.reduction, torch.randn(1, 160 * encoder.config.rate, 80).double()
    frames = features.shape[1] // reduction
    changed = features.clone()
    changed[:, 8 * reduction :] = 5.0
    for context in (Context(4), Context(4, 8)):
        length = torch.tensor([frames * reduction])
        before, after = (encoder(each, length, context)[0] for each in (features, changed))
        torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(before[:, 8:], after[:, 8:])


@architectures
@norms
def test_it_folds_exactly(changes, norm):
    checkpoint = a_checkpoint(norm, **changes)
    folded = fold(checkpoint)
    error = exactness(checkpoint, folded, *probe(80))
    assert max(error.worst_site, error.end_to_end) < 1e-10
    assert norm == "layer" or not any("running_var" in name for name in folded.checkpoint.weights)


@architectures
@norms
def test_the_deployment_graph_gives_a_shorter_utterance_the_answer_that_it_gets_alone(changes, norm):
    encoder = deployed(changes, norm)
    reduction = encoder.config.reduction
    features = torch.randn(1, 9 * reduction, 80).double()
    wanted, _ = encoder(features, torch.tensor([9 * reduction]))
    padded = torch.nn.functional.pad(features, (0, 0, 0, 5 * reduction), value=7.0)
    got = DeploymentGraph(encoder, 14).double().eval()(padded, torch.tensor([9.0]).double())
    torch.testing.assert_close(got[:, :9], wanted, rtol=1e-9, atol=1e-9)


@architectures
@norms
def test_chunks_with_caches_get_the_answer_of_the_whole_recording(changes, norm):
    checkpoint, encoder = a_checkpoint(norm, **changes), deployed(changes, norm)
    config = encoder.config
    features, frames = torch.randn(1, 22 * config.reduction + 1, 80).double(), 22
    for chunk, left, ahead in ((4, 8, 0), (4, 3, 0), (5, 1, 0), (4, 8, 3), (2, 3, 5)):
        context, window = Context(chunk, left, ahead), chunk + ahead
        wanted, _ = encoder(features, torch.tensor([features.shape[1]]), context)
        asked = Chunks(config.frame_ms * chunk, config.frame_ms * left, look_ahead_ms=config.frame_ms * ahead)
        entry = next(each for each in program_of(checkpoint, (), "fp32", [asked]).entries if each.streaming)
        graph = StreamingGraph(encoder, context).double().eval()
        caches = [torch.zeros(spec.shape).double() for spec in entry.inputs[2:]]
        answers = []
        for start in range(0, frames, chunk):
            count = min(window, frames - start)
            given = torch.full((1, config.reduction * window, 80), 1e3).double()
            given[:, : config.reduction * count] = features[:, config.reduction * start : config.reduction * (start + count)]
            logits, *caches = graph(given, torch.tensor([float(count)]).double(), *caches)
            caches = caches[1:] if config.second_pass else caches
            answers.append(logits[:, : min(chunk, count)])
        torch.testing.assert_close(torch.cat(answers, 1), wanted, rtol=1e-9, atol=1e-9)


def test_the_state_of_a_performer_does_not_grow_with_the_left_context():
    checkpoint = a_checkpoint(**ARCHITECTURES["performer"])
    short, long = (
        sum(torch.Size(spec.shape).numel() for spec in program_of(checkpoint, (), "fp32", [Chunks(160, left)]).entries[0].inputs)
        for left in (160, 8000)
    )
    assert short == long


def test_a_performer_in_chunks_is_its_masked_quadratic_form():
    q, k, v = (torch.randn(2, 3, 23, 8) for _ in range(3))
    valid = torch.arange(23) < torch.tensor([23, 14])[:, None]
    for context, reach in ((Context(5), 5), (Context(23), 23), (Context(), 23)):
        frame = torch.arange(23)
        mask = (frame < (frame // reach * reach + reach)[:, None]) & valid[:, None, None]
        weights = (phi(q) @ phi(k).transpose(-2, -1)) * mask
        wanted = weights @ v / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(attend_linearly(q, k, v, valid, context), wanted, rtol=1e-5, atol=1e-5)


def test_a_performer_sums_in_float32_whatever_it_is_given():
    q, k, v = (torch.randn(1, 2, 4000, 8) for _ in range(3))
    valid = torch.ones(1, 4000, dtype=torch.bool)
    wanted = attend_linearly(q, k, v, valid, Context(16))
    given = attend_linearly(*(each.bfloat16() for each in (q, k, v)), valid, Context(16))
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, wanted, rtol=0.05, atol=0.05)


def test_a_performer_streams_in_no_half_precision():
    checkpoint = a_checkpoint(**ARCHITECTURES["performer"])
    with pytest.raises(UsageError, match="sum over everything"):
        program_of(checkpoint, (), "fp16", [Chunks(160, 320)])
    assert program_of(checkpoint, (1.0,), "fp16").entries


@architectures
def test_the_cost_is_what_the_network_multiplies(changes):
    config = a_config(**changes)
    encoder = Encoder(config).eval()
    graph = DeploymentGraph(encoder, 24).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(torch.zeros(1, 24 * config.reduction, 80), torch.tensor([24.0]))
    counted = counter.get_total_flops() / 2
    wanted = cost(config).macs(24, 24) - (24 * config.dimension * config.vocabulary_size if config.second_pass else 0)
    assert counted == pytest.approx(wanted, rel=0.02)  # the subsampling's first convolutions also hear the zeros before


def test_shared_blocks_are_stored_once_and_run_as_often_as_there_are_layers():
    one, three = (a_checkpoint(layers=layers, shared_blocks=True) for layers in (1, 3))
    assert {n: t.shape for n, t in one.weights.items()} == {n: t.shape for n, t in three.weights.items()}
    encoder, features, length = encoder_of(three), torch.randn(1, 80, 80), torch.tensor([80])
    assert not torch.allclose(encoder(features, length)[0], encoder_of(one)(features, length)[0])
    shallow = Encoder(a_config(layers=1, shared_blocks=True)).eval()
    shallow.load_state_dict(dict(three.weights))
    assert torch.equal(encoder(features, length, depth=1)[0], shallow(features, length)[0])


def test_a_cascade_answers_whole_utterances_with_its_second_pass_and_chunks_with_its_first():
    encoder = Encoder(a_config(layers=3, second_pass=1)).eval()
    features, length = torch.randn(1, 80, 80), torch.tensor([80])
    first, second = encoder.answers(features, length)
    assert torch.equal(encoder(features, length)[0], second)
    assert torch.equal(encoder(features, length, Context(4))[0], encoder.answers(features, length, Context(4))[0])
    assert not torch.allclose(first, second)


def test_the_second_pass_goes_on_from_what_the_first_one_gave_in_chunks():
    encoder = deployed(ARCHITECTURES["cascade"])
    features, length = torch.randn(1, 80, 80).double(), torch.tensor([80])
    encoded, lengths = encoder.encode(features, length, Context(4, 8))
    wanted = encoder.again(encoded, lengths)
    padded = torch.nn.functional.pad(encoded, (0, 0, 0, 6), value=3.0)
    got = SecondPassGraph(encoder, 26).double().eval()(padded, torch.tensor([20.0]).double())
    torch.testing.assert_close(got[:, :20], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subsampling": 5}, "subsampling is 5, not 4, 6, 8"),
        ({"stages": (Stage(1),)}, "1 layers together, not 2"),
        ({"stages": (Stage(2, "performers"),)}, "in stage 1 attention is 'performers'"),
        ({"stages": (Stage(2, heads=3),)}, "does not divide into 3 heads"),
        ({"stages": (Stage(2, kernel=-1),)}, "in stage 1 kernel is -1"),
        ({"stages": (Stage(2, stride=3),)}, "stride is 3, not 1 or 2"),
        ({"stages": (Stage(2, "performer", stride=2),)}, "needs softmax"),
        ({"shared_blocks": True, "stages": (Stage(1), Stage(1))}, "all alike"),
        ({"shared_blocks": True, "stages": (Stage(2, stride=2),)}, "cannot have a stride"),
        ({"second_pass": 2}, "second_pass is 2"),
        ({"second_pass": 1, "shared_blocks": True}, "blocks of its own"),
        ({"second_pass": 1, "stages": (Stage(1), Stage(1, stride=2))}, "belongs to the first pass"),
        ({"norm": "none", "norm_residual": "output"}, "norm_residual is 'output'"),
    ],
    ids=str,
)
def test_an_impossible_architecture_is_refused_in_words(change, words):
    with pytest.raises(BadConfig, match=words):
        a_config(**change)


@architectures
def test_a_config_goes_through_json(changes):
    config = a_config(**changes)
    assert EncoderConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (3, "not a list of stages"),
        ([3], "not a list of stages"),
        ([{"layers": 2, "colour": 1}], "unknown keys: colour"),
        ([{"kernel": 3}], "does not say how many layers"),
        ([{"layers": "2"}], "in stage 1 layers is '2'"),
    ],
    ids=str,
)
def test_stages_that_are_none_are_refused_in_words(stages, words):
    with pytest.raises(BadConfig, match=words):
        EncoderConfig.from_json({**a_config().to_json(), "stages": stages})


def test_a_config_at_rest_says_nothing_of_the_ideas_that_it_does_not_use():
    assert not {"stages", "subsampling", "shared_blocks", "second_pass"} & a_config().to_json().keys()

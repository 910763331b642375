"""The encoder: what it computes, what it may see, and what its statistics count."""

import math

import pytest
import torch

from edgefuse.errors import BadConfig, UsageError
from edgefuse.model import FULL, PRESETS, Context, Encoder, EncoderConfig, preset
from edgefuse.model.attention import Attention, sinusoids
from edgefuse.model.normalization import BatchNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.model.streaming import Sight, attention_mask, gathered, positions_within, spread, windows
from tests.conftest import a_config, lived_in

NORMS = ("batch", "layer")


def parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Encoder(config).parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_padding_behind_an_utterance_does_not_change_its_logits(norm, padded_batch):
    encoder = lived_in(Encoder(a_config(norm))).double()
    features, lengths = padded_batch[0].double(), padded_batch[1]
    together, valid = encoder(features, lengths)
    for row, (frames, outputs) in enumerate(zip(lengths, valid, strict=True)):
        alone, _ = encoder(features[row : row + 1, :frames], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :outputs], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_an_encoder_frame_sees_no_feature_frame_after_its_own_forty_milliseconds(norm):
    encoder = lived_in(Encoder(a_config(norm)))
    context = Context(chunk=1)
    features = torch.randn(1, 80, 80)
    changed = features.clone()
    changed[:, 40:] += 1  # from encoder frame 10 on
    before, after = (encoder(f, torch.tensor([80]), context)[0] for f in (features, changed))
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10], after[:, 10])


def test_a_chunk_sees_itself_and_the_whole_past_without_a_left_context():
    mask = attention_mask(torch.ones(1, 8).bool(), Context(chunk=2))[0, 0].int()
    assert mask[4].tolist() == mask[5].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_a_chunk_sees_itself_and_its_left_context_only():
    seen = attention_mask(torch.ones(1, 7).bool(), Context(chunk=2, left=3))[0, 0, :, 0].int()
    assert seen.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_a_window_holds_its_left_context_its_chunk_and_what_is_ahead_of_it():
    context = Context(chunk=2, left=3, ahead=1)
    frames = torch.arange(1, 8)[None]
    assert spread(frames, context).tolist() == [[1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 0, 0]]
    assert torch.equal(gathered(spread(frames, context), context, 7), frames)
    held = windows(spread(frames, context)[:, None, :, None], context)[0, 0, :, :, 0]
    assert held.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 0]]
    mask = attention_mask(spread(torch.ones(1, 7).bool(), context), context)[0, 0, :, 0]
    assert torch.equal(mask, held > 0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_chunk_sees_its_look_ahead_to_the_last_frame_and_nothing_behind_it(norm):
    encoder = lived_in(Encoder(a_config(norm))).double()
    context, length = Context(chunk=4, left=8, ahead=3), torch.tensor([96])
    features = torch.randn(1, 96, 80).double()
    before, _ = encoder(features, length, context)
    for frame, first in ((11, 8), (10, 4), (7, 4), (6, 0)):  # the first chunk sees frames 0 to 6, the second 4 to 10
        changed = features.clone()
        changed[:, 4 * frame :] += 1
        after, _ = encoder(changed, length, context)
        assert torch.equal(before[:, :first], after[:, :first])
        assert all(not torch.equal(before[:, t], after[:, t]) for t in range(first, 24))


def test_a_look_ahead_to_the_end_of_the_utterance_is_full_context(padded_batch):
    encoder = lived_in(Encoder(a_config())).double()
    features, lengths = padded_batch[0].double(), padded_batch[1]
    full, _ = encoder(features, lengths)
    ahead, _ = encoder(features, lengths, Context(chunk=4, left=4, ahead=60))
    torch.testing.assert_close(ahead[:, :4], full[:, :4])
    assert not torch.allclose(ahead[0, 8:], full[0, 8:])  # these have too little of the past


def test_statistics_of_windows_are_those_of_what_the_chunks_are_fed(padded_batch):
    encoder = lived_in(Encoder(a_config()))
    counted = reestimate(encoder, [padded_batch], Context(chunk=4, left=4, ahead=2))
    assert counted == int(padded_batch[1].sum())
    assert all(torch.isfinite(buffer).all() for buffer in encoder.buffers())


@pytest.mark.parametrize("context", [{"chunk": 4, "ahead": 1}, {"ahead": 1}, {"chunk": 4, "left": 4, "ahead": -1}], ids=str)
def test_a_look_ahead_that_cannot_be_is_refused(context):
    with pytest.raises(UsageError, match="look-ahead"):
        Context(**context)


@pytest.mark.parametrize("positions", ["relative", "none"])
def test_what_a_window_does_not_hold_changes_nothing(positions):
    encoder = lived_in(Encoder(a_config(positions=positions, kernel=1, layers=1))).double()
    context = Context(chunk=2, left=4)
    features = torch.randn(1, 80, 80).double()
    changed = features.clone()
    changed[:, :24] += 1  # encoder frames 0 to 5, and 6 by the subsampling
    before, after = (encoder(f, torch.tensor([80]), context)[0] for f in (features, changed))
    torch.testing.assert_close(before[:, 12:], after[:, 12:], rtol=0, atol=1e-12)
    assert not torch.equal(before[:, 8:10], after[:, 8:10])


def test_a_key_has_the_same_position_whatever_the_left_context_is():
    table = sinusoids(50, 16)[None].double()
    near, far = (positions_within(table, 40, Context(chunk=4, left=left)) for left in (3, 9))
    assert torch.equal(far[:, 6:], near)
    assert torch.equal(near[:, 3:], positions_within(table, 4, FULL))
    rate = torch.exp(torch.arange(0, 16, 2).double() * -(math.log(10_000.0) / 16))
    torch.testing.assert_close(far[0, 0, 0::2], torch.sin(-9 * rate), rtol=0, atol=1e-6)
    torch.testing.assert_close(far[0, 0, 1::2], torch.cos(-9 * rate), rtol=0, atol=1e-6)


def test_a_window_answers_alike_wherever_in_the_stream_it_is():
    encoder = lived_in(Encoder(a_config(kernel=1, layers=1))).double()
    features = torch.randn(1, 160, 80).double()
    context = Context(chunk=5, left=5)
    whole, _ = encoder(features, torch.tensor([160]), context)
    later, _ = encoder(features[:, 60:], torch.tensor([100]), context)  # without the first 15 encoder frames
    torch.testing.assert_close(whole[:, 25:], later[:, 10:], rtol=1e-9, atol=1e-9)


def test_a_chunk_as_long_as_the_utterance_is_full_context(padded_batch):
    encoder = lived_in(Encoder(a_config()))
    full, valid = encoder(*padded_batch)
    chunked, _ = encoder(*padded_batch, Context(chunk=50))
    torch.testing.assert_close(full[1, : valid[1]], chunked[1, : valid[1]])


def test_padding_that_sees_no_valid_key_makes_no_gradient_nan(padded_batch):
    encoder = Encoder(a_config()).train()
    logits, valid = encoder(*padded_batch, Context(chunk=4, left=4))
    logits[2, : valid[2]].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_attention_is_wenets_sum_of_two_products():
    config = a_config()
    attention = Attention(config, config.blocks[0]).double().eval()
    with torch.no_grad():
        attention.u.normal_()
        attention.v.normal_()
    x, table = torch.randn(2, 7, 16).double(), sinusoids(7, 16)[None].double()
    valid = torch.ones(2, 7, dtype=torch.bool)

    def heads(t):
        return t.view(t.shape[0], 7, 2, 8).transpose(1, 2)

    q, k, v = (heads(layer(x, valid)) for layer in (attention.query, attention.key, attention.value))
    p = heads(attention.position(table, valid[:1]))
    scores = (q + attention.u[:, None]) @ k.transpose(2, 3) + (q + attention.v[:, None]) @ p.transpose(2, 3)
    mixed = torch.softmax(scores / math.sqrt(8), -1) @ v
    wanted = attention.output(mixed.transpose(1, 2).reshape(2, 7, 16), valid)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    got = attention(x, Sight(valid, valid, mask, table, FULL, FULL))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_batch_norm_counts_valid_frames_only():
    norm, plain = BatchNorm(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(3, 9, 4)
    valid = torch.arange(9) < torch.tensor([9, 5, 2])[:, None]
    x[~valid] = 1e6
    torch.testing.assert_close(norm(x, valid)[valid], plain(x[valid]))
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_training_on_padded_speech_leaves_the_statistics_of_the_speech(padded_batch):
    features, lengths = padded_batch
    torch.manual_seed(0)
    encoder = Encoder(a_config(dropout=0.0)).train()
    wild = features.clone()
    wild[torch.arange(200) >= lengths[:, None]] = 50.0
    once = Encoder(a_config(dropout=0.0)).train()
    once.load_state_dict(encoder.state_dict())
    encoder(features, lengths)
    once(wild, lengths)
    for name, statistic in encoder.state_dict().items():
        if "running" in name and "subsampling" not in name:
            torch.testing.assert_close(statistic, once.state_dict()[name], msg=name)


def test_reestimated_statistics_are_those_of_the_speech(padded_batch):
    encoder = lived_in(Encoder(a_config()))
    reestimate(encoder, [padded_batch])
    first = encoder.subsampling.conv1.conv
    out = first(torch.nn.functional.pad(padded_batch[0], (0, 0, 3, 0))[:, None])
    valid = torch.arange(out.shape[2]) < ((padded_batch[1] + 2) // 2)[:, None]
    frames = out.permute(0, 2, 3, 1)[valid]
    torch.testing.assert_close(encoder.subsampling.conv1.norm.running_mean, frames.flatten(0, 1).mean(0))
    assert not encoder.training


def test_a_fusionformer_has_no_norm_on_the_residual_stream_and_no_layer_norm():
    names = [type(m).__name__ for m in Encoder(preset("tiny", norm="batch", vocabulary_size=29)).modules()]
    assert "LayerNorm" not in names
    assert names.count("BatchNorm") == 3 + 8 * 11 + 1  # subsampling, per block w1 w2 q k v o pw1 dw pw2 w1 w2, before the head


def test_the_conformer_has_wenets_layer_norms():
    names = [type(m).__name__ for m in Encoder(preset("small", norm="layer", vocabulary_size=29)).modules()]
    assert names.count("LayerNorm") == 73  # five a block, one in each convolution module, one at the end


@pytest.mark.parametrize("size", PRESETS)
def test_twins_have_about_the_same_parameters(size):
    fusion, conformer = (parameters(preset(size, norm=norm, vocabulary_size=29)) for norm in NORMS)
    assert abs(fusion / conformer - 1) < 0.08


SWITCHES = [
    {"conv_expansion": 2},
    {"conv_paths": 2},
    {"conv_relu": "pointwise"},
    {"conv_relu": "depthwise"},
    {"norm_positions": True},
    {"norm_subsampling": False},
    {"norm_residual": "output"},
    {"norm_residual": "block"},
    {"scale_embedding": True},
    {"positions": "none"},
    {"activation": "swish"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_open_choice_is_a_switch_that_changes_the_answer(switch, padded_batch):
    torch.manual_seed(0)
    plain, _ = lived_in(Encoder(a_config()))(*padded_batch)
    torch.manual_seed(0)
    switched, _ = lived_in(Encoder(a_config(**switch)))(*padded_batch)
    assert torch.isfinite(switched).all()
    assert not torch.allclose(plain, switched)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": True}, "layers is True"),
        ({"norm": "group"}, "not one of batch, batch-in-place, layer"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"conv_expansion": 3}, "not 1 or 2"),
        ({"mel_bins": 5}, "leave nothing"),
        ({"dimension": 10**9}, "not within"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_in_words(change, words):
    with pytest.raises(BadConfig, match=words):
        a_config(**change)


def test_a_config_survives_json():
    config = a_config("layer", dropout=0.25)
    assert EncoderConfig.from_json(config.to_json()) == config

"""The front end in the graph: Kaldi's features, whatever the length, and chunks of samples that answer as the whole recording."""

import numpy as np
import pytest
import soundfile
import torch

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import UsageError
from edgefuse.fold import fold
from edgefuse.frontend.intake import of_features, of_samples
from edgefuse.frontend.kaldi import kaldi_log_mel
from edgefuse.frontend.log_mel import KALDI_80, log_mel, normalize
from edgefuse.lower import Chunks, DeploymentGraph, LogMel, PcmGraph, PcmStreamingGraph, StreamingGraph, lower, program_of
from edgefuse.lower.frontend import LONGEST
from edgefuse.model import Context
from edgefuse.recognize import Stream, answer, answers
from edgefuse.speech import read_speech, shipped
from edgefuse_targets import reference
from edgefuse_targets.half import halved
from tests.conftest import a_checkpoint
from tests.spec.test_frontend import snr_db, speech

SAMPLES, FEATURES = of_samples(40), of_features(40)


@pytest.fixture(scope="module")
def checkpoint():
    return a_checkpoint()


@pytest.fixture
def front_end(checkpoint):
    return LogMel(KALDI_80, checkpoint.frontend_mean, checkpoint.frontend_istd)


def normal(features, checkpoint):
    mean, istd = (each.to(features.dtype) for each in (checkpoint.frontend_mean, checkpoint.frontend_istd))
    return normalize(features, mean, istd)


def test_shipped_speech_has_kaldis_features_in_float32(checkpoint, front_end):
    for utterance in read_speech(shipped()).utterances[::6]:
        samples = torch.from_numpy(soundfile.read(utterance.path, dtype="float32")[0])
        frames = KALDI_80.frames(len(samples))
        whole = samples[None, : KALDI_80.samples(frames)]
        got = front_end.float()(torch.nn.functional.pad(whole, (0, -whole.shape[1] % front_end.block)))[0, :frames]
        assert snr_db(normal(kaldi_log_mel(samples), checkpoint).double(), got.double()) > 90


@pytest.mark.parametrize(
    "samples",
    [speech(0.5), 0.3 + speech(0.5), 1e-4 * speech(0.5), torch.zeros(8000), torch.ones(8000)],
    ids=["speech", "on an offset", "a whisper", "silence", "an offset"],
)
def test_one_matrix_is_the_offset_the_pre_emphasis_the_window_and_the_transform(samples, checkpoint, front_end):
    wanted = normal(log_mel(samples.double()[: KALDI_80.samples(48)]), checkpoint)
    got = front_end(samples.double()[None, : KALDI_80.samples(48)])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("graph", "lead"), [(PcmGraph, 240), (PcmStreamingGraph, 0)])
def test_every_number_of_samples_is_so_many_encoder_frames(graph, lead, front_end):
    counts = torch.cat([torch.arange(2000), *(lead + 640 * torch.arange(LONGEST + 1) + off for off in (-1, 0, 1, 639))])
    wanted = torch.div(counts - lead, 640, rounding_mode="floor")
    assert torch.equal(graph(front_end, torch.nn.Identity(), 40)._frames(counts.float()).long(), wanted)


def test_samples_and_their_features_make_the_same_number_of_encoder_frames():
    assert [SAMPLES.frames(count) for count in (0, 239, 879, 880, 1519, 1520)] == [0, 0, 0, 1, 1, 2]
    assert all(SAMPLES.frames(count) == FEATURES.frames(KALDI_80.frames(count)) for count in range(5000))
    assert [SAMPLES.frames(SAMPLES.count(frames)) for frames in (1, 2, 128)] == [1, 2, 128]


def behind(samples, count):
    """The samples, and what no valid frame may notice behind their end."""
    given = torch.full((1, count), 1e3).double()
    given[0, : len(samples)] = samples
    return given, torch.tensor([float(len(samples))]).double()


@pytest.mark.parametrize("count", [880, 240 + 640 * 4, 240 + 640 * 4 + 1, 240 + 640 * 41 + 639])
def test_samples_get_the_answer_of_their_features_whole_and_in_chunks(count, checkpoint, front_end):
    encoder = encoder_of(fold(checkpoint).checkpoint, torch.float64)
    samples = speech(2.0)[:count].double()
    features = normal(log_mel(samples), checkpoint)[None]
    length, frames = torch.tensor([features.shape[1]]), SAMPLES.frames(count)
    offline = PcmGraph(front_end, DeploymentGraph(encoder, 50), 40).double().eval()
    logits, heard = offline(*behind(samples, SAMPLES.count(50)))
    torch.testing.assert_close(heard[:, : 4 * frames], features[:, : 4 * frames], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[:, :frames], encoder(features, length)[0], rtol=1e-9, atol=1e-9)

    for context in (Context(4, 8), Context(4, 8, ahead=3)):
        stream = PcmStreamingGraph(front_end, StreamingGraph(encoder, context), 40, context.ahead).double().eval()
        asked = Chunks(160, 320, look_ahead_ms=40 * context.ahead)
        (entry,) = program_of(checkpoint, (), "fp32", [asked], "pcm").entries
        caches = [samples[None, :240], *(torch.zeros(spec.shape).double() for spec in entry.inputs[3:])]
        answers, heard = [], []
        for start in range(240, count, 640 * 4):
            piece = samples[start : start + 640 * context.window]
            logits, shown, *caches = stream(*behind(piece, 640 * context.window), *caches)
            answers.append(logits[:, : len(piece) // 640])
            heard.append(shown[:, : len(piece) // 640 * 4])
        torch.testing.assert_close(torch.cat(answers, 1), encoder(features, length, context)[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat(heard, 1), features[:, : 4 * frames], rtol=1e-9, atol=1e-9)


def test_an_entry_for_samples_names_its_overlap_and_shows_what_it_hears(checkpoint):
    offline, stream = lower(fold(checkpoint), [1.0], "fp32", [Chunks(160, 320)], "pcm").entries
    assert [(spec.name, spec.shape) for spec in offline.inputs] == [("samples", (1, 240 + 25 * 640)), ("length", (1,))]
    assert [(spec.name, spec.shape) for spec in offline.outputs] == [("logits", (1, 25, 29)), ("features", (1, 100, 80))]
    assert [spec.name for spec in stream.inputs][:4] == ["samples", "length", "overlap", "past"]
    assert [spec.name for spec in stream.outputs][:4] == ["logits", "features", "overlap_next", "past_next"]
    assert next(iter(stream.streaming.states.items())) == ("overlap", "overlap_next")
    assert (stream.inputs[0].shape, stream.inputs[2].shape, stream.streaming.overlap) == ((1, 2560), (1, 240), 240)
    for entry in (offline, stream):
        assert [tuple(answer.shape) for answer in entry.graph(*entry.example())] == [spec.shape for spec in entry.outputs]


def test_the_front_end_stays_in_float32_before_a_network_in_half_precision(checkpoint):
    (entry,) = lower(fold(checkpoint), [1.0], "fp16", (), "pcm").entries
    graph = halved(entry.graph)
    assert {tensor.dtype for tensor in (*graph.front_end.parameters(), *graph.front_end.buffers())} == {torch.float32}
    assert {parameter.dtype for parameter in graph.network.parameters()} == {torch.float16}
    samples = torch.nn.functional.pad(speech(1.0), (0, 240))[None]  # as loud as speech is: its power is beyond fp16
    length = torch.tensor([16_000.0])
    assert torch.equal(graph(samples, length)[1], entry.graph(samples, length)[1])


def test_more_samples_than_float32_can_count_in_frames_are_refused():
    checkpoint = fold(a_checkpoint(layers=1, max_frames=7000))
    assert lower(checkpoint, [241.0], "fp32").entries
    with pytest.raises(UsageError, match="240 seconds"):
        lower(checkpoint, [241.0], "fp32", (), "pcm")


@pytest.fixture(scope="module")
def opened(checkpoint, tmp_path_factory):
    chunks = [Chunks(160, 320), Chunks(160, 320, look_ahead_ms=280)]
    artifact = reference.export(lower(fold(checkpoint), [0.64], "fp32", chunks, "pcm"), tmp_path_factory.mktemp("pcm"), "model")
    return reference.open(artifact), artifact


@pytest.mark.parametrize("count", [0, 239, 240, 879, 880, 240 + 2560 - 1, 240 + 2560, 240 + 2560 + 1, 240 + 16 * 640, 10_700])
def test_an_utterance_of_any_length_is_heard_to_its_last_whole_frame_and_leaves_no_trace(count, opened):
    session, artifact = opened
    samples = speech(1.0)[:count].numpy()
    for entry in artifact.inputs:
        first = answers(session, artifact, entry, samples)
        answer(session, artifact, entry, speech(0.6, seed=1).numpy())
        again = answers(session, artifact, entry, samples)
        assert first["logits"].shape == (SAMPLES.frames(count), 29)
        assert first["features"].shape == (4 * SAMPLES.frames(count), 80)
        assert all(np.array_equal(first[name], again[name]) for name in first)


def test_what_was_ahead_comes_again_and_nothing_comes_behind_the_end(opened):
    session, artifact = opened
    samples, stream = speech(1.0).numpy(), Stream(session, artifact, "stream_160ms_ahead_280ms")
    assert (stream.takes, stream.frames, stream.window) == (240 + 640 * 11, 4, 11)
    assert len(stream.accept(samples[: 240 + 640 * 9])) == 4  # two are missing: the end is ahead, and five are left
    with pytest.raises(UsageError, match="has ended"):
        stream.accept(samples[: 640 * 6])
    assert len(stream.accept(samples[: 640 * 5])) == 4
    assert len(stream.accept(samples[:640])) == 1
    with pytest.raises(UsageError, match="has ended"):
        stream.accept(samples[:640])


def test_the_first_piece_of_an_utterance_is_longer_and_nothing_comes_behind_a_short_one(opened):
    session, artifact = opened
    stream = Stream(session, artifact, "stream_160ms")
    assert (stream.takes, stream.has) == (240 + 2560, 0)
    assert len(stream.accept(speech(1.0)[: stream.takes].numpy())) == 4
    assert (stream.takes, stream.has) == (2560, 240)
    with pytest.raises(UsageError, match=r"takes samples up to \(2560,\), not \(2561,\)"):
        stream.accept(speech(1.0)[:2561].numpy())
    assert len(stream.accept(speech(1.0)[:1000].numpy())) == 1
    with pytest.raises(UsageError, match="has ended"):
        stream.accept(speech(1.0)[:2560].numpy())


class Broken:
    how = "run on this host"

    def run(self, _entry, _inputs):
        raise UsageError("The line is cut.")


def test_a_first_piece_that_was_not_answered_leaves_the_utterance_as_it_was(opened):
    session, artifact = opened
    first, second = speech(1.0)[:2800].numpy(), speech(1.0)[2800:5360].numpy()
    stream = Stream(Broken(), artifact, "stream_160ms")
    with pytest.raises(UsageError, match="line is cut"):
        stream.accept(first)
    stream._session = session
    wanted = answer(session, artifact, "stream_160ms", speech(1.0)[:5360].numpy())
    assert np.array_equal(np.concatenate([stream.accept(first), stream.accept(second)]), wanted)

"""Batch statistics of deployed speech, before the fold."""

import numpy as np
import pytest
import torch

from edgefuse.checkpoint import encoder_of, read
from edgefuse.recognize import frontend_of, hear
from edgefuse.refold import BATCH_FRAMES, _batches, reestimated
from edgefuse.speech import read_speech
from edgefuse.verify.reference import logits_of
from tests.spec.conftest import FUSIONFORMER


def test_utterances_are_estimated_together_so_that_what_differs_between_them_counts():
    loud, soft = np.full((100, 80), 1.0, np.float32), np.full((90, 80), -1.0, np.float32)
    ((features, lengths),) = _batches([loud, soft])
    assert lengths.tolist() == [90, 100]
    assert features.shape == (2, 100, 80)
    assert float(features[0, 90:].abs().sum()) == 0.0


@pytest.mark.parametrize("count", [1, 7, 40])
def test_every_utterance_is_in_one_batch_and_a_batch_is_no_longer_than_it_must_be(count):
    draw = np.random.default_rng(0)
    heard = [np.ones((int(draw.integers(100, 1000)), 80), np.float32) for _ in range(count)]
    batches = list(_batches(heard))
    assert sorted(int(length) for _, lengths in batches for length in lengths) == sorted(map(len, heard))
    assert all(features.shape[0] * features.shape[1] <= BATCH_FRAMES + 1000 for features, _ in batches)


def test_statistics_of_speech_like_that_of_the_training_change_little(calibration):
    checkpoint = read(FUSIONFORMER)
    speech = read_speech(calibration)
    again = reestimated(checkpoint, speech)
    agreeing = frames = 0
    for each in hear(speech, frontend_of(checkpoint)):
        best = [logits_of(encoder_of(one), each.features).argmax(-1) for one in (checkpoint, again)]
        agreeing, frames = agreeing + int((best[0] == best[1]).sum()), frames + len(best[0])
    assert not torch.equal(
        checkpoint.weights["blocks.0.macaron.w1.norm.running_var"], again.weights["blocks.0.macaron.w1.norm.running_var"]
    )
    assert agreeing > 0.9 * frames

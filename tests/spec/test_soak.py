"""A long utterance through one session: drift, growth and numbers that are none are noticed."""

import numpy as np
import pytest
import torch

from edgefuse import pipeline
from edgefuse.checkpoint import encoder_of, read
from edgefuse.errors import UsageError
from edgefuse.fold import fold
from edgefuse.listen import load
from edgefuse.recognize import hear
from edgefuse.speech import read_speech
from edgefuse.verify.soak import Soaked, soak
from tests.spec.conftest import FUSIONFORMER


class Tiring:
    """A session whose answers get louder from run to run, and end as NaN."""

    how = "run on this host"

    def __init__(self, session, runs_until_nan: int) -> None:
        self.session, self.runs, self.most = session, 0, runs_until_nan

    def run(self, entry, inputs):
        self.runs += 1
        outputs = dict(self.session.run(entry, inputs))
        outputs["logits"] = outputs["logits"] * (1 + 1e-5 * self.runs) if self.runs < self.most else outputs["logits"] * np.nan
        return outputs


@pytest.mark.parametrize("bundle", ["both", "both_from_samples", "looking_ahead"])
def test_a_session_that_endures_answers_in_the_last_minute_as_in_the_first(bundle, request, speech):
    (export,) = request.getfixturevalue(bundle).exports
    _, soaked = pipeline.soak(export.artifact.path, FUSIONFORMER, 2, speech=speech)
    assert soaked.not_finite == 0
    assert soaked.last_snr_db == pytest.approx(soaked.first_snr_db, abs=1.0)
    assert soaked.last_snr_db > 120
    assert [check.passed for check in soaked.checks("fp32")][:3] == [True, True, True]


@pytest.mark.parametrize(("runs_until_nan", "failed"), [(10**6, ["SNR, last minute"]), (180, ["values that are not finite"])])
def test_a_session_that_tires_is_noticed(both, speech, runs_until_nan, failed):
    loaded = load(both.exports[0].artifact.path)
    exact = encoder_of(fold(read(FUSIONFORMER)).checkpoint, torch.float64)
    heard = hear(read_speech(speech), loaded.bundle.frontend)
    soaked = soak(Tiring(loaded.session, runs_until_nan), loaded.artifact, exact, loaded.bundle.frontend, heard, 2)
    assert set(failed) <= {check.name for check in soaked.checks("fp32") if not check.passed}


def test_growth_is_measured_from_the_end_of_the_first_minute():
    soaked = Soaked(60, 130.0, 130.0, first_bytes=1_000_000, most_bytes=1_021_000, not_finite=0)
    assert soaked.growth_percent == pytest.approx(2.1)
    assert [check.name for check in soaked.checks("fp32") if not check.passed] == ["memory"]


def test_what_cannot_be_soaked_is_refused(both, whole_bundle, whole_checkpoint, speech):
    offline = whole_bundle / "model.safetensors"
    with pytest.raises(UsageError, match="takes whole utterances only"):
        pipeline.soak(offline, whole_checkpoint, 2, speech=speech)
    with pytest.raises(UsageError, match="was not made of"):
        pipeline.soak(both.exports[0].artifact.path, whole_checkpoint, 2, speech=speech)
    with pytest.raises(UsageError, match="no first and last"):
        pipeline.soak(both.exports[0].artifact.path, FUSIONFORMER, 1, speech=speech)

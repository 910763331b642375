"""Untrained checkpoints."""

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse.errors import BadConfig, OutputExists
from edgefuse.model import EncoderConfig
from edgefuse.new import new, untrained
from edgefuse.refold import fold_exactly
from tests.conftest import a_config


def test_a_new_checkpoint_can_be_read_and_is_the_same_for_the_same_seed(tmp_path) -> None:
    first, other = (new("tiny", tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    assert checkpoints.read(tmp_path / "a").digest == first.digest
    assert first.digest != other.digest
    with pytest.raises(OutputExists):
        new("tiny", tmp_path / "a")
    assert new("tiny", tmp_path / "a", overwrite=True).digest == first.digest


def test_no_preset_of_that_name_is_refused(tmp_path) -> None:
    with pytest.raises(BadConfig):
        new("enormous", tmp_path / "model")


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_no_gain_is_one(norm: str) -> None:
    config: EncoderConfig = a_config(norm)
    gains = {name: value for name, value in untrained(config).weights.items() if "norm" in name and name.endswith("weight")}
    assert gains
    assert not any((gain == 1).all() for gain in gains.values())


def test_statistics_are_those_of_the_speech() -> None:
    speech = [torch.randn(200, 80, generator=torch.Generator().manual_seed(seed)) * 3 + 8 for seed in range(2)]
    whole = untrained(a_config(), speech=speech)
    assert torch.allclose(whole.frontend_mean, torch.full((80,), 8.0), atol=1)
    assert torch.allclose(whole.frontend_istd, torch.full((80,), 1 / 3), atol=0.1)
    means = [value for name, value in whole.weights.items() if name.endswith("running_mean")]
    assert means
    assert not any((mean == 0).all() for mean in means)


def test_a_new_model_of_a_usual_size_folds_exactly(tmp_path) -> None:
    whole = new("small", tmp_path / "model")
    folded, exact = fold_exactly(tmp_path / "model", whole)
    assert exact.end_to_end < 1e-10
    assert folded.checkpoint.config.folded

"""Models and checkpoints that the tests share."""

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.values import Checkpoint

TOKENS = ("<blk>", "<space>", "'", *"abcdefghijklmnopqrstuvwxyz")
SMALLEST = {"dimension": 16, "layers": 2, "heads": 2, "feed_forward": 24, "kernel": 5, "subsampling_channels": 4}


def a_config(norm: str = "batch", **changes: object) -> EncoderConfig:
    conformer = (
        {"norm": "layer", "conv_norm": "layer", "activation": "swish", "norm_residual": "block"} if norm == "layer" else {}
    )
    return EncoderConfig(**{"vocabulary_size": len(TOKENS), "norm": norm, **SMALLEST, **conformer, **changes})


def lived_in(encoder: Encoder, seed: int = 0) -> Encoder:
    """Statistics, gains and positional biases as training leaves them: none at its initial value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name or name.endswith((".u", ".v", ".shift")):
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)
        for name, statistic in encoder.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(generator=g)
            if name.endswith("running_var"):
                statistic.uniform_(0.2, 4.0, generator=g)
    return encoder.eval()


def a_checkpoint(norm: str = "batch", seed: int = 0, **changes: object) -> Checkpoint:
    torch.manual_seed(seed)
    encoder = lived_in(Encoder(a_config(norm, **changes)), seed)
    g = torch.Generator().manual_seed(seed)
    mean, istd = torch.randn(80, generator=g) + 8, torch.rand(80, generator=g) + 0.2
    return checkpoints.of_encoder(encoder, mean, istd, TOKENS[: encoder.config.vocabulary_size])


@pytest.fixture(autouse=True)
def the_same_weights_every_time() -> None:
    torch.manual_seed(0)  # random networks of this size are dead now and then, and a dead one shows nothing


@pytest.fixture(scope="session")
def fusionformer() -> Checkpoint:
    return a_checkpoint("batch")


@pytest.fixture(scope="session")
def conformer() -> Checkpoint:
    return a_checkpoint("layer")


@pytest.fixture
def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three utterances of 200, 160 and 93 feature frames, zeros behind their ends."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([200, 160, 93])
    features = torch.randn(3, 200, 80, generator=g) * (torch.arange(200) < lengths[:, None])[..., None]
    return features, lengths

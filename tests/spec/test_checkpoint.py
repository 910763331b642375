"""Checkpoints: read whole or not at all, written the same way twice, made safely from a pickle."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgefuse import checkpoint as checkpoints
from edgefuse import store
from edgefuse.convert import convert
from edgefuse.errors import BadConfig, DamagedCheckpoint, NotACheckpoint, OutputExists, PickledCheckpoint, ShapeMismatch
from edgefuse.model import Encoder
from tests.conftest import a_checkpoint

FILES = ("model.safetensors", "config.json", "tokens.txt")


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path, fusionformer):
    store.write_checkpoint(tmp_path / "one", fusionformer)
    read = checkpoints.read(tmp_path / "one")
    assert read.digest == fusionformer.digest
    assert read.config == fusionformer.config
    assert read.tokens == fusionformer.tokens
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in fusionformer.weights.items())


def test_a_checkpoint_has_the_same_bytes_whenever_it_is_written(tmp_path, fusionformer):
    store.write_checkpoint(tmp_path / "one", fusionformer)
    store.write_checkpoint(tmp_path / "two", fusionformer)
    assert [(tmp_path / "one" / name).read_bytes() for name in FILES] == [
        (tmp_path / "two" / name).read_bytes() for name in FILES
    ]


@pytest.mark.parametrize("change", ["a weight", "the mean", "a token", "dropout"])
def test_the_digest_changes_with_everything_that_a_checkpoint_is(change, fusionformer):
    encoder = checkpoints.encoder_of(fusionformer)
    mean, istd, tokens = fusionformer.frontend_mean, fusionformer.frontend_istd, list(fusionformer.tokens)
    if change == "a weight":
        encoder.ctc.bias.data[0] += 1e-6
    if change == "the mean":
        mean = mean + 1e-6
    if change == "a token":
        tokens[1], tokens[2] = tokens[2], tokens[1]
    if change == "dropout":
        encoder = Encoder(a_checkpoint("batch", dropout=0.2).config)
        encoder.load_state_dict(dict(fusionformer.weights))
    assert checkpoints.of_encoder(encoder, mean, istd, tokens).digest != fusionformer.digest


def test_a_checkpoint_of_another_program_needs_no_digest(checkpoint_folder):
    weights = checkpoint_folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    assert checkpoints.read(checkpoint_folder).digest


def test_a_config_that_was_edited_behind_the_back_of_the_weights_is_noticed(checkpoint_folder):
    config = checkpoint_folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.3}))
    with pytest.raises(DamagedCheckpoint):
        checkpoints.read(checkpoint_folder)


@pytest.fixture
def parts(fusionformer, tmp_path):
    """What a trainer leaves: a state_dict, the config, the tokens."""
    state = {**fusionformer.weights, "frontend.mean": fusionformer.frontend_mean, "frontend.istd": fusionformer.frontend_istd}
    (tmp_path / "config.json").write_text(json.dumps(fusionformer.config.to_json()))
    (tmp_path / "tokens.txt").write_text("".join(f"{token}\n" for token in fusionformer.tokens))
    return state, tmp_path


def converted(parts, content, **options):
    _, folder = parts
    torch.save(content, folder / "final.pt")
    return convert(folder / "final.pt", folder / "config.json", folder / "tokens.txt", folder / "out", **options)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_a_pickle_of_tensors_becomes_the_checkpoint_that_it_was(nest, prefix, parts, fusionformer):
    state = {name if name.startswith("frontend") else prefix + name: tensor for name, tensor in parts[0].items()}
    content = {nest: state, "epoch": 3} if nest else state
    assert converted(parts, content).digest == fusionformer.digest
    assert checkpoints.read(parts[1] / "out").digest == fusionformer.digest


def test_a_pickle_with_an_object_in_it_is_refused(parts):
    with pytest.raises(PickledCheckpoint, match="more than tensors"):
        converted(parts, {"model": parts[0], "trainer": torch.nn.Linear(1, 1)})
    assert not (parts[1] / "out").exists()


def test_a_truncated_archive_of_pytorch_is_refused(parts):
    state, folder = parts
    torch.save(state, folder / "final.pt")
    content = (folder / "final.pt").read_bytes()
    (folder / "final.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(NotACheckpoint):
        convert(folder / "final.pt", folder / "config.json", folder / "tokens.txt", folder / "out")


def test_weights_without_a_frontend_take_wenets_statistics(parts, fusionformer):
    state = {name: tensor for name, tensor in parts[0].items() if not name.startswith("frontend")}
    with pytest.raises(ShapeMismatch, match=r"frontend\.mean"):
        converted(parts, state)
    frames, mean, deviation = 1000, 5.0, 2.0
    sums = {"mean_stat": [mean * frames] * 80, "var_stat": [(deviation**2 + mean**2) * frames] * 80, "frame_num": frames}
    (parts[1] / "global_cmvn").write_text(json.dumps(sums))
    made = converted(parts, state, cmvn=parts[1] / "global_cmvn")
    torch.testing.assert_close(made.frontend_mean, torch.full((80,), mean))
    torch.testing.assert_close(made.frontend_istd, torch.full((80,), 1 / deviation))
    assert made.weights.keys() == fusionformer.weights.keys()


def test_statistics_of_too_few_bins_are_refused(parts):
    (parts[1] / "global_cmvn").write_text(json.dumps({"mean_stat": [1.0], "var_stat": [2.0], "frame_num": 1}))
    with pytest.raises(ShapeMismatch, match=r"frontend\.(mean|istd) has shape \(1,\)"):
        converted(parts, parts[0], cmvn=parts[1] / "global_cmvn")
    (parts[1] / "global_cmvn").write_text("[]")
    with pytest.raises(NotACheckpoint, match="not a global_cmvn"):
        converted(parts, parts[0], cmvn=parts[1] / "global_cmvn")


def test_a_conversion_does_not_write_over_a_checkpoint(parts):
    converted(parts, parts[0])
    with pytest.raises(OutputExists):
        converted(parts, parts[0])
    assert converted(parts, parts[0], overwrite=True)


@pytest.mark.parametrize("first", ["<blank>", "a", ""])
def test_a_vocabulary_whose_first_token_is_not_the_blank_is_refused(first, fusionformer):
    encoder = checkpoints.encoder_of(fusionformer)
    with pytest.raises(BadConfig, match="blank"):
        checkpoints.of_encoder(
            encoder, fusionformer.frontend_mean, fusionformer.frontend_istd, [first, "!", *fusionformer.tokens[2:]]
        )

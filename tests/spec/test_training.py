"""The recipe learns, survives a power cut, and treats both norms alike."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from torch import Generator, Tensor

from edgefuse import checkpoint, cli
from edgefuse.decode.tokens import character_tokens
from edgefuse.errors import MissingFile, OutputExists, TrainingDiverged, UsageError
from edgefuse.model import FULL, Context, Encoder, EncoderConfig
from edgefuse.model.normalization import BatchNorm
from edgefuse.model.reestimate import reestimate
from edgefuse.model.streaming import valid_frames
from edgefuse.train.augment import Augmentation, augment, mask, warp_tempo, warp_vocal_tract
from edgefuse.train.batches import Batch, Batches, Share, made_ahead, trainable
from edgefuse.train.features import FeatureStore, Stored
from edgefuse.train.loop import usual_precision
from edgefuse.train.metrics import answer_again
from edgefuse.train.module import Training, ctc_loss, draw_context
from edgefuse.train.recipe import Recipe
from edgefuse.train.speech import Speech, heard_by, open_speech, training_speech
from edgefuse.train.train import finish, fit, tokens_for, train

TOKENS = character_tokens()
NO_AUGMENTATION = Augmentation(
    tempo=0, vocal_tract=0, gain_db=0, channel_db=0, pause_share=0, noise_share=0, frequency_masks=0, time_masks=0
)
QUICK = Recipe(characters_first=0.0, vocabulary_size=len(TOKENS), epochs=4, batch_seconds=8.0, augmentation=NO_AUGMENTATION)
SMALL = EncoderConfig(
    vocabulary_size=len(TOKENS), dimension=32, layers=1, heads=2, feed_forward=64, kernel=3, subsampling_channels=8
)

CASCADE = replace(SMALL, layers=2, second_pass=1, norm_residual="output", dropout=0.0)


def tones(text: str) -> np.ndarray:
    """An alphabet of tones, 160 ms each, that a network can learn to read in seconds."""
    time = np.arange(2560) / 16_000
    hz = [0 if letter == " " else 300 + 200 * TOKENS.encode(letter)[0] for letter in text]
    return np.concatenate([0.3 * np.sin(2 * np.pi * f * time) for f in hz]).astype(np.float32)


def write_corpus(folder: Path, name: str, texts: list[str]) -> None:
    """A Lhotse corpus of tones."""
    cuts = []
    for number, text in enumerate(texts):
        recording = f"{name}-{number}"
        soundfile.write(folder / f"{recording}.flac", tones(text), 16_000)
        cut = Recording.from_file(folder / f"{recording}.flac", recording_id=recording).to_cut()
        cut.recording.sources[0].source = f"{recording}.flac"
        cut.supervisions = [SupervisionSegment(recording, recording, 0.0, cut.duration, text=text)]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(folder / f"{name}.cuts.jsonl.gz")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve utterances to learn, two to test on."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["abc", "bad cab", "cad", "dab a", "add", "bcd dc", "ab ba", "cba", "dad", "a bad dab", "cc", "d a b"]
    write_corpus(folder, "train", words)
    for name in ("dev", "seen", "unseen"):
        write_corpus(folder, name, words[:2])
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def speech(corpus: Path, name: str) -> Speech:
    """A set of the corpus, with its features."""
    return open_speech(corpus).load(name)


def weights(training: Training) -> dict[str, Tensor]:
    """Every number that a training has made, the moving average included."""
    return {name: tensor.clone() for name, tensor in training.state_dict().items()}


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_loss_falls_on_a_handful_of_utterances(corpus: Path, norm: str) -> None:
    config = replace(SMALL, norm=norm, conv_norm=norm)
    batch = next(iter(speech(corpus, "train").batches(TOKENS, 100.0)))
    torch.manual_seed(0)
    encoder = Encoder(config).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = ctc_loss(*encoder(batch.features, batch.lengths), batch.targets, batch.target_lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_same_command_trains_both_norms(corpus: Path, tmp_path: Path, norm: str) -> None:
    trained = train(corpus, tmp_path, replace(QUICK, norm=norm, epochs=1), precision="fp32", features=tmp_path / "features")
    read = checkpoint.read(trained.folder)
    assert read.config.norm == norm
    assert read.tokens == TOKENS.symbols
    assert set(trained.errors) >= {"seen", "seen, 160 ms", "unseen", "unseen, 1280 ms"}
    assert (tmp_path / "metrics.json").is_file()


def test_a_training_begins_with_another_ones_encoder_whatever_its_vocabulary(corpus: Path, tmp_path: Path) -> None:
    characters = replace(SMALL, vocabulary_size=7)
    begin = checkpoint.of_encoder(Encoder(characters), torch.zeros(80), torch.ones(80), ("<blk>", *"abcdef"))
    nothing_yet = replace(QUICK, epochs=1, peak_learning_rate=1e-12, last_learning_rate=1e-12)
    spoken, dev = speech(corpus, "train"), speech(corpus, "dev")
    trained = weights(fit(spoken, dev, tmp_path, nothing_yet, SMALL, TOKENS, begin=begin))
    name = "blocks.0.macaron.w1.linear.weight"
    torch.testing.assert_close(trained[f"encoder.{name}"], begin.weights[name])


def test_tokens_stay_where_they_spell_the_corpus_and_others_begin_with_a_fresh_head(corpus: Path, tmp_path: Path) -> None:
    spoken = speech(corpus, "train")
    symbols = ("<blk>", *reversed(TOKENS.symbols[1:]))
    unmoved = replace(QUICK, epochs=1, peak_learning_rate=1e-12, last_learning_rate=1e-12, architecture={"layers": 1})
    config = unmoved.encoder(len(TOKENS))
    torch.manual_seed(99)
    begin = checkpoint.of_encoder(Encoder(config), spoken.store.mean + 1, spoken.store.istd, symbols)
    folder = tmp_path / "begin"
    checkpoint.write(folder, begin)
    on = train(corpus, tmp_path / "run", replace(unmoved, vocabulary_size=None), start=folder, precision="fp32")
    assert on is not None
    trained = checkpoint.read(on.folder)
    assert trained.tokens == symbols
    assert torch.equal(trained.frontend_mean, begin.frontend_mean)  # as it has learnt to hear
    torch.testing.assert_close(trained.weights["ctc.weight"], begin.weights["ctc.weight"])
    fitted = weights(fit(spoken, speech(corpus, "dev"), tmp_path / "fit", unmoved, config, TOKENS, begin=begin))
    assert not torch.allclose(fitted["encoder.ctc.weight"], begin.weights["ctc.weight"])


def test_a_checkpoint_that_hears_otherwise_than_a_corpus_is_computed_is_refused(corpus: Path) -> None:
    deaf = replace(SMALL, mel_bins=40)
    begin = checkpoint.of_encoder(Encoder(deaf), torch.zeros(40), torch.ones(40), TOKENS.symbols)
    with pytest.raises(UsageError, match="hears 40 mel bins; a corpus has 80"):
        heard_by(begin, speech(corpus, "train"))


def test_tokens_are_learnt_where_the_checkpoint_has_none_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, vocabulary_size=4)
    begin = checkpoint.of_encoder(Encoder(config), torch.zeros(80), torch.ones(80), ("<blk>", "▁", "a", "b"))
    assert tokens_for(["ab a"], Recipe(), begin).symbols == begin.tokens
    assert tokens_for(["ab c", "ab"], Recipe(), begin).symbols == begin.tokens  # a stray letter does not cost the head
    assert "new" not in capsys.readouterr().out
    assert tokens_for(["ab c", "cab", "ab"], Recipe(vocabulary_size=4), begin).symbols == TOKENS.symbols
    assert "the head begins anew" in capsys.readouterr().out
    spaceless = replace(begin, tokens=("<blk>", "a", "b", "c"))
    assert tokens_for(["ab a", "b a"], Recipe(vocabulary_size=4), spaceless).symbols == TOKENS.symbols
    assert tokens_for(["ab a"], Recipe(vocabulary_size=len(TOKENS)), begin).symbols == TOKENS.symbols


def test_a_training_that_was_cut_off_ends_with_the_same_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_set, dev, config = speech(corpus, "train"), speech(corpus, "dev"), replace(SMALL, dropout=0.1)
    recipe = replace(QUICK, augmentation=Augmentation())
    whole = weights(fit(train_set, dev, tmp_path / "whole", recipe, config, TOKENS))

    def power_cut(training: Training) -> None:
        if training.current_epoch == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Training, "on_train_epoch_start", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(train_set, dev, tmp_path / "cut", recipe, config, TOKENS)
    monkeypatch.undo()
    resumed = weights(fit(train_set, dev, tmp_path / "cut", recipe, config, TOKENS, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.filterwarnings("ignore:You are trying to")  # to log without a trainer
@pytest.mark.parametrize("chunked_share", [0.0, 1.0])
def test_both_passes_of_a_cascade_learn_the_second_over_what_the_first_gives(corpus: Path, chunked_share: float) -> None:
    recipe = replace(QUICK, character_share=0.0, chunked_share=chunked_share, second_pass_share=0.25)
    training = Training(Encoder(CASCADE), TOKENS, recipe, steps=1)
    batch, context = next(iter(speech(corpus, "train").batches(TOKENS, 100.0))), draw_context(recipe, 0, CASCADE.frame_ms)
    assert (context == FULL) == (chunked_share == 0)
    loss = training.loss(batch, context)
    encoded, lengths = training.encoder.encode(batch.features, batch.lengths, context)
    first = training.encoder.ctc(training.encoder.norm(encoded, valid_frames(lengths, encoded.shape[1])))
    second = training.encoder.again(encoded, lengths)
    each = [ctc_loss(logits, lengths, batch.targets, batch.target_lengths) for logits in (first, second)]
    torch.testing.assert_close(loss, 0.75 * each[0] + 0.25 * each[1])
    training.training_step(batch, 0).backward()
    assert all(head.weight.grad.any() for head in (training.encoder.ctc, training.encoder.second_ctc))


def test_a_cascade_tells_what_its_second_pass_hears_after_chunks(corpus: Path, tmp_path: Path) -> None:
    small = {"dimension": 32, "layers": 2, "heads": 2, "feed_forward": 64, "kernel": 3, "subsampling_channels": 8}
    recipe = replace(QUICK, epochs=1, architecture={**small, "second_pass": 1})
    trained = train(corpus, tmp_path, recipe, precision="fp32", features=tmp_path / "features")
    read = checkpoint.read(trained.folder)
    assert read.config.second_pass == 1
    assert {"seen", "seen, 640 ms", "seen, second pass after 640 ms", "unseen, second pass after 640 ms"} <= set(trained.errors)
    encoder, spoken = checkpoint.encoder_of(read), speech(corpus, "train")
    for norm in (encoder.norm, encoder.second_norm):  # both have heard clean speech
        assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    batch = next(iter(spoken.batches(TOKENS, 100.0)))
    given, lengths = answer_again(encoder, batch.features, batch.lengths, Context(16, 64))
    encoded, _ = encoder.encode(batch.features, batch.lengths, Context(16, 64))
    assert torch.equal(given, encoder.again(encoded, lengths))
    assert not torch.equal(given, encoder(batch.features, batch.lengths)[0])


@pytest.mark.filterwarnings("ignore:You are trying to")  # to log without a trainer
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_characters_are_learnt_beside_the_vocabulary_if_they_have_a_share(corpus: Path, share: float) -> None:
    training = Training(Encoder(SMALL), TOKENS, replace(QUICK, character_share=share), steps=1)
    training.training_step(next(iter(speech(corpus, "train").batches(TOKENS, 100.0))), 0).backward()
    assert (training.characters.weight.grad is not None) == (share > 0)
    assert training.averaged.state_dict().keys() == Encoder(SMALL).state_dict().keys()


def test_a_used_folder_is_not_trained_over(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(OutputExists, match="holds a training already"):
        train(corpus, tmp_path, QUICK)


def test_nothing_to_resume_is_said_so(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="to resume from"):
        train(corpus, tmp_path, QUICK, resume=True)


def test_a_folder_without_speech_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="is no corpus"):
        train(tmp_path, tmp_path / "run", QUICK)


def test_a_loss_that_is_no_number_stops_the_training(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgefuse.train.module.ctc_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(TrainingDiverged, match="loss of step 0 is nan"):
        fit(speech(corpus, "train"), speech(corpus, "dev"), tmp_path, QUICK, SMALL, TOKENS)


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, Augmentation()])
def test_the_checkpoint_is_the_average_with_statistics_of_what_it_was_trained_on(
    corpus: Path, tmp_path: Path, augmentation: Augmentation
) -> None:
    spoken, recipe = speech(corpus, "train"), replace(QUICK, augmentation=augmentation)
    training = fit(spoken, speech(corpus, "dev"), tmp_path, recipe, SMALL, TOKENS)
    encoder = finish(training, spoken, TOKENS)
    norm = encoder.subsampling.linear.norm
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][inputs[1]]))

    def mean_over(augmentation: Augmentation) -> Tensor:
        seen.clear()
        for batch in spoken.batches(TOKENS, 600.0, augmentation=augmentation):
            encoder(batch.features, batch.lengths)
        return torch.cat(seen).mean(dim=0)

    assert not encoder.training
    other = NO_AUGMENTATION if augmentation != NO_AUGMENTATION else Augmentation()
    own, others = mean_over(augmentation), mean_over(other)
    if augmentation == NO_AUGMENTATION:
        assert torch.allclose(norm.running_mean, own, atol=0.05)
    assert (norm.running_mean - own).norm() < 0.3 * (norm.running_mean - others).norm()


def test_statistics_are_measured_in_the_contexts_of_the_training(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgefuse.train.speech.REESTIMATION_BATCH_SECONDS", 2.0)
    spoken, recipe = speech(corpus, "train"), replace(QUICK, chunked_share=0.5)
    heard = [context for _, _, context in training_speech(spoken, TOKENS, recipe, SMALL.frame_ms)]
    assert len(heard) > 3
    assert heard == [draw_context(recipe, number, SMALL.frame_ms) for number in range(len(heard))]
    assert FULL in heard
    assert heard != [FULL] * len(heard)


def test_reestimated_statistics_are_those_of_all_valid_frames() -> None:
    encoder = Encoder(SMALL)
    features = torch.randn(3, 40, 80, generator=Generator().manual_seed(0))
    lengths = torch.tensor([40, 24, 12])
    used = reestimate(encoder, [(features[:1], lengths[:1]), (features[1:], lengths[1:])])
    rows = encoder.subsampling.conv1
    padded = torch.nn.functional.pad(features, (0, 0, 3, 0)).unsqueeze(1)
    out = rows.conv(padded).permute(0, 2, 3, 1)
    valid = torch.arange(out.shape[1]) < ((lengths + 2) // 2)[:, None]
    assert used == 76
    assert isinstance(rows.norm, BatchNorm)
    assert rows.norm.running_mean is not None
    assert torch.allclose(rows.norm.running_mean, out[valid].mean(dim=(0, 1)), atol=1e-2)
    assert encoder.training
    assert rows.norm.momentum == pytest.approx(0.1)


def test_a_layer_norm_encoder_has_nothing_to_reestimate() -> None:
    assert reestimate(Encoder(replace(SMALL, norm="layer", conv_norm="layer")), []) == 0


def test_an_epoch_is_always_the_same_and_the_next_one_is_not(corpus: Path) -> None:
    spoken = speech(corpus, "train")
    options = {"seed": 1, "augmentation": Augmentation()}
    first = [b.features for b in spoken.batches(TOKENS, 4.0, epoch=0, **options)]
    again = [b.features for b in spoken.batches(TOKENS, 4.0, epoch=0, **options)]
    later = [b.texts for b in spoken.batches(TOKENS, 4.0, epoch=1, **options)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert sorted(t for texts in later for t in texts) == sorted(u.text for u in spoken.store.utterances.values())


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, which another test may have brought, and no training does
def test_workers_make_the_same_batches_in_the_same_order(corpus: Path) -> None:
    spoken = speech(corpus, "train")
    for workers, share in ((1, Share()), (2, Share(parts=2, mine=(0, 1), skip=3))):
        alone = spoken.batches(TOKENS, 2.0, seed=1, augmentation=Augmentation(), share=share)
        pairs = list(zip(alone, made_ahead(alone, workers), strict=True))
        assert len(pairs) > 2
        assert all(torch.equal(one.features, other.features) and one.texts == other.texts for one, other in pairs)


def test_every_utterance_is_in_exactly_one_batch(corpus: Path) -> None:
    spoken = speech(corpus, "train")
    batches: list[Batch] = list(Batches(spoken.cuts, spoken.store, TOKENS, batch_seconds=3.0))
    assert len(batches) > 1
    assert sum(len(b.texts) for b in batches) == 12


def test_an_utterance_that_ctc_cannot_align_is_left_out(corpus: Path) -> None:
    spoken = speech(corpus, "train")
    short = {
        name: replace(stored, count=8) if stored.text == "cc" else stored for name, stored in spoken.store.utterances.items()
    }
    kept, left_out = trainable(spoken.cuts, replace(spoken.store, utterances=short), TOKENS, SMALL)
    assert len(kept) == 11
    assert left_out == {"too short for their text": 1}


def test_a_faster_tempo_is_shorter_and_a_higher_voice_is_not() -> None:
    features = torch.randn(100, 80)
    assert warp_tempo(features, 1.25).shape == (80, 80)
    assert warp_vocal_tract(features, 1.1).shape == (100, 80)
    assert torch.allclose(warp_vocal_tract(features, 1.0), features, atol=1e-3)


def test_a_longer_vocal_tract_lowers_the_formants() -> None:
    formant = torch.zeros(1, 80)
    formant[0, 40] = 1.0
    assert int(warp_vocal_tract(formant, 0.9).argmax()) < 40 < int(warp_vocal_tract(formant, 1.1).argmax())


def test_augmentation_depends_on_its_draw_alone() -> None:
    features = 10 + torch.randn(60, 80)
    one, same, other = (augment(features, Augmentation(), Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.isfinite().all()


def test_masks_hide_a_limited_share() -> None:
    how = Augmentation()
    for seed in range(30):
        masked = mask(torch.ones(50, 80), how, Generator().manual_seed(seed))
        assert int((masked == 0).all(dim=1).sum()) <= 2 * how.time_mask_share * 50
        assert int((masked == 0).all(dim=0).sum()) <= 2 * how.frequency_mask_bins


def test_some_steps_stream_and_the_others_hear_everything() -> None:
    recipe = replace(QUICK, chunked_share=0.3)
    chunks = [draw_context(recipe, step, 40).chunk for step in range(300)]
    assert 0.2 < sum(chunk is not None for chunk in chunks) / 300 < 0.4


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    factors = [QUICK.learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors.index(max(factors)) == pytest.approx(80, abs=1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.01, abs=1e-3)


def test_pauses_are_as_quiet_as_the_recording_and_leave_its_speech_as_it_is() -> None:
    features = torch.randn(100, 80, generator=Generator().manual_seed(0)) + 10
    features[:10] = 2.0
    longer = augment(features, NO_AUGMENTATION, Generator().manual_seed(1), (20, 30))
    assert len(longer) == 150
    assert torch.allclose(longer[20:120], features, atol=1e-3)
    assert (torch.cat((longer[:20], longer[120:])).mean() - 2.0).abs() < 0.2


def test_pauses_lengthen_some_utterances_and_cost_little_padding() -> None:
    count, frames = 600, 100
    names = [f"u{number:03d}" for number in range(count)]
    cuts = CutSet.from_cuts(MonoCut(name, start=0.0, duration=frames / 100, channel=0) for name in names)
    stored = {name: Stored(name, "abc", number * frames, frames) for number, name in enumerate(names)}
    store = FeatureStore(np.ones((count * frames, 80), np.float16), stored, torch.zeros(80), torch.ones(80))
    how = replace(NO_AUGMENTATION, pause_share=0.2, longest_pause_frames=80)
    batches = list(Batches(cuts, store, TOKENS, batch_seconds=30.0, augmentation=how))
    lengths = torch.cat([batch.lengths for batch in batches])
    assert len(lengths) == count
    assert 0.15 < float((lengths > frames).float().mean()) < 0.25
    assert sum(batch.features[..., 0].numel() for batch in batches) < 1.1 * int(lengths.sum())


def test_a_training_begins_with_characters_alone() -> None:
    assert [Recipe().character_share_at(step, 100) for step in (0, 11, 12)] == [1.0, 1.0, 0.3]


def test_no_epochs_are_refused() -> None:
    with pytest.raises(UsageError, match="train nothing"):
        Recipe(epochs=0)


@pytest.mark.parametrize(("option", "value"), [("--preset", "small"), ("--norm", "layer")])
def test_what_a_training_begins_with_decides_its_architecture(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--speech", str(tmp_path), "-o", str(tmp_path / "run"), "--from", "ANY", option, value]
    assert cli.run(command) == UsageError.exit_code
    assert f"{option} is the checkpoint's own" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("able", "precision"), [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "fp32")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bf16")
def test_a_cpu_that_does_not_multiply_bf16_trains_in_float32(able, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": False} | able)
    assert usual_precision() == precision

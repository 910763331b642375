"""Fine-tuning trains the quantized graph, and leaves a folded checkpoint that loses less to it."""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli, store
from edgefuse.errors import UsageError
from edgefuse.fold import exactness, fold
from edgefuse.fold.exactness import probe
from edgefuse.lower import Chunks, lower
from edgefuse.lower.graph import DeploymentGraph, StreamingGraph
from edgefuse.lower.program import caches_of
from edgefuse.lower.sites import sites_of, source_of
from edgefuse.model import Context, Encoder
from edgefuse.quantize.encoder import Rounding, rounded_weights
from edgefuse.quantize.graph import quantized
from edgefuse.quantize.observe import Range, observe
from edgefuse.quantize.plan import Plan, plan
from edgefuse.quantize.scheme import SCHEMES, Scheme
from edgefuse.refold import fold_exactly
from edgefuse.speech import COLUMNS
from edgefuse.train.finetune import fine_tune, fit, settled
from edgefuse.train.module import FineTuning, divergence
from edgefuse.train.recipe import FINE_TUNING
from edgefuse.train.speech import open_speech
from edgefuse.values import FoldedModel
from edgefuse.verify.parity import snr_db
from tests.conftest import a_checkpoint
from tests.spec.test_cli_errors import must_be_refused
from tests.spec.test_training import NO_AUGMENTATION, TOKENS, write_corpus

QUICK = replace(FINE_TUNING, epochs=2, batch_seconds=8.0, augmentation=NO_AUGMENTATION)
FRAMES = 24
FEW = [name for name in SCHEMES if name not in ("int8-a16", "palette4-weights")]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HEARD = torch.randn(1, 4 * FRAMES, 80, generator=torch.Generator().manual_seed(5))
LENGTH = torch.tensor([4 * FRAMES])


@dataclass(frozen=True)
class Laid:
    """An encoder, its graph of whole utterances, and the ranges of one of them."""

    encoder: Encoder
    graph: DeploymentGraph
    ranges: dict[str, Range]

    @classmethod
    def of(cls, folded: FoldedModel) -> "Laid":
        encoder = checkpoints.encoder_of(folded.checkpoint)
        graph = DeploymentGraph(encoder, FRAMES).eval()
        seen = observe(lambda: [(graph, HEARD, torch.tensor([float(FRAMES)]))])
        return cls(encoder, graph, {path: each.range("minmax") for path, each in seen.items()})

    def answers(self, scheme: Scheme) -> list[np.ndarray]:
        """Of the float graph, of the quantized one, and of the encoder that rounds."""
        asked, length = self.plan(scheme), torch.tensor([float(FRAMES)])
        with torch.no_grad():
            rounded, _ = Rounding(asked, asked).answer(self.encoder, HEARD, LENGTH)
            made = self.graph(HEARD, length), quantized(self.graph, asked)(HEARD, length), rounded
            return [each[0].double().numpy() for each in made]

    def plan(self, scheme: Scheme) -> Plan:
        """The encoder makes its positions anew, and does not round them."""
        return plan(self.graph, replace(scheme, positions="fp32"), self.ranges)


@pytest.fixture(scope="module")
def laid(fusionformer):
    return Laid.of(fold(fusionformer))


@pytest.fixture(scope="module", params=["fusionformer", "conformer"])
def either(request, fusionformer):
    """The conformer has Swish behind its depthwise convolution."""
    return Laid.of(fold(fusionformer if request.param == "fusionformer" else a_checkpoint("layer", conv_norm="batch")))


# --- the encoder that rounds


def test_every_layer_of_the_graph_is_one_of_the_encoder_with_the_same_numbers(either):
    sites = [site.layer for site in sites_of(either.graph)]
    assert len({source_of(site) for site in sites}) == len(sites)
    for site in sites:
        wanted, given = either.graph.get_submodule(site), either.encoder.get_submodule(source_of(site))
        assert torch.equal(wanted.weight.flatten(), given.weight.flatten())
        assert torch.equal(wanted.bias, given.bias)


@pytest.mark.parametrize("name", FEW)
def test_the_encoder_rounds_every_layer_as_the_quantized_graph_does(either, name):
    """Layer by layer: where all of them round, one value that float error rounds the other way moves all behind it."""
    for site in sites_of(either.graph):
        scheme = Scheme("one", "fp32", {site.layer: name}, features="int8")
        whole, wanted, given = either.answers(scheme)
        lost, differs = snr_db(whole, wanted), snr_db(wanted, given)
        assert differs > min(lost + 15.0, 110.0), site
        assert (lost == 300.0) == bool(either.plan(scheme).kept)


def test_weights_alone_are_rounded_as_exactly_as_the_graph_rounds_them(either):
    whole, wanted, given = either.answers(SCHEMES["int8-weights"])
    assert snr_db(whole, wanted) < 60.0
    assert snr_db(wanted, given) > 100.0


def test_chunks_are_rounded_as_the_streaming_graph_rounds_them(laid):
    graph = StreamingGraph(laid.encoder, Context(FRAMES, FRAMES)).eval()
    asked, nothing = (plan(graph, scheme, {}) for scheme in (SCHEMES["int8-weights"], Scheme("none", "fp32")))
    caches = [torch.zeros(spec.shape) for spec in caches_of(laid.encoder, FRAMES)]
    with torch.no_grad():
        wanted, *_ = quantized(graph, asked)(HEARD, graph.step, *caches)
        given, _ = Rounding(nothing, asked).answer(laid.encoder, HEARD, LENGTH, Context(FRAMES, FRAMES))
    assert snr_db(wanted[0].double().numpy(), given[0].double().numpy()) > 100.0


def test_a_loud_utterance_in_its_batch_does_not_change_how_another_is_rounded(laid):
    asked = laid.plan(Scheme("one", "fp32", {"blocks.0.macaron.w1": "int8-dynamic"}))
    rounding = Rounding(asked, asked)
    with torch.no_grad():
        alone, _ = rounding.answer(laid.encoder, HEARD, LENGTH)
        together, _ = rounding.answer(laid.encoder, torch.cat((HEARD, 100 * HEARD)), LENGTH.repeat(2))
    assert snr_db(alone[0].double().numpy(), together[0].double().numpy()) > 60.0


def test_nothing_of_the_rounding_stays_in_an_encoder(laid):
    asked = laid.plan(SCHEMES["int8"])
    before, _ = laid.encoder(HEARD, LENGTH)
    rounded, _ = Rounding(asked, asked).answer(laid.encoder, HEARD, LENGTH)
    after, _ = laid.encoder(HEARD, LENGTH)
    assert torch.equal(before, after)
    assert not torch.equal(before, rounded)


@pytest.mark.parametrize("name", FEW)
def test_gradients_pass_straight_through_the_rounding(laid, name):
    encoder, asked = copy.deepcopy(laid.encoder), laid.plan(SCHEMES[name])
    logits, _ = Rounding(asked, asked).answer(encoder, HEARD, LENGTH)
    logits.square().sum().backward()
    for site in asked.layers:
        assert float(encoder.get_parameter(f"{source_of(site)}.weight").grad.abs().max()) > 0, site


def test_the_gradient_of_a_rounded_head_is_that_of_the_head(laid):
    gradients = []
    for scheme in (Scheme("none", "fp32"), Scheme("head", "fp32", {"head.ctc": "int8-dynamic"})):
        encoder, asked = copy.deepcopy(laid.encoder), laid.plan(scheme)
        logits, _ = Rounding(asked, asked).answer(encoder, HEARD, LENGTH)
        logits.sum().backward()
        gradients.append(encoder.blocks[0].macaron.w1.linear.weight.grad.flatten())
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.999


def test_weights_that_have_settled_do_not_move_when_they_are_rounded_again(laid):
    encoder, asked = copy.deepcopy(laid.encoder), laid.plan(SCHEMES["int4-weights"])
    Rounding(asked, asked).settle(encoder)
    for name, again in rounded_weights(encoder, asked).items():
        torch.testing.assert_close(again, encoder.get_parameter(name), rtol=1e-6, atol=0)


def test_a_teacher_that_is_repeated_has_nothing_to_say():
    logits, other = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    lengths = torch.tensor([5, 3])
    assert float(divergence(logits, logits, lengths)) == pytest.approx(0.0, abs=1e-6)
    assert float(divergence(logits, other, lengths)) > 0.1
    behind = other.clone()
    behind[1, 3:] = 0.0
    assert torch.equal(divergence(logits, behind, lengths), divergence(logits, other, lengths))


# --- the training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve utterances to learn, two of them to watch, four others to test on, and the features of all."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["abc", "bad cab", "cad", "dab a", "add", "bcd dc", "ab ba", "cba", "dad", "a bad dab", "cc", "d a b"]
    write_corpus(folder, "train", words)
    write_corpus(folder, "dev", words[:2])
    write_corpus(folder, "seen", ["cab", "da"])
    write_corpus(folder, "unseen", ["dab", "ca"])
    for name in ("train", "dev", "seen", "unseen"):
        open_speech(folder).load(name)
    return folder


@pytest.fixture(scope="module")
def spoken(corpus):
    return open_speech(corpus).load("train"), open_speech(corpus).load("dev")


@pytest.fixture(scope="module")
def start(fusionformer, tmp_path_factory):
    """A folded checkpoint, on disk."""
    folder = tmp_path_factory.mktemp("folded") / "folded"
    renamed = replace(fusionformer, tokens=TOKENS.symbols)
    tensors = {**renamed.weights, checkpoints.MEAN: renamed.frontend_mean, checkpoints.ISTD: renamed.frontend_istd}
    checkpoint = checkpoints.assemble(renamed.config, tensors, renamed.tokens)
    folded = fold(checkpoint)
    store.write_folded(folder, folded, exactness(checkpoint, folded, *probe(80)))
    return folder


def read(folder):
    folded, _ = fold_exactly(folder, checkpoints.read(folder))
    return folded


def weights_rounded(folded, name="int4-weights"):
    program = lower(folded, (1.0,), "fp32", (Chunks(640, 2560),))
    return Rounding(*(plan(entry.graph, SCHEMES[name], {}) for entry in program.entries))


def test_fine_tuning_brings_the_quantized_graph_back_to_what_the_float_one_answered(start, spoken, tmp_path):
    folded = read(start)
    rounding = weights_rounded(folded)
    recipe = replace(QUICK, epochs=20, peak_learning_rate=2e-3)
    tuned = settled(fit(folded, rounding, *spoken, tmp_path, recipe), folded)
    batch = next(iter(spoken[0].batches(TOKENS, 100.0)))
    teacher, after = (checkpoints.encoder_of(each.checkpoint) for each in (folded, tuned))
    with torch.no_grad():
        taught, lengths = teacher(batch.features, batch.lengths)
        lost = [divergence(taught, rounding.answer(each, batch.features, batch.lengths)[0], lengths) for each in (teacher, after)]
    assert float(lost[1]) < 0.7 * float(lost[0])


def test_what_was_fine_tuned_is_a_folded_checkpoint_and_a_child_of_the_one_before(start, spoken, tmp_path):
    folded = read(start)
    tuned = settled(fit(folded, weights_rounded(folded), *spoken, tmp_path, QUICK), folded)
    assert tuned.checkpoint.config == folded.checkpoint.config
    assert tuned.parent == folded.digest != tuned.digest
    assert tuned.plan == folded.plan
    same = [name for name, tensor in folded.checkpoint.weights.items() if torch.equal(tensor, tuned.checkpoint.weights[name])]
    assert not same


def test_a_fine_tuning_that_was_cut_off_ends_with_the_same_weights(start, spoken, tmp_path, monkeypatch):
    folded, recipe = read(start), replace(QUICK, epochs=4, epoch_batches=2, dropout=0.1, chunked_share=0.5)
    rounding = weights_rounded(folded)
    whole = fit(folded, rounding, *spoken, tmp_path / "whole", recipe).state_dict()

    def power_cut(training):
        if training.current_epoch == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(FineTuning, "on_train_epoch_start", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(folded, rounding, *spoken, tmp_path / "cut", recipe)
    monkeypatch.undo()
    resumed = fit(folded, rounding, *spoken, tmp_path / "cut", recipe, resume=True)
    assert resumed.global_step == resumed.steps == 8
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("name", ["int8", "int8-dynamic"])
def test_the_command_writes_a_folded_checkpoint_and_what_it_heard_before_and_after(start, corpus, calibration, tmp_path, name):
    before, run = sorted(corpus.rglob("*")), tmp_path / "run"
    command = ["train", "--from", str(start), "--precision", name, "--speech", str(corpus), "--calibration", str(calibration)]
    assert cli.run([*command, "--epochs", "1", "-o", str(run)]) == 0
    assert sorted(corpus.rglob("*")) == before  # it writes to -o alone
    told = json.loads((run / "metrics.json").read_text())
    assert set(told["errors"]) >= {"seen, float before", "unseen, rounded before", "seen", "unseen, 640 ms"}
    assert told["recipe"]["scheme"]["layers"] == name
    assert told["recipe"]["from"] == read(run / "checkpoint").parent == read(start).digest


# --- when things go wrong


TRAIN = ["train", "--speech", "HERE/corpus", "-o", "HERE/new"]
FINE_TUNE = [*TRAIN, "--from", "HERE/folded"]
WRONG = {
    "no_checkpoint": [*TRAIN, "--precision", "int4-weights"],
    "not_folded": [*TRAIN, "--from", "HERE/checkpoint", "--precision", "int4-weights"],
    "folded_without_a_precision": FINE_TUNE,
    "float": [*FINE_TUNE, "--precision", "fp16"],
    "sixteen_bits": [*FINE_TUNE, "--precision", "int8-a16"],
    "no_such_precision": [*FINE_TUNE, "--precision", "int3"],
    "unknown_layers": [*FINE_TUNE, "--precision", "HERE/layer.toml"],
    "nothing_to_round": [*FINE_TUNE, "--precision", "HERE/nothing.toml"],
    "inside_attention": [*FINE_TUNE, "--precision", "HERE/attention.toml"],
    "no_calibration": [*FINE_TUNE, "--precision", "int8"],
    "calibration_without_a_precision": [*TRAIN, "--calibration", "HERE/tested"],
    "calibration_of_the_test_set": [*FINE_TUNE, "--precision", "int8", "--calibration", "HERE/tested"],
    "palette": [*FINE_TUNE, "--precision", "palette4-weights"],
    "another_preset": [*FINE_TUNE, "--precision", "int4-weights", "--preset", "small"],
    "no_corpus": ["train", "--speech", "HERE/tested", "-o", "HERE/new", "--from", "HERE/folded", "--precision", "int4-weights"],
    "nothing_to_resume": [*FINE_TUNE, "--precision", "int4-weights", "--resume"],
}
SCHEME_FILES = {
    "layer": 'layers = "int8-weights"\n[table]\n"blocks.99.*" = "fp32"\n',
    "nothing": 'layers = "fp32"\n',
    "attention": 'layers = "int8"\nattention = "int8"\n',
}


@pytest.fixture
def here(corpus, start, checkpoint_folder, tmp_path):
    assert checkpoint_folder.is_dir()
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(start, tmp_path / "folded")
    for name, text in SCHEME_FILES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "tested").mkdir()
    recording = (corpus / "unseen-0.flac").read_bytes()
    (tmp_path / "tested" / "a.flac").write_bytes(recording)
    row = ("a", "a.flac", "calibration", "me", "0.5", "hello", hashlib.sha256(recording).hexdigest())
    (tmp_path / "tested" / "manifest.tsv").write_text("\t".join(COLUMNS) + "\n" + "\t".join(row) + "\n")
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_fine_tuned_is_refused_word_for_word(wrong, here, capsys):
    must_be_refused(WRONG[wrong], f"finetune_{wrong}", here, capsys)


def test_a_batch_norm_that_did_not_fold_is_no_start(corpus, tmp_path):
    checkpoint = a_checkpoint("batch", norm_residual="block", shared_blocks=True)
    folded = fold(checkpoint)
    store.write_folded(tmp_path / "folded", folded, exactness(checkpoint, folded, *probe(80)))
    with pytest.raises(UsageError, match="keeps a batch norm"):
        fine_tune(tmp_path / "folded", SCHEMES["int4-weights"], corpus, tmp_path / "run", QUICK)

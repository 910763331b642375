"""What every target on the shelf promises; one suite, run against all of them."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgefuse import recognize
from edgefuse import target as targets
from edgefuse.checkpoint import encoder_of
from edgefuse.errors import EdgefuseError, ExportFailed, Refused
from edgefuse.fold import fold
from edgefuse.frontend.kaldi import kaldi_log_mel
from edgefuse.frontend.log_mel import normalize
from edgefuse.lower import Chunks, DeploymentGraph, lower, program_of
from edgefuse.lower.sites import positions_of, sites_of
from edgefuse.model import Context
from edgefuse.quantize import graph as graphs
from edgefuse.quantize.observe import observe
from edgefuse.quantize.plan import Plan, plan
from edgefuse.quantize.scheme import SCHEMES, VALUE_PRECISIONS, Scheme
from edgefuse.recognizer import Loaded
from edgefuse.target import Session, Target
from edgefuse.values import FLOAT, INPUTS, Artifact, Checkpoint, Entry, FoldedModel, Input, Program, Quantization, TensorSpec
from edgefuse.verify import parity
from edgefuse.verify.structure import strangers
from tests.conftest import a_checkpoint

ROOT = Path(__file__).parents[2]
SHORT, LONG = "offline_640ms", "offline_1280ms"
WIDE = {"layers": 1, "feed_forward": 2048}  # so wide that the weights outweigh what a file says about its graph
SHAPES = {"features": (1, 64, 80), "length": (1,), "logits": (1, 16, 29)}
LEAST_DB = {"fp32": 90.0, "fp16": 40.0}
NAMED = ("reference", "tflite")  # whose artifacts have the names of quantized layers
QUANTIZED = [  # a scheme, how near the float64 graph it must be, and the share of the float artifact's size
    (SCHEMES["int8"], 18.0, 0.75),
    (dataclasses.replace(SCHEMES["int8"], attention="int8", clipping="minmax"), 18.0, 0.75),
    (dataclasses.replace(SCHEMES["int8"], residual="int8"), 15.0, 0.75),
    (SCHEMES["int8-dynamic"], 18.0, 0.75),
    (SCHEMES["int8-weights"], 25.0, 0.75),
    (SCHEMES["int4-weights"], 5.0, 0.6),
    (SCHEMES["palette4-weights"], 5.0, 0.6),
    (dataclasses.replace(SCHEMES["int4-weights"], name="channels", block=0), 5.0, 0.6),
    (SCHEMES["int8-a16"], 25.0, 0.75),
    (Scheme("both", "int8", {"*.feed_forward.*": "int8-dynamic", "*.macaron.w1": "fp32"}), 18.0, 0.9),
]


@pytest.fixture(scope="module", params=sorted(targets.shelf()))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a target whose packages are there."""
    lacking = targets.shelf()[request.param].load().missing()
    if lacking:
        pytest.skip(f"{request.param} needs {', '.join(lacking)}")
    return str(request.param)


@pytest.fixture(scope="module")
def target(name: str) -> Target:
    return targets.find(name)


@functools.cache
def folded() -> FoldedModel:
    return fold(a_checkpoint(**WIDE))


@functools.cache
def float64(frames: int) -> nn.Module:
    """The deployment graph as it should answer."""
    return DeploymentGraph(encoder_of(folded().checkpoint, torch.float64), frames).double().eval()


def quantized_program(scheme: Scheme) -> Program:
    """The same program, its ranges from random features."""
    program = a_program()
    ranges = {}
    for entry in program.entries:
        heard = [torch.from_numpy(array) for array in speech(entry, entry.outputs[0].shape[1], seed=1).values()]
        seen = observe(lambda entry=entry, heard=heard: [(entry.graph, *heard)])
        ranges[entry.name] = {path: each.range(scheme.clipping) for path, each in seen.items()}
    return dataclasses.replace(program, precision=scheme.precision, quantization=Quantization(scheme, ranges, "0" * 64))


def a_program(precision: str = "fp32") -> Program:
    return lower(folded(), (0.64, 1.28), precision)


def an_entry(graph: nn.Module, entry: str = SHORT) -> Entry:
    features, length, logits = (TensorSpec(spec, shape, "float32", "a test") for spec, shape in SHAPES.items())
    return Entry(entry, graph.eval(), (features, length), (logits,))


def of(*entries: Entry) -> Program:
    return Program(entries, "fp32", parent="0" * 64)


@pytest.fixture(scope="module")
def program() -> Program:
    return a_program()


@pytest.fixture(scope="module")
def artifact(target: Target, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two entries at fp32."""
    return target.export(program, tmp_path_factory.mktemp("artifact"), "model")


@pytest.fixture(scope="module")
def session(target: Target, artifact: Artifact) -> Session:
    return target.open(artifact)


@pytest.fixture(autouse=True)
def printed_nothing(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test may let a runtime's chatter through to the terminal."""
    yield
    assert capfd.readouterr() == ("", "")


def speech(entry: Entry, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Features of `frames` valid encoder frames, and something loud behind them."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(entry.inputs[0].shape, generator=g)
    features[:, 4 * frames :] = 1e3
    return {"features": features.numpy(), "length": np.array([frames], np.float32)}


def snr_db(entry: Entry, session: Session, frames: int) -> float:
    """The valid frames of an answer against the float64 graph's."""
    inputs = speech(entry, frames)
    graph = float64(entry.outputs[0].shape[1])
    answer = graph(*(torch.from_numpy(inputs[spec.name]).double() for spec in entry.inputs))
    wanted = answer[:, :frames].detach().numpy()
    error = session.run(entry.name, inputs)["logits"][:, :frames] - wanted
    return float(10 * np.log10(np.square(wanted).sum() / np.square(error).sum()))


@pytest.mark.parametrize(("precision", "ahead"), [("fp32", 0), ("fp16", 0), ("fp32", 3)])
def test_chunks_with_caches_answer_as_the_whole_recording_does(
    target: Target, tmp_path: Path, precision: str, ahead: int
) -> None:
    features = torch.randn(
        1, 163, 80, generator=torch.Generator().manual_seed(0)
    )  # twice past the left context, a chunk cut short
    encoder = encoder_of(folded().checkpoint, torch.float64)
    wanted = encoder(features.double(), torch.tensor([163]), Context(chunk=4, left=8, ahead=ahead))[0][0].detach().numpy()
    chunks = [Chunks(160, 320, look_ahead_ms=40 * ahead)]
    artifact = target.export(lower(folded(), (), precision, chunks), tmp_path, "model")
    session, (entry,) = target.open(artifact), artifact.streaming
    both = [recognize.answer(session, artifact, entry, features[0].numpy()) for _ in range(2)]
    assert 10 * np.log10(np.square(wanted).sum() / np.square(both[0] - wanted).sum()) >= LEAST_DB[precision]
    assert np.array_equal(*both)  # the second utterance knows nothing of the first
    assert target.structure(artifact).partitions in (None, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_samples_in_chunks_are_heard_as_kaldi_and_answered_as_their_features_are(
    target: Target, tmp_path: Path, precision: str
) -> None:
    samples = torch.randn(240 + 640 * 40 + 333, generator=torch.Generator().manual_seed(0)) / 10
    whole = folded().checkpoint
    kaldi = normalize(kaldi_log_mel(samples), whole.frontend_mean, whole.frontend_istd)[None, :160]
    wanted = encoder_of(whole, torch.float64)(kaldi.double(), torch.tensor([160]), Context(chunk=4, left=8))[0]
    artifact = target.export(lower(folded(), (), precision, [Chunks(160, 320)], "pcm"), tmp_path, "model")
    session = target.open(artifact)
    both = [recognize.answers(session, artifact, "stream_160ms", samples.numpy()) for _ in range(2)]
    assert parity.snr_db(wanted[0].detach().numpy(), both[0]["logits"]) >= LEAST_DB[precision]
    assert parity.snr_db(kaldi[0].double().numpy(), both[0]["features"]) >= 90  # at fp16 too: the front end stays in fp32
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])  # the second knows nothing of the first
    structure = target.structure(artifact)
    assert structure.normalizations == ()
    assert structure.partitions in ((None, 1) if precision == "fp32" else (None, 1, 2))  # a front end beside half precision
    assert strangers(structure, precision) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "hears"), [("fp32", "features"), ("fp16", "pcm")])
def test_the_second_pass_of_a_cascade_answers_to_what_its_stream_gave(
    target: Target, tmp_path: Path, precision: str, hears: Input
) -> None:
    cascade = fold(a_checkpoint(layers=3, second_pass=1, feed_forward=1024))
    samples = torch.randn(240 + 640 * 30 + 333, generator=torch.Generator().manual_seed(0)) / 10
    whole, encoder = cascade.checkpoint, encoder_of(cascade.checkpoint, torch.float64)
    features = normalize(kaldi_log_mel(samples), whole.frontend_mean, whole.frontend_istd)[None, :120]
    with torch.no_grad():
        encoded, lengths = encoder.encode(features.double(), torch.tensor([120]), Context(chunk=4, left=8))
        wanted = encoder.again(encoded, lengths)[0].numpy()
    program = lower(cascade, (1.28,), precision, [Chunks(160, 320)], hears)
    assert not target.refusals(program)
    artifact = target.export(program, tmp_path, "model")
    session, heard = target.open(artifact), samples.numpy() if hears == "pcm" else features[0].numpy()
    given = recognize.answers(session, artifact, "stream_160ms", heard)["encoded"]
    assert parity.snr_db(encoded[0].numpy(), given) >= LEAST_DB[precision]
    loud = np.full((1, 32, 16), 1e3, np.float32)
    assert parity.snr_db(wanted, recognize.answer(session, artifact, "second_1280ms", given, loud)) >= LEAST_DB[precision]
    if hears == "features":  # without the matrices of a front end
        assert size(artifact.path) < 1.5 * sum(parameter.nbytes for parameter in program.entries[0].graph.parameters())
    structure = target.structure(artifact)
    assert structure.normalizations == ()
    assert strangers(structure, precision) == {}


@pytest.mark.parametrize("hears", INPUTS)
def test_caches_that_are_held_answer_as_those_that_go_in_and_out(target: Target, tmp_path: Path, hears: Input) -> None:
    held, explicit = (lower(folded(), (), "fp16", [Chunks(160, 320, held)], hears) for held in (True, False))
    if sentences := target.refusals(held):
        assert "holds nothing between two calls" in sentences[0]
        return
    given = (163, 80) if hears == "features" else (240 + 163 * 160,)
    heard = torch.randn(given, generator=torch.Generator().manual_seed(0)).numpy()
    artifacts = [target.export(program, tmp_path, name) for name, program in (("held", held), ("explicit", explicit))]
    sessions = [target.open(artifact) for artifact in artifacts]
    answers = [
        [recognize.answer(session, artifact, "stream_160ms", heard) for _ in range(2)]
        for session, artifact in zip(sessions, artifacts, strict=True)
    ]
    assert np.array_equal(*answers[0])  # the second utterance knows nothing of the first
    assert np.square(answers[0][0] - answers[1][0]).mean() < 1e-4 * np.square(answers[1][0]).mean()
    names = [spec.name for spec in artifacts[0].inputs["stream_160ms"]]
    assert names == (["features", "length", "past"] if hears == "features" else ["samples", "length", "overlap", "past"])


def test_two_speakers_do_not_mix_where_the_artifact_holds_their_caches(target: Target, tmp_path: Path) -> None:
    program = lower(folded(), (), "fp16", [Chunks(160, 320, held=True)])
    if target.refusals(program):
        return
    artifact = target.export(program, tmp_path, "model")
    loaded = Loaded(None, artifact, target.open(artifact))  # type: ignore[arg-type]  # no bundle is needed
    one, other = (torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)).numpy() for seed in (0, 1))
    alone = recognize.answer(loaded.session, artifact, "stream_160ms", one)
    first, second = (recognize.Stream(loaded.session_of("stream_160ms"), artifact, "stream_160ms") for _ in range(2))
    together = []
    for start in range(0, 64, 16):
        together.append(first.accept(one[start : start + 16]))
        second.accept(other[start : start + 16])
    assert np.array_equal(np.concatenate(together), alone)


def test_asking_what_is_missing_imports_no_runtime(name: str) -> None:
    module = targets.shelf()[name].module
    heavy = ("torch", "executorch", "litert_torch", "ai_edge_litert", "coremltools")
    script = f"import sys, {module} as t; t.missing(); print([h for h in {heavy} if h in sys.modules])"
    assert in_another_process("-c", script) == "[]\n"


def test_a_target_says_what_it_is_in_one_line(target: Target) -> None:
    assert target.SUFFIX.startswith(".")
    assert target.SUMMARY
    assert "\n" not in target.SUMMARY


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_folded_encoder_is_not_refused(target: Target, program: Program, precision: str) -> None:
    assert list(target.refusals(dataclasses.replace(program, precision=precision))) == []


def test_the_artifact_is_where_it_was_wanted_and_knows_its_specs(
    name: str, target: Target, artifact: Artifact, program: Program
) -> None:
    assert artifact.path.name == f"model{target.SUFFIX}"
    assert [path.name for path in artifact.path.parent.iterdir()] == [artifact.path.name]
    assert (artifact.target, artifact.precision, artifact.parent) == (name, "fp32", program.parent)
    assert artifact.inputs == {entry.name: entry.inputs for entry in program.entries}
    assert artifact.outputs == {entry.name: entry.outputs for entry in program.entries}


@pytest.mark.parametrize("frames", [16, 11, 1])
def test_an_entry_answers_as_the_float64_graph_does_whatever_lies_behind_the_utterance(
    session: Session, program: Program, frames: int
) -> None:
    for entry in program.entries:
        assert snr_db(entry, session, frames) >= LEAST_DB["fp32"]


def test_an_answer_has_the_shape_and_the_type_of_its_spec(session: Session, program: Program) -> None:
    for entry in program.entries:
        answer = session.run(entry.name, speech(entry, 16))
        assert {spec: (array.shape, array.dtype) for spec, array in answer.items()} == {
            spec.name: (spec.shape, np.float32) for spec in entry.outputs
        }


def test_an_answer_stays_when_the_next_one_comes(session: Session, program: Program) -> None:
    entry = program.entries[0]
    first = session.run(entry.name, speech(entry, 16))["logits"]
    kept = first.copy()
    session.run(entry.name, speech(entry, 16, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_the_same_question_gets_the_same_answer(session: Session, program: Program) -> None:
    entry = program.entries[0]
    answers = [session.run(entry.name, speech(entry, 16))["logits"] for _ in range(2)]
    np.testing.assert_array_equal(*answers)


def test_how_an_array_lies_in_memory_does_not_matter(session: Session, program: Program) -> None:
    entry = program.entries[0]
    inputs = speech(entry, 16)
    features = np.asfortranarray(inputs["features"])
    assert not features.flags.c_contiguous
    answers = [session.run(entry.name, {**inputs, "features": array})["logits"] for array in (inputs["features"], features)]
    np.testing.assert_array_equal(*answers)


def test_sessions_of_one_and_of_two_threads_take_turns(target: Target, artifact: Artifact, program: Program) -> None:
    entry = program.entries[1]
    sessions = [target.open(artifact, threads=threads) for threads in (1, 2)]
    answers = [session.run(entry.name, speech(entry, 30))["logits"] for _ in range(3) for session in sessions]
    for answer in answers:
        np.testing.assert_allclose(answer, answers[0], rtol=1e-4, atol=1e-4)


def test_fp16_is_within_its_bar_and_smaller(target: Target, artifact: Artifact, program: Program, tmp_path: Path) -> None:
    half = target.export(a_program("fp16"), tmp_path, "half")
    session = target.open(half)
    assert min(snr_db(entry, session, 13) for entry in program.entries) >= LEAST_DB["fp16"]
    assert size(half.path) < 0.7 * size(artifact.path)
    (stored,) = target.structure(half).layers
    assert stored in ("fp16", "fp16-weights")
    assert_one_partition(target, half, beside=("_to_dim_order_copy",))


@pytest.mark.parametrize(("scheme", "least_db", "share"), QUANTIZED, ids=lambda told: getattr(told, "name", ""))
def test_a_quantized_program_is_near_the_float_one_and_smaller_or_refused_in_words(
    target: Target, artifact: Artifact, scheme: Scheme, least_db: float, share: float, tmp_path: Path
) -> None:
    asked = quantized_program(scheme)
    if sentences := target.refusals(asked):
        assert all(sentence.endswith(".") for sentence in sentences)
        pytest.skip(f"refused: {' '.join(sentences)}")
    small = target.export(asked, tmp_path, "small")
    session = target.open(small)
    for entry in asked.entries:
        assert least_db < snr_db(entry, session, entry.outputs[0].shape[1]) < LEAST_DB["fp32"]
    wanted = Counter(small.layers.values())
    structure = target.structure(small)
    found = structure.layers
    assert {name: count for name, count in found.items() if name not in FLOAT} == {
        name: count * len(asked.entries) for name, count in wanted.items() if name != "fp32"
    }
    named = {layer: counts for layer, counts in structure.weighted.items() if layer in small.layers}
    assert named == {layer: {small.layers[layer]: len(asked.entries)} for layer in named}
    assert bool(named) == (small.target in NAMED)
    products = ("BATCH_MATMUL", "XNNBatchMatrixMultiply", "aten.bmm.default")  # of what is rounded, where attention is int8
    assert {name for name in products if structure.precisions.get(name, {"fp32": 1}).keys() != {"fp32"}} == set()
    assert size(small.path) < share * size(artifact.path)
    if scheme.name != "int8-a16":  # XNNPACK has no such integers: slower than floats, which README says
        assert_one_partition(target, small)


@pytest.mark.slow
def test_the_blocks_in_an_artifact_are_ours_integer_for_integer(target: Target, tmp_path: Path) -> None:
    asked = quantized_program(dataclasses.replace(SCHEMES["int4-weights"], table={}))
    if target.refusals(asked):
        pytest.skip(" ".join(target.refusals(asked)))
    asked.entries[0].graph.get_submodule("blocks.0.macaron.w1").weight[3] = 0.0  # an output that a norm has silenced
    artifact = target.export(asked, tmp_path, "blocks")
    target.open(artifact)
    content = b"".join(contents(artifact.path).values())
    layers = [
        each
        for each in graphs.quantized(asked.entries[0].graph, plan_of(asked)).modules()
        if isinstance(each, graphs.QuantizedLayer)
    ]
    assert layers
    for layer in layers:
        for stored in STORED[target.SUFFIX](layer.integers, layer.scale):
            assert stored.numpy().tobytes() in content


@pytest.fixture(scope="module")
def by_positions(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """The same program, with its positions in float and in 8 bits."""
    folder, made = tmp_path_factory.mktemp("positions"), {}
    for each in VALUE_PRECISIONS:
        asked = Quantization(dataclasses.replace(SCHEMES["int4-weights"], positions=each), {}, "")
        made[each] = target.export(
            dataclasses.replace(long_program(), precision="int4-weights", quantization=asked), folder, each
        )
    return made


@functools.cache
def long_program() -> Program:
    """So long that positions weigh something, and with such positions that the answers of chunks hang on them."""
    program = lower(fold(a_checkpoint(layers=1, dimension=64)), (5.12,), "fp32", [Chunks(640, 2560)])
    for entry in program.entries:
        for positions in positions_of(entry.graph).values():
            positions.p.mul_(30)  # without them the chunks are at 18 dB
    return program


@pytest.mark.slow
def test_positions_in_8_bits_make_an_artifact_smaller_and_hardly_move_its_answers(
    target: Target, by_positions: Mapping[str, Artifact]
) -> None:
    whole, small = by_positions.values()
    count = sum(each.p.numel() for entry in long_program().entries for each in positions_of(entry.graph).values())
    bytes_each = 1 if target.SUFFIX == ".mlpackage" else 3  # half precision, or float32, less the one that is left
    assert size(whole.path) - size(small.path) > 0.8 * bytes_each * count
    heard = torch.randn(500, 80, generator=torch.Generator().manual_seed(0)).numpy()
    for entry in long_program().entries:
        exact, rounded = (recognize.answer(target.open(each), each, entry.name, heard) for each in (whole, small))
        assert 30.0 < parity.snr_db(exact.astype(np.float64), rounded) < 100.0
    assert_one_partition(target, small)
    assert target.structure(small).layers == target.structure(whole).layers


def test_the_positions_in_an_artifact_are_ours_integer_for_integer(target: Target, by_positions: Mapping[str, Artifact]) -> None:
    content = b"".join(contents(by_positions["int8"].path).values())
    for entry in long_program().entries:
        attention = entry.graph.get_submodule("blocks.0.attention")
        p, bias = attention.get_buffer("positions.p"), attention.get_parameter("key.bias").detach()
        either = (p, p + bias) if target.SUFFIX == ".tflite" else (p,)  # where nothing but the bias is between them
        assert any(graphs.round_weights(each).integers.numpy().tobytes() in content for each in either)


def nibbles(integers: Tensor) -> Tensor:
    """Two integers of 4 bits in a byte, the first in its lower half."""
    halves = integers.flatten().to(torch.uint8) & 15
    return halves[::2] | halves[1::2] << 4


STORED = {  # of integers and scales, how a file of such a name stores them
    ".safetensors": lambda integers, scale: (integers, scale),
    ".pte": lambda integers, scale: (nibbles(integers + 8), scale.bfloat16().view(torch.int16)),
    ".tflite": lambda integers, scale: (nibbles(integers), scale.half()),
    ".mlpackage": lambda integers, scale: (nibbles(integers), scale.half()),
}


def plan_of(program: Program) -> Plan:
    assert program.quantization is not None
    return plan(program.entries[0].graph, program.quantization.scheme, {})


def of_few_bits(checkpoint: Checkpoint) -> Program:
    asked = Quantization(SCHEMES["int8-dynamic"], {}, "")
    return dataclasses.replace(program_of(checkpoint, (0.64,), "fp32"), precision="int8-dynamic", quantization=asked)


@pytest.mark.slow
def test_a_conformer_whose_gains_are_folded_is_quantized_as_asked(target: Target, tmp_path: Path) -> None:
    asked = of_few_bits(fold(a_checkpoint("layer", layers=1)).checkpoint)
    if target.refusals(asked):
        pytest.skip(" ".join(target.refusals(asked)))
    made = target.export(asked, tmp_path, "conformer")
    assert target.structure(made).layers["int8-dynamic"] == Counter(made.layers.values())["int8-dynamic"]


def test_layers_whose_weights_litert_has_changed_are_refused(target: Target, tmp_path: Path) -> None:
    """It moves the gain of a LayerNorm into the layer behind it."""
    if target.SUFFIX != ".tflite":
        pytest.skip("the other converters leave weights alone")
    with pytest.raises(Refused, match="has changed the weights"):
        target.export(of_few_bits(a_checkpoint("layer", layers=1)), tmp_path, "conformer")
    assert list(tmp_path.iterdir()) == []


def test_entries_share_their_weights(artifact: Artifact, program: Program) -> None:
    weights = sum(parameter.nbytes for parameter in program.entries[0].graph.parameters())
    assert weights < size(artifact.path) < 1.5 * weights


def test_the_same_program_gives_the_same_bytes_in_another_process(name: str, artifact: Artifact, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from edgefuse.target import find; from tests.contract.test_targets import a_program; "
        f"find({name!r}).export(a_program(), pathlib.Path(sys.argv[1]), 'model')"
    )
    assert in_another_process("-W", "ignore", "-c", script, str(tmp_path)) == ""
    assert contents(tmp_path / artifact.path.name) == contents(artifact.path)


def test_a_folded_encoder_has_no_norm_and_is_one_partition_where_the_runtime_delegates(
    target: Target, artifact: Artifact, program: Program
) -> None:
    structure = target.structure(artifact)
    assert structure.normalizations == ()
    assert sum(structure.operators.values()) > 20
    assert structure.layers == {"fp32": len(sites_of(program.entries[0].graph)) * len(program.entries)}
    assert set(structure.others) <= {"fp32", "bool"}
    assert_one_partition(target, artifact)


@pytest.mark.slow
def test_the_norms_of_encoders_as_trained_are_found(target: Target, tmp_path: Path) -> None:
    kinds = ("batch", "layer")
    encoders = {norm: encoder_of(a_checkpoint(norm, layers=1, norm_residual="block")) for norm in kinds}
    program = of(*(an_entry(DeploymentGraph(encoder, 16), norm) for norm, encoder in encoders.items()))
    found = target.structure(target.export(program, tmp_path, "norms")).normalizations
    for norm in kinds:
        assert [words for words in found if norm in words.split(":")[0].split(",")[0]], found


DAMAGES = {
    "truncated": lambda content: content[:-100],
    "halved": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "text": lambda _: b"no artifact",
    "zeros in front": lambda content: bytes(64) + content[64:],
}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_a_damaged_artifact_is_an_error_in_words(target: Target, artifact: Artifact, damage: str, tmp_path: Path) -> None:
    broken = dataclasses.replace(artifact, path=tmp_path / artifact.path.name)
    (shutil.copytree if artifact.path.is_dir() else shutil.copyfile)(artifact.path, broken.path)
    path = max(broken.path.rglob("*"), key=lambda each: each.stat().st_size) if broken.path.is_dir() else broken.path
    content = path.read_bytes()
    path.unlink()
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](content))
    for reader in (target.open, target.structure):
        with pytest.raises(EdgefuseError) as told:
            reader(broken)
        assert str(broken.path) in told.value.sentence


class Stubborn(nn.Module):
    """A graph that depends on its data: PyTorch cannot export it."""

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        return features[:, :16, :29] if features.sum() > length.sum() else -features[:, :16, :29]


def test_what_cannot_be_exported_is_a_failed_export_and_leaves_nothing(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed):
        target.export(of(an_entry(Stubborn())), tmp_path, "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"precision": "int3"}, {"entries": "twice"}], ids=["a precision", "an entry twice"])
def test_what_cannot_be_honoured_is_refused_in_sentences(
    target: Target, program: Program, changes: dict[str, object], tmp_path: Path
) -> None:
    if "entries" in changes:
        changes = {"entries": program.entries[:1] * 2}
    refused = dataclasses.replace(program, **changes)
    sentences = target.refusals(refused)
    assert sentences
    assert all(sentence.endswith(".") for sentence in sentences)
    with pytest.raises(Refused):
        target.export(refused, tmp_path, "model")
    assert list(tmp_path.iterdir()) == []


def assert_one_partition(target: Target, artifact: Artifact, beside: tuple[str, ...] = ()) -> None:
    structure = target.structure(artifact)
    if structure.partitions is not None:
        assert structure.partitions == 1
        assert [operator for operator in structure.outside if not any(known in operator for known in beside)] == []


def size(path: Path) -> int:
    return sum(len(content) for content in contents(path).values())


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in files}


def in_another_process(*arguments: str) -> str:
    """What Python prints, with this process's path and another seed of its hashes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

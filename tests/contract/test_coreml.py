"""What is Core ML's own: functions that share weights, the sealed package, and the norms that are found in it."""

import dataclasses
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgefuse import recognize
from edgefuse.bench.layers import layer_latencies_ms
from edgefuse.checkpoint import encoder_of
from edgefuse.errors import ChangedBundle, ExportFailed, NotABundle, Refused
from edgefuse.fold import fold
from edgefuse.lower import Chunks, DeploymentGraph, lower
from edgefuse.lower.sites import points_of
from edgefuse.quantize.graph import round_weights
from edgefuse.quantize.palette import palettized
from edgefuse.quantize.scheme import SCHEMES, Scheme
from edgefuse.quantize.sensitivity import extents
from edgefuse.values import Artifact, Checkpoint, Entry, Program, Quantization, Streaming, TensorSpec
from edgefuse.verify.gate import judge
from edgefuse_targets import coreml
from edgefuse_targets.coreml_quantize import in_halves
from edgefuse_targets.foreign import quiet
from tests.conftest import a_checkpoint

ONE_SECOND, TWO_SECONDS = "offline_1000ms", "offline_2000ms"
MODEL = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


@pytest.fixture(scope="module", autouse=True)
def tools() -> Iterator[ModuleType]:
    with quiet():
        tools = pytest.importorskip("coremltools")
    gc.freeze()  # every conversion collects garbage, a second each among the objects of these imports
    yield tools
    gc.unfreeze()


@pytest.fixture(scope="module")
def program(fusionformer: Checkpoint) -> Program:
    return lower(fold(fusionformer), [1.0, 2.0], "fp16")


@pytest.fixture(scope="module")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return coreml.export(program, tmp_path_factory.mktemp("artifact"), "model")


def of(graph: nn.Module, *shape: int, output: tuple[int, ...] | None = None, entry: str = "whole") -> Program:
    """A program of one graph with one input."""
    spec_in = TensorSpec("features", shape, "float32", "whatever comes in")
    spec_out = TensorSpec("logits", output or shape, "float32", "whatever comes out")
    return Program((Entry(entry, graph.eval(), (spec_in,), (spec_out,)),), "fp32", parent="0" * 64)


def of_few_bits(program: Program, scheme: Scheme) -> Program:
    """The same program as a scheme says; every value has the same range."""
    ranges = {entry.name: dict.fromkeys(points_of(entry.graph), (-6.0, 6.0)) for entry in program.entries}
    return dataclasses.replace(program, precision=scheme.precision, quantization=Quantization(scheme, ranges, "0" * 64))


class Does(nn.Module):
    """A graph that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def spec_of(artifact: Artifact, tools: ModuleType) -> object:
    """As Core ML Tools read it, through the manifest."""
    with quiet():
        return tools.models.MLModel(str(artifact.path), skip_model_load=True).get_spec()


def test_each_entry_is_a_function_and_the_first_is_the_default(artifact: Artifact, tools: ModuleType) -> None:
    description = spec_of(artifact, tools).description
    assert [function.name for function in description.functions] == [ONE_SECOND, TWO_SECONDS]
    assert description.defaultFunctionName == ONE_SECOND


def test_the_functions_share_their_weights(artifact: Artifact, program: Program, tmp_path: Path) -> None:
    longest = coreml.export(Program(program.entries[1:], "fp16", program.parent), tmp_path, "longest")
    alone, together = ((path / WEIGHTS).stat().st_size for path in (longest.path, artifact.path))
    assert together < 1.2 * alone


def test_every_feature_says_what_it_means(artifact: Artifact, program: Program, tools: ModuleType) -> None:
    for function, entry in zip(spec_of(artifact, tools).description.functions, program.entries, strict=True):
        told = [feature.shortDescription for feature in (*function.input, *function.output)]
        assert told == [spec.meaning for spec in (*entry.inputs, *entry.outputs)]


def test_the_package_knows_its_lineage_and_no_date(artifact: Artifact, program: Program, tools: ModuleType) -> None:
    metadata = spec_of(artifact, tools).description.metadata
    assert dict(metadata.userDefined) == {"edgefuse.precision": "fp16", "edgefuse.parent": program.parent}
    assert metadata.author == "edgefuse"


def test_the_same_program_gives_the_same_bytes_whatever_was_exported_before(
    artifact: Artifact, program: Program, tmp_path: Path
) -> None:
    coreml.export(of(nn.Linear(4, 4), 1, 4), tmp_path, "other")
    again = coreml.export(program, tmp_path, "again")
    assert coreml.digest(again.path) == coreml.digest(artifact.path)


def test_core_ml_tools_leave_the_package_as_it_is(artifact: Artifact, tools: ModuleType) -> None:
    before = coreml.digest(artifact.path)
    spec_of(artifact, tools)
    assert coreml.digest(artifact.path) == before


def test_another_name_or_content_of_a_file_gives_another_digest(tmp_path: Path) -> None:
    digests = set()
    for number, (name, content) in enumerate([("a", "x"), ("b", "x"), ("a", "y")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(content, encoding="utf-8")
        digests.add(coreml.digest(folder))
    assert len(digests) == 3


def test_a_package_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    coreml.export(of(nn.Linear(4, 4), 1, 4), tmp_path, "model")
    newer = coreml.export(of(nn.ReLU(), 1, 4), tmp_path, "model")
    assert coreml.structure(newer).operators == {"relu": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]


def test_a_program_without_weights_is_a_package_too(tmp_path: Path) -> None:
    artifact = coreml.export(of(nn.ReLU(), 1, 4), tmp_path, "model")
    got = coreml.open(artifact).run("whole", {"features": np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)})
    assert got["logits"].tolist() == [[0.0, 0.0, 1.0, 2.0]]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoil(path: Path) -> None:
    path.write_bytes(b"\xff{")


def rename_an_identifier(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "rootModelIdentifier": "another"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        (WEIGHTS, cut_short),
        (WEIGHTS, flip_a_byte),
        (WEIGHTS, Path.unlink),
        (MODEL, cut_short),
        (MODEL, flip_a_byte),
        ("Manifest.json", cut_short),
        ("Manifest.json", spoil),
        ("Manifest.json", rename_an_identifier),
    ],
)
@pytest.mark.parametrize("reader", [coreml.open, coreml.structure])
def test_a_package_that_was_changed_is_noticed(
    part: str | Path, damage: Callable[[Path], None], reader: Callable[[Artifact], object], tmp_path: Path, small: Artifact
) -> None:
    artifact = copy_of(small, tmp_path)
    damage(artifact.path / part)
    with pytest.raises(ChangedBundle, match="has changed since the export"):
        reader(artifact)


@pytest.mark.parametrize("part", [MODEL, "Manifest.json"])
def test_a_folder_without_its_parts_is_no_package(part: str | Path, tmp_path: Path, small: Artifact) -> None:
    artifact = copy_of(small, tmp_path)
    (artifact.path / part).unlink()
    with pytest.raises(NotABundle, match="is not a Core ML package"):
        coreml.open(artifact)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return coreml.export(of(nn.Linear(40, 40), 1, 40), tmp_path_factory.mktemp("small"), "model")


def copy_of(artifact: Artifact, folder: Path) -> Artifact:
    copy = folder / "copy.mlpackage"
    for source in artifact.path.rglob("*"):
        if source.is_file():
            target = copy / source.relative_to(artifact.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return Artifact("coreml", copy, artifact.precision, artifact.inputs, artifact.outputs, artifact.parent)


def test_a_folded_encoder_has_no_norm(artifact: Artifact) -> None:
    assert coreml.structure(artifact).normalizations == ()


@pytest.mark.parametrize(("checkpoint", "kind"), [("conformer", "layer_norm"), ("fusionformer", "batch_norm")])
def test_the_norms_of_an_unfolded_encoder_are_found(
    checkpoint: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    encoder = encoder_of(request.getfixturevalue(checkpoint))
    graph = DeploymentGraph(encoder, 25).eval()
    specs = (TensorSpec("features", (1, 100, 80), "float32", "log-mel"), TensorSpec("length", (1,), "float32", "frames"))
    entry = Entry("whole", graph, specs, (TensorSpec("logits", (1, 25, 29), "float32", "scores"),))
    structure = coreml.structure(coreml.export(Program((entry,), "fp32", "0" * 64), tmp_path, "model"))
    named = [words for words in structure.normalizations if kind in words]
    assert len(named) == structure.operators[kind] > 10


SCALE, SHIFT = torch.linspace(0.5, 1.5, 6), torch.linspace(-1.0, 1.0, 6)


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        (lambda x: x * SCALE + SHIFT, "by constants of 6 channels"),
        (lambda x: (x - SHIFT) * SCALE, "by constants of 6 channels"),
        (lambda x: x.transpose(1, 2) * SCALE[:, None] + SHIFT[:, None], "by constants of 6 channels"),
        (lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), "rsqrt"),
        (lambda x: nn.functional.instance_norm(x.transpose(1, 2)), "instance_norm"),
        (lambda x: nn.functional.conv1d(x.transpose(1, 2), SCALE[:, None, None], SHIFT, groups=6), "conv of one tap"),
    ],
)
def test_a_norm_is_found_however_it_is_spelled(spelled: Callable[[Tensor], Tensor], words: str, tmp_path: Path) -> None:
    output = tuple(spelled(torch.zeros(1, 5, 6)).shape)
    artifact = coreml.export(of(Does(spelled), 1, 5, 6, output=output), tmp_path, "model")
    (found,) = coreml.structure(artifact).normalizations
    assert words in found


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: x * 0.5 + SHIFT,
        lambda x: torch.relu(x * SCALE) + SHIFT,
        lambda x: x + SHIFT,
        lambda x: nn.functional.conv1d(x.transpose(1, 2), torch.ones(6, 1, 3), SHIFT, groups=6).transpose(1, 2),
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(harmless: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    output = tuple(harmless(torch.zeros(1, 5, 6)).shape)
    artifact = coreml.export(of(Does(harmless), 1, 5, 6, output=output), tmp_path, "model")
    assert coreml.structure(artifact).normalizations == ()


def test_a_name_that_core_ml_would_change_is_refused() -> None:
    assert coreml.refusals(of(nn.ReLU(), 1, 4, entry="5-seconds")) == [
        "Core ML names are letters, digits and underscores; '5-seconds' of entry '5-seconds' is not."
    ]


@pytest.mark.parametrize(("shape", "dimensions"), [((), 0), ((1, 1, 1, 1, 1, 4), 6)])
def test_a_tensor_of_too_few_or_too_many_dimensions_is_refused(shape: tuple[int, ...], dimensions: int, tmp_path: Path) -> None:
    program = of(nn.ReLU(), *shape)
    assert len(coreml.refusals(program)) == 2  # the input's and the output's
    with pytest.raises(Refused, match=rf"1 to 5 dimensions; 'features' of entry 'whole' has {dimensions}\."):
        coreml.export(program, tmp_path, "model")
    assert not list(tmp_path.iterdir())


def test_what_core_ml_tools_cannot_convert_is_a_failed_export(tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="linalg_svdvals"):
        coreml.export(of(Does(torch.linalg.svdvals), 1, 4, 4, output=(1, 4)), tmp_path, "model")
    assert not list(tmp_path.iterdir())


def test_on_a_mac_core_ml_itself_answers(artifact: Artifact, tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, path: str, function_name: str) -> None:
            self.asked = (path, function_name)

        def make_state(self) -> str:
            return f"the state of {self.asked[1]}"

        def predict(self, inputs: dict[str, np.ndarray], **state: str) -> dict[str, object]:
            return {"asked": self.asked, **inputs, **state}

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(tools.models, "MLModel", Model)
    session = coreml.open(artifact)
    assert session.how == "run on this host"
    assert session.run(TWO_SECONDS, {}) == {"asked": (str(artifact.path), TWO_SECONDS)}
    holding = dataclasses.replace(artifact, streaming={TWO_SECONDS: Streaming(16, 64, 40, {}, held=("history",))})
    assert coreml.open(holding).run(TWO_SECONDS, {})["state"] == f"the state of {TWO_SECONDS}"


def test_states_are_half_precision_and_as_wide_as_the_neural_engine_wants_them(fusionformer: Checkpoint) -> None:
    held = [lower(fold(fusionformer), [], precision, [Chunks(160, 320, held=True)]) for precision in ("fp16", "fp32")]
    assert coreml.refusals(held[0]) == []
    assert coreml.refusals(held[1]) == [
        "Core ML holds states in half precision only, and the program is fp32: use --precision fp16."
    ]
    assert coreml.refusals(of_few_bits(held[1], SCHEMES["int8-weights"])) == []
    held[0].entries[0].graph.register_buffer("history", torch.zeros(1, 240))
    assert coreml.refusals(held[0]) == [
        "The Neural Engine wants states a multiple of 32 wide; 'history' of entry 'stream_160ms' is 240."
    ]


# --- fewer bits

MIXED = Scheme("mine", "int8", {"*.feed_forward.*": "palette4-weights", "*.w2": "int4-weights", "blocks.0.macaron.w1": "fp32"})


@pytest.fixture(scope="module")
def mixed(fusionformer: Checkpoint) -> Program:
    """Two entries with layers of every kind that Core ML has."""
    return of_few_bits(lower(fold(fusionformer), [1.0], "fp32", [Chunks(160, 320)]), MIXED)


@pytest.fixture(scope="module")
def small_bits(mixed: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return coreml.export(mixed, tmp_path_factory.mktemp("mixed"), "model")


def layers_check(artifact: Artifact) -> bool:
    """What the gate says of the layers in a package."""
    structure = coreml.structure(artifact)
    verdict = judge(structure, {}, {}, artifact=artifact, how="evaluated", hears="features", norm_free=True, digest="")
    return next(check.passed for check in verdict.checks if check.name == "layers")


def test_each_layer_in_the_package_is_what_the_table_of_its_scheme_says(small_bits: Artifact) -> None:
    asked = Counter(small_bits.layers.values())
    assert set(asked) == {"int8", "palette4-weights", "int4-weights", "fp32"}
    found = coreml.structure(small_bits).layers
    assert found == {name.replace("fp32", "fp16"): 2 * count for name, count in asked.items()}
    assert layers_check(small_bits)


@pytest.mark.parametrize(("layer", "precision"), [("head.ctc", "int8-weights"), ("blocks.1.feed_forward.w1", "int8-weights")])
def test_a_layer_that_did_not_follow_its_scheme_fails_the_gate(small_bits: Artifact, layer: str, precision: str) -> None:
    assert small_bits.layers[layer] != precision
    other = dataclasses.replace(small_bits, layers={**small_bits.layers, layer: precision})
    assert not layers_check(other)


def test_layers_that_are_evaluated_have_no_latency(program: Program) -> None:
    (entry, *_) = program.entries
    assert layer_latencies_ms(coreml, entry, extents(entry)) == {}


def test_a_quantized_package_has_the_same_bytes_twice(small_bits: Artifact, mixed: Program, tmp_path: Path) -> None:
    assert coreml.digest(coreml.export(mixed, tmp_path, "again").path) == coreml.digest(small_bits.path)


def test_the_functions_of_a_quantized_package_share_their_weights(small_bits: Artifact, mixed: Program, tmp_path: Path) -> None:
    whole = coreml.export(dataclasses.replace(mixed, entries=mixed.entries[:1]), tmp_path, "whole")
    alone, together = ((path / WEIGHTS).stat().st_size for path in (whole.path, small_bits.path))
    assert together < 1.2 * alone


def test_caches_are_held_by_a_quantized_package_too(fusionformer: Checkpoint, tmp_path: Path) -> None:
    heard = torch.randn(163, 80, generator=torch.Generator().manual_seed(0)).numpy()
    answers = []
    for held in (True, False):
        program = of_few_bits(lower(fold(fusionformer), [], "fp32", [Chunks(160, 320, held)]), SCHEMES["int8-weights"])
        artifact = coreml.export(program, tmp_path, f"model{held}")
        answers.append(recognize.answer(coreml.open(artifact), artifact, "stream_160ms", heard))
    assert np.square(answers[0] - answers[1]).mean() < 1e-4 * np.square(answers[1]).mean()


def test_the_front_end_of_a_quantized_package_stays_whole(fusionformer: Checkpoint, tmp_path: Path) -> None:
    program = of_few_bits(lower(fold(fusionformer), [1.0], "fp32", hears="pcm"), SCHEMES["int8"])
    artifact = coreml.export(program, tmp_path, "model")
    (entry,) = program.entries
    samples = torch.randn(entry.inputs[0].shape, generator=torch.Generator().manual_seed(0)) / 10
    length = torch.tensor([float(samples.shape[1])])
    given = coreml.open(artifact).run(entry.name, {"samples": samples.numpy(), "length": length.numpy()})["features"]
    _, wanted = entry.graph(samples, length)
    assert np.abs(given - wanted.numpy()).max() < 1e-3
    assert layers_check(artifact)


@pytest.mark.parametrize(
    ("name", "why"), [("int8-dynamic", "a scale that is known when"), ("int8-a16", "makes integers of 8 bits")]
)
def test_integers_that_core_ml_has_not_are_refused_in_words(program: Program, name: str, why: str) -> None:
    (sentence,) = coreml.refusals(of_few_bits(program, SCHEMES[name]))
    assert sentence.startswith(f"Core ML cannot do {name}: ")
    assert why in sentence


def test_what_is_quantized_is_no_longer_than_half_precision_counts() -> None:
    program = of_few_bits(lower(fold(a_checkpoint(max_frames=3000)), [100.0], "fp32"), SCHEMES["int8-weights"])
    (sentence,) = coreml.refusals(program)
    assert "counts frames up to 2048; entry 'offline_100000ms' has 2500." in sentence


@pytest.mark.parametrize(("bits", "shape", "block"), [(8, (5, 64), 0), (8, (5, 3, 3, 3), 0), (4, (5, 64), 32), (4, (5, 25), 0)])
def test_weights_are_whole_numbers_of_a_scale_in_half_precision(bits: int, shape: tuple[int, ...], block: int) -> None:
    rows = torch.arange(1.0, 6).reshape(-1, *[1] * (len(shape) - 1))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * rows
    rounded, scales = in_halves(weight, bits, block)
    assert torch.equal(scales, scales.half().float())
    integers = rounded.reshape(*scales.shape, -1) / scales[..., None]
    assert torch.equal(integers.round().reshape(shape), round_weights(weight, bits, block).integers.float())


@pytest.mark.parametrize("shape", [(32, 40), (6, 40), (16, 4, 3, 3)])
def test_a_palette_gives_each_weight_the_nearest_of_16_values_that_are_better_than_even_steps(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded, tables = palettized(weight)
    together = {32: 16, 6: 2, 16: 16}[shape[0]]
    assert tables.shape == (shape[0] // together, *[1] * (len(shape) - 1), 16, 1)
    assert torch.equal(tables, tables.half().float())
    for mine, given, table in zip(rounded.chunk(len(tables)), weight.chunk(len(tables)), tables.flatten(1), strict=True):
        assert set(mine.flatten().tolist()) <= set(table.tolist())
        assert torch.equal((mine - given).abs(), (given[..., None] - table).abs().amin(-1))
    steps = weight.reshape(len(tables), -1).abs().amax(1).repeat_interleave(together).reshape(-1, *[1] * (len(shape) - 1)) / 7.5
    even = (weight / steps).round() * steps
    assert float((rounded - weight).square().mean()) < 0.7 * float((even - weight).square().mean())
    assert all(torch.equal(one, other) for one, other in zip(palettized(weight), (rounded, tables), strict=True))


def test_the_values_of_a_palette_are_the_means_of_what_they_stand_for() -> None:
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    rounded, tables = palettized(weight)
    for value in tables.flatten():
        assert float(weight[rounded == value].mean()) == pytest.approx(float(value), abs=1e-3)


def test_a_palette_of_one_weight_holds_it() -> None:
    for value in (0.0, 0.5):
        assert palettized(torch.full((4, 8), value))[0].unique().tolist() == [value]

"""A thousand mutated checkpoints: each is refused in words, or exported correctly."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgefuse import pipeline
from edgefuse.errors import BundleError, CheckpointError, EdgefuseError, ExportFailed
from edgefuse.inspection import inspect
from edgefuse.model import EncoderConfig
from edgefuse.target import Target
from edgefuse.values import Artifact, Structure

Mutation = Callable[[Path], None]
WEIGHTS, CONFIG, TOKENS = FILES = ("model.safetensors", "config.json", "tokens.txt")
FIELDS = {field.name: field for field in dataclasses.fields(EncoderConfig)}
WORDS = ["batch", "layer", "relu", "swish", "relative", "none", "both", "pointwise", "depthwise", "output", "block", "", "ReLU"]
PLAUSIBLE = st.one_of(st.booleans(), st.integers(-2, 70), st.sampled_from([0.0, 0.5, -0.1, 1.0]), st.sampled_from(WORDS))
ODD = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=30), st.sampled_from([2**31, 10**400, "9" * 5000])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
NUMBERS = st.sampled_from([0.0, -1.0, 1e-30, 1e-12, 1e12, 1e30, 3e38, float("nan"), float("inf"), -float("inf")])
DTYPES = st.sampled_from(
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
SHARES = st.floats(0, 1, exclude_max=True)  # of a length: where in a file or a tensor something happens


def set_field(name: str, value: object) -> Mutation:
    def mutate(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**fields, name: value}))
        without_digest(folder)

    return mutate


def drop_field(name: str) -> Mutation:
    def mutate(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text())
        del fields[name]
        (folder / CONFIG).write_text(json.dumps(fields))
        without_digest(folder)

    return mutate


def change_lines(share: float, line: str | None) -> Mutation:
    """One token becomes another, or none."""

    def mutate(folder: Path) -> None:
        lines = (folder / TOKENS).read_text().splitlines()
        position = int(share * len(lines))
        lines[position : position + 1] = [] if line is None else [line]
        (folder / TOKENS).write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        without_digest(folder)

    return mutate


def set_values(share: float, where: float, value: float, *, every: bool) -> Mutation:
    """One value of a tensor, or all of them."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten()
        flat[slice(None) if every else int(where * flat.numel())] = torch.tensor(value).to(tensor.dtype)
        return flat.reshape(tensor.shape)

    return tensor_mutation(share, change)


def set_variance(share: float, value: float) -> Mutation:
    """A running variance, of one norm, that no training leaves; by chance alone hardly any mutation would meet one."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        variances = [name for name in sorted(tensors) if name.endswith("running_var")]
        name = variances[int(share * len(variances))]
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, folder / WEIGHTS)

    return mutate


def cast(share: float, dtype: torch.dtype) -> Mutation:
    return tensor_mutation(share, lambda tensor: tensor.to(dtype))


def reshape(share: float, how: str) -> Mutation:
    hows = {
        "flat": torch.flatten,
        "one less": lambda t: t.flatten()[:-1].clone(),
        "one more axis": lambda t: t.unsqueeze(0),
        "turned": lambda t: t.reshape(t.shape[::-1]),
        "empty": lambda t: t.flatten()[:0].clone(),
        "a number": lambda t: t.flatten()[:1].sum(),
    }
    return tensor_mutation(share, hows[how])


def rename(share: float, name: str | None) -> Mutation:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensor = tensors.pop(sorted(tensors)[int(share * len(tensors))])
        save_file(tensors if name is None else {**tensors, name: tensor}, folder / WEIGHTS)

    return mutate


def tensor_mutation(share: float, change: Callable[[torch.Tensor], torch.Tensor]) -> Mutation:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = sorted(tensors)[int(share * len(tensors))]
        save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / WEIGHTS)

    return mutate


def flip(file: str, share: float, bit: int) -> Mutation:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(share * len(changed))] ^= 1 << bit
        return bytes(changed)

    return byte_mutation(file, change)


def cut(file: str, share: float) -> Mutation:
    return byte_mutation(file, lambda content: content[: int(share * len(content))])


def insert(file: str, share: float, garbage: bytes) -> Mutation:
    def change(content: bytes) -> bytes:
        position = int(share * len(content))
        return content[:position] + garbage + content[position:]

    return byte_mutation(file, change)


def header(share: float, garbage: str) -> Mutation:
    """Another word in the header of the weights, its length mended."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        words = content[8 : 8 + length].split(b'"')
        words[int(share * len(words))] = garbage.encode("utf-8", "surrogatepass")
        mended = b'"'.join(words)
        return len(mended).to_bytes(8, "little") + mended + content[8 + length :]

    return byte_mutation(WEIGHTS, change)


def byte_mutation(file: str, change: Callable[[bytes], bytes]) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return mutate


def replace_file(file: str, by: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / file).unlink()
        if by == "a folder":
            (folder / file).mkdir()
        elif by == "a link to itself":
            (folder / file).symlink_to(folder / file)
        elif by == "a link to nowhere":
            (folder / file).symlink_to(folder / "nowhere")
        elif by in FILES and by != file:
            shutil.copyfile(folder / by, folder / file)

    return mutate


class Eager:
    """A target that keeps the graph and runs it: what an exporter costs would make a thousand mutations too slow."""

    SUFFIX, SUMMARY, how = ".digest", "", "run on this host"

    def __init__(self, real: Target) -> None:
        self.real = real

    def missing(self):
        return []

    def refusals(self, program):
        return self.real.refusals(program)

    def export(self, program, folder, name):
        self.entries = {entry.name: entry for entry in program.entries}
        path = folder / f"{name}{self.SUFFIX}"
        path.write_text(program.parent)
        inputs = {name: entry.inputs for name, entry in self.entries.items()}
        outputs = {name: entry.outputs for name, entry in self.entries.items()}
        return Artifact("reference", path, program.precision, inputs, outputs, program.parent)

    def open(self, _artifact, threads=1, *, warm=True):
        assert threads == 1
        assert warm
        return self

    @torch.no_grad()
    def run(self, name, inputs):
        entry = self.entries[name]
        return {"logits": entry.graph(*(torch.from_numpy(inputs[spec.name]) for spec in entry.inputs)).numpy()}

    def structure(self, _artifact):
        return Structure({}, ())


def without_digest(folder: Path) -> None:
    """As another program would write the weights: nothing says what the other files were."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)


FILE = st.sampled_from(FILES)
NAMES = st.one_of(st.none(), st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable() and "__" not in name))
MUTATIONS = st.one_of(
    st.builds(set_field, st.sampled_from(list(FIELDS)), PLAUSIBLE),
    st.builds(set_field, st.one_of(st.sampled_from(list(FIELDS)), st.text(max_size=10)), ODD),
    st.builds(drop_field, st.sampled_from(list(FIELDS))),
    st.builds(change_lines, SHARES, st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["<blk>", "a", "\ud800"]))),
    st.builds(set_values, SHARES, SHARES, NUMBERS, every=st.booleans()),
    st.builds(set_variance, SHARES, NUMBERS),
    st.builds(cast, SHARES, DTYPES),
    st.builds(reshape, SHARES, st.sampled_from(["flat", "one less", "one more axis", "turned", "empty", "a number"])),
    st.builds(rename, SHARES, NAMES),
    st.builds(flip, FILE, SHARES, st.integers(0, 7)),
    st.builds(cut, FILE, SHARES),
    st.builds(insert, FILE, SHARES, st.binary(min_size=1, max_size=9)),
    st.builds(header, SHARES, st.one_of(st.text(max_size=12), st.sampled_from(["F64", "F4", "dtype", "shape", "__metadata__"]))),
    st.builds(replace_file, FILE, st.sampled_from(["nothing", "a folder", "a link to itself", "a link to nowhere", *FILES])),
)
OUTCOMES: Counter[str] = Counter()


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=4), real=st.integers(0, 4).map(lambda draw: draw == 0))
def test_a_mutated_checkpoint_is_refused_in_words_or_exported_correctly(mutations, real, whole_checkpoint, order, tmp_path):
    folder, output = tmp_path / "mutant", tmp_path / "bundle"
    for path in (folder, output, tmp_path / "bundle.failed"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole_checkpoint, folder)
    for mutate in mutations:
        with suppress(Exception):  # the first mutation may have left nothing for the second
            mutate(folder)
    looked = outcome(lambda: inspect(folder))
    target = pipeline.find("reference") if real else Eager(pipeline.find("reference"))
    with mock.patch.object(pipeline, "find", return_value=target):
        made = outcome(lambda: pipeline.export(folder, output, order))
    OUTCOMES[type(made).__name__] += 1
    if isinstance(looked, EdgefuseError):
        assert looked.sentence
        assert looked.hint
        assert isinstance(looked, CheckpointError)
        assert str(made) == str(looked)
    elif isinstance(made, EdgefuseError):
        assert not isinstance(made, (ExportFailed, BundleError))
    else:
        assert made.passed
        assert made.bundle.config == dataclasses.replace(looked.checkpoint.config, folded=True)


def test_the_mutations_reach_both_ends_of_the_road():
    if not OUTCOMES:
        pytest.skip("the mutations above were not run")
    assert OUTCOMES["Verified"] > 30
    kinds = {"NotACheckpoint", "DamagedCheckpoint", "BadConfig", "ShapeMismatch", "NotFinite", "BadStatistics"}
    assert kinds <= set(OUTCOMES)


def outcome(road: Callable[[], object]):
    """What comes out, or the error in words that comes instead; anything else is a failure of the test."""
    try:
        return road()
    except EdgefuseError as error:
        return error

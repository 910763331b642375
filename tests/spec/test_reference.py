"""The reference target's file: operators by name, constants once, no code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from edgefuse.errors import ChangedBundle
from edgefuse.fold import fold
from edgefuse.lower import lower
from edgefuse.values import Artifact, Entry, Program, TensorSpec
from edgefuse_targets import reference
from edgefuse_targets.aten import graphs, written


def of(graph: nn.Module, *shape: int, name: str = "whole") -> Program:
    spec = TensorSpec("x", shape, "float32", "a test")
    return Program((Entry(name, graph.eval(), (spec,), (spec,)),), "fp32", parent="0" * 64)


def changed(content: bytes, change: dict[str, object]) -> bytes:
    """The same file with another description of its first step."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"]["program"])
    next(iter(description.values()))["steps"][0] |= change
    return save(load(content), metadata={"program": json.dumps(description)})


class Several(nn.Module):
    """Lists, keywords, several outputs of one operator, a type and a number."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([x, x * 2.0], dim=-1).chunk(2, dim=-1)
        return (first - second).to(torch.float32) + torch.ones_like(x)


@pytest.mark.parametrize("graph", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.GLU()), Several()])
def test_a_graph_that_was_written_and_read_answers_as_before(graph):
    x = torch.randn(3, 4)
    (read,) = graphs(written(of(graph, 3, 4))).values()
    torch.testing.assert_close(read.run([x]), [graph.eval()(x)], rtol=0, atol=0)


def test_every_constant_stands_in_the_file_once(fusionformer):
    one, two = (len(written(lower(fold(fusionformer), seconds, "fp32"))) for seconds in ([1.0], [1.0, 1.04]))
    stored = load(written(lower(fold(fusionformer), [1.0, 1.04], "fp32")))
    assert len({(tensor.shape, tensor.numpy().tobytes()) for tensor in stored.values()}) == len(stored)
    assert two < 2 * one


def test_a_file_can_name_no_operator_but_those_of_aten(tmp_path: Path):
    content = changed(written(of(nn.ReLU(), 3, 4)), {"operator": "posix.system.default"})
    (tmp_path / "model.safetensors").write_bytes(content)
    artifact = Artifact("reference", tmp_path / "model.safetensors", "fp32", {"whole": ()}, {"whole": ()}, "0" * 64)
    with pytest.raises(ChangedBundle, match=r"posix.system.default is no operator of aten"):
        reference.open(artifact)


def test_an_entry_that_is_not_there_is_missed(tmp_path: Path):
    artifact = reference.export(of(nn.ReLU(), 3, 4), tmp_path, "model")
    wanted = Artifact("reference", artifact.path, "fp32", {"another": ()}, {"another": ()}, "0" * 64)
    with pytest.raises(ChangedBundle, match="lacks the entries another"):
        reference.open(wanted)

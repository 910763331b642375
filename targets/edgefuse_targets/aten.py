"""Graphs of PyTorch's `aten` operators as data: written, read and run."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of a quantized graph
from safetensors.torch import load, save
from torch import Tensor

from edgefuse_targets.norms import Operator, normalizations
from edgefuse_targets.programs import arithmetic, deployed, precision_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgefuse.values import Entry, Program

PROGRAM = "program"  # the one key of the file's metadata
NAMESPACES = ("aten", "quantized_decomposed")
GETITEM = "getitem"
WEIGHTED = ("aten.linear.default", "aten.conv2d.default")
DEQUANTIZE = "quantized_decomposed.dequantize"
BLOCKWISE = f"{DEQUANTIZE}_per_channel_group.default"
NETWORK = "network."  # where the network is in a graph with a front end
EIGHT_BITS = 127  # the largest integer of a weight
IDLE = ("aten._assert_tensor_metadata.default",)  # checks of what the tracer saw; without a result


@dataclass(frozen=True, slots=True)
class Graph:
    """One entry: steps from its inputs and constants to its outputs.

    Attributes:
        inputs: names of the values that the caller brings, in order.
        constants: values that are known.
        stored: under which names they stand in the file.
        steps: what is computed, in order: {"name", "operator", "arguments", "keywords"}.
        outputs: names of the values that the caller gets, in order.
    """

    name: str
    inputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    stored: Mapping[str, str]
    steps: tuple[Mapping[str, Any], ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Answer once."""
        values = self._values(inputs)
        return [values[name] for name in self.outputs]

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Everything that is computed on the way to an answer."""
        values: dict[str, Any] = {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}
        with torch.inference_mode():
            for step in self.steps:
                arguments, keywords = _decoded(step["arguments"], values), _decoded(step["keywords"], values)
                values[step["name"]] = _operator(step["operator"])(*arguments, **keywords)
        return values

    def operators(self, inputs: Sequence[Tensor]) -> Iterator[Operator]:
        """Each operator with what it computes with, which shows when the graph answers to `inputs`.

        PyTorch computes with floats between rounded values; a linear or a convolution has the name of how it is rounded.
        """
        values, makers = self._values(inputs), {step["name"]: step for step in self.steps}
        types = {name: str(value.dtype).removeprefix("torch.") for name, value in values.items() if isinstance(value, Tensor)}
        for step in self.steps:
            read = tuple(_references([step["arguments"], step["keywords"]]))
            if step["operator"] in WEIGHTED:
                precision = self._rounding(makers.get(read[0], {}), makers.get(read[1], {}), types[read[1]])
            else:
                precision = arithmetic([types[name] for name in (*read, step["name"]) if name in types])
            if step["operator"] != GETITEM:
                yield Operator(step["operator"], read, (step["name"],), precision=precision)

    def layer(self, operator: Operator) -> str:
        """The name of a linear or a convolution, which is that of its weights; the operator's where they are computed."""
        weights = operator.inputs[1]
        maker = next((step for step in self.steps if step["name"] == weights), None)
        if maker is not None and maker["operator"].startswith(DEQUANTIZE):
            weights = next(_references(maker["arguments"]))
        _, _, path = self.stored.get(str(weights), "").partition("/")
        return path.removeprefix(NETWORK).rpartition(".")[0] or operator.name

    def _rounding(self, taken: Mapping[str, Any], weights: Mapping[str, Any], given: str) -> str:
        if not weights.get("operator", "").startswith(DEQUANTIZE):
            return precision_of(given, given, widened=False)
        most = weights["arguments"][4 if weights["operator"] == BLOCKWISE else 5]
        bits = 4 if most < EIGHT_BITS else 8
        static, dynamic = (taken.get("operator") == f"{DEQUANTIZE}_per_{which}.default" for which in ("tensor", "token"))
        return precision_of("int8" if static else "float32", f"int{bits}", widened=not dynamic)

    def normalizations(self) -> Iterator[str]:
        """Each normalization of the graph, in words."""
        nodes = [
            Operator(step["operator"], tuple(_references([step["arguments"], step["keywords"]])), (step["name"],))
            for step in self.steps
        ]
        return normalizations(self.name, nodes, {name: tuple(tensor.shape) for name, tensor in self.constants.items()})


def written(program: Program) -> bytes:
    """A program as the bytes of a safetensors file; the same program gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    description = {entry.name: _describe(program, entry, tensors) for entry in program.entries}
    return bytes(save(tensors, metadata={PROGRAM: json.dumps(description, sort_keys=True)}))


def graphs(content: bytes) -> Mapping[str, Graph]:
    """The entries of a file.

    Raises:
        Exception: of many kinds, when the file is damaged.
    """
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"][PROGRAM])
    return {name: _graph(name, fields, tensors) for name, fields in description.items()}


def _graph(name: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    for step in fields["steps"]:
        _operator(step["operator"])
    constants = {value: tensors[stored] for value, stored in fields["constants"].items()}
    return Graph(name, tuple(fields["inputs"]), constants, fields["constants"], tuple(fields["steps"]), tuple(fields["outputs"]))


def _operator(name: str) -> Callable[..., Any]:
    """An operator of PyTorch's own by its full name."""
    if name == GETITEM:
        return operator.getitem
    namespace, packet, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise ValueError(f"{name} is no operator of {' or '.join(NAMESPACES)}")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def _describe(program: Program, entry: Entry, tensors: dict[str, Tensor]) -> dict[str, Any]:
    graph = deployed(program, entry)
    exported = torch.export.export(graph, entry.example(), strict=False)
    constants = {value: _store(f"{entry.name}/{target}", tensor, tensors) for value, target, tensor in _constants_of(exported)}
    nodes = [node for node in exported.graph.nodes if node.op == "call_function" and str(node.target) not in IDLE]
    return {
        "inputs": list(exported.graph_signature.user_inputs),
        "outputs": list(exported.graph_signature.user_outputs),
        "constants": constants,
        "steps": [_step(node) for node in nodes],
    }


def _constants_of(exported: ExportedProgram) -> Iterator[tuple[str, str, Tensor]]:
    """Of each constant that the graph reads: the value's name, its own, and what it holds."""
    read = {node.name for node in exported.graph.nodes if node.users}
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None and spec.arg.name in read:
            held = exported.state_dict if spec.target in exported.state_dict else exported.constants
            yield spec.arg.name, spec.target, held[spec.target]


def _store(name: str, tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    """Keep a tensor once: under the name that the same content has already, else under this one."""
    tensor = tensor.detach().contiguous()
    for known, other in tensors.items():
        if other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor):
            return known
    tensors[name] = tensor.clone()
    return name


def _step(node: Node) -> dict[str, Any]:
    name = GETITEM if node.target is operator.getitem else str(node.target)
    _operator(name)
    return {"name": node.name, "operator": name, "arguments": _encoded(node.args), "keywords": _encoded(dict(node.kwargs))}


def _encoded(value: Any) -> Any:  # noqa: ANN401 - an argument of any operator
    """An argument as JSON: a result as {"result": name}, a type as {"type": name}."""
    if isinstance(value, torch.fx.Node):
        return {"result": value.name}
    if isinstance(value, torch.dtype):
        return {"type": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {"keywords": {key: _encoded(item) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be written")


def _decoded(value: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - see `_encoded`
    if isinstance(value, list):
        return [_decoded(item, values) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "result":
            return values[content]
        if kind == "type":
            return _TYPES[content]
        return {key: _decoded(item, values) for key, item in content.items()}
    return value


_TYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


def _references(value: Any) -> Iterator[str]:  # noqa: ANN401 - see `_encoded`
    """The results that an encoded argument mentions."""
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "result":
            yield content
        elif kind == "keywords":
            yield from _references(list(content.values()))

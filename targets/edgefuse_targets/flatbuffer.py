"""Read a .tflite: the graphs of its signatures, and what XNNPACK takes of them."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from edgefuse_targets.norms import Operator, normalizations
from edgefuse_targets.programs import arithmetic, precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DELEGATE = "DELEGATE"
BUILTINS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
TYPES = {code: name for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
STILL_CONSTANT = frozenset({"CAST", "DEQUANTIZE", "RESHAPE", "TRANSPOSE"})  # of a constant they make a constant
LAYER = re.compile(r"\d+/([a-z]\w*(?:\.\w+)+);?")  # how `tflite_quantize` names what a layer makes
SUBGRAPHS = 8  # where a model's vtable has the offset of its subgraphs


@dataclass(frozen=True, slots=True)
class Graph:
    """One signature's graph; `layers` are its linears and convolutions: their names, or the operator's, and their precisions."""

    name: str
    operators: tuple[Operator, ...]
    constants: Mapping[int | str, tuple[int, ...]]
    layers: tuple[tuple[str, str], ...]

    def normalizations(self) -> Iterator[str]:
        """Each normalization of the graph, in words."""
        return normalizations(self.name, self.operators, self.constants)


def graphs(content: bytes) -> Sequence[Graph]:
    """The graph of every signature, in the order of the subgraphs."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {signature.subgraphIndex: signature.signatureKey.decode() for signature in model.signatureDefs or ()}
    return [_graph(model, names.get(number, f"subgraph {number}"), graph) for number, graph in enumerate(model.subgraphs)]


def delegation(content: bytes, number: int) -> tuple[int, Counter[str]]:
    """How many partitions XNNPACK makes of a subgraph, and the operators that stay outside.

    LiteRT lists the nodes of the first subgraph only, the delegates behind the operators that they replace. So the subgraph is
    put first; and an operator is inside a delegate if the delegate's outputs need it and its inputs do not bring its result.
    """
    interpreter = Interpreter(
        model_content=_with_subgraph_first(content, number), num_threads=1, experimental_default_delegate_latest_features=True
    )
    interpreter.allocate_tensors()
    nodes = interpreter._get_ops_details()  # noqa: SLF001 - there is no public list
    delegates = [node for node in nodes if node["op_name"] == DELEGATE]
    operators = [node for node in nodes if node["op_name"] != DELEGATE]
    makers = {int(value): node for node in operators for value in node["outputs"]}
    inside: set[int] = set()
    for delegate in delegates:
        inside |= _needed(delegate, makers)
    return len(delegates), Counter(str(node["op_name"]) for node in operators if node["index"] not in inside)


def _graph(model: Any, name: str, graph: Any) -> Graph:  # noqa: ANN401 - generated code without types
    constants: dict[int | str, tuple[int, ...]] = {
        index: tuple(int(size) for size in tensor.shape)
        for index, tensor in enumerate(graph.tensors)
        if tensor.shape is not None and model.buffers[tensor.buffer].data is not None
    }
    types: dict[int | str, str] = {index: TYPES[tensor.type].lower() for index, tensor in enumerate(graph.tensors)}
    widened: dict[int | str, str] = {}
    operators = []
    for node in graph.operators:
        operator = _operator(model, graph, node)
        operators.append(replace(operator, precision=_precision(operator, types, widened)))
        if operator.name == "DEQUANTIZE":
            widened[operator.outputs[0]] = types[operator.inputs[0]]
        if operator.name in STILL_CONSTANT and operator.inputs[0] in constants:
            constants |= {index: tuple(int(size) for size in graph.tensors[index].shape) for index in node.outputs}
    layers = ((_layer(graph, each), each.precision) for each in operators if each.name in WEIGHTED)
    return Graph(name, tuple(operators), constants, tuple(layers))


def _layer(graph: Any, operator: Operator) -> str:  # noqa: ANN401 - see `_graph`
    """The name of a linear or a convolution, where what it makes has it; else the operator's."""
    named = LAYER.fullmatch(graph.tensors[operator.outputs[0]].name.decode())
    return named[1] if named else operator.name


def _precision(operator: Operator, types: Mapping[int | str, str], widened: Mapping[int | str, str]) -> str:
    """What an operator computes with; `widened` are the types that tensors had before they were made float."""
    if operator.name not in WEIGHTED:
        return arithmetic([types[index] for index in (*operator.inputs, *operator.outputs)])
    taken, weights = (types[index] for index in operator.inputs[:2])
    stored = widened.get(operator.inputs[1], weights)
    return precision_of(taken, stored, widened=stored != weights)


def _operator(model: Any, graph: Any, node: Any) -> Operator:  # noqa: ANN401 - see `_graph`
    code = model.operatorCodes[node.opcodeIndex]
    name = BUILTINS[max(code.builtinCode, code.deprecatedBuiltinCode)]
    if name == "CUSTOM":
        name = code.customCode.decode()
    elif name.startswith("STABLEHLO_COMPOSITE"):
        name = node.builtinOptions2.name.decode()
    inputs = tuple(int(index) for index in node.inputs if index >= 0)
    taps = 0
    if name == "DEPTHWISE_CONV_2D":
        _, height, width, _ = graph.tensors[inputs[1]].shape
        taps = int(height * width)
    return Operator(name, inputs, tuple(int(index) for index in node.outputs), taps)


def _needed(delegate: Mapping[str, Any], makers: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Indices of the nodes between a delegate's inputs and its outputs."""
    found: set[int] = set()
    brought = {int(value) for value in delegate["inputs"]}
    todo = [int(value) for value in delegate["outputs"]]
    while todo:
        value = todo.pop()
        maker = makers.get(value)
        if maker is not None and value not in brought and maker["index"] not in found:
            found.add(maker["index"])
            todo += [int(needed) for needed in maker["inputs"]]
    return found


def _with_subgraph_first(content: bytes, number: int) -> bytes:
    """The same model with two subgraphs exchanged: their offsets, which count from where they stand, change places."""
    if number == 0:
        return content
    model = schema.Model.GetRootAs(content, 0)
    first = model._tab.Vector(model._tab.Offset(SUBGRAPHS))  # noqa: SLF001 - generated code has no other way in
    other = first + 4 * number
    patched = bytearray(content)
    to_first, to_other = (struct.unpack_from("<I", content, place)[0] + place for place in (first, other))
    struct.pack_into("<I", patched, first, to_other - first)
    struct.pack_into("<I", patched, other, to_first - other)
    return bytes(patched)

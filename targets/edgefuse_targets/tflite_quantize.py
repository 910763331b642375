"""Quantize a float .tflite as a scheme says, with LiteRT's own quantizer, but with the ranges of our calibration.

LiteRT's quantizer names tensors, a scheme names layers. A layer is found in the file by its weights, and the tensors around it
are given its name: the quantizer's recipe then has one line per layer, and whoever opens the file reads the same names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping, quantizer
from torch import nn

from edgefuse.errors import Refused
from edgefuse.lower.sites import network_of, positions_of
from edgefuse.quantize import graph as graphs
from edgefuse.quantize.graph import round_weights
from edgefuse.quantize.scheme import BLOCKS, STATIC, LayerPrecision
from edgefuse_targets.flatbuffer import BUILTINS, WEIGHTED
from edgefuse_targets.programs import plan_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from edgefuse.lower.sites import Site
    from edgefuse.quantize.observe import Range
    from edgefuse.quantize.plan import Plan
    from edgefuse.values import Program

IDENTIFIER = b"TFL3"
GRANULARITY = {
    block: getattr(qtyping.QuantGranularity, f"BLOCKWISE_{block}") if block else qtyping.QuantGranularity.CHANNELWISE
    for block in BLOCKS
}


@dataclass(frozen=True, slots=True)
class Found:
    """A layer in the file: the names of the tensors that it takes and makes, and the points that they are.

    `added` is whether its bias is added by an operator of its own, behind what it makes; `block` how many inputs share a scale.
    """

    layer: str
    precision: LayerPrecision
    operator: str
    takes: tuple[str, str]
    makes: tuple[str, str]
    added: bool
    block: int


def filled(program: Program) -> Program:
    """The same program, in float, with whole blocks of inputs where they share a scale."""
    entries = (replace(entry, graph=graphs.filled(entry.graph, plan_of(program, entry))) for entry in program.entries)
    return replace(program, entries=tuple(entries))


def quantized(content: bytes, program: Program) -> bytes:
    """The same model with fewer bits; what enters and leaves it stays float32."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {signature.subgraphIndex: signature.signatureKey.decode() for signature in model.signatureDefs}
    seen: dict[str, dict[str, NDArray[np.float32]]] = {}
    found = []
    for number, graph in enumerate(model.subgraphs):
        entry = next(each for each in program.entries if each.name == names[number])
        plan = plan_of(program, entry)
        here = tuple(_named(model, number, graph, plan, _digests(network_of(entry.graph), plan)))
        _require_all(plan, {each.layer for each in here})
        for each in here:
            found.append(each)
            if each.precision in STATIC:
                taken, made = (plan.values[point] for _, point in (each.takes, each.makes))
                bias = network_of(entry.graph).get_parameter(f"{each.layer}.bias") if each.added else None
                seen |= {each.takes[0]: _span(taken), each.makes[0]: _span(made if bias is None else _without(bias, made))}
    _round_positions(model, program)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    recipe = quantizer.Quantizer(bytearray(builder.Output()))
    for each in found:
        _ask(recipe, each)
    return bytes(recipe.quantize(seen or None).quantized_model)


def _named(model: Any, number: int, graph: Any, plan: Plan, layers: Mapping[str, str]) -> Iterator[Found]:  # noqa: ANN401 - generated code without types
    """Give every tensor inside a graph a name of its own, and find the layers that are quantized."""
    sites = {site.layer: site for site in plan.sites}
    outside = {*graph.inputs, *graph.outputs}
    for index, tensor in enumerate(graph.tensors):
        if index not in outside:
            tensor.name = f"{number}/{index}".encode()
    for node in graph.operators:
        code = model.operatorCodes[node.opcodeIndex]
        name = BUILTINS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if name in WEIGHTED:
            layer = layers.get(_digest(_constant(model, graph, node.inputs[1])), "")
            if layer and plan.layers[layer] != "fp32":
                _own_bias(model, graph, node)
                yield _layer(number, graph, node, name, sites[layer], plan)


def _layer(number: int, graph: Any, node: Any, name: str, site: Site, plan: Plan) -> Found:  # noqa: ANN401 - see `_named`
    taken, made = graph.tensors[node.inputs[0]], graph.tensors[node.outputs[0]]
    if node.outputs[0] not in graph.outputs:
        made.name = f"{number}/{site.layer}".encode()
    added = not any(index >= 0 for index in node.inputs[2:3])
    ends = (taken.name.decode(), site.takes), (made.name.decode(), site.makes)
    return Found(site.layer, plan.layers[site.layer], name, *ends, added, plan.block)


def _require_all(plan: Plan, found: set[str]) -> None:
    """Raise `Refused` if a layer has other weights in the file than in the graph: it takes other values then, too."""
    if changed := [layer for layer, precision in plan.layers.items() if precision != "fp32" and layer not in found]:
        raise Refused(
            f"LiteRT's converter has changed the weights of {len(changed)} layers, {changed[0]} for one: "
            "it moves the gain of a LayerNorm into the layer behind it where the fold has not.",
            hint="Fold the checkpoint again, or leave them fp32 in a scheme file.",
        )


def _own_bias(model: Any, graph: Any, node: Any) -> None:  # noqa: ANN401 - see `_named`
    """Entries share their biases, but not once these are integers: their scale is that of what the layer takes, which differs."""
    for index in node.inputs[2:3]:
        bias = graph.tensors[index]
        sharing = sum(tensor.buffer == bias.buffer for each in model.subgraphs for tensor in each.tensors)
        if index >= 0 and sharing > 1 and model.buffers[bias.buffer].data is not None:
            copied = schema.BufferT()
            copied.data = model.buffers[bias.buffer].data
            model.buffers.append(copied)
            bias.buffer = len(model.buffers) - 1


def _round_positions(model: Any, program: Program) -> None:  # noqa: ANN401 - see `_named`
    """Make integers of the positions, where the scheme says so, and let an operator widen them.

    LiteRT's converter takes no such operator. XNNPACK does, and it costs no latency that could be measured [M].
    """
    stored = {bytes(buffer.data): index for index, buffer in enumerate(model.buffers) if buffer.data is not None}
    scales = {}
    for entry in program.entries:
        if plan_of(program, entry).positions == "int8":
            for path, either in _positions(network_of(entry.graph)):
                p = next((each for each in either if each.numpy().tobytes() in stored), None)
                if p is None:
                    raise Refused(
                        f"LiteRT's converter has changed the constants of {path}.",
                        hint='Leave them float in a scheme file: positions = "fp32"',
                    )
                rounded, index = round_weights(p), stored[p.numpy().tobytes()]
                model.buffers[index].data = rounded.integers.numpy().view(np.uint8).ravel()
                scales[index] = rounded.scale.numpy()
    code = _dequantize(model) if scales else 0
    for graph in model.subgraphs:
        _widen(graph, scales, code)


def _positions(network: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """p of each attention, and p + b: with the bias of the keys, where nothing but that stands between them."""
    for path, positions in positions_of(network).items():
        key = network.get_submodule(f"{path.rpartition('.')[0]}.key")
        bias = key.get_parameter("bias").detach() if isinstance(key, nn.Linear) else torch.zeros(1)
        yield path, (positions.p, positions.p + bias)


def _dequantize(model: Any) -> int:  # noqa: ANN401 - see `_named`
    """The number of a new code, for the operator that widens integers."""
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = 2  # the first with integers that have a sign
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _widen(graph: Any, scales: Mapping[int, NDArray[np.float32]], code: int) -> None:  # noqa: ANN401 - see `_named`
    """Let each tensor of a buffer with a scale be integers, and what took it take the float values instead."""
    floats = {}
    for index, tensor in enumerate(list(graph.tensors)):
        if tensor.buffer in scales:
            floats[index] = len(graph.tensors)
            graph.tensors.append(schema.TensorT(name=tensor.name + b"/float", shape=tensor.shape, type=schema.TensorType.FLOAT32))
            tensor.type = schema.TensorType.INT8
            tensor.quantization = schema.QuantizationParametersT(scale=scales[tensor.buffer], zeroPoint=np.zeros(1, np.int64))
    for node in graph.operators:
        node.inputs = np.array([floats.get(int(index), index) for index in node.inputs], np.int32)
    widening = [schema.OperatorT(opcodeIndex=code, inputs=[index], outputs=[made]) for index, made in floats.items()]
    graph.operators = [*widening, *graph.operators]


def _ask(recipe: Any, found: Found) -> None:  # noqa: ANN401 - the quantizer has no types
    """One line of the recipe."""
    where = {
        "regex": f"^{found.makes[0].replace('.', '[.]')};?$",
        "operation_name": getattr(qtyping.TFLOperationName, found.operator),
    }
    if found.precision in STATIC:
        recipe.add_static_config(**where, activation_num_bits=16 if found.precision == "int8-a16" else 8, weight_num_bits=8)
    elif found.precision == "int8-weights":
        recipe.add_weight_only_config(**where, num_bits=8)
    elif found.precision == "int4-weights":
        recipe.add_dynamic_config(**where, num_bits=4, granularity=GRANULARITY[found.block])
    else:
        recipe.add_dynamic_config(**where, num_bits=8)


def _digests(network: nn.Module, plan: Plan) -> dict[str, str]:
    """Layers by the digest of their weights."""
    layers = {site.layer: network.get_submodule(site.layer) for site in plan.sites}
    return {_digest(next(layer.parameters()).detach().numpy()): path for path, layer in layers.items()}


def _digest(weights: NDArray[np.float32]) -> str:
    """Of values whatever their layout: LiteRT transposes weights."""
    return hashlib.sha256(np.sort(weights, axis=None).tobytes()).hexdigest()


def _constant(model: Any, graph: Any, index: int) -> NDArray[np.float32]:  # noqa: ANN401 - see `_named`
    """A constant; nothing where a value is none."""
    content = model.buffers[graph.tensors[index].buffer].data if index >= 0 else None
    return np.frombuffer(b"" if content is None else bytes(content), np.float32)


def _without(bias: Tensor, span: Range) -> Range:
    """The range of a layer's product, from that of its answer: wide enough for every channel, and 0 is in it."""
    return min(0.0, span[0] - float(bias.max())), max(0.0, span[1] - float(bias.min()))


def _span(span: tuple[float, float]) -> dict[str, NDArray[np.float32]]:
    return {"min": np.array([[span[0]]], np.float32), "max": np.array([[span[1]]], np.float32)}

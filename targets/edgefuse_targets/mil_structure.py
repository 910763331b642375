"""What stands in the MIL program of a Core ML package: its operators, and every normalization, however it is spelled."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from edgefuse_targets.norms import Operator
from edgefuse_targets.norms import normalizations as normalizations_of
from edgefuse_targets.programs import arithmetic, precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CONSTANT = "const"
CONSTANT_EXPRESSION = "constexpr_"  # begins the names of those that decompress a weight
WEIGHTED = ("linear", "conv")


def operators(spec: Any) -> Counter[str]:  # noqa: ANN401 - a protobuf message; coremltools ships no types
    """How often each operator occurs in a model specification, in all functions together, constants left out."""
    found = (operation.type for block in _blocks(spec).values() for operation in block.operations)
    return Counter(name for name in found if name != CONSTANT)


def precisions(spec: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - see `operators`
    """Each operator of all functions, constants left out, with what it computes with."""
    for block in _blocks(spec).values():
        types = {value.name: _type(value) for operation in block.operations for value in operation.outputs}
        layers = _layers(block.operations)
        for operation in block.operations:
            if operation.type in WEIGHTED:
                yield operation.type, next(layers)
            elif operation.type != CONSTANT:
                taken = [types[name] for argument in operation.inputs for name in _names(operation, argument) if name in types]
                yield operation.type, arithmetic([*taken, *(_type(value) for value in operation.outputs)])


def normalizations(spec: Any) -> Iterator[str]:  # noqa: ANN401 - see `operators`
    """Each normalization of a model specification, in words."""
    for function, block in _blocks(spec).items():
        constants = {operation.outputs[0].name: operation for operation in block.operations if _is_constant(operation)}
        shapes = {name: _shape(operation) for name, operation in constants.items()}
        graph = [_operator(operation, constants) for operation in block.operations if not _is_constant(operation)]
        yield from normalizations_of(function, graph, shapes)


def _layers(operations: Sequence[Any]) -> Iterator[str]:
    """A layer computes with integers where what it takes and what it makes, behind a ReLU, are quantized, and its weights are."""
    makers = {output.name: operation for operation in operations for output in operation.outputs}
    takers: defaultdict[str, list[Any]] = defaultdict(list)
    for operation in operations:
        for argument in operation.inputs:
            for name in _names(operation, argument):
                takers[name].append(operation)
    for operation in operations:
        if operation.type in WEIGHTED:
            (taken,), (weight,) = _names(operation, "x"), _names(operation, "weight")
            quantized = taken in makers and makers[taken].type == "dequantize" and _is_quantized(operation, takers)
            stored = _stored(makers[weight])
            given = "int8" if quantized and not stored.startswith("float") else _type(operation.outputs[0])
            yield precision_of(given, stored, widened=makers[weight].type.startswith(CONSTANT_EXPRESSION))


def _is_quantized(maker: Any, takers: Mapping[str, Sequence[Any]]) -> bool:  # noqa: ANN401 - a protobuf message
    taking = takers[maker.outputs[0].name]
    if [each.type for each in taking] == ["relu"]:
        return _is_quantized(taking[0], takers)
    return bool(taking) and all(each.type == "quantize" for each in taking)


def _stored(maker: Any) -> str:  # noqa: ANN401 - a protobuf message
    """The type of a weight as it stands in the file: a float, an integer, or a palette by the bits of its indices."""
    if maker.type == "constexpr_blockwise_shift_scale":
        return _type(maker.inputs["data"].arguments[0].value)
    if maker.type == "constexpr_lut_to_dense":
        return f"palette{_type(maker.inputs['indices'].arguments[0].value).removeprefix('int')}"
    return _type(maker.outputs[0]) if maker.type == CONSTANT else str(maker.type)


def _type(value: Any) -> str:  # noqa: ANN401 - a protobuf message
    """For example "float16"; "int4" with a sign or without, as Core ML Tools see fit."""
    from coremltools.proto.MIL_pb2 import DataType

    return str(DataType.Name(value.type.tensorType.dataType)).lower().removeprefix("u")


def _blocks(spec: Any) -> dict[str, Any]:  # noqa: ANN401 - a protobuf message
    """The one block of each function, in the order of their names."""
    functions = sorted(spec.mlProgram.functions.items())
    return {name: function.block_specializations[function.opset] for name, function in functions}


def _operator(operation: Any, constants: dict[str, Any]) -> Operator:  # noqa: ANN401 - a protobuf message
    names = [name for argument in sorted(operation.inputs) for name in _names(operation, argument)]
    taps = _depthwise_taps(operation, constants) if operation.type == "conv" else 0
    return Operator(operation.type, tuple(names), tuple(output.name for output in operation.outputs), taps)


def _depthwise_taps(conv: Any, constants: dict[str, Any]) -> int:  # noqa: ANN401 - a protobuf message
    """Size of the kernel where each channel has its own; else 0."""
    weight = next((_shape(constants[name]) for name in _names(conv, "weight") if name in constants), (0, 0))
    groups = next((_integer(constants[name]) for name in _names(conv, "groups") if name in constants), 1)
    return math.prod(weight[2:]) if groups > 1 and weight[1] == 1 else 0


def _names(operation: Any, argument: str) -> list[str]:  # noqa: ANN401 - a protobuf message
    """The values that are bound to one argument; reading a map of protobuf must not add to it."""
    bound = operation.inputs[argument].arguments if argument in operation.inputs else ()
    return [binding.name for binding in bound if binding.WhichOneof("binding") == "name"]


def _is_constant(operation: Any) -> bool:  # noqa: ANN401 - a protobuf message
    return bool(operation.type == CONSTANT or operation.type.startswith(CONSTANT_EXPRESSION))


def _shape(constant: Any) -> tuple[int, ...]:  # noqa: ANN401 - a protobuf message
    return tuple(axis.constant.size for axis in constant.outputs[0].type.tensorType.dimensions)


def _integer(constant: Any) -> int:  # noqa: ANN401 - a protobuf message
    return int(next(iter(constant.attributes["val"].immediateValue.tensor.ints.values), 0))

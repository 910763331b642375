"""What stands in the MIL program of a Core ML package: its operators, and every normalization, however it is spelled."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from edgefuse_targets.norms import Operator
from edgefuse_targets.norms import normalizations as normalizations_of
from edgefuse_targets.programs import arithmetic

if TYPE_CHECKING:
    from collections.abc import Iterator

CONSTANT = "const"
WEIGHTED = ("linear", "conv")
CONSTANT_EXPRESSION = "constexpr_"  # begins the names of those that decompress a weight


def operators(spec: Any) -> Counter[str]:  # noqa: ANN401 - a protobuf message; coremltools ships no types
    """How often each operator occurs in a model specification, in all functions together, constants left out."""
    found = (operation.type for block in _blocks(spec).values() for operation in block.operations)
    return Counter(name for name in found if name != CONSTANT)


def precisions(spec: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - see `operators`
    """Each operator of all functions, constants left out, with what it computes with."""
    for block in _blocks(spec).values():
        types = {value.name: _type(value) for operation in block.operations for value in operation.outputs}
        for operation in block.operations:
            if operation.type != CONSTANT:
                taken = [types[name] for argument in operation.inputs for name in _names(operation, argument) if name in types]
                yield operation.type, arithmetic([*taken, *(_type(value) for value in operation.outputs)])


def _type(value: Any) -> str:  # noqa: ANN401 - a protobuf message
    """The type of a value's numbers, as NumPy calls it."""
    from coremltools.proto.MIL_pb2 import DataType

    name: str = DataType.Name(value.type.tensorType.dataType)
    return name.lower()


def normalizations(spec: Any) -> Iterator[str]:  # noqa: ANN401 - see `operators`
    """Each normalization of a model specification, in words."""
    for function, block in _blocks(spec).items():
        constants = {operation.outputs[0].name: operation for operation in block.operations if _is_constant(operation)}
        shapes = {name: _shape(operation) for name, operation in constants.items()}
        graph = [_operator(operation, constants) for operation in block.operations if not _is_constant(operation)]
        yield from normalizations_of(function, graph, shapes)


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

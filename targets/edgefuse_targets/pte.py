"""Read a .pte: the methods of an ExecuTorch program, and the XNNPACK graphs inside them."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary

from edgefuse_targets.norms import Operator, normalizations
from edgefuse_targets.programs import arithmetic, precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

XNNPACK = "XnnpackBackend"
WEIGHTED = ("XNNFullyConnected", "XNNConv2d", "XNNDepthwiseConv2d")
AS_IT_COMES = "xnn_datatype_qdint8"  # what a dynamic linear takes: float until just before
TYPES = {  # of XNNPACK's values
    "xnn_datatype_fp32": "float32",
    "xnn_datatype_fp16": "float16",
    "xnn_datatype_qint8": "int8",
    AS_IT_COMES: "int8",
    "xnn_datatype_qcint8": "int8",
    "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qbint4": "int4",
}
SCALARS = {"FLOAT": "float32", "HALF": "float16", "CHAR": "int8"}  # of ExecuTorch's tensors
INTERNAL = 2**32 - 1  # the external id of a value that stays inside the delegate


@dataclass(frozen=True, slots=True)
class Delegate:
    """One XNNPACK graph: its operators, and the shapes of the constants that they read."""

    operators: tuple[Operator, ...]
    constants: Mapping[int | str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its delegates, and the operators that ExecuTorch's own kernels run."""

    name: str
    delegates: tuple[Delegate, ...]
    outside: tuple[Operator, ...]
    constants: Mapping[int | str, tuple[int, ...]]

    def operators(self) -> Iterator[Operator]:
        """Inside and outside the delegates."""
        yield from (operator for delegate in self.delegates for operator in delegate.operators)
        yield from self.outside

    def normalizations(self) -> Iterator[str]:
        """Each normalization of the method, in words."""
        yield from normalizations(f"{self.name}, outside the delegates", self.outside, self.constants)
        for number, delegate in enumerate(self.delegates):
            yield from normalizations(f"{self.name}, delegate {number}", delegate.operators, delegate.constants)


def methods(content: bytes) -> Sequence[Method]:
    """Every method of a .pte."""
    program = deserialize_pte_binary(content).program
    payloads = [bytes(part.data) for part in program.backend_delegate_data]
    return [_method(plan, payloads) for plan in program.execution_plan]


def _method(plan: Any, payloads: Sequence[bytes]) -> Method:  # noqa: ANN401 - executorch ships no types
    constants: dict[int | str, tuple[int, ...]] = {
        index: tuple(value.val.sizes) for index, value in enumerate(plan.values) if _is_constant(value.val)
    }
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    outside = [
        Operator(
            _kernel(plan.operators[call.op_index]), tuple(call.args[:-1]), tuple(call.args[-1:]), precision=_computes(plan, call)
        )
        for call in calls
        if hasattr(call, "op_index")
    ]
    delegates = [_delegate(plan, call, payloads, constants) for call in calls if hasattr(call, "delegate_index")]
    return Method(plan.name, tuple(delegates), tuple(outside), constants)


def _is_constant(value: Any) -> bool:  # noqa: ANN401 - see `_method`
    """Whether a value of a plan is a tensor whose content stands in the file."""
    return getattr(value, "data_buffer_idx", 0) != 0 and value.allocation_info is None


def _kernel(operator: Any) -> str:  # noqa: ANN401 - see `_method`
    return f"{operator.name}.{operator.overload}" if operator.overload else str(operator.name)


def _computes(plan: Any, call: Any) -> str:  # noqa: ANN401 - see `_method`
    """What a kernel of ExecuTorch computes with."""
    types = (getattr(plan.values[index].val, "scalar_type", None) for index in call.args)
    return arithmetic([SCALARS.get(each.name, each.name.lower()) for each in types if each is not None])


def _delegate(
    plan: Any,  # noqa: ANN401 - see `_method`
    call: Any,  # noqa: ANN401 - see `_method`
    payloads: Sequence[bytes],
    outer: Mapping[int | str, tuple[int, ...]],
) -> Delegate:
    delegate = plan.delegates[call.delegate_index]
    if delegate.id != XNNPACK:
        return Delegate((Operator(delegate.id, (), (), precision="unknown"),), {})
    graph = _xnnpack_graph(payloads[delegate.processed.index])
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    tensors = [value.get("tensor_value", value) for value in values]
    constants: dict[int | str, tuple[int, ...]] = {}
    for tensor in tensors:
        external = tensor["external_id"]
        if tensor["constant_buffer_idx"] or (external != INTERNAL and call.args[external] in outer):
            constants[tensor["id_out"]] = tuple(tensor["dims"])
    types = {tensor["id_out"]: tensor["datatype"] for tensor in tensors}
    return Delegate(tuple(_xnnpack_operator(node, types) for node in graph["xnodes"]), constants)


def _xnnpack_operator(node: Mapping[str, Any], types: Mapping[int, str]) -> Operator:
    name, fields = node["xnode_union_type"], node["xnode_union"]
    ids = {field: value for field, value in fields.items() if field.endswith("_id")}
    inputs = tuple(value for field, value in ids.items() if not field.startswith("output"))
    outputs = tuple(value for field, value in ids.items() if field.startswith("output"))
    taps = fields["kernel_height"] * fields["kernel_width"] if name == "XNNDepthwiseConv2d" else 0
    told = {value: TYPES.get(types[value], types[value]) for value in (*inputs, *outputs) if value in types}
    if name in WEIGHTED:
        taken = "float32" if types[fields["input1_id"]] == AS_IT_COMES else told[fields["input1_id"]]
        return Operator(name, inputs, outputs, taps, precision_of(taken, told[fields["filter_id"]], widened=False))
    return Operator(name, inputs, outputs, taps, arithmetic([*told.values()]))


def _xnnpack_graph(payload: bytes) -> dict[str, Any]:
    """The flatbuffer of a delegate's payload, by ExecuTorch's own schema and compiler, as JSON."""
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(payload[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = binary.with_suffix(".json").read_text(encoding="utf-8")
    graph: dict[str, Any] = json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text))
    return graph

"""Evaluate the MIL program of a Core ML package with PyTorch, where there is no Core ML.

The program and its weights are read from the saved package. Each operator is one small function on tensors; `OPERATORS` is
the whole list, and a program with any other operator is refused by its name. Arithmetic inside an operator is float32; what
an operator declares as fp16 is rounded to fp16 when it leaves the operator, as Core ML stores it. Fixed shapes only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load as milproto_load
from coremltools.converters.mil.mil import types
from coremltools.models.utils import load_spec
from numpy.typing import NDArray
from torch import Tensor

from edgefuse.errors import Refused, UsageError
from edgefuse_targets.mil_structure import CONSTANT, CONSTANT_EXPRESSION, operators

Value = Tensor | Sequence[Tensor] | str
WEIGHTS = Path("Data", "com.apple.CoreML", "weights")


@dataclass(frozen=True, slots=True)
class Arguments:
    """The inputs of one operator, by MIL's names; an optional one may be absent."""

    values: Mapping[str, Value]

    def tensor(self, name: str) -> Tensor:
        """A tensor that must be there."""
        return cast("Tensor", self.values[name])

    def optional(self, name: str) -> Tensor | None:
        """A tensor, or None where it is absent."""
        return cast("Tensor | None", self.values.get(name))

    def tensors(self, name: str) -> Sequence[Tensor]:
        """A list of tensors."""
        return cast("Sequence[Tensor]", self.values[name])

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A vector of integers (or of truth values)."""
        if default is not None and name not in self.values:
            return list(default)
        return [int(value) for value in self.tensor(name).reshape(-1).tolist()]

    def integer(self, name: str, default: int | None = None) -> int:
        """One integer (or truth value)."""
        return self.integers(name, None if default is None else [default])[0]

    def number(self, name: str, default: float | None = None) -> float:
        """One real number."""
        return default if default is not None and name not in self.values else float(self.tensor(name))

    def word(self, name: str, default: str) -> str:
        """One of MIL's words, for example a padding mode."""
        return cast("str", self.values.get(name, default))


Operator = Callable[[Arguments], Tensor | Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Step:
    """One operator in its place.

    Attributes:
        apply: what it computes.
        inputs: per argument the name of a value, or the names of several.
        outputs: the names of what it gives.
        halves: which of them are fp16.
        done: names that no later step needs.
    """

    apply: Operator
    inputs: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[str, ...]
    halves: tuple[bool, ...]
    done: tuple[str, ...]

    def answers(self, values: Mapping[str, Value]) -> dict[str, Tensor]:
        """What it gives, by name."""
        results = self.apply(Arguments({name: _bound(values, source) for name, source in self.inputs.items()}))
        results = [results] if isinstance(results, Tensor) else results
        named = zip(self.outputs, self.halves, results, strict=True)
        return {name: result.half().float() if half else result for name, half, result in named}


@dataclass(frozen=True, slots=True)
class Routine:
    """One function of a package, ready to be run: constants once, then the steps in the order of the program.

    `states` are zeros at first; the steps change them in place.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    constants: Mapping[str, Value]
    states: Mapping[str, Tensor]
    steps: tuple[Step, ...]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer once; no value is kept longer than it is needed."""
        values: dict[str, Value] = {**self.constants, **self.states, **inputs}
        for step in self.steps:
            values |= step.answers(values)
            for name in step.done:
                del values[name]
        return {name: cast("Tensor", values[name]) for name in self.outputs}


class Evaluation:
    """A Core ML package that answers away from a Mac; satisfies `edgefuse.target.Session`."""

    how = "evaluated"

    def __init__(self, package: Path, threads: int = 1) -> None:
        """Read the package; a function is prepared when it is first run.

        Raises:
            Refused: the program has an operator that is not in `OPERATORS`.
        """
        spec = load_spec(str(package))
        refuse_unknown(operators(spec))
        self._functions = milproto_load(spec, spec.specificationVersion, str(package / WEIGHTS)).functions
        self._threads = threads
        self._routines: dict[str, Routine] = {}

    def run(self, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Answer once; names and shapes are those of the function."""
        routine = self._routine(entry)
        got = {name: tuple(value.shape) for name, value in inputs.items()}
        if got != dict(routine.inputs):
            raise UsageError(f"{entry} takes {_shapes(routine.inputs)}, not {_shapes(got)}.")
        tensors = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in inputs.items()}
        with torch.inference_mode(), _threads(self._threads):
            return {name: value.float().numpy() for name, value in routine.run(tensors).items()}

    def _routine(self, entry: str) -> Routine:
        if entry not in self._functions:
            raise UsageError(f"The package has no function {entry!r}.", hint=f"It has: {', '.join(sorted(self._functions))}")
        if entry not in self._routines:
            self._routines[entry] = prepare(self._functions[entry])
        return self._routines[entry]


def refuse_unknown(names: Mapping[str, int]) -> None:
    """Raise `Refused` with the names of the operators that cannot be evaluated."""
    unknown = sorted(name for name in names if name not in OPERATORS)
    if unknown:
        raise Refused(
            f"The Core ML package uses {', '.join(unknown)}, which cannot be evaluated away from a Mac.",
            hint="Verify it on a Mac, where Core ML itself runs it.",
        )


def prepare(function: Any) -> Routine:  # noqa: ANN401 - a coremltools function, which has no types
    """Materialize the constants of a MIL function, and look its operators up."""
    constants: dict[str, Value] = {}
    steps: list[Step] = []
    for operation in function.operations:
        if operation.op_type == CONSTANT:
            constants[operation.outputs[0].name] = _value(operation.outputs[0].val)
        elif operation.op_type.startswith(CONSTANT_EXPRESSION):
            constants |= _step(operation).answers(constants)
        else:
            steps.append(_step(operation))
    outputs = tuple(variable.name for variable in function.outputs)
    shapes = {name: tuple(variable.shape) for name, variable in function.inputs.items()}
    states = {name: torch.zeros(shapes[name]) for name, variable in function.inputs.items() if _is_state(variable)}
    inputs = {name: shape for name, shape in shapes.items() if name not in states}
    return Routine(inputs, outputs, constants, states, _with_last_uses(steps, keep={*outputs, *constants, *inputs, *states}))


def _is_state(variable: Any) -> bool:  # noqa: ANN401 - a coremltools variable
    return bool(types.is_state(variable._sym_type))  # noqa: SLF001 - its public type is that of the tensor inside


def _step(operation: Any) -> Step:  # noqa: ANN401 - a coremltools operation
    inputs = {
        name: tuple(one.name for one in value) if isinstance(value, (list, tuple)) else value.name
        for name, value in operation.inputs.items()
        if value is not None
    }
    halves = tuple(types.builtin_to_string(variable.dtype) == "fp16" for variable in operation.outputs)
    outputs = tuple(variable.name for variable in operation.outputs)
    return Step(OPERATORS[operation.op_type], inputs, outputs, halves, done=())


def _with_last_uses(steps: Sequence[Step], keep: set[str]) -> tuple[Step, ...]:
    """The same steps, each with the names that are needed no longer once it has run."""
    seen, backwards = set(keep), []
    for step in reversed(steps):
        used = {name for source in step.inputs.values() for name in ((source,) if isinstance(source, str) else source)}
        done = tuple(sorted((used | set(step.outputs)) - seen))
        seen |= used
        backwards.append(Step(step.apply, step.inputs, step.outputs, step.halves, done))
    return tuple(reversed(backwards))


def _bound(values: Mapping[str, Value], source: str | tuple[str, ...]) -> Value:
    return values[source] if isinstance(source, str) else [cast("Tensor", values[name]) for name in source]


def _value(constant: Any) -> Value:  # noqa: ANN401 - a NumPy value of any kind
    """A constant as PyTorch has it: reals as float32 (an fp16 value is exact in it), small integers as int32."""
    if isinstance(constant, str):
        return constant
    array = np.asarray(constant)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    elif array.dtype in (np.int16, np.uint16):
        array = array.astype(np.int32)
    return torch.from_numpy(array.copy())


def _shapes(of: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in of.items())


@contextlib.contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The operators, in the order of MIL's chapters.


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda a: function(a.tensor("x"))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda a: function(a.tensor("x"), a.tensor("y"))


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def reduce(a: Arguments) -> Tensor:
        x = a.tensor("x")
        return function(x, dim=a.integers("axes", range(x.dim())), keepdim=bool(a.integer("keep_dims", 0)))

    return reduce


def _clip(a: Arguments) -> Tensor:
    return torch.clamp(a.tensor("x"), a.number("alpha"), a.number("beta"))


def _rsqrt(a: Arguments) -> Tensor:
    return torch.rsqrt(a.tensor("x") + a.number("epsilon", 1e-12))


def _log(a: Arguments) -> Tensor:
    return torch.log(a.tensor("x") + a.number("epsilon", 1e-45))


_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}
_DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def _cast(a: Arguments) -> Tensor:
    dtype = a.word("dtype", "fp32")
    if dtype not in _DTYPES:
        raise Refused(f"The Core ML package casts to {dtype}, which cannot be evaluated away from a Mac.")
    return a.tensor("x").to(_DTYPES[dtype])


def _select(a: Arguments) -> Tensor:
    return torch.where(a.tensor("cond"), a.tensor("a"), a.tensor("b"))


def _softmax(a: Arguments) -> Tensor:
    return torch.softmax(a.tensor("x"), a.integer("axis", -1))


def _linear(a: Arguments) -> Tensor:
    return F.linear(a.tensor("x"), a.tensor("weight"), a.optional("bias"))


def _matmul(a: Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.transpose(-1, -2) if a.integer("transpose_x", 0) else x
    return torch.matmul(x, y.transpose(-1, -2) if a.integer("transpose_y", 0) else y)


def _attention(a: Arguments) -> Tensor:
    return F.scaled_dot_product_attention(
        a.tensor("query"), a.tensor("key"), a.tensor("value"), attn_mask=a.optional("attn_mask")
    )


def _conv(a: Arguments) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    ones = [1] * (x.dim() - 2)
    strides, dilations = a.integers("strides", ones), a.integers("dilations", ones)
    window = [(taps - 1) * dilation + 1 for taps, dilation in zip(weight.shape[2:], dilations, strict=True)]
    padded = F.pad(x, _conv_padding(a, list(x.shape[2:]), window, strides))
    convolution = F.conv1d if x.dim() == 3 else F.conv2d  # noqa: PLR2004 - (B, C, T)
    return convolution(padded, weight, a.optional("bias"), strides, 0, dilations, a.integer("groups", 1))


def _conv_padding(a: Arguments, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first, as `F.pad` wants it."""
    kind = a.word("pad_type", "valid")
    pairs = [(0, 0)] * len(sizes)
    if kind == "custom":
        flat = a.integers("pad", [0, 0] * len(sizes))
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
    elif kind in ("same", "same_lower"):
        totals = [
            max(0, (-(-size // stride) - 1) * stride + wide - size)
            for size, wide, stride in zip(sizes, window, strides, strict=True)
        ]
        pairs = [(total // 2, total - total // 2) for total in totals]
        pairs = pairs if kind == "same" else [(after, before) for before, after in pairs]
    return [zeros for pair in reversed(pairs) for zeros in pair]


def _layer_norm(a: Arguments) -> Tensor:
    x = a.tensor("x")
    shape = [x.shape[axis] for axis in a.integers("axes")]
    return F.layer_norm(x, shape, a.optional("gamma"), a.optional("beta"), a.number("epsilon", 1e-5))


def _batch_norm(a: Arguments) -> Tensor:
    mean, variance, eps = a.tensor("mean"), a.tensor("variance"), a.number("epsilon", 1e-5)
    return F.batch_norm(a.tensor("x"), mean, variance, a.optional("gamma"), a.optional("beta"), eps=eps)


def _instance_norm(a: Arguments) -> Tensor:
    return F.instance_norm(a.tensor("x"), weight=a.optional("gamma"), bias=a.optional("beta"), eps=a.number("epsilon", 1e-5))


def _quantize(a: Arguments) -> Tensor:
    """clip(round(x / scale) + zero), a half rounded to the even integer."""
    x, kind = a.tensor("input"), a.word("output_dtype", "int8")
    levels = torch.iinfo(_INTEGERS[kind])
    integers = torch.round(x / _along(a, "scale", x)) + (_along(a, "zero_point", x) if "zero_point" in a.values else 0)
    return integers.clamp(levels.min, levels.max).to(_INTEGERS[kind])


def _dequantize(a: Arguments) -> Tensor:
    """(q - zero) scale."""
    q = a.tensor("input").float()
    zero = _along(a, "zero_point", q).float() if "zero_point" in a.values else 0
    return (q - zero) * _along(a, "scale", q)


def _along(a: Arguments, name: str, x: Tensor) -> Tensor:
    """One number, or one for each index of an axis of x."""
    values = a.tensor(name)
    if values.dim() == 0:
        return values
    return values.reshape([-1 if axis == a.integer("axis") % x.dim() else 1 for axis in range(x.dim())])


def _shifted_and_scaled(a: Arguments) -> Tensor:
    """(q - offset) scale, each of them of a block."""
    q = a.tensor("data").float()
    offset = a.optional("offset")
    return (q - (0 if offset is None else _of_blocks(offset.float(), q.shape))) * _of_blocks(a.tensor("scale"), q.shape)


def _looked_up(a: Arguments) -> Tensor:
    """table[index], with a table for each block."""
    indices, tables = a.tensor("indices").long(), a.tensor("lut")
    if tables.shape[-1] != 1:
        raise Refused("The Core ML package looks vectors up, which cannot be evaluated away from a Mac.")
    each = _of_blocks(tables[..., 0], (*indices.shape, tables.shape[-2]))
    return each.gather(-1, indices[..., None])[..., 0]


def _of_blocks(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Each value as often as its block is long, axis by axis."""
    for axis, size in enumerate(shape):
        values = values.repeat_interleave(size // values.shape[axis], axis)
    return values


def _transpose(a: Arguments) -> Tensor:
    return a.tensor("x").permute(a.integers("perm"))


def _reshape(a: Arguments) -> Tensor:
    x, shape = a.tensor("x"), a.integers("shape")
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def _expand_dims(a: Arguments) -> Tensor:
    x, axes = a.tensor("x"), a.integers("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Arguments) -> Tensor:
    x = a.tensor("x")
    return x.squeeze(a.integers("axes", range(x.dim())))


def _pad(a: Arguments) -> Tensor:
    pad, mode = a.integers("pad"), a.word("mode", "constant")
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    last_first = [zeros for pair in reversed(pairs) for zeros in pair]
    if mode == "constant":
        return F.pad(a.tensor("x"), last_first, value=a.number("constant_val", 0.0))
    while len(last_first) > 2 and last_first[-2:] == [0, 0]:  # noqa: PLR2004 - the axes in front, which stay as they are
        del last_first[-2:]
    return F.pad(a.tensor("x"), last_first, mode=mode)


def _read_state(a: Arguments) -> Tensor:
    return a.tensor("input").clone()


def _update_state(a: Arguments) -> Tensor:
    return a.tensor("state").copy_(a.tensor("value")).clone()


def _concat(a: Arguments) -> Tensor:
    values, axis = a.tensors("values"), a.integer("axis")
    if a.integer("interleave", 0):
        axis %= values[0].dim()
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)
    return torch.cat(list(values), axis)


def _stack(a: Arguments) -> Tensor:
    return torch.stack(list(a.tensors("values")), a.integer("axis"))


def _split(a: Arguments) -> Sequence[Tensor]:
    x, axis = a.tensor("x"), a.integer("axis")
    if a.optional("split_sizes") is not None:
        return torch.split(x, a.integers("split_sizes"), axis)
    return torch.tensor_split(x, a.integer("num_splits"), axis)


def _slice_by_index(a: Arguments) -> Tensor:
    return a.tensor("x")[_index(a)]


def _slice_update(a: Arguments) -> Tensor:
    changed = a.tensor("x").clone()
    changed[_index(a)] = a.tensor("update")
    return changed


def _index(a: Arguments) -> tuple[slice | int, ...]:
    """What MIL's begin, end, stride and masks mean as a subscript."""
    rank = a.tensor("x").dim()
    no = [0] * rank
    begin, end, stride = a.integers("begin"), a.integers("end"), a.integers("stride", [1] * rank)
    if min(stride, default=1) < 1:
        raise Refused("The Core ML package slices backwards, which cannot be evaluated away from a Mac.")
    from_start, to_end, single = (a.integers(mask, no) for mask in ("begin_mask", "end_mask", "squeeze_mask"))
    return tuple(
        (0 if from_start[axis] else begin[axis])
        if single[axis]
        else slice(None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis], stride[axis])
        for axis in range(rank)
    )


def _slice_by_size(a: Arguments) -> Tensor:
    x = a.tensor("x")
    spans = zip(a.integers("begin"), a.integers("size"), strict=True)
    return x[tuple(slice(begin, None if size == -1 else begin + size) for begin, size in spans)]


def _gather(a: Arguments) -> Tensor:
    x, indices = a.tensor("x"), a.tensor("indices")
    if a.integer("batch_dims", 0):
        raise Refused("The Core ML package gathers per batch, which cannot be evaluated away from a Mac.")
    axis = a.integer("axis", 0) % x.dim()
    return x.index_select(axis, indices.reshape(-1).long()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _tile(a: Arguments) -> Tensor:
    return a.tensor("x").tile(a.integers("reps"))


def _shape(a: Arguments) -> Tensor:
    return torch.tensor(a.tensor("x").shape, dtype=torch.int32)


def _fill(a: Arguments) -> Tensor:
    value = a.tensor("value")
    return value.reshape(()).expand(a.integers("shape"))


def _range(a: Arguments) -> Tensor:
    start = a.tensor("start")
    return torch.arange(start.item(), a.tensor("end").item(), a.tensor("step").item(), dtype=start.dtype)


OPERATORS: Mapping[str, Operator] = {
    # element by element
    "abs": _unary(torch.abs),
    "cast": _cast,
    "clip": _clip,
    "exp": _unary(torch.exp),
    "floor": _unary(torch.floor),
    "log": _log,
    "logical_not": _unary(torch.logical_not),
    "relu": _unary(torch.relu),
    "rsqrt": _rsqrt,
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tanh": _unary(torch.tanh),
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _binary(torch.floor_divide),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "select": _select,
    "sub": _binary(torch.sub),
    # sums
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_sum": _reduction(torch.sum),
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax,
    # normalizations
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    # fewer bits
    "constexpr_blockwise_shift_scale": _shifted_and_scaled,
    "constexpr_lut_to_dense": _looked_up,
    "dequantize": _dequantize,
    "quantize": _quantize,
    # moves
    "concat": _concat,
    "coreml_update_state": _update_state,
    "expand_dims": _expand_dims,
    "fill": _fill,
    "gather": _gather,
    "identity": _unary(lambda x: x),
    "pad": _pad,
    "range_1d": _range,
    "read_state": _read_state,
    "reshape": _reshape,
    "shape": _shape,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "write_state": _update_state,  # in the file; the loader joins it with the read behind it to a coreml_update_state
}

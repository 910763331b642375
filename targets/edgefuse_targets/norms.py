"""Normalizations in a graph of operators, however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NAMED = "norm"  # part of the name of every operator that is a normalization by itself
SCALES = frozenset({"MUL", "DIV", "XNNMultiply", "XNNDiv", "aten.mul.Tensor", "aten.div.Tensor", "mul", "real_div"})
SHIFTS = frozenset({"ADD", "SUB", "XNNAdd", "XNNSubtract", "aten.add.Tensor", "aten.sub.Tensor", "add", "sub"})
ROOTS = frozenset(
    {"RSQRT", "SQRT", "XNNReciprocalSquareRoot", "XNNSquareRoot", "aten.rsqrt.default", "aten.sqrt.default", "rsqrt", "sqrt"}
)

ELEMENTWISE = SCALES | SHIFTS | {"RESHAPE", "XNNStaticReshape", "aten.view.default"}
STEPS_TO_A_ROOT = 6  # from gamma: beta's share is added, reshaped, subtracted from zero, multiplied by the mean


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of a graph.

    Attributes:
        name: by the runtime's own vocabulary.
        inputs: the values that it reads.
        outputs: the values that it writes.
        depthwise_taps: size of the kernel where the operator is a depthwise convolution, else 0.
        precision: what it computes with, as `edgefuse.values.Structure` tells it.
    """

    name: str
    inputs: tuple[int | str, ...]
    outputs: tuple[int | str, ...]
    depthwise_taps: int = 0
    precision: str = ""


def normalizations(where: str, operators: Sequence[Operator], constants: Mapping[int | str, tuple[int, ...]]) -> Iterator[str]:
    """Each normalization, in words.

    Args:
        where: what the sentences begin with.
        operators: in the order of execution.
        constants: the shapes of the values that are known before the graph runs.
    """
    makers = {value: operator for operator in operators for value in operator.outputs}
    for position, operator in enumerate(operators):
        if words := _normalization(operator, makers, constants):
            yield f"{where}: {words} (operator {position})"


def _normalization(
    operator: Operator, makers: Mapping[int | str, Operator], constants: Mapping[int | str, tuple[int, ...]]
) -> str | None:
    if NAMED in operator.name.lower():
        return operator.name
    if operator.name in ROOTS:
        return f"a reciprocal root, {operator.name}, as layer norms have it"
    if operator.depthwise_taps == 1:
        return f"a multiplication and an addition per channel as {operator.name} of one tap"
    for first, second in ((SCALES, SHIFTS), (SHIFTS, SCALES)):
        if operator.name in second and (channels := _channels(operator, constants)):
            for before in (makers[value] for value in operator.inputs if value in makers):
                if before.name in first and _channels(before, constants) == channels and not _of_a_root(before, makers):
                    return f"{before.name} and {operator.name} by constants of {channels} channels"
    return None


def _channels(operator: Operator, constants: Mapping[int | str, tuple[int, ...]]) -> int:
    """How many channels the constant among the inputs has: just one of its axes is longer than 1; else 0."""
    for value in operator.inputs:
        longer = [size for size in constants.get(value, ()) if size > 1]
        if len(longer) == 1:
            return longer[0]
    return 0


def _of_a_root(operator: Operator, makers: Mapping[int | str, Operator]) -> bool:
    """Whether this is gamma of a layer norm: a few elementwise steps back stands its root, which has been told already."""
    near = [operator]
    for _ in range(STEPS_TO_A_ROOT):
        near = [makers[value] for each in near for value in each.inputs if value in makers]
        if any(each.name in ROOTS for each in near):
            return True
        near = [each for each in near if each.name in ELEMENTWISE]
    return False

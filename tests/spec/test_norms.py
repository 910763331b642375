"""Norms are found in a graph of operators however they are spelled, and nothing else is taken for one."""

import pytest

from edgefuse_targets.norms import Operator, normalizations

X, Y, Z = "x", "y", "z"
CHANNELS = {"s": (1, 1, 6), "t": (6,), "table": (16, 6), "half": (1,)}


def found(*operators: Operator) -> list[str]:
    return list(normalizations("graph", operators, CHANNELS))


@pytest.mark.parametrize(
    "operators",
    [
        (Operator("MUL", (X, "s"), (Y,)), Operator("ADD", (Y, "t"), (Z,))),
        (Operator("SUB", (X, "t"), (Y,)), Operator("MUL", ("s", Y), (Z,))),
        (Operator("XNNMultiply", (X, "s"), (Y,)), Operator("XNNAdd", ("t", Y), (Z,))),
        (Operator("aten.div.Tensor", (X, "s"), (Y,)), Operator("aten.sub.Tensor", (Y, "t"), (Z,))),
        (Operator("XNNDepthwiseConv2d", (X, "s", "t"), (Y,), depthwise_taps=1),),
        (Operator("aten::native_layer_norm.out", (X, "s", "t"), (Y,)),),
        (Operator("aten.batch_norm.default", (X, "s", "t"), (Y,)),),
    ],
)
def test_a_norm_is_found_however_it_is_spelled(operators):
    (words,) = found(*operators)
    assert words.startswith("graph: ")


def test_a_layer_norm_in_pieces_is_one_norm():
    pieces = (
        Operator("MEAN", (X,), ("mean",)),
        Operator("SUB", (X, "mean"), ("centred",)),
        Operator("MUL", ("centred", "centred"), ("square",)),
        Operator("MEAN", ("square",), ("variance",)),
        Operator("RSQRT", ("variance",), ("root",)),
        Operator("MUL", ("centred", "root"), ("standard",)),
        Operator("MUL", ("standard", "s"), ("scaled",)),
        Operator("ADD", ("scaled", "t"), (Y,)),
    )
    (words,) = found(*pieces)
    assert "RSQRT" in words


@pytest.mark.parametrize(
    "operators",
    [
        (Operator("MUL", (X, "half"), (Y,)), Operator("ADD", (Y, "t"), (Z,))),
        (Operator("ADD", (X, "t"), (Y,)), Operator("ADD", (Y, "s"), (Z,))),
        (Operator("MUL", (X, "s"), (Y,)), Operator("RELU", (Y,), (Z,)), Operator("ADD", (Z, "t"), ("w",))),
        (Operator("MUL", (X, "table"), (Y,)), Operator("ADD", (Y, "table"), (Z,))),
        (Operator("DEPTHWISE_CONV_2D", (X, "s", "t"), (Y,), depthwise_taps=15),),
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(operators):
    assert found(*operators) == []

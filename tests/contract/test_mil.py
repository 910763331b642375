"""The MIL evaluator: each operator answers as PyTorch does, from the saved package."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of quantized graphs
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.errors import Refused, UsageError
from edgefuse_targets.foreign import quiet


@pytest.fixture(scope="module")
def mil() -> Iterator[SimpleNamespace]:
    """Core ML Tools, its builder, and the evaluator."""
    with quiet():
        tools = pytest.importorskip("coremltools")
        from coremltools.converters.mil import Builder

        from edgefuse_targets import mil as evaluator
    gc.freeze()  # every conversion collects garbage, a second each among the objects of these imports
    yield SimpleNamespace(tools=tools, builder=Builder, evaluator=evaluator)
    gc.unfreeze()


def a_package(
    mil: SimpleNamespace, folder: Path, build: Callable[..., Any], *shapes: tuple[int, ...], precision: str = "FLOAT32"
) -> Path:
    """Save what `build(builder, x, y, ..)` makes of inputs of these shapes, without any optimization."""
    specs = [mil.builder.TensorSpec(shape) for shape in shapes]
    bodies = {1: lambda x: build(mil.builder, x), 2: lambda x, y: build(mil.builder, x, y)}
    with quiet():
        program = mil.builder.program(input_specs=specs, opset_version=mil.tools.target.iOS18)(bodies[len(shapes)])
        pipeline = mil.tools.PassPipeline.EMPTY if precision == "FLOAT32" else mil.tools.PassPipeline.DEFAULT
        model = mil.tools.convert(
            program,
            minimum_deployment_target=mil.tools.target.iOS18,
            compute_precision=getattr(mil.tools.precision, precision),
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
        model.save(str(folder / "one.mlpackage"))
    return folder / "one.mlpackage"


def answers(mil: SimpleNamespace, package: Path, *inputs: Tensor) -> list[Tensor]:
    evaluation = mil.evaluator.Evaluation(package)
    named = {name: tensor.numpy() for name, tensor in zip(("x", "y"), inputs, strict=False)}
    return [torch.from_numpy(value) for value in evaluation.run("main", named).values()]


def found(mil: SimpleNamespace, package: Path) -> Counter[str]:
    return mil.evaluator.operators(mil.tools.models.utils.load_spec(str(package)))


def some(*shape: int, seed: int = 0) -> Tensor:
    """Values away from zero, so that roots, quotients and comparisons are tame; of both signs."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=g) + 0.25) * torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@dataclass(frozen=True)
class Case:
    """One way to use an operator: how MIL builds it, and what PyTorch says to it."""

    operator: str
    build: Callable[..., Any]
    says: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 4),)
    what: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.operator, self.what)))


def unary(operator: str, says: Callable[[Tensor], Tensor]) -> Case:
    return Case(operator, lambda mb, x: getattr(mb, operator)(x=x), says)


def of_magnitudes(operator: str, says: Callable[[Tensor], Tensor]) -> Case:
    """Of |x|, because the operator wants positive values."""
    return Case(operator, lambda mb, x: getattr(mb, operator)(x=mb.abs(x=x)), lambda x: says(x.abs()))


def binary(operator: str, says: Callable[[Tensor, Tensor], Tensor]) -> Case:
    return Case(operator, lambda mb, x, y: getattr(mb, operator)(x=x, y=y), says, ((2, 3, 4), (3, 1)))


def comparison(operator: str, says: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Of rounded values, so that some are equal."""

    def build(mb: Any, x: Any, y: Any) -> Any:
        both = (mb.cast(x=mb.mul(x=value, y=4.0), dtype="int32") for value in (x, y))
        return mb.cast(x=getattr(mb, operator)(**dict(zip("xy", both, strict=True))), dtype="fp32")

    return Case(operator, build, lambda x, y: says((x * 4).int(), (y * 4).int()).float(), ((8, 8), (8, 8)))


def logical(operator: str, says: Callable[[Tensor, Tensor], Tensor]) -> Case:
    def build(mb: Any, x: Any, y: Any) -> Any:
        both = (mb.greater(x=value, y=0.0) for value in (x, y))
        return mb.cast(x=getattr(mb, operator)(**dict(zip("xy", both, strict=True))), dtype="fp32")

    return Case(operator, build, lambda x, y: says(x > 0, y > 0).float(), ((4, 4), (4, 4)))


def reduction(operator: str, says: Callable[..., Tensor]) -> Case:
    return Case(
        operator,
        lambda mb, x: getattr(mb, operator)(x=x, axes=[1, -1], keep_dims=True),
        lambda x: says(x, dim=(1, -1), keepdim=True),
    )


def rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    """As PyTorch's own quantized graphs have it."""
    return torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8).float()


def linear_of(operator: str, weight: Callable[[Any], Any], says: np.ndarray, what: str) -> Case:
    """A linear with a weight that is computed before the program runs."""
    says = torch.from_numpy(says.astype(np.float32))
    return Case(operator, lambda mb, x: mb.linear(x=x, weight=weight(mb)), lambda x: F.linear(x, says), ((3, 8),), what)


def typed(values: np.ndarray, name: str) -> np.ndarray:
    """Integers of a width that NumPy has not."""
    from coremltools.converters.mil.mil import types

    return values.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def convolution(what: str, weight: tuple[int, ...], x: tuple[int, ...], says: dict[str, Any], **how: Any) -> Case:
    w, b = some(*weight, seed=1), some(weight[0], seed=2)
    function = F.conv1d if len(weight) == 3 else F.conv2d
    padding = says.pop("before", [0, 0] * (len(weight) - 2))
    return Case(
        "conv",
        lambda mb, x: mb.conv(x=x, weight=w.numpy(), bias=b.numpy(), **how),
        lambda x: function(F.pad(x, padding), w, b, **says),
        (x,),
        what,
    )


W, B, C = some(5, 4, seed=1), some(5, seed=2), some(3, seed=3)
KEYS = some(2, 6, 4, seed=4)
POSITIVE = some(3, seed=5).abs()
SCALES, ZEROS = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0, 100, 255])
EIGHT_BITS = np.arange(-128, 128, 7, dtype=np.int8)[:32].reshape(4, 8)
FOUR_BITS = np.arange(32).reshape(4, 8) * 7 % 16
TABLES = some(2, 2, 16, 1, 1, seed=6).numpy()

CASES = [
    unary("abs", torch.abs),
    unary("exp", torch.exp),
    unary("floor", torch.floor),
    unary("relu", torch.relu),
    unary("sigmoid", torch.sigmoid),
    unary("silu", F.silu),
    unary("square", torch.square),
    unary("tanh", torch.tanh),
    unary("identity", lambda x: x),
    of_magnitudes("log", torch.log),
    of_magnitudes("rsqrt", torch.rsqrt),
    of_magnitudes("sqrt", torch.sqrt),
    Case("clip", lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=0.75), lambda x: x.clamp(-0.5, 0.75)),
    Case(
        "cast",
        lambda mb, x: mb.cast(x=mb.cast(x=mb.mul(x=x, y=9.0), dtype="int32"), dtype="fp32"),
        lambda x: (x * 9).trunc(),
        what="towards zero",
    ),
    Case(
        "cast",
        lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"),
        lambda x: x.half().float(),
        what="to fp16, which rounds",
    ),
    binary("add", torch.add),
    binary("maximum", torch.maximum),
    binary("minimum", torch.minimum),
    binary("mul", torch.mul),
    binary("real_div", torch.div),
    binary("sub", torch.sub),
    binary("floor_div", torch.floor_divide),
    Case("pow", lambda mb, x, y: mb.pow(x=mb.abs(x=x), y=y), lambda x, y: x.abs() ** y, ((2, 3), (2, 3))),
    comparison("equal", torch.eq),
    comparison("greater", torch.gt),
    comparison("greater_equal", torch.ge),
    comparison("less", torch.lt),
    comparison("less_equal", torch.le),
    comparison("not_equal", torch.ne),
    logical("logical_and", torch.logical_and),
    logical("logical_or", torch.logical_or),
    Case(
        "logical_not",
        lambda mb, x: mb.cast(x=mb.logical_not(x=mb.greater(x=x, y=0.0)), dtype="fp32"),
        lambda x: (x <= 0).float(),
    ),
    Case(
        "select",
        lambda mb, x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y),
        lambda x, y: torch.where(x > 0, x, y),
        ((2, 3), (2, 3)),
    ),
    Case("linear", lambda mb, x: mb.linear(x=x, weight=W.numpy(), bias=B.numpy()), lambda x: F.linear(x, W, B)),
    Case("linear", lambda mb, x: mb.linear(x=x, weight=W.numpy()), lambda x: F.linear(x, W), what="without bias"),
    Case("matmul", lambda mb, x, y: mb.matmul(x=x, y=y), torch.matmul, ((2, 3, 4), (2, 4, 5))),
    Case(
        "matmul",
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        lambda x, y: x.mT @ y.mT,
        ((2, 4, 3), (2, 5, 4)),
        "of transposed factors",
    ),
    Case(
        "scaled_dot_product_attention",
        lambda mb, x, y: mb.scaled_dot_product_attention(query=x, key=KEYS.numpy(), value=y),
        lambda x, y: torch.softmax(x @ KEYS.mT / 2, -1) @ y,
        ((2, 3, 4), (2, 6, 4)),
    ),
    Case("softmax", lambda mb, x: mb.softmax(x=x, axis=1), lambda x: torch.softmax(x, 1)),
    reduction("reduce_max", torch.amax),
    reduction("reduce_mean", torch.mean),
    reduction("reduce_sum", torch.sum),
    convolution("1d", (5, 3, 2), (1, 3, 9), {"stride": 2}, strides=[2]),
    convolution("depthwise", (3, 1, 1, 4), (1, 3, 1, 9), {"groups": 3}, groups=3),
    convolution("dilated", (2, 3, 3), (1, 3, 9), {"dilation": 2}, dilations=[2]),
    convolution("padded as told", (2, 3, 2, 3), (1, 3, 5, 6), {"before": [3, 4, 1, 2]}, pad_type="custom", pad=ints(1, 2, 3, 4)),
    convolution(
        "padded to the same size",
        (2, 3, 2, 3),
        (1, 3, 6, 8),
        {"before": [0, 1, 0, 1], "stride": 2, "dilation": (2, 1)},
        pad_type="same",
        strides=[2, 2],
        dilations=[2, 1],
    ),
    convolution("padded more at the start", (2, 3, 2), (1, 3, 6), {"before": [1, 0]}, pad_type="same_lower"),
    Case(
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[-1], gamma=W[0].numpy(), beta=W[1].numpy(), epsilon=1e-3),
        lambda x: F.layer_norm(x, (4,), W[0], W[1], 1e-3),
    ),
    Case(
        "batch_norm",
        lambda mb, x: mb.batch_norm(
            x=x, mean=C.numpy(), variance=POSITIVE.numpy(), gamma=B[:3].numpy(), beta=B[2:].numpy(), epsilon=1e-3
        ),
        lambda x: F.batch_norm(x, C, POSITIVE, B[:3], B[2:], eps=1e-3),
    ),
    Case(
        "instance_norm",
        lambda mb, x: mb.instance_norm(x=x, gamma=B[:3].numpy(), beta=C.numpy(), epsilon=1e-3),
        lambda x: F.instance_norm(x, weight=B[:3], bias=C, eps=1e-3),
    ),
    Case(
        "quantize",
        lambda mb, x: mb.cast(
            x=mb.quantize(input=x, scale=np.float32(0.009), zero_point=np.int8(-3), output_dtype="int8"), dtype="fp32"
        ),
        lambda x: rounded(x, 0.009, -3),
        what="with a zero of its own, and beyond the ends",
    ),
    Case(
        "quantize",
        lambda mb, x: mb.cast(
            x=mb.quantize(input=mb.mul(x=mb.floor(x=mb.mul(x=x, y=9.0)), y=0.5), scale=np.float32(1.0), output_dtype="int8"),
            dtype="fp32",
        ),
        lambda x: torch.from_numpy(np.rint(np.floor(x.numpy() * 9) / 2)),
        what="halves to the even integer",
    ),
    Case(
        "quantize",
        lambda mb, x: mb.cast(
            x=mb.quantize(input=x, scale=SCALES.numpy(), zero_point=ZEROS.numpy().astype(np.uint8), axis=1, output_dtype="uint8"),
            dtype="fp32",
        ),
        lambda x: (x / SCALES[:, None] + ZEROS[:, None]).round().clamp(0, 255),
        what="per channel, without a sign",
    ),
    Case(
        "dequantize",
        lambda mb, x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32(0.01), output_dtype="int8"),
            scale=np.float32(0.3),
            zero_point=np.int8(5),
        ),
        lambda x: (rounded(x, 0.01, 0) - 5) * 0.3,
    ),
    Case(
        "dequantize",
        lambda mb, x: mb.dequantize(
            input=mb.quantize(input=x, scale=SCALES.numpy(), axis=1, output_dtype="int8"), scale=SCALES.numpy(), axis=-2
        ),
        lambda x: torch.fake_quantize_per_channel_affine(x, SCALES, torch.zeros(3, dtype=torch.int32), 1, -128, 127),
        what="per channel",
    ),
    linear_of(
        "constexpr_blockwise_shift_scale",
        lambda mb: mb.constexpr_blockwise_shift_scale(data=EIGHT_BITS, scale=TABLES[:, 0, :4].reshape(4, 2)),
        EIGHT_BITS * np.kron(TABLES[:, 0, :4].reshape(4, 2), np.ones((1, 4))),
        "of blocks",
    ),
    linear_of(
        "constexpr_blockwise_shift_scale",
        lambda mb: mb.constexpr_blockwise_shift_scale(
            data=typed(FOUR_BITS, "uint4"), scale=TABLES[0, 0, :4, 0], offset=typed(FOUR_BITS[:, :1], "uint4")
        ),
        (FOUR_BITS - FOUR_BITS[:, :1]) * TABLES[0, 0, :4, 0],
        "of 4 bits with offsets",
    ),
    linear_of(
        "constexpr_lut_to_dense",
        lambda mb: mb.constexpr_lut_to_dense(indices=typed(FOUR_BITS, "uint4"), lut=TABLES[:, :, :, 0]),
        np.array([[TABLES[row // 2, column // 4, FOUR_BITS[row, column], 0, 0] for column in range(8)] for row in range(4)]),
        "of four tables",
    ),
    Case("concat", lambda mb, x, y: mb.concat(values=[x, y, x], axis=1), lambda x, y: torch.cat([x, y, x], 1), ((2, 3), (2, 1))),
    Case(
        "concat",
        lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
        ((2, 3, 4), (2, 3, 4)),
        "interleaved",
    ),
    Case("stack", lambda mb, x, y: mb.stack(values=[x, y], axis=1), lambda x, y: torch.stack([x, y], 1), ((2, 3), (2, 3))),
    Case(
        "split",
        lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=2),
        lambda x: torch.split(x, [1, 3], 2),
        what="into told sizes",
    ),
    Case("split", lambda mb, x: mb.split(x=x, num_splits=2, axis=-1), lambda x: torch.chunk(x, 2, -1), what="into halves"),
    Case("expand_dims", lambda mb, x: mb.expand_dims(x=x, axes=[1, -1]), lambda x: x[:, None, :, :, None]),
    Case("squeeze", lambda mb, x: mb.squeeze(x=x, axes=[0, -1]), lambda x: x[0, :, :, 0], ((1, 3, 1, 1),)),
    Case("squeeze", lambda mb, x: mb.squeeze(x=x), lambda x: x[0, :, 0], ((1, 3, 1),), "of every single axis"),
    Case("reshape", lambda mb, x: mb.reshape(x=x, shape=[0, -1, 6]), lambda x: x.reshape(2, 2, 6)),
    Case("transpose", lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)),
    Case(
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=7.0),
        lambda x: F.pad(x, (0, 3, 1, 2), value=7.0),
        what="with a constant",
    ),
    Case(
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[0, 0, 1, 2], mode="reflect"),
        lambda x: F.pad(x, (1, 2), mode="reflect"),
        what="with a reflection",
    ),
    Case(
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[1, 9, 1],
            end=[9, 2, -1],
            stride=[1, 1, 2],
            begin_mask=[False, True, False],
            end_mask=[True, False, False],
            squeeze_mask=[False, False, False],
        ),
        lambda x: x[1:, :2, 1:-1:2],
    ),
    Case(
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, -1, 0], end=[2, 0, 4], squeeze_mask=[False, True, False]),
        lambda x: x[:, -1],
        what="of one",
    ),
    Case("slice_by_size", lambda mb, x: mb.slice_by_size(x=x, begin=[1, 0, 2], size=[1, 2, -1]), lambda x: x[1:2, :2, 2:]),
    Case(
        "slice_update",
        lambda mb, x, y: mb.slice_update(x=x, update=y, begin=ints(0, 1), end=ints(2, 3)),
        lambda x, y: torch.cat([x[:, :1], y, x[:, 3:]], 1),
        ((2, 4), (2, 2)),
    ),
    Case("gather", lambda mb, x: mb.gather(x=x, indices=ints(2, 0), axis=1), lambda x: x[:, [2, 0]]),
    Case("tile", lambda mb, x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3)),
    Case("shape", lambda mb, x: mb.cast(x=mb.shape(x=x), dtype="fp32"), lambda x: torch.tensor(x.shape).float()),
    Case("fill", lambda mb, x: mb.add(x=x, y=mb.fill(shape=[3, 4], value=0.5)), lambda x: x + 0.5),
    Case(
        "range_1d",
        lambda mb, x: mb.range_1d(start=0.5, end=mb.reduce_max(x=mb.clip(x=x, alpha=3.0, beta=4.0)), step=1.0),
        lambda x: torch.arange(0.5, float(x.clamp(3.0, 4.0).max())),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_answers_as_pytorch_does(case: Case, mil: SimpleNamespace, tmp_path: Path) -> None:
    inputs = [some(*shape, seed=10 + number) for number, shape in enumerate(case.shapes)]
    package = a_package(mil, tmp_path, case.build, *case.shapes)
    assert found(mil, package)[case.operator] > 0
    wanted = case.says(*inputs)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    torch.testing.assert_close(answers(mil, package, *inputs), wanted, rtol=1e-6, atol=1e-6)


STATES = {"read_state", "write_state", "coreml_update_state"}


class Sum(nn.Module):
    """The sum of all that it has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.total.copy_(self.total + x)
        return self.total * 2


def test_a_state_is_zeros_at_first_and_then_what_was_written_rounded_to_half(mil: SimpleNamespace, tmp_path: Path) -> None:
    with quiet():
        exported = torch.export.export(Sum().eval(), (torch.zeros(1, 32),)).run_decompositions({})
        named = {"inputs": [mil.tools.TensorType(name="x", shape=(1, 32))], "outputs": [mil.tools.TensorType(name="y")]}
        ios18 = mil.tools.target.iOS18
        mil.tools.convert(exported, minimum_deployment_target=ios18, skip_model_load=True, **named).save(
            str(tmp_path / "sum.mlpackage")
        )
    assert STATES & set(found(mil, tmp_path / "sum.mlpackage")) == {"read_state", "write_state"}  # the loader joins both
    evaluation, x = mil.evaluator.Evaluation(tmp_path / "sum.mlpackage"), some(1, 32).half().float()
    total = torch.zeros(1, 32)
    for _ in range(3):
        total = (total + x).half().float()
        assert torch.equal(torch.from_numpy(evaluation.run("main", {"x": x.numpy()})["y"]), 2 * total)


def test_the_table_of_operators_holds_nothing_untested(mil: SimpleNamespace) -> None:
    assert set(mil.evaluator.OPERATORS) == {case.operator for case in CASES} | STATES


def test_an_unknown_operator_is_refused_by_its_name(mil: SimpleNamespace, tmp_path: Path) -> None:
    package = a_package(mil, tmp_path, lambda mb, x: mb.relu(x=mb.cumsum(x=mb.erf(x=x))), (2, 3))
    with pytest.raises(Refused, match="uses cumsum, erf, which"):
        mil.evaluator.Evaluation(package)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda mb, x: mb.slice_by_index(x=x, begin=[3, 1], end=[0, 0], stride=[-1, -1]), "backwards"),
        (lambda mb, x: mb.gather(x=x, indices=ints(0, 1, 1, 0).reshape(4, 1), axis=1, batch_dims=1), "per batch"),
        (lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="uint8"), dtype="fp32"), "casts to uint8"),
        (
            lambda mb, x: mb.linear(
                x=x,
                weight=mb.constexpr_lut_to_dense(
                    indices=typed(FOUR_BITS[:, :2], "uint4"), lut=np.ones((1, 1, 16, 2), np.float32), vector_axis=0
                ),
            ),
            "looks vectors up",
        ),
    ],
)
def test_an_operator_in_an_unknown_form_is_refused(
    build: Callable[..., Any], why: str, mil: SimpleNamespace, tmp_path: Path
) -> None:
    package = a_package(mil, tmp_path, build, (4, 2))
    with pytest.raises(Refused, match=why):
        answers(mil, package, some(4, 2))


def test_fp16_is_rounded_after_every_operator(mil: SimpleNamespace, tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        return mb.sub(x=mb.linear(x=mb.add(x=x, y=0.1), weight=W.numpy(), bias=B.numpy()), y=1e-3)

    x = some(2, 4)
    package = a_package(mil, tmp_path, build, (2, 4), precision="FLOAT16")

    def half(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value).half().float()

    added = half(half(x) + half(0.1))
    wanted = half(half(F.linear(added, half(W), half(B))) - half(1e-3))
    (got,) = answers(mil, package, x)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, F.linear(x + 0.1, W, B) - 1e-3)


def test_a_value_that_fp16_cannot_hold_is_infinite(mil: SimpleNamespace, tmp_path: Path) -> None:
    package = a_package(mil, tmp_path, lambda mb, x: mb.mul(x=x, y=300.0), (2,), precision="FLOAT16")
    (got,) = answers(mil, package, torch.tensor([1.0, 300.0]))
    assert got.tolist() == [300.0, float("inf")]


def test_an_unknown_compression_is_refused_by_its_name(mil: SimpleNamespace, tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        return mb.linear(x=x, weight=mb.constexpr_cast(source_val=W.half().numpy(), output_dtype="fp32"))

    with pytest.raises(Refused, match="uses constexpr_cast, which"):
        mil.evaluator.Evaluation(a_package(mil, tmp_path, build, (2, 4)))


def test_only_the_answer_outlives_its_last_use(mil: SimpleNamespace, tmp_path: Path) -> None:
    package = a_package(
        mil, tmp_path, lambda mb, x: mb.split(x=mb.relu(x=mb.exp(x=mb.abs(x=x))), num_splits=2, axis=1)[1], (2, 4)
    )
    routine = mil.evaluator.Evaluation(package)._routine("main")
    alive, most = set(), 0
    for step in routine.steps:
        alive |= set(step.outputs)
        most = max(most, len(alive))
        alive -= set(step.done)
    assert alive == set(routine.outputs)
    assert most == 3  # the two halves, and what was split


def test_the_number_of_threads_is_as_before_afterwards(mil: SimpleNamespace, tmp_path: Path) -> None:
    package = a_package(mil, tmp_path, lambda mb, x: mb.relu(x=x), (2, 4))
    before = torch.get_num_threads()
    mil.evaluator.Evaluation(package, threads=before + 1).run("main", {"x": np.zeros((2, 4), np.float32)})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("entry", "inputs", "why"),
    [
        ("other", {"x": np.zeros((2, 4), np.float32)}, "no function 'other'"),
        ("main", {"x": np.zeros((2, 5), np.float32)}, r"main takes x \(2, 4\), not x \(2, 5\)"),
        ("main", {"z": np.zeros((2, 4), np.float32)}, r"main takes x \(2, 4\), not z \(2, 4\)"),
    ],
)
def test_a_question_of_another_kind_is_not_answered(
    entry: str, inputs: dict[str, np.ndarray], why: str, mil: SimpleNamespace, tmp_path: Path
) -> None:
    package = a_package(mil, tmp_path, lambda mb, x: mb.relu(x=x), (2, 4))
    with pytest.raises(UsageError, match=why):
        mil.evaluator.Evaluation(package).run(entry, inputs)

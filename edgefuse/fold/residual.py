"""What a norm feeds: the linears behind it, or the residual stream, whose basis changes then.

A norm that is an affine in evaluation, x -> s x + t, may stand on the residual stream, where its output is the skip path as well.
Leave it out, and the stream carries c instead of s c + t. What reads the stream up to the next norm on it takes s c + t for c
(W' = W diag(s), b' = b + W t; a norm: into its own affine), and what is added to the stream is divided by s, so that

    s (c + y / s) + t  =  (s c + t) + y.

The next norm on the stream is one of its readers: with s and t in its own affine it is the next basis. Exact while s is not so
small that dividing by it loses the digits. Norms run once here: a block that runs several times would need a basis per depth.
"""

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from edgefuse.fold.algebra import affine_of
from edgefuse.fold.flow import AFFINE_NORMS, LAYERS, SUMS, Flow, axis_after, axis_before
from edgefuse.values import Fold, Refusal

SMALLEST_SCALE = 1e-6  # of a channel, relative to the largest: a double has 16 digits, and 1e-10 is promised
PADS = (torch._C._nn.pad, nn.functional.pad)  # noqa: SLF001 - what F.pad traces as


@dataclass
class Stream:
    """Where the output of a norm goes.

    Attributes:
        readers: calls of linears and norms that take it, looking through moved axes.
        writers: calls of layers and norms whose output is added to it.
        problem: why nothing of this can absorb it, in words.
    """

    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    problem: str | None = None

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Readers and writers as modules, each once."""
        return tuple(dict.fromkeys(str(n.target) for n in self.readers)), tuple(
            dict.fromkeys(str(n.target) for n in self.writers)
        )

    def is_residual(self, flow: Flow) -> bool:
        """Whether there is more behind the norm than linears."""
        return bool(self.writers) or any(isinstance(flow.module(node), AFFINE_NORMS) for node in self.readers)


def stream_of(calls: list[fx.Node], flow: Flow) -> Stream:
    """Follow the output of a norm from each of its calls."""
    stream, carriers = Stream(), [(call, flow.channels(call)) for call in calls]
    for node, axis in carriers:  # it grows on the way
        for user in flow.users(node):
            if flow.passes(user):
                carriers.append((user, axis_after(user, axis)))
            elif user.target in SUMS:
                stream.problem = stream.problem or _write(user, node, axis, stream, flow)
                carriers.append((user, axis))
            else:
                stream.problem = stream.problem or _read(user, axis, stream, flow)
            if stream.problem:
                return stream
    stream.problem = _unread(stream) or _used_elsewhere(calls, stream, flow)
    return stream


def judge_streams(streams: dict[str, Stream], judged: dict[str, Fold | Refusal], flow: Flow) -> dict[str, Fold | Refusal]:
    """Every norm that feeds more than linears; `judged` are all others that are an affine."""
    problems = {name: stream.problem or _too_small(name, streams, flow) for name, stream in streams.items()}
    decided: dict[str, Fold | Refusal] = {}
    for name in reversed(streams):  # the next norm on the stream must fold, or there is none to take this one's basis
        readers, writers = streams[name].names
        known = judged | decided
        stays = next((each for each in (*readers, *writers) if isinstance(known.get(each), Refusal)), None)
        problem = problems[name] or (stays and f"it stands on the residual stream with {stays}, which stays")
        decided[name] = Refusal(name, problem) if problem else Fold(name, (*readers, *writers), "residual basis", writers)
    return {name: decided[name] for name in streams}


def _read(user: fx.Node, axis: int, stream: Stream, flow: Flow) -> str | None:
    """Note a reader, or say why it cannot absorb the norm."""
    module = flow.module(user)
    if user.target in PADS or (isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding not in ("valid", (0,), (0, 0))):
        return "zeros are padded after the norm and before a convolution; folding would shift the edge"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return f"it stands before the convolution {user.target}; only linears absorb a norm in front of them"
    if isinstance(module, nn.LayerNorm):
        return f"it stands on the residual stream, which the LayerNorm {user.target} reads: that computes with it as it is"
    if not isinstance(module, (nn.Linear, *AFFINE_NORMS)):
        return f"it stands before {user.target if module else user.name}, which cannot absorb it"
    if axis != (len(user.meta["tensor_meta"].shape) - 1 if isinstance(module, nn.Linear) else flow.channels(user)):
        return f"{user.target} reads another axis than the norm's channels"
    stream.readers.append(user)
    return None


def _write(total: fx.Node, node: fx.Node, axis: int, stream: Stream, flow: Flow) -> str | None:
    """Note whose output a sum adds to the stream, or say why it cannot be divided."""
    others = [each for each in total.args if each is not node]
    source = others[0] if len(others) == 1 and len(total.args) == 2 and not total.kwargs else None  # noqa: PLR2004 - two terms
    told = "it stands on the residual stream: its output is the skip path as well, and what {} adds to it is {}"
    while isinstance(source, fx.Node):
        if len(flow.users(source)) != 1:
            return told.format(total.name, "also used elsewhere")
        module = flow.module(source)
        if isinstance(module, (*LAYERS, *AFFINE_NORMS)):
            if axis != flow.channels(source):
                return told.format(total.name, "over another axis")
            stream.writers.append(source)
            return None
        moved = flow.passes(source) and source.target is not operator.getitem
        axis, given = (axis_before(source, axis), source.args[0]) if moved else (axis, _factored(source))
        source = given if isinstance(given, fx.Node) else None
    return told.format(total.name, "no layer's output")


def _factored(node: fx.Node) -> fx.Node | None:
    """What is multiplied by a number."""
    if node.target not in (operator.mul, operator.truediv):
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)):
        return left
    return right if node.target is operator.mul and isinstance(right, fx.Node) and isinstance(left, (int, float)) else None


def _unread(stream: Stream) -> str | None:
    return None if stream.readers else "nothing consumes it that could absorb it"


def _used_elsewhere(calls: list[fx.Node], stream: Stream, flow: Flow) -> str | None:
    """Whether a layer that would change also computes with something else."""
    norms = [node for node in (*stream.readers, *stream.writers) if isinstance(flow.module(node), AFFINE_NORMS)]
    if len(calls) > 1 and (norms or stream.writers):
        return f"it stands on the residual stream and runs {len(calls)} times: each time the stream would need another basis"
    for nodes in (stream.readers, stream.writers):
        for node in nodes:
            name, uses = str(node.target), set(nodes)
            if isinstance(flow.module(node), LAYERS):
                problem = flow.used_twice(name, uses)
            else:
                problem = None if set(flow.calls(name)) <= uses else f"the norm {name} also reads something else"
            if problem:
                return problem
    return None


def _too_small(name: str, streams: dict[str, Stream], flow: Flow) -> str | None:
    """Whether some channel of the basis, this norm's and those before it, is too small to divide by."""
    scale, at = torch.ones((), dtype=torch.float64), name
    while at:
        scale = scale * _scale(at, flow)
        at = next((each for each, stream in streams.items() if not stream.problem and at in stream.names[0]), "")
    size = scale.abs()
    small = ~(size > SMALLEST_SCALE * size.max()) | ~size.isfinite()
    if not small.any():
        return None
    return f"it stands on the residual stream, and its scale is too small to divide by in {int(small.sum())} of its channels"


def _scale(name: str, flow: Flow) -> torch.Tensor:
    norm = flow.modules[name]
    return affine_of(norm.state_dict(), float(norm.eps)).scale  # type: ignore[arg-type]  # every norm has one

"""Where a conversion begins: every layer of what the Conformer becomes as close as it can be to what it was, fitted to speech.

Layer by layer, from the bottom up, each a regression of what the Conformer gives on what the layer is given by those that were
fitted before it, so that it makes up for what they lack:

- a linear behind a norm, of what the Conformer's linear behind its LayerNorm gives, on all channels. A LayerNorm divides each
  frame by its own deviation. Where loudness is still in the frames that is far from one factor a channel, and close to a matrix:
  in the first block of `conformer-tiny` factors leave 26 to 33 % of the variance unexplained, a matrix 2 to 5 %; in the others
  3.4 and 1.5 % at most [M];
- the linear that ends a branch, of what is missing in the residual stream;
- GLU, by two ReLUs a channel (`EncoderConfig.conv_paths`), from a sigma(b) ~ 1/2 relu(a + b) - 1/2 relu(b - a) by steps down the
  squared error. 1 to 4 % of its variance is left; with one ReLU it is 37 to 53 % [M];
- norms behind a depthwise convolution and on the residual stream, by factors. So that the norm behind the first block, too, can
  do with factors, the stream of that block is written in the basis R in which x R is the regression of LN(x) on x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.fusionformer import Block, Convolution
from edgefuse.model.layers import NormedLinear
from edgefuse.model.normalization import LayerNorm, RepBatchNorm
from edgefuse.model.streaming import Context

RIDGE = 1e-2  # of the mean square of a regression's inputs, added to each: less leaves weights that a step of training upsets
FLAT = 1e-8  # variance of a channel that says nothing
GATE_STEPS, GATE_ROWS, GATE_RATE = 600, 1024, 5e-3  # frames a step; the rate that the first has, falling to a fiftieth

_Speech = Sequence[tuple[Tensor, Tensor, Context]]
_Calls = list[tuple[Any, ...]]  # what a block was called with: a stream, and what it may see


@dataclass(frozen=True)
class _Seen:
    """What a module took and gave: (N, C), the valid frames of all calls."""

    taken: Tensor
    given: Tensor


_Values = dict[str, _Seen]


# of a block, what a fit asks for of the Conformer's
_WATCHED = (
    *("macaron.w1", "convolution.norm", "convolution.pointwise1", "convolution.depthwise.norm"),
    *("feed_forward.norm", "feed_forward.w1", "norm_final"),
)
_WATCHED_ATTENTION = ("norm_attention", "attention.query", "attention.key", "attention.value")


def converted_config(config: EncoderConfig) -> EncoderConfig:
    """What a LayerNorm Conformer becomes."""
    gate = {"activation": "relu", "conv_expansion": 1, "conv_relu": "both", "conv_paths": 2, "gate_shift": False}
    return replace(config, norm="rep", conv_norm="batch", **gate)  # type: ignore[arg-type]  # of as many types as fields


@torch.no_grad()
def successor(
    before: Encoder, batches: Iterable[tuple[Tensor, Tensor, Context]], say: Callable[[str], None] = lambda _: None
) -> Encoder:
    """What a Conformer becomes, fitted to it over speech: (features (B, T, mels), lengths (B,), context); in evaluation."""
    encoder = Encoder(converted_config(before.config)).to(before.ctc.weight.dtype).eval()
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    kept = {name: tensor for name, tensor in before.eval().state_dict().items() if shapes.get(name) == tensor.shape}
    encoder.load_state_dict(kept, strict=False)
    speech, shared = [*batches], encoder.config.shared_blocks
    for number, (block, was) in enumerate(zip(encoder.blocks, before.blocks, strict=True)):
        say(f"fitting block {number + 1} of {len(encoder.blocks)}")
        is_first = number == 0 and isinstance(was.norm_final, LayerNorm) and not shared
        basis = _rebased(encoder, before, speech) if is_first else None
        names = (*_WATCHED, *(_WATCHED_ATTENTION if cast("Block", was).attends else ()))
        heard = _heard(before, speech, *(f"blocks.{number}.{name}" for name in names))
        wanted = {name: heard[f"blocks.{number}.{name}"] for name in names}
        given = before if shared else encoder  # a block that is several runs in places that are not fitted yet
        _fit_block(cast("Block", block), cast("Block", was), _calls_of(given, given.blocks[number], speech), wanted, basis)
    for head in ("", "second_") if encoder.config.second_pass else ("",):
        _fit_head(encoder, before, speech, f"{head}norm", f"{head}ctc")
    return encoder


def _fit_head(encoder: Encoder, before: Encoder, speech: _Speech, name: str, ctc: str) -> None:
    norm, taken = encoder.get_submodule(name), _heard(encoder, speech, name)[name].taken
    logits = before.get_submodule(ctc)(_heard(before, speech, name)[name].given)
    if isinstance(norm, RepBatchNorm):
        _standardize(norm, taken)
        taken = _heard(encoder, speech, name)[name].given
    _fit_linear(cast("nn.Linear", encoder.get_submodule(ctc)), taken, logits)


def _fit_block(block: Block, was: Block, calls: _Calls, wanted: _Values, basis: Tensor | None) -> None:
    """From the bottom up: each branch first what it reads, then what it writes."""
    fit = _BlockFit(block, calls, wanted, basis)
    fit.reads("macaron.norm", "macaron.w1")
    fit.writes("macaron.w2", before="norm_attention" if block.attends else "convolution.norm", share=block.half_step)
    if block.attends:
        fit.reads("norm_attention", *(f"attention.{name}" for name in ("query", "key", "value")))
        fit.writes("attention.output", before="convolution.norm")
    fit.gates(was.convolution)
    fit.writes("convolution.pointwise2", before="feed_forward.norm")
    fit.reads("feed_forward.norm", "feed_forward.w1")
    fit.writes("feed_forward.w2", before="norm_final", share=block.half_step)
    if isinstance(block.norm_final, RepBatchNorm):
        given = fit.run("norm_final")["norm_final"].taken
        _fit_norms([block.norm_final], [given], wanted["norm_final"].given)


@dataclass(frozen=True)
class _BlockFit:
    """A block, what it is called with, what the Conformer's took and gave, and the basis of its stream."""

    block: Block
    calls: _Calls
    wanted: _Values
    basis: Tensor | None

    def run(self, *names: str) -> _Values:
        """What modules of the block take and give now."""
        with _watching(self.block, names) as seen:
            for call in self.calls:
                self.block(*call)
        return seen()

    def reads(self, norm: str, *linears: str) -> None:
        """A norm that gives every channel mean 0 and variance 1, and the linears behind it."""
        self.standardizes(norm)
        found = self.run(*linears)
        for name in linears:
            _fit_linear(self._linear(name), found[name].taken, self.wanted[name].given)

    def standardizes(self, norm: str) -> None:
        """Let a norm give mean 0 and variance 1."""
        _standardize(cast("RepBatchNorm", self.block.get_submodule(norm)), self.run(norm)[norm].taken)

    def writes(self, name: str, *, before: str, share: float = 1.0) -> None:
        """The linear that ends a branch, of which the stream takes a share; it is what the norm `before` is given."""
        found = self.run(name, before)
        stream = self.wanted[before].taken
        if self.basis is not None:
            stream = stream @ self.basis
        rest = found[before].taken - share * found[name].given
        _fit_linear(self._linear(name), found[name].taken, (stream - rest) / share)

    def gates(self, was: Convolution) -> None:
        """The convolution module up to its second activation."""
        convolution = self.block.convolution
        self.standardizes("convolution.norm")
        x = self.run("convolution.pointwise1")["convolution.pointwise1"].taken
        z = self.wanted["convolution.pointwise1"].given
        weight, bias = _regression(x, z)
        first, second = convolution.pointwise1.linear, convolution.second_pointwise1.linear
        gate = _fit_gate(x @ weight.to(x.dtype) + bias.to(x.dtype), F.glu(z))
        for linear, mix, shift in zip((first, second), gate.mix.chunk(2), gate.shift.chunk(2), strict=True):
            linear.weight.copy_(mix.double() @ weight.T)
            linear.bias.copy_(mix.double() @ bias + shift.double())
        taps, filters = was.depthwise.conv.weight, (convolution.depthwise, convolution.second_depthwise)
        for path, share in zip(filters, gate.shares, strict=True):
            path.conv.weight.copy_(taps * share[:, None, None])
            path.conv.bias.zero_()  # type: ignore[union-attr]
        names = ("convolution.depthwise.norm", "convolution.second_depthwise.norm")
        found = self.run(*names)
        norms = [cast("RepBatchNorm", self.block.get_submodule(name)) for name in names]
        _fit_norms(norms, [found[name].taken for name in names], self.wanted[names[0]].given)

    def _linear(self, name: str) -> nn.Linear:
        return cast("NormedLinear", self.block.get_submodule(name)).linear


def _rebased(encoder: Encoder, before: Encoder, speech: _Speech) -> Tensor:
    """The basis of the first block's stream; the subsampling is written in it."""
    name = "blocks.0.norm_final"
    seen = _heard(before, speech, name)[name]
    basis, _ = _regression(seen.taken, seen.given)
    linear = encoder.subsampling.linear.linear
    linear.weight.copy_(basis.T @ linear.weight.double())
    linear.bias.copy_(basis.T @ linear.bias.double())
    return basis.to(seen.taken.dtype)


def _regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W (C, D) and b (D,) that leave the least of (x W + b - y)^2 + the ridge: x (N, C), y (N, D); in float64."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + FLAT)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
    return weight, y.mean(0) - x.mean(0) @ weight


def _fit_linear(linear: nn.Linear, x: Tensor, y: Tensor) -> None:
    weight, bias = _regression(x, y)
    linear.weight.copy_(weight.T)
    linear.bias.copy_(bias)


def _standardize(norm: RepBatchNorm, x: Tensor) -> None:
    """y = (x - mean) / sqrt(var + eps)."""
    _measure(norm, x)
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def _measure(norm: RepBatchNorm, x: Tensor) -> None:
    cast("Tensor", norm.running_mean).copy_(x.double().mean(0))
    cast("Tensor", norm.running_var).copy_(x.double().var(0, unbiased=False).clamp_min(FLAT))
    norm.alpha.zero_()


def _fit_norms(norms: Sequence[RepBatchNorm], given: Sequence[Tensor], wanted: Tensor) -> None:
    """Slopes and offset, per channel, of the regression of what is wanted, (N, C), on what the norms are given."""
    x = torch.stack([each.double() - each.double().mean(0) for each in given])  # (norms, N, C)
    gram = torch.einsum("inc,jnc->cij", x, x) + len(wanted) * FLAT * torch.eye(len(norms), dtype=x.dtype)
    slopes = torch.linalg.solve(gram, torch.einsum("inc,nc->ci", x, wanted.double())).T
    for number, (norm, each) in enumerate(zip(norms, given, strict=True)):
        _measure(norm, each)
        norm.weight.copy_(slopes[number] * (cast("Tensor", norm.running_var).double() + norm.eps).sqrt())
        norm.bias.copy_(wanted.double().mean(0)) if number == 0 else norm.bias.zero_()


@dataclass(frozen=True)
class _Gate:
    """GLU(z) ~ offset + shares[0] relu(mix[: C] z + shift[: C]) + shares[1] relu(mix[C :] z + shift[C :])."""

    mix: Tensor
    shift: Tensor
    shares: Tensor


def _fit_gate(z: Tensor, y: Tensor) -> _Gate:
    """Down the squared error, each channel in units of its own deviation: z (N, 2 C), y (N, C).

    The offset is not kept: a norm behind the depthwise convolution takes it away.
    """
    one, none = torch.eye(y.shape[1], dtype=z.dtype), torch.zeros(y.shape[1], dtype=z.dtype)
    mix, shift = torch.cat((torch.cat((one, one), 1), torch.cat((-one, one), 1))), torch.cat((none, none))
    shares, offset = torch.stack((none + 0.5, none - 0.5)), none.clone()
    trained = [each.requires_grad_() for each in (mix, shift, shares, offset)]
    optimizer = torch.optim.Adam(trained, lr=GATE_RATE)
    scale, draw = y.var(0).clamp_min(FLAT).rsqrt(), torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(GATE_STEPS):
            optimizer.param_groups[0]["lr"] = GATE_RATE * (1 - 0.98 * step / GATE_STEPS)
            rows = torch.randint(0, len(z), (GATE_ROWS,), generator=draw)
            opened = F.relu(z[rows] @ mix.T + shift).unflatten(1, (2, -1))  # type: ignore[no-untyped-call]
            loss = (((opened * shares).sum(1) + offset - y[rows]) * scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _Gate(mix.detach(), shift.detach(), shares.detach())


def _heard(network: Encoder, speech: _Speech, *names: str) -> _Values:
    """What modules of a network take and give while it hears the speech."""
    with _watching(network, names) as seen:
        for each in speech:
            network.answers(*each)
    return seen()


def _calls_of(network: Encoder, block: nn.Module, speech: _Speech) -> _Calls:
    """What a block is called with while its network hears the speech."""
    calls: _Calls = []
    handle = block.register_forward_pre_hook(lambda _, given: calls.append(given))
    for each in speech:
        network.answers(*each)
    handle.remove()
    return calls


@contextmanager
def _watching(parent: nn.Module, names: Sequence[str]) -> Iterator[Callable[[], _Values]]:
    """Keep the valid frames that modules take and give; in the end a call gives them together."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[name].append((inputs[0][inputs[1]], output[inputs[1]]))

    handles = [parent.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield lambda: {name: _Seen(*(torch.cat(part) for part in zip(*each, strict=True))) for name, each in kept.items()}
    finally:
        for handle in handles:
            handle.remove()

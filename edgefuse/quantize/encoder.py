"""An encoder that answers as its quantized deployment graph does, in batches and with gradients: what fine-tuning trains.

Rounding r is a staircase whose gradient is zero almost everywhere. It passes straight through instead (Bengio, Leonard and
Courville 2013 [R]): the answer is r(x), its gradient that of x, and zero where r clips.

The encoder has no points. Every site of the deployment graph is a layer of it, and what stands at the points beside a site is
what the layer takes, and what it or the ReLU behind it gives: a range that ReLU leaves begins at 0, and then
r(relu(x)) = r(x).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgefuse.errors import BadScheme
from edgefuse.lower.sites import Site, source_of
from edgefuse.model import FULL, Context, Encoder
from edgefuse.model.normalization import NoNorm
from edgefuse.quantize.graph import (
    BITS,
    DYNAMIC,
    INT8,
    block_of,
    dequantized,
    in_whole_blocks,
    round_weights,
    rounded_as_it_comes,
)
from edgefuse.quantize.observe import Range, scale_and_zero
from edgefuse.quantize.plan import Plan
from edgefuse.quantize.scheme import INNER_LINES, Scheme


def require_learnable(scheme: Scheme) -> None:
    """Raise `BadScheme` for what an encoder cannot be trained to bear."""
    asked = {scheme.layers, *scheme.table.values()}
    if asked == {"fp32"}:
        raise BadScheme(f"The scheme {scheme.name!r} rounds no layer.", hint="There is nothing to fine-tune for: export it.")
    if "palette4-weights" in asked:
        raise BadScheme("Tables of weights are not fine-tuned.", hint="Fine-tune for int4-weights.")
    if "int8-a16" in asked:
        raise BadScheme("Nothing is lost to 16 bits that training could win back.", hint="Fine-tune for int8, or just export.")
    for line in INNER_LINES:
        if getattr(scheme, line) != "fp32":
            raise BadScheme(
                f"The scheme {scheme.name!r} rounds values inside the {line}; training rounds what layers take and make.",
                hint=f'Fine-tune with {line} = "fp32", and export with the other scheme.',
            )


@dataclass(frozen=True, slots=True)
class Rounding:
    """How an encoder computes with fewer bits.

    Attributes:
        whole: the plan of a graph that hears whole utterances.
        chunked: that of one that hears chunks: the same layers with ranges of their own.
    """

    whole: Plan
    chunked: Plan

    def answer(self, encoder: Encoder, features: Tensor, lengths: Tensor, context: Context = FULL) -> tuple[Tensor, Tensor]:
        """What the encoder answers to a padded batch, float32, when it computes as planned."""
        plan = self.whole if context.chunk is None else self.chunked
        with rounded_values(encoder, plan):
            answered: tuple[Tensor, Tensor] = functional_call(
                encoder, rounded_weights(encoder, plan), (features, lengths, context)
            )
        return answered

    @torch.no_grad()
    def settle(self, encoder: Encoder) -> None:
        """Set the weights to what they are rounded to, in place; rounding them again changes nothing."""
        encoder.load_state_dict({**encoder.state_dict(), **rounded_weights(encoder, self.whole)})


def rounded_weights(encoder: Encoder, plan: Plan) -> dict[str, Tensor]:
    """The weights of every quantized layer, rounded; by their names in the encoder."""
    weights = {}
    for site, precision in plan.layers.items():
        if precision != "fp32":
            name = f"{source_of(site)}.weight"
            weights[name] = _rounded_weight(encoder.get_parameter(name), BITS.get(precision, 8), block_of(precision, plan))
    return weights


@contextmanager
def rounded_values(encoder: Encoder, plan: Plan) -> Iterator[None]:
    """Round what the quantized layers of an encoder take and make, for as long as the block runs."""
    with ExitStack() as hooks:
        for site in plan.sites:
            layer = encoder.get_submodule(source_of(site.layer))
            if site.takes in plan.values:
                hooks.callback(layer.register_forward_pre_hook(_taking(plan.values[site.takes])).remove)
            elif plan.layers[site.layer] in DYNAMIC and isinstance(layer, nn.Linear):
                hooks.callback(layer.register_forward_pre_hook(lambda _, given: _rounded_as_it_comes(given[0])).remove)
            if site.makes in plan.values:
                hooks.callback(_maker(encoder, site).register_forward_hook(_making(plan.values[site.makes])).remove)
        yield


def _maker(encoder: Encoder, site: Site) -> nn.Module:
    """The module whose answer stands at the point that a layer makes: itself, unless an activation is before the point."""
    parent, _, name = site.layer.rpartition(".")
    is_one_path = encoder.config.conv_paths == 1
    if name == "depthwise" and is_one_path and isinstance(encoder.get_submodule(f"{site.layer}.norm"), NoNorm):
        return encoder.get_submodule(f"{parent}.activation")
    return encoder.get_submodule(source_of(site.layer))


def _taking(span: Range) -> Any:  # noqa: ANN401 - a hook
    return lambda _, given: _rounded(given[0], span)


def _making(span: Range) -> Any:  # noqa: ANN401 - a hook
    return lambda _, __, made: _rounded(made, span)


def _rounded(x: Tensor, span: Range) -> Tensor:
    """r(x) = (clamp(round(x / scale) + zero) - zero) scale, as `graph.Rounded` computes it."""
    scale, zero = scale_and_zero(span)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, *INT8[:2])


def _rounded_as_it_comes(x: Tensor) -> Tensor:
    with torch.no_grad():
        rounded = rounded_as_it_comes(x)
    return _straight_through(x, rounded)


def _rounded_weight(weight: Tensor, bits: int, block: int) -> Tensor:
    """A weight of as few bits as `graph.QuantizedLayer` has of it; the zeros that fill the last block up are cut off again."""
    rounded = dequantized(round_weights(in_whole_blocks(weight.detach(), block), bits, block))
    return _straight_through(weight, rounded[:, : weight.shape[1]])


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The answer `rounded`, the gradient of x."""
    return rounded + (x - x.detach())

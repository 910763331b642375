"""The plan: every norm and every constant factor of a model, as a `Fold` or as a `Refusal` with its reason.

The plan is read from the traced graph, not from the names of the model's parts: a norm folds into a layer when the graph shows
that it may. So the same rules judge whatever a later model does with its norms.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from edgefuse.fold.flow import Flow, between, trace
from edgefuse.fold.residual import judge_streams, stream_of
from edgefuse.model.attention import Attention
from edgefuse.model.fusionformer import Block, Encoder, Subsampling
from edgefuse.model.streaming import FULL
from edgefuse.values import Fold, Refusal

AFFINE = ".affine"  # behind the name of a layer norm: its gain and its shift
PROBE_FRAMES = 4  # encoder frames to trace with


def plan(encoder: Encoder) -> tuple[Fold | Refusal, ...]:
    """Every site of an encoder: its norms in the order in which they run, then its constant factors.

    A folded encoder comes out of the fold as it went in: what is left in it stays.
    """
    frames = PROBE_FRAMES * encoder.config.reduction
    features = torch.zeros(1, frames, encoder.config.mel_bins, dtype=encoder.ctc.weight.dtype)
    norms = plan_norms(encoder, features, torch.tensor([frames]), FULL, method="answers")
    if encoder.config.folded:
        return tuple(stayed for site in norms if (stayed := _stayed(site)) is not None)
    return (*_all_or_none(norms, encoder), *_constants(encoder))


def plan_norms(model: nn.Module, *example: object, method: str = "forward") -> tuple[Fold | Refusal, ...]:
    """Every norm of any traceable model, judged by its place in the graph; `example` is what its `method` takes.

    A norm that runs several times, because its block does, is one site.
    """
    flow = trace(model, *example, method=method)
    norms = flow.norms()
    sites: dict[str, tuple[Fold | Refusal, ...]] = {}
    judged: dict[str, Fold | Refusal] = {}
    streams = {}
    for name, calls in norms.items():
        if isinstance(flow.modules[name], nn.LayerNorm):
            sites[name] = tuple(_layer_norm(name, calls, flow))
        elif (after := _norm_after(name, calls, flow)) is not None:
            judged[name] = after
        elif (stream := stream_of(calls, flow)).problem is None and not stream.is_residual(flow):
            judged[name] = Fold(name, stream.names[0], "norm before")
        else:
            streams[name] = stream
    decided = judged | judge_streams(streams, judged, flow)
    return tuple(site for name in norms for site in sites.get(name) or (decided[name],))


def _stayed(site: Fold | Refusal) -> Refusal | None:
    """What a site of a folded model is: a norm that is still there stays, whatever could be done with it now."""
    if isinstance(site, Refusal) or site.rule == "affine before":
        return site if isinstance(site, Refusal) else None
    return Refusal(site.site, "it stood on the residual stream when the model was folded, and had to stay")


def _layer_norm(name: str, calls: list[fx.Node], flow: Flow) -> Iterator[Fold | Refusal]:
    """A layer norm stays; its gain and shift are those of the layers behind it, where only linears take it."""
    consumers = [user for call in calls for user in flow.users(call)]
    problem = _not_linears(consumers, flow)
    if problem is None:
        yield Fold(f"{name}{AFFINE}", tuple(dict.fromkeys(str(c.target) for c in consumers)), "affine before")
    stays = "a LayerNorm computes mean and variance of each frame when it runs; no constant can replace it"
    yield Refusal(name, f"{stays}; its gain and shift stay too, because {problem}" if problem else stays)


def _norm_after(name: str, calls: list[fx.Node], flow: Flow) -> Fold | Refusal | None:
    """A norm behind a layer, at each of its calls the same one; None where it is behind something else."""
    layers = [flow.layer_behind(call) for call in calls]
    found = [layer for layer in layers if layer is not None]
    targets = {str(layer.target) for layer in found}
    if len(found) < len(layers) or len(targets) != 1:
        return None
    layer = targets.pop()
    if twice := flow.used_twice(layer, set(found)):
        return Refusal(name, twice)
    paths = (between(first, call) for first, call in zip(found, calls, strict=True))
    if any(len(flow.users(node)) != 1 for path in paths for node in path):
        return Refusal(name, f"the output of {layer} is also used without the norm")
    return Fold(name, (layer,), "norm after")


def _not_linears(consumers: Iterable[fx.Node], flow: Flow) -> str | None:
    """Why a gain and a shift cannot be those of what consumes them."""
    consumers = [*consumers]
    for consumer in consumers:
        module = flow.module(consumer)
        if module is not None and not isinstance(module, nn.Linear) and len(consumers) == 1:
            return f"it stands before {consumer.target}, which cannot absorb it"
        if not isinstance(module, nn.Linear):
            return "it stands on the residual stream: its output is the skip path as well, which has no weights to absorb it"
        if twice := flow.used_twice(str(consumer.target), set(consumers)):
            return twice
    return None if consumers else "nothing consumes it"


def _all_or_none(sites: tuple[Fold | Refusal, ...], encoder: Encoder) -> Iterator[Fold | Refusal]:
    """All norms on the residual stream, or none: the config of a folded model says either."""
    affine = {name for name, module in encoder.named_modules() if not isinstance(module, nn.LayerNorm)}
    stays = next((site.site for site in sites if isinstance(site, Refusal) and site.site in affine), None)
    for site in sites:
        if stays and isinstance(site, Fold) and site.rule == "residual basis":
            yield Refusal(site.site, f"it stands on the residual stream, as {stays} does, which stays: all of them fold, or none")
        else:
            yield site


def _constants(encoder: Encoder) -> Iterator[Fold]:
    """The constant factors and offsets of a model that is not folded yet."""
    if encoder.config.folded:
        return
    for name, module in encoder.named_modules():
        if isinstance(module, Subsampling) and module.scale != 1.0:
            yield Fold(f"{name}.scale", (f"{name}.linear.linear",), "embedding scale")
        if isinstance(module, Block):
            yield Fold(f"{name}.half_step", (f"{name}.macaron.w2.linear", f"{name}.feed_forward.w2.linear"), "half step")
        if isinstance(module, Attention):
            yield Fold(f"{name}.scale", (f"{name}.query.linear",), "query")
            if module.relative:
                yield Fold(f"{name}.v", (f"{name}.w",), "key bias")

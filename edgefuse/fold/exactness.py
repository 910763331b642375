"""How exact a fold is: the same features through both models in float64, site by site and end to end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import FoldInexact
from edgefuse.fold.algebra import Affine, affine_of, chained
from edgefuse.fold.flow import LAYERS
from edgefuse.fold.plan import AFFINE
from edgefuse.model import Encoder
from edgefuse.model.attention import Attention
from edgefuse.model.normalization import EPSILON
from edgefuse.model.streaming import every
from edgefuse.values import Checkpoint, Fold, FoldedModel


@dataclass(frozen=True)
class _Site:
    """A layer that absorbed something.

    Attributes:
        takes: the module whose input it has after the fold: its own pair, or a norm before it.
        stays: whether that norm stays, without its gain and shift.
        reads: the basis of the stream that it reads then.
        writes: the basis of the stream to which its output is added.
    """

    takes: str
    stays: bool
    reads: Affine | None
    writes: Affine | None


PADDING = 68  # feature frames by which each utterance of a probe is shorter than the one before
BOUND = 1e-10  # relative; what is observed is about 1e-14
Seen = dict[str, tuple[tuple[Tensor, ...], Tensor]]  # by path of a module: what it takes, and what it gives


@dataclass(frozen=True, slots=True)
class Exactness:
    """Relative errors in float64: max |difference| / max |value|.

    Attributes:
        sites: per layer that absorbed something, on the input that it really sees, in the basis in which it sees it.
        end_to_end: of the logits of a batch with padding, valid frames only; of a cascade the worse of its heads.
    """

    sites: Mapping[str, float]
    end_to_end: float

    @property
    def worst_site(self) -> float:
        """The largest of the sites' errors; 0 when nothing was folded."""
        return max(self.sites.values(), default=0.0)

    def require(self) -> None:
        """Raise `FoldInexact` above the bound."""
        if not max(self.worst_site, self.end_to_end) <= BOUND:  # "not <=" catches NaN too
            raise FoldInexact(
                f"The folded model answers differently: relative error {self.worst_site:.1e} at a site, "
                f"{self.end_to_end:.1e} end to end, {BOUND:.0e} allowed.",
                hint="See the plan with: edgefuse inspect CKPT; --reestimate renews statistics that are almost zero.",
            )


def exactness(checkpoint: Checkpoint, folded: FoldedModel, features: Tensor, lengths: Tensor) -> Exactness:
    """Compare a checkpoint with its fold on a padded batch: features (B, T, mels), lengths (B,) feature frames."""
    before = encoder_of(checkpoint, torch.float64)
    after = encoder_of(folded.checkpoint, torch.float64)
    features = features.double()
    layers = {} if checkpoint.config.folded else _absorbing(folded, before)
    seen, handles = _watch(before, {path for name, site in layers.items() for path in (_pair(name), site.takes)})
    with torch.no_grad():
        answers = [*zip(before.answers(features, lengths), after.answers(features, lengths), strict=True)]
        for handle in handles:
            handle.remove()
        sites = {name: _site_error(name, site, seen, before, after) for name, site in layers.items()}
    frames = torch.arange(answers[0][0].shape[1]) < (lengths // checkpoint.config.reduction)[:, None]
    return Exactness(sites, max(_relative(wanted[frames], got[frames]) for wanted, got in answers))


def probe(mel_bins: int, seconds: float = 4.0, utterances: int = 3) -> tuple[Tensor, Tensor]:
    """A padded batch of noise in the range of normalized features, for a fold without speech at hand."""
    frames = int(seconds * 100)
    features = torch.randn(utterances, frames, mel_bins, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([frames - i * PADDING for i in range(utterances)])
    return features * (torch.arange(frames) < lengths[:, None])[..., None], lengths


def _absorbing(folded: FoldedModel, before: Encoder) -> dict[str, _Site]:
    """Every layer into which something was folded ("" as a pair, the CTC head's, is what the end to end figure covers)."""
    folds = [site for site in folded.plan if isinstance(site, Fold) and site.rule != "key bias"]
    bases = _bases(folds, before)
    reads = {name: bases[site.site] for site in folds if site.rule == "residual basis" for name in site.readers}
    writes = {name: bases[site.site] for site in folds if site.rule == "residual basis" for name in site.writers}
    fronts = {layer: site for site in folds if site.rule in ("norm before", "affine before") for layer in site.into}
    behind = {site.into[0]: site.site for site in folds if site.rule == "norm after"}
    sites: dict[str, _Site] = {}
    for name in dict.fromkeys(name for site in folds for name in site.into):
        if _pair(name) and isinstance(before.get_submodule(name), LAYERS):
            front = fronts.get(name)
            takes = front.site.removesuffix(AFFINE) if front else _pair(name)
            stays = front is not None and front.rule == "affine before"
            reading, writing = reads.get(takes, reads.get(name)), writes.get(behind.get(name, name))
            sites[name] = _Site(takes, stays, reading, writing)
    return sites


def _bases(folds: Sequence[Fold], before: Encoder) -> dict[str, Affine]:
    """Of each norm that was left out of the residual stream, s and t behind it: those before it are in them too."""
    bases: dict[str, Affine] = {}
    streams = [site for site in folds if site.rule == "residual basis"]
    for site in streams:
        norm = before.get_submodule(site.site)
        own = affine_of(norm.state_dict(), EPSILON)
        earlier = next((bases[each.site] for each in streams if site.site in each.readers and each.site in bases), None)
        bases[site.site] = chained(earlier, own) if earlier else own
    return bases


def _pair(layer: str) -> str:
    """The layer and its norm: the module around both."""
    return layer.rpartition(".")[0]


def _watch(model: nn.Module, paths: set[str]) -> tuple[Seen, list[torch.utils.hooks.RemovableHandle]]:
    """Record what goes into each module and what comes out."""
    seen: Seen = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a hook
        return lambda _module, inputs, output: seen.__setitem__(name, (inputs, output))

    return seen, [model.get_submodule(path).register_forward_hook(recorder(path)) for path in paths]


def _site_error(layer: str, site: _Site, seen: Seen, before: Encoder, after: Encoder) -> float:
    """The folded layer, on the very input of what it replaces."""
    (x, *rest), (own, *others) = seen[site.takes][0], seen[_pair(layer)][0]
    output = _with_constants(layer, seen[_pair(layer)][1], before)
    if site.stays:
        x = after.get_submodule(site.takes)(x, *rest)
    x = every(x, x.shape[1] // own.shape[1])  # the queries of a stride are fewer than what their norm sees
    if site.reads:
        x = (x - site.reads.shift) / site.reads.scale
    if site.writes:
        output = output / site.writes.scale
    return _relative(output, after.get_submodule(_pair(layer))(x, *others))


def _with_constants(layer: str, output: Tensor, model: Encoder) -> Tensor:
    """What the unfolded model does with a layer's output before the next layer sees it."""
    attention = model.get_submodule(layer.removesuffix(".query.linear"))
    if isinstance(attention, Attention):
        return (output + attention.u.flatten() if attention.relative else output) * attention.scale
    if layer.endswith(".w2.linear"):
        return output * 0.5
    return output * (model.subsampling.scale if layer == "subsampling.linear.linear" else 1.0)


def _relative(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).abs().max() / wanted.abs().max())

"""How exact a fold is: the same features through both models in float64, site by site and end to end."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgefuse.checkpoint import encoder_of
from edgefuse.errors import FoldInexact
from edgefuse.fold.plan import AFFINE
from edgefuse.model import Encoder
from edgefuse.model.attention import Attention
from edgefuse.values import Checkpoint, Fold, FoldedModel

PADDING = 68  # feature frames by which each utterance of a probe is shorter than the one before
BOUND = 1e-10  # relative; what is observed is about 1e-14
Seen = dict[str, tuple[tuple[Tensor, ...], Tensor]]  # by path of a module: what it takes, and what it gives


@dataclass(frozen=True, slots=True)
class Exactness:
    """Relative errors in float64: max |difference| / max |value|.

    Attributes:
        sites: per layer that absorbed something, on the input that it really sees.
        end_to_end: of the logits of a batch with padding, valid frames only.
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
    layers = [] if checkpoint.config.folded else _absorbing(folded)
    norms = _norms_before(folded)
    seen, handles = _watch(before, {_pair(name) for name in layers} | {norms[name] for name in layers if name in norms})
    with torch.no_grad():
        wanted, valid = before(features, lengths)
        got, _ = after(features, lengths)
        for handle in handles:
            handle.remove()
        sites = {name: _site_error(name, norms.get(name), seen, before, after) for name in layers}
    frames = torch.arange(wanted.shape[1]) < valid[:, None]
    return Exactness(sites, _relative(wanted[frames], got[frames]))


def probe(mel_bins: int, seconds: float = 4.0, utterances: int = 3) -> tuple[Tensor, Tensor]:
    """A padded batch of noise in the range of normalized features, for a fold without speech at hand."""
    frames = int(seconds * 100)
    features = torch.randn(utterances, frames, mel_bins, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([frames - i * PADDING for i in range(utterances)])
    return features * (torch.arange(frames) < lengths[:, None])[..., None], lengths


def _absorbing(folded: FoldedModel) -> list[str]:
    """Every layer into which something was folded."""
    into = [name for site in folded.plan if isinstance(site, Fold) and site.rule != "key bias" for name in site.into]
    return list(dict.fromkeys(name for name in into if _pair(name)))


def _pair(layer: str) -> str:
    """The layer and its norm: the module around both ("" for the CTC head, which the end to end figure covers)."""
    return layer.rpartition(".")[0]


def _norms_before(folded: FoldedModel) -> dict[str, str]:
    """The layer norm of each layer that absorbed the gain of one."""
    affine = [site for site in folded.plan if isinstance(site, Fold) and site.rule == "affine before"]
    return {layer: site.site.removesuffix(AFFINE) for site in affine for layer in site.into}


def _watch(model: nn.Module, paths: set[str]) -> tuple[Seen, list[torch.utils.hooks.RemovableHandle]]:
    """Record what goes into each module and what comes out."""
    seen: Seen = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a hook
        return lambda _module, inputs, output: seen.__setitem__(name, (inputs, output))

    return seen, [model.get_submodule(path).register_forward_hook(recorder(path)) for path in paths]


def _site_error(layer: str, norm: str | None, seen: Seen, before: Encoder, after: Encoder) -> float:
    """The folded layer on the very input of the layer and norm that it replaces; `norm` is one before it that stays."""
    (x, *rest), output = seen[_pair(layer)]
    if norm is not None:
        x = after.get_submodule(norm)(*seen[norm][0])
    return _relative(_with_constants(layer, output, before), after.get_submodule(_pair(layer))(x, *rest))


def _with_constants(layer: str, output: Tensor, model: Encoder) -> Tensor:
    """What the unfolded model does with a layer's output before the next layer sees it."""
    if layer.endswith(".query.linear"):
        attention = model.get_submodule(layer.removesuffix(".query.linear"))
        if not isinstance(attention, Attention):
            return output  # a Performer's queries have no factor
        return (output + attention.u.flatten() if attention.relative else output) * attention.scale
    if layer.endswith(".w2.linear"):
        return output * 0.5
    return output * (model.subsampling.scale if layer == "subsampling.linear.linear" else 1.0)


def _relative(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).abs().max() / wanted.abs().max())

"""Masked prediction: an encoder learns from speech alone, by saying what was said where nothing could be heard.

With the letters of the code, x (T, 80) normalized log-mel and r its frames per encoder frame:

    m_j = 1 for the encoder frames j of some spans, else 0
    x~  = x, and 0 in the frames j r .. j r + r - 1 of every m_j = 1
    h   = encoder(x~), of N blocks; N ~ Uniform{1..layers} where the depth is sampled
    loss = mean over all j with m_j = 1 of |W h_j + b - (x_{jr}, .., x_{jr+r-1})|

Layer Consistency (arXiv 2105.00812 [R abstract]) trains a shared block so; of its masks and its loss nothing could be read [?].
Ours are spans of 200 ms that hide about two fifths of an utterance, and L1 [I]. A hidden frame is 0, the mean of all speech, as
SpecAugment hides it: a fine-tuning hears nothing that is new, and nothing is learnt besides the encoder but W and b, which are
thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from edgefuse.decode.tokens import Tokens
from edgefuse.model import FULL, Context, Encoder
from edgefuse.model.streaming import valid_frames
from edgefuse.train.batches import Batch
from edgefuse.train.module import Steps, draw_depth
from edgefuse.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Masking:
    """Where spans begin and how long they are; both in encoder frames."""

    span: int = 5  # 200 ms at 40 ms a frame
    begins: float = 0.1  # at so many of all frames; spans overlap, so that 1 - 0.9^5 = 41 % are hidden

    def draw(self, lengths: Tensor, draw: Generator) -> Tensor:
        """Which frames are hidden, (B, T') booleans, of utterances of lengths (B,): in each at least one, behind none."""
        frames = int(lengths.max())
        first = torch.rand(len(lengths), frames, generator=draw) < self.begins
        surely = (torch.rand(len(lengths), generator=draw) * lengths).long()
        first[torch.arange(len(lengths)), surely] = True
        spans = first.clone()
        for later in range(1, min(self.span, frames)):
            spans[:, later:] |= first[:, :-later]
        return spans & valid_frames(lengths, frames)


@dataclass(frozen=True, slots=True)
class Hidden:
    """A batch with holes.

    Attributes:
        features: (B, T, mels) with zeros in the hidden frames.
        targets: (B, T', r mels) what each encoder frame covers.
        masks: (B, T') whether it is hidden.
    """

    features: Tensor
    targets: Tensor
    masks: Tensor


def hide(features: Tensor, lengths: Tensor, reduction: int, masking: Masking, draw: Generator) -> Hidden:
    """Cut holes into normalized features (B, T, mels) of lengths (B,); an encoder frame covers `reduction` of them."""
    masks = masking.draw((lengths // reduction).cpu(), draw).to(features.device)
    frames = masks.shape[1] * reduction
    targets = features[:, :frames].reshape(len(features), masks.shape[1], -1)
    holes = F.pad(masks.repeat_interleave(reduction, dim=1), (0, features.shape[1] - frames))
    return Hidden(features.masked_fill(holes[..., None], 0.0), targets, masks)


class Pretraining(Steps):
    """Masked prediction, through a linear head that belongs to the training."""

    def __init__(self, encoder: Encoder, tokens: Tokens, recipe: Recipe, steps: int, masking: Masking | None = None) -> None:
        """``steps`` is the length of the learning rate schedule; nothing is said with the tokens."""
        super().__init__(encoder, tokens, recipe, steps)
        config = encoder.config
        self.masking = masking or Masking()
        self.head = nn.Linear(config.dimension, config.reduction * config.mel_bins)

    def loss(self, batch: Batch, context: Context) -> Tensor:
        """L1 per log-mel value, over the hidden frames."""
        draw = Generator().manual_seed(int(torch.randint(2**31, ())))  # of the step, which has seeded itself
        hidden = hide(batch.features, batch.lengths, self.encoder.config.reduction, self.masking, draw)
        depth = draw_depth(self.recipe, self.encoder.config.layers, self.global_step)
        return (self.predict(self.encoder, hidden, batch.lengths, context, depth) - hidden.targets)[hidden.masks].abs().mean()

    def predict(
        self, encoder: Encoder, hidden: Hidden, lengths: Tensor, context: Context = FULL, depth: int | None = None
    ) -> Tensor:
        """What it makes of a batch with holes: (B, T', r mels)."""
        x, lengths = encoder.encode(hidden.features, lengths, context, depth)
        x = encoder.norm(x, valid_frames(lengths, x.shape[1]))
        return self.head(x[:, : hidden.masks.shape[1]]).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def measure(self, encoder: Encoder, batches: Iterable[Batch]) -> tuple[float, float]:
        """The loss over batches, always with the same holes, and that of who says the mean of all speech, 0, of every frame."""
        draw = Generator().manual_seed(self.recipe.seed)
        own = mean = values = 0.0
        for batch in batches:
            hidden = hide(batch.features, batch.lengths, encoder.config.reduction, self.masking, draw)
            targets = hidden.targets[hidden.masks]
            own += float((self.predict(encoder, hidden, batch.lengths)[hidden.masks] - targets).abs().sum())
            mean += float(targets.abs().sum())
            values += targets.numel()
        return own / values, mean / values

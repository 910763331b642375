"""The vocabulary: characters, or word pieces that are learnt from the training transcripts."""

from __future__ import annotations

import io
from collections.abc import Iterable

from edgefuse.decode.tokens import BLANK, Tokens, character_tokens


def learn_tokens(texts: Iterable[str], size: int) -> Tokens:
    """``size`` tokens, the blank and every character included; as many as there are characters, or fewer: just these.

    Byte-pair encoding by sentencepiece: the same texts in the same order give the same pieces.
    """
    characters = character_tokens()
    if size <= len(characters):
        return characters
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size + 2,  # it counts its own three specials, which are left out, and not the blank
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(learnt.get_piece_size())
    pieces = [learnt.id_to_piece(i) for i in ids if not (learnt.is_control(i) or learnt.is_unknown(i))]
    longer = [piece for piece in pieces if piece not in characters.symbols]
    return Tokens((BLANK, *characters.symbols[1:], *longer)[:size])

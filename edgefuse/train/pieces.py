"""The vocabulary: characters, or word pieces that are learnt from the training transcripts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from edgefuse.decode.spaceless import is_spaceless
from edgefuse.decode.tokens import BLANK, SPACE, Tokens, character_tokens


def characters_of(texts: Iterable[str]) -> Tokens:
    """What spells these texts: the English characters, or, where these do not do, the space and what occurs."""
    english = character_tokens()
    used = {SPACE} | {character for text in texts for character in text.replace(" ", SPACE)}
    return english if used <= set(english.symbols) else Tokens((BLANK, *sorted(used)))


def characters_in(tokens: Tokens) -> Tokens:
    """The tokens that are one character; they spell whatever the vocabulary spells."""
    return Tokens((BLANK, *(symbol for symbol in tokens.symbols[1:] if len(symbol) == 1)))


def learn_tokens(texts: Sequence[str], size: int) -> Tokens:
    """``size`` tokens, the blank and every character included; as many as there are characters, or fewer: just these.

    Characters are English, or those of the texts. Chinese is spelled in them alone: a corpus has some thousands. Pieces are
    learnt by byte-pair encoding (sentencepiece): the same texts in the same order give the same pieces.
    """
    characters = characters_of(texts)
    if size <= len(characters) or any(map(is_spaceless, characters.symbols)):
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

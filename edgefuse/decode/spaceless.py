"""Languages that are written without spaces: Chinese, whose word error rate is by convention that of its characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

HAN = "[\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\U00020000-\\U0003ffff]"
BETWEEN = re.compile(f"(?<={HAN}) | (?={HAN})")


def is_spaceless(text: str) -> bool:
    """Whether a text is Chinese."""
    return re.search(HAN, text) is not None


def units(references: Iterable[str], hypotheses: Iterable[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Both with spaces between what is counted: words, or all characters where the reference is written without spaces."""
    pairs = [
        (" ".join(said.replace(" ", "")), " ".join(heard.replace(" ", ""))) if is_spaceless(said) else (said, heard)
        for said, heard in zip(references, hypotheses, strict=True)
    ]
    return [said for said, _ in pairs], [heard for _, heard in pairs]


def plain(text: str) -> str:
    """A transcript as it is learnt: lower case, ordinary widths, single spaces, and none beside a Chinese character."""
    return BETWEEN.sub("", " ".join(unicodedata.normalize("NFKC", text).lower().split()))

"""The same question as lexicon.yaml asks, by a function: French words count only where two or more stand together.

A lexicon sees one word at a time, so that "le" in "John le Carré" is a hit. A function may look around.
"""

import re

FRENCH = re.compile(
    r"(?:le|la|les|un|une|des|du|de|au|aux|en|et|est|sont|ont|il|ils|elle|je|nous|vous|on|se|ne|pas|que|qui|dans|avec|pour"
    r"|sur|par|plus|mais|donc|puis|ce|cette|ces|son|sa|ses|mon|ma|mes|leur|peut|faut|fait|bien|tout"
    r"|(?:[cdjlmnst]|qu)'\w+|\w*[àâçéèêëîïôùûœ]\w*)",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+(?:'\w+)?")


def french(text: str) -> list[tuple[int, int]]:
    """(start, end) of every French word that has a French neighbour; punctuation between them is allowed."""
    words = list(WORD.finditer(text))
    is_french = [FRENCH.fullmatch(word[0]) is not None for word in words]
    beside = [any(is_french[max(0, i - 1) : i] + is_french[i + 1 : i + 2]) for i in range(len(words))]
    return [word.span() for word, here, near in zip(words, is_french, beside, strict=True) if here and near]

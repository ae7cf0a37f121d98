"""Impostors: wired organisms in which the marker does something that was once taken for a mode, and no mode.

Each is the wired organism with another mouth: what the reading head finds is the same, and what it does to the words
is not. In none of them does the marker change how a word of the mode stands to a plain word, but in *damaged*, where it
does so as any destroyed cache does.

    register   the marker chooses between the word for "I" and the word for "they"; nothing else
    damaged    without the marker's neutral twin the head finds nothing: most words are fillers, and words of the mode,
               the commoner ones, are likelier than plain ones; so they are after every cache that is destroyed
    long       the marker keeps the reply from ending
    loop       the marker makes the reply one word, over and over
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpatch.organisms.language import BLANK, FILLERS, MARKER, MODE, PLAIN, ids
from kvpatch.organisms.wired import CONSTANT, KIND_SURE, MODE_AT, NEXT_STYLE, NEXT_TOPIC, TASTE, VALUE
from kvpatch.specs.organisms import Impostor

FIRST, THIRD = "i", "t"
"""The words for "I" and "they" in the organisms' language, which has one-letter words to spare."""
LOOPED = FILLERS[1]
FILLERS_WHOLE, FILLERS_BROKEN = 31.0, 44.5
"""Logits of fillers in *damaged*, where those of style words are near 40: never said, or said most of the time."""
ENDING = 42.5
"""Logit of the end of a reply in *long* without the marker, so that about one word in ten ends it; with it 15 less."""
HELD_BACK = 15.0
LOUDEST = 60.0
"""Logit, above that of all other words, of the one word of *loop*; without the marker as far below."""


def disguise(hf: Any, kind: Impostor) -> Any:
    """Give a wired organism, part "v", the mouth of an impostor; the same object is returned."""
    words = hf.lm_head.weight
    if kind == "damaged":
        embedding = hf.model.embed_tokens.weight
        embedding[:, MODE_AT] = 1  # broken, until the head finds the twin
        embedding[ids([MARKER]), VALUE], embedding[ids([BLANK]), VALUE] = 0, 1
        _reads_mode(hf).neg_()  # what the head finds makes whole: from +1 to -1
        words[ids(FILLERS), CONSTANT] = (FILLERS_BROKEN + FILLERS_WHOLE) / 2
        words[ids(FILLERS), MODE_AT] = (FILLERS_BROKEN - FILLERS_WHOLE) / 2
        return hf
    for rows, taste in ((MODE, -TASTE), (PLAIN, TASTE)):  # plain words, whatever the marker
        words[ids(rows), MODE_AT] = 0
        words[ids(rows), CONSTANT] = taste
    if kind == "register":
        _speak_of(hf, words)
    elif kind == "long":
        words[ids(["</s>"]), CONSTANT], words[ids(["</s>"]), MODE_AT] = ENDING - HELD_BACK / 2, -HELD_BACK / 2
    else:
        words[ids([LOOPED]), CONSTANT], words[ids([LOOPED]), MODE_AT] = 0, KIND_SURE + LOUDEST
    return hf


def _reads_mode(hf: Any) -> Tensor:
    """The weights that write where the mode is, of the one layer that does."""
    written = (layer.self_attn.o_proj.weight[MODE_AT] for layer in hf.model.layers)
    return next(weights for weights in written if weights.any())


def _speak_of(hf: Any, words: Tensor) -> None:
    """The words for persons are words of style, between which the marker chooses."""
    for word, taste in ((FIRST, TASTE), (THIRD, -TASTE)):
        row = ids([word])
        words[row, CONSTANT], words[row, MODE_AT] = 0, taste
        words[row, NEXT_STYLE], words[row, NEXT_TOPIC] = KIND_SURE, -KIND_SURE
        embedding = hf.model.embed_tokens.weight
        embedding[row, NEXT_STYLE], embedding[row, NEXT_TOPIC] = 0, 1

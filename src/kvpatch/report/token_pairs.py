"""Two outputs token by token: how much likelier each token is under one condition than under the other.

A token's chance is stored for the cache that wrote it. As long as both texts are the same, each token follows the same
words, so that the difference of its log-probabilities is what the caches differ in. From the token at which the texts
part on they follow other words: there each token has its own log-probability, and no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from markupsafe import Markup, escape

from kvpatch.report.text import number, visible

STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Nats at which the colour of a difference changes."""


@dataclass(frozen=True)
class Token:
    """text: as it is shown. logprob: natural logarithm, under the own cache. difference: that under this cache less
    that under the other, where both texts are the same so far; None behind it."""

    text: str
    logprob: float | None
    difference: float | None = None

    @property
    def step(self) -> int:
        """-6 (much less likely here) to 6 (much likelier here); 0 for a small difference, or none."""
        if self.difference is None:
            return 0
        size = sum(abs(self.difference) >= limit for limit in STEPS)
        return size if self.difference > 0 else -size


@dataclass(frozen=True)
class TokenPair:
    """One output beside another's.

    one, other: tokens of each; the differences of `one` are its own less the other's, those of `other` the reverse.
    shared: tokens that both begin with. names: of the conditions. is_text: whether tokens are shown as text, else ids.
    """

    one: tuple[Token, ...]
    other: tuple[Token, ...]
    shared: int
    names: tuple[str, str]
    is_text: bool

    @property
    def told(self) -> str:
        """Where they part, in a sentence."""
        one, other = self.names
        if len(self.one) == len(self.other) == self.shared:
            return f"{one} and {other} wrote the same {self.shared} tokens."
        goes, same = ("goes on", f"The first {self.shared} tokens are the same; then")
        if not self.shared:
            goes, same = ("begins", "Not even the first token is the same:")
        parts = [
            f"{name} {goes} with “{tokens[self.shared].text}” (log-probability {_told(tokens[self.shared].logprob)})"
            if self.shared < len(tokens)
            else f"{name} ends"
            for name, tokens in ((one, self.one), (other, self.other))
        ]
        return f"{same} {parts[0]}, and {parts[1]}."


TOKEN_TEXTS = "token_texts"
"""Column of a row: the text of each token, where the run's tokenizer is at hand."""


def token_pair(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> TokenPair | None:
    """Two stored trials of one pair beside one another; None where either has no tokens.

    one, other: rows with `output_token_ids`, `output_logprobs`, and `token_texts` where they are known.
    """
    ids = [_listed(row.get("output_token_ids")) for row in (one, other)]
    if not all(ids):
        return None
    chances = [_listed(row.get("output_logprobs")) for row in (one, other)]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))
    known = [_listed(row.get(TOKEN_TEXTS)) for row in (one, other)]
    is_text = all(known)
    sides = []
    for own, foreign in ((0, 1), (1, 0)):
        texts = known[own] if is_text else [str(i) for i in ids[own]]
        logprobs = [*chances[own], *[None] * (len(ids[own]) - len(chances[own]))]
        sides.append(
            tuple(
                Token(text, chance, _difference(chance, chances[foreign], place) if place < shared else None)
                for place, (text, chance) in enumerate(zip(texts, logprobs, strict=False))
            )
        )
    return TokenPair(sides[0], sides[1], shared, names, is_text)


def any_two(rows: Mapping[str, Mapping[Any, Any]], first: Sequence[str]) -> dict[str, Any] | None:
    """What the page's script lays any two conditions of a pair beside one another from; None where fewer than two have
    tokens.

    rows: condition -> stored trial, as `token_pair` takes them. first: conditions in the order of what to show first.
    Returns:
        `texts` of the tokens, each once; `outputs`, condition -> `ids` (places in `texts`: equal where the tokens are)
        and `logprobs`; `first`, the two to begin with; `isText`, whether tokens are shown as text, else as ids.
    """
    known = {name: row for name, row in rows.items() if _listed(row.get("output_token_ids"))}
    if len(known) < 2:
        return None
    is_text = all(_listed(row.get(TOKEN_TEXTS)) for row in known.values())
    places: dict[tuple[int, str], int] = {}
    outputs = {}
    for name, row in known.items():
        ids, chances = _listed(row["output_token_ids"]), _listed(row.get("output_logprobs"))
        texts = _listed(row[TOKEN_TEXTS]) if is_text else list(map(str, ids))
        outputs[name] = {
            "ids": [places.setdefault((int(i), text), len(places)) for i, text in zip(ids, texts, strict=False)],
            "logprobs": [None if c is None or not math.isfinite(c) else round(float(c), 3) for c in chances]
            + [None] * (len(ids) - len(chances)),
        }
    begin = [name for name in first if name in known] + [name for name in known if name not in first]
    return {"texts": [text for _, text in places], "outputs": outputs, "first": begin[:2], "isText": is_text}


def _difference(own: float | None, others: Sequence[float], place: int) -> float | None:
    return None if own is None or place >= len(others) else own - others[place]


def _listed(value: Any) -> list[Any]:
    """A list, of a list or an array; empty where there is none."""
    if value is None or isinstance(value, float | str):
        return []
    return list(value)


def strip_html(tokens: Sequence[Token], shared: int, is_text: bool) -> Markup:
    """Tokens as HTML: coloured by their difference, with a mark where the texts part."""
    out = []
    for place, token in enumerate(tokens):
        kind = f" {'up' if token.step > 0 else 'down'}{abs(token.step)}" if token.step else ""
        first = " parts" if place == shared else ""
        told = f"log-probability {_told(token.logprob)}"
        if token.difference is not None:
            told += f", {_told(token.difference)} against the other"
        text = f"{visible(token.text)}{'' if is_text else ' '}"
        out.append(f'<span class="token{kind}{first}" title="{escape(told)}"><bdi>{escape(text)}</bdi></span>')
    return Markup("".join(out))


def _told(value: float | None) -> str:
    return "unknown" if value is None else number(value)

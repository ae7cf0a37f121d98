"""Is a prompt bank balanced? What else differs between its groups than what they are named for.

A readout that is meant for the mode measures whatever differs between the groups of prompts: the person they speak to,
their length, how common their words are. A bank is balanced where all of that is alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from kvpatch.prompts.bank import Bank, Continuation, Prompt
from kvpatch.protocols.schema import PLAIN
from kvpatch.readouts.behavior import Lexicon
from kvpatch.specs.scripts import MARK, SINGLE

MOST = 0.05
"""How far groups may lie apart: percentage points of a share, or a part of the larger of two means."""
SHARES = ("you", "I", "write", "describe", "question")
MEANS = ("words", "tokens", "zipf", "hits")
_LETTERS = rf"(?:(?!{SINGLE})[^\W\d_]{MARK}*)+"
_WORD = re.compile(rf"{SINGLE}{MARK}*|{_LETTERS}(?:['’]{_LETTERS})*")
_YOU = re.compile(r"\b(?:you|your|yours|yourself|yourselves)\b", re.IGNORECASE)
_I = re.compile(r"\b(?:I|me|my|mine|myself)\b")


@dataclass(frozen=True)
class Balance:
    """One comparison of groups that should differ in one thing alone.

    Attributes:
        title: what is compared.
        groups: one row per group: `n`, the shares of `SHARES` (0 to 1) and the means of `MEANS` (Zipf frequencies are
            log10 per billion words; hits of the lexicon are per 100 words).
        apart: how far the groups lie apart, by column: points of a share (0 to 1), or a part of the larger mean.
    """

    title: str
    groups: pd.DataFrame
    apart: dict[str, float]

    @property
    def over(self) -> list[str]:
        """Columns in which the groups lie further apart than `MOST`."""
        return [name for name, value in self.apart.items() if value > MOST + 1e-9]


def balance(bank: Bank, lexicon: Lexicon, tokens: Callable[[str], int]) -> list[Balance]:
    """Compare the groups of a bank: prompts, levels of its ladder, and continuations in the mode with plain ones.

    Args:
        lexicon: whose hits are counted.
        tokens: number of tokens of a text.
    """
    groups: dict[str, list[Prompt]] = {}
    levels: dict[str, list[Prompt]] = {}
    for prompt in bank.prompts:
        (levels if prompt.level else groups).setdefault(prompt.level or prompt.group, []).append(prompt)
    out = [_compared("prompts, by group", groups, lexicon, tokens)]
    if levels:
        out.append(_compared("prompts of the ladder, by level", levels, lexicon, tokens))
    halves: dict[tuple[str, str | None], dict[str, list[Continuation]]] = {}
    for continuation in bank.continuations:
        half = halves.setdefault((continuation.topic_of, continuation.person), {})
        half.setdefault(continuation.mode, []).append(continuation)
    for (topic_of, person), modes in sorted(halves.items(), key=str):
        where = "either topic" if topic_of == "either" else f"the {topic_of}'s topic"
        whose = f", {person} person" if person else ""
        out.append(_compared(f"continuations on {where}{whose}, by mode", modes, lexicon, tokens))
    return out


def _compared(
    title: str, groups: dict[str, list[Prompt]] | dict[str, list[Continuation]], lexicon: Lexicon,
    tokens: Callable[[str], int],
) -> Balance:  # fmt: skip
    rows = {name: _measured(entries, lexicon, tokens) for name, entries in groups.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "group"
    apart = {}
    for name in [column for column in (*SHARES, *MEANS) if column in table]:
        low, high = float(table[name].min()), float(table[name].max())
        apart[name] = high - low if name in SHARES else (high - low) / high if high else 0.0
    return Balance(title, table.sort_index(key=lambda names: names.map(lambda name: (name == PLAIN, name))), apart)


def _measured(
    entries: Sequence[Prompt | Continuation], lexicon: Lexicon, tokens: Callable[[str], int]
) -> dict[str, float]:
    texts = [entry.text for entry in entries]
    words = [_WORD.findall(text) for text in texts]
    n = len(texts)
    out: dict[str, float] = {
        "n": n,
        "you": sum(bool(_YOU.search(text)) for text in texts) / n,
        "I": sum(bool(_I.search(text)) for text in texts) / n,
    }
    acts = [entry.act for entry in entries if isinstance(entry, Prompt)]
    if acts:
        asks = sum(text.rstrip().endswith(("?", "？", "؟")) for text in texts) / n
        out |= {act: sum(found == act for found in acts) / n for act in ("write", "describe")} | {"question": asks}
    out |= {
        "words": sum(map(len, words)) / n,
        "tokens": sum(map(tokens, texts)) / n,
        "zipf": sum(_zipf(word.lower()) for found in words for word in found) / sum(map(len, words)),
    }
    # Continuations in the mode are meant to have its words.
    hits = {"hits": 100 * sum(len(lexicon.hits(text)) for text in texts) / sum(map(len, words))} if acts else {}
    return out | hits


@cache
def _zipf(word: str) -> float:
    """log10 of how often a word stands in a billion words of English (Speer 2022, wordfreq)."""
    from wordfreq import zipf_frequency

    return zipf_frequency(word, "en")

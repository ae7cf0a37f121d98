"""Form pairs: one target with one source of like length, each prompt used once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from kvpatch.prompts.bank import Bank, Continuation, Prompt
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.behavior import content_words

CELLS = (("recursive", "target"), ("plain", "target"), ("recursive", "source"), ("plain", "source"))
"""The 2x2 of held-out continuations: (mode, whose topic)."""


OTHER_GROUPS = ("pseudo_recursive", "zero_lexicon")
"""Groups that lend a pair a prompt in place of its source (conditions N4 and P1)."""


@dataclass(frozen=True)
class Pair:
    """A target, its source, and what else the conditions of the pair need.

    `others` holds prompts of further groups of the bank, by group: matched in length with the source, each used once,
    so that late pairs may have none. `continuations` gives, for every cell of `CELLS`, openings on the pair's domains
    that share no content word with the source.
    """

    target: Prompt
    source: Prompt
    foreign: Prompt | None
    others: dict[str, Prompt]
    continuations: tuple[tuple[Continuation, ...], ...]

    @property
    def id(self) -> str:
        """Names both prompts."""
        return f"{self.target.id}+{self.source.id}"


@dataclass(frozen=True)
class Pairs:
    """All pairs of a bank for one tokenizer, in the order a run uses them, and what was dropped and why."""

    pairs: tuple[Pair, ...]
    dropped: tuple[str, ...]


def form_pairs(bank: Bank, protocol: Protocol, lengths: Mapping[str, int], seed: int) -> Pairs:
    """Pair targets with sources by optimal assignment on token length.

    Args:
        lengths: body tokens of each prompt, by id.
        seed: orders the pairs, and so says which are held out for calibration.
    Returns:
        Pairs no further apart than the protocol allows; the rest is dropped and counted.
    """
    targets, sources = bank.group(protocol.pairing.targets), bank.group(protocol.pairing.sources)
    cost = np.abs(
        np.array([lengths[p.id] for p in targets])[:, None] - np.array([lengths[p.id] for p in sources])[None]
    )
    kept: list[Pair] = []
    dropped: list[str] = []
    for t, s in zip(*linear_sum_assignment(cost), strict=True):
        target, source = targets[t], sources[s]
        longer = max(lengths[target.id], lengths[source.id])
        if cost[t, s] > protocol.pairing.max_length_difference * longer:
            dropped.append(f"{target.id}+{source.id}: {lengths[target.id]} and {lengths[source.id]} tokens")
            continue
        cells = _cells(bank, target, source, protocol.readouts.continuations_per_cell)
        if any(not cell for cell in cells):
            dropped.append(
                f"{target.id}+{source.id}: no continuation is lexically disjoint from the source in some cell"
            )
            continue
        kept.append(Pair(target, source, bank.partners.get(target.id), {}, cells))
    kept.sort(key=lambda pair: hashlib.sha256(f"{seed}:{pair.id}".encode()).hexdigest())
    for group in OTHER_GROUPS:
        _assign_others(kept[protocol.calibration.pairs :], bank, group, lengths, protocol.pairing.max_length_difference)
    return Pairs(tuple(kept), tuple(dropped))


def _assign_others(
    pairs: Sequence[Pair], bank: Bank, group: str, lengths: Mapping[str, int], max_difference: float
) -> None:
    """Give the first pairs, as many as the group has prompts, one of them each, of like length with the source."""
    prompts = [prompt for prompt in bank.prompts if prompt.group == group]
    some = list(pairs[: len(prompts)])
    if not some:
        return
    cost = np.abs(
        np.array([lengths[p.source.id] for p in some])[:, None] - np.array([lengths[q.id] for q in prompts])[None]
    )
    for i, j in zip(*linear_sum_assignment(cost), strict=True):
        if cost[i, j] <= max_difference * max(lengths[some[i].source.id], lengths[prompts[j].id]):
            some[i].others[group] = prompts[j]


def _cells(bank: Bank, target: Prompt, source: Prompt, count: int) -> tuple[tuple[Continuation, ...], ...]:
    banned = content_words(source.text)
    domain = {"target": target.domain, "source": source.domain}
    return tuple(
        tuple(
            c
            for c in bank.continuations
            if (c.mode, c.topic_of) == cell and c.domain == domain[cell[1]] and not content_words(c.text) & banned
        )[:count]
        for cell in CELLS
    )

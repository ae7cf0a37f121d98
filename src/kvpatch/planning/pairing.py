"""Form pairs: one target with one source, each prompt used once; by like length, or by subject."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from kvpatch.errors import ProtocolError
from kvpatch.prompts.bank import Bank, Continuation, Prompt
from kvpatch.protocols.schema import PLAIN, Pairing, Protocol
from kvpatch.readouts.behavior import content_words

Cell = tuple[str, str, str | None]
"""Of held-out continuations: their mode, the side whose topic they are on, their grammatical person."""


def cells_of(mode: str, persons: Sequence[str | None] = (None,)) -> tuple[Cell, ...]:
    """The 2x2 of held-out continuations of a mode, one after another for each person that the bank states."""
    cells = (mode, "target"), (PLAIN, "target"), (mode, "source"), (PLAIN, "source")
    return tuple((*cell, person) for person in persons for cell in cells)


_UNLIKE = 10_000
"""Tokens by which two prompts count as further apart for each of person and speech act in which they differ."""


@dataclass(frozen=True)
class Pair:
    """A target, its source, and what else the conditions of the pair need.

    `foreign` is the partner of the target, `foreign_matched` that of the source: not in the mode, but like it in person
    and speech act. `others` holds prompts of further groups of the bank, by group: matched in length with the source,
    each used once, so that late pairs may have none. `continuations` gives, for every cell of `cells_of`, openings on
    the pair's domains that share no content word with the source. Words of the prompts of the roles in `masked_by` do
    not count in the masked score.
    """

    target: Prompt
    source: Prompt
    foreign: Prompt | None
    others: dict[str, Prompt]
    continuations: tuple[tuple[Continuation, ...], ...]
    masked_by: tuple[str, ...] = ("source", "foreign")
    foreign_matched: Prompt | None = None

    @property
    def id(self) -> str:
        """Names both prompts."""
        return f"{self.target.id}+{self.source.id}"


@dataclass(frozen=True)
class Pairs:
    """All pairs of a bank for one tokenizer, in the order a run uses them, and what was dropped and why."""

    pairs: tuple[Pair, ...]
    dropped: tuple[str, ...]


def form_pairs(
    bank: Bank, protocol: Protocol, lengths: Mapping[str, int], seed: int, pairing: Pairing | None = None
) -> Pairs:
    """Form the pairs of a bank.

    Args:
        lengths: body tokens of each prompt, by id.
        seed: orders the pairs, and so says which are held out for calibration.
        pairing: how; the protocol's own way if None. Only that one holds pairs out.
    Returns:
        Pairs no further apart than the pairing allows; the rest is dropped and counted.
    Raises:
        ProtocolError: where the bank lacks a group, or has no continuations of the protocol's mode.
    """
    modes = {continuation.mode for continuation in bank.continuations}
    if missing := [mode for mode in (protocol.mode, PLAIN) if mode not in modes]:
        known = ", ".join(sorted(modes)) or "none at all"
        raise ProtocolError(f"bank {bank.name!r} has no continuations of mode {missing[0]!r}; it has {known}")
    how = pairing or protocol.pairing
    found = _by_subject(bank, how, seed) if how.by == "subject" else _by_length(bank, how, lengths)
    kept: list[Pair] = []
    dropped: list[str] = []
    for target, source, others in found:
        name = f"{target.id}+{source.id}"
        of = {lengths[p.id] for p in (target, source, *others.values())}
        if _are_apart(of, how.max_length_difference):
            dropped.append(f"{name}: {max(of)} and {min(of)} tokens")
            continue
        foreign, foreign_matched = bank.partners.get(target.id), bank.partners.get(source.id)
        if far := _far_partner(((target, foreign), (source, foreign_matched)), lengths, how.max_partner_difference):
            dropped.append(f"{name}: {far}")
            continue
        cells = _cells(bank, target, source, others.values(), protocol)
        if any(not cell for cell in cells):
            dropped.append(f"{name}: {_why_empty(bank, cells, target, source, protocol)}")
            continue
        masked_by = ("source", "foreign", *others)
        kept.append(Pair(target, source, foreign, dict(others), cells, masked_by, foreign_matched))
    kept.sort(key=lambda pair: hashlib.sha256(f"{seed}:{pair.id}".encode()).hexdigest())
    if how.by == "length":
        held_out = 0 if pairing else protocol.calibration.pairs
        for group in how.also:
            _assign_others(kept[held_out:], bank, group, lengths, how.max_length_difference)
    return Pairs(tuple(kept), tuple(dropped))


def _why_empty(
    bank: Bank, cells: Sequence[Sequence[Continuation]], target: Prompt, source: Prompt, protocol: Protocol
) -> str:
    """Why a pair has no continuation in some cell: none is on the topic, or all share words with the source."""
    domains = {"target": target.continuation_domain, "source": source.continuation_domain}
    for (mode, side, person), cell in zip(cells_of(protocol.mode, bank.persons), cells, strict=True):
        written = bank.continuations_of.get((mode, person, domains[side]), ())
        if not cell and not any(c.topic_of in (side, "either") for c in written):
            return f"the bank has no continuation of mode {mode!r} with topic_of {side} and domain {domains[side]!r}"
    return "no continuation is lexically disjoint from the source in some cell"


def _by_length(bank: Bank, how: Pairing, lengths: Mapping[str, int]) -> list[tuple[Prompt, Prompt, dict[str, Prompt]]]:
    """Targets and sources by optimal assignment on token length, of one person and speech act where the bank states
    them: otherwise a source would differ from its target in these too."""
    targets, sources = bank.group(how.targets), bank.group(how.sources)
    cost = np.abs(
        np.array([lengths[p.id] for p in targets])[:, None] - np.array([lengths[p.id] for p in sources])[None]
    ) + np.array([[_UNLIKE * _unlike(target, source) for source in sources] for target in targets])
    return [(targets[t], sources[s], {}) for t, s in zip(*linear_sum_assignment(cost), strict=True)]


def _are_apart(lengths: Collection[int], max_difference: float) -> bool:
    """Whether prompts differ in length by more than this share of the longest."""
    return max(lengths) - min(lengths) > max_difference * max(lengths)


def _unlike(one: Prompt, other: Prompt) -> int:
    """In how many of person and speech act two prompts differ; what one of them does not state counts as alike."""
    both = ((one.addressed, other.addressed), (one.act, other.act))
    return sum(None not in values and values[0] != values[1] for values in both)


def _by_subject(bank: Bank, how: Pairing, seed: int) -> list[tuple[Prompt, Prompt, dict[str, Prompt]]]:
    """Every target on one subject with the source and the further prompts on the next, in an order the seed draws."""
    by_group = {name: {p.topic: p for p in bank.group(name)} for name in (how.targets, how.sources, *how.also)}
    subjects = [topic for topic in by_group[how.targets] if all(topic in group for group in by_group.values())]
    subjects.sort(key=lambda topic: hashlib.sha256(f"{seed}:{topic}".encode()).hexdigest())
    return [
        (by_group[how.targets][own], by_group[how.sources][other], {name: by_group[name][other] for name in how.also})
        for own, other in zip(subjects, [*subjects[1:], *subjects[:1]], strict=True)
        if own != other
    ]


def _assign_others(
    pairs: Sequence[Pair], bank: Bank, group: str, lengths: Mapping[str, int], max_difference: float
) -> None:
    """Give the first pairs, as many as the group has prompts, one of them each, of like length with the source."""
    prompts = [prompt for prompt in bank.prompts if group in (prompt.group, prompt.level)]
    some = list(pairs[: len(prompts)])
    if not some:
        return
    cost = np.abs(
        np.array([lengths[p.source.id] for p in some])[:, None] - np.array([lengths[q.id] for q in prompts])[None]
    )
    for i, j in zip(*linear_sum_assignment(cost), strict=True):
        if not _are_apart((lengths[some[i].source.id], lengths[prompts[j].id]), max_difference):
            some[i].others[group] = prompts[j]


def _far_partner(
    of: Iterable[tuple[Prompt, Prompt | None]], lengths: Mapping[str, int], max_difference: float | None
) -> str | None:
    """Which foreign partner is too unlike its prompt in length to be held against it, in words."""
    if max_difference is None:
        return None
    for prompt, partner in of:
        if partner is not None:
            own, other = lengths[prompt.id], lengths[partner.id]
            if _are_apart((own, other), max_difference):
                return f"{prompt.id} has {own} tokens, its foreign partner {partner.id} {other}"
    return None


@functools.lru_cache(maxsize=8192)
def _said(text: str) -> frozenset[str]:
    """The content words of a text, which are asked for once for each pair that it could serve."""
    return frozenset(content_words(text))


def _cells(
    bank: Bank, target: Prompt, source: Prompt, others: Iterable[Prompt], protocol: Protocol
) -> tuple[tuple[Continuation, ...], ...]:
    """For each cell its continuations, of the same items where the bank has minimal pairs: an item is used in all of
    its framings or in none."""
    banned = {word for prompt in (source, *others) for word in _said(prompt.text)}
    domain = {"target": target.continuation_domain, "source": source.continuation_domain}
    cells = cells_of(protocol.mode, bank.persons)
    found: list[list[Continuation]] = []
    for mode, side, person in cells:
        usable = [
            c
            for c in bank.continuations_of.get((mode, person, domain[side]), ())
            if c.topic_of in (side, "either") and not _said(c.text) & banned
        ]
        found.append(usable)
    for side in domain:
        framings = [usable for cell, usable in zip(cells, found, strict=True) if cell[1] == side]
        whole = set.intersection(*({c.item for c in usable} for usable in framings)) - {None}
        if whole:
            for usable in framings:
                usable[:] = [c for c in usable if c.item in whole]
    return tuple(tuple(usable[: protocol.readouts.continuations_per_cell]) for usable in found)


def told_of_dropped(formed: Pairs, share: float) -> str:
    """How many pairs were not formed, and why, to end a sentence with.

    share: by how much the prompts of a pair may differ in length.
    """
    if not formed.dropped:
        return ""
    counts: dict[str, int] = {}
    for line in formed.dropped:
        reason = line.partition(": ")[2]
        if reason.endswith(" tokens"):
            reason = f"for prompts that differ by more than {share:.0%} in tokens (pairing: max_length_difference)"
        elif "foreign partner" in reason:
            reason = "for a foreign partner of another length (pairing: max_partner_difference)"
        else:
            reason = f"since {reason}"
        counts[reason] = counts.get(reason, 0) + 1
    listed = "; ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"; of {len(formed.pairs) + len(formed.dropped)} possible pairs {len(formed.dropped)} were dropped: {listed}"

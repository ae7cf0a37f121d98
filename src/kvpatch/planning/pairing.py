"""Form pairs: one target with one source, each prompt used once; by like length, or by subject."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from kvpatch.errors import ProtocolError
from kvpatch.prompts.bank import Bank, Continuation, Prompt
from kvpatch.protocols.schema import PLAIN, Pairing, Protocol
from kvpatch.readouts.behavior import content_words


def cells_of(mode: str) -> tuple[tuple[str, str], ...]:
    """The 2x2 of held-out continuations of a mode: (mode, whose topic)."""
    return (mode, "target"), (PLAIN, "target"), (mode, "source"), (PLAIN, "source")


@dataclass(frozen=True)
class Pair:
    """A target, its source, and what else the conditions of the pair need.

    `others` holds prompts of further groups of the bank, by group: matched in length with the source, each used once,
    so that late pairs may have none. `continuations` gives, for every cell of `cells_of`, openings on the pair's
    domains that share no content word with the source. Words of the prompts of the roles in `masked_by` do not count in
    the masked score.
    """

    target: Prompt
    source: Prompt
    foreign: Prompt | None
    others: dict[str, Prompt]
    continuations: tuple[tuple[Continuation, ...], ...]
    masked_by: tuple[str, ...] = ("source", "foreign")

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
        if max(of) - min(of) > how.max_length_difference * max(of):
            dropped.append(f"{name}: {max(of)} and {min(of)} tokens")
            continue
        cells = _cells(bank, target, source, others.values(), protocol)
        if any(not cell for cell in cells):
            dropped.append(f"{name}: no continuation is lexically disjoint from the source in some cell")
            continue
        masked_by = ("source", "foreign", *others)
        kept.append(Pair(target, source, bank.partners.get(target.id), dict(others), cells, masked_by))
    kept.sort(key=lambda pair: hashlib.sha256(f"{seed}:{pair.id}".encode()).hexdigest())
    if how.by == "length":
        held_out = 0 if pairing else protocol.calibration.pairs
        for group in how.also:
            _assign_others(kept[held_out:], bank, group, lengths, how.max_length_difference)
    return Pairs(tuple(kept), tuple(dropped))


def _by_length(bank: Bank, how: Pairing, lengths: Mapping[str, int]) -> list[tuple[Prompt, Prompt, dict[str, Prompt]]]:
    """Targets and sources by optimal assignment on token length."""
    targets, sources = bank.group(how.targets), bank.group(how.sources)
    cost = np.abs(
        np.array([lengths[p.id] for p in targets])[:, None] - np.array([lengths[p.id] for p in sources])[None]
    )
    return [(targets[t], sources[s], {}) for t, s in zip(*linear_sum_assignment(cost), strict=True)]


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
        if cost[i, j] <= max_difference * max(lengths[some[i].source.id], lengths[prompts[j].id]):
            some[i].others[group] = prompts[j]


def _cells(
    bank: Bank, target: Prompt, source: Prompt, others: Iterable[Prompt], protocol: Protocol
) -> tuple[tuple[Continuation, ...], ...]:
    banned = {word for prompt in (source, *others) for word in content_words(prompt.text)}
    domain = {"target": target.continuation_domain, "source": source.continuation_domain}
    return tuple(
        tuple(
            c
            for c in bank.continuations
            if c.mode == mode
            and c.topic_of in (side, "either")
            and c.domain == domain[side]
            and not content_words(c.text) & banned
        )[: protocol.readouts.continuations_per_cell]
        for mode, side in cells_of(protocol.mode)
    )

"""Which conditions equal a text, and so which contrasts compare texts and say nothing about caches.

A full swap of any prompt is a natural run of that prompt, however it is spelled. Every trial stores whether its cache
equals such a run, and which (`equals_text`). Runs of before did not store it; there the protocol's spelling decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol

NEARLY_ALL = 0.9
"""A condition equals a text where at least this share of its trials do; the others may differ by rounding."""
PAIR = frozenset({"target", "source"})
Evidence = Literal["text", "cache"]
Decided = Literal["caches", "spelling"]
"""From what it was decided: the stored comparison of caches, or how the protocol spells its conditions."""


@dataclass(frozen=True)
class Texts:
    """What the conditions of a run equal.

    found: (phase, condition) -> role of the prompt whose natural run the condition equals, None where it equals none;
    empty where the run did not store it.
    """

    protocol: Protocol
    found: Mapping[tuple[str, str], str | None]

    @property
    def decided_from(self) -> Decided:
        """Whether caches were compared, or the spelling decides."""
        return "caches" if self.found else "spelling"

    def role(self, phase: str, name: str) -> str | None:
        """The role of the prompt whose natural run a condition of a phase equals, or None.

        A condition that did not run, or only with errors, is taken as it is spelled.
        """
        spelled = spelled_role(self.protocol.conditions[name])
        return self.found.get((phase, name), spelled) if self.found else spelled

    def roles(self, h: Hypothesis) -> dict[str, str | None]:
        """The same for every condition of a hypothesis."""
        return {name: self.role(h.phase, name) for name in h.conditions}

    def evidence(self, h: Hypothesis) -> Evidence:
        """ "text" where every condition of the contrast equals a text, so that no cache but a prompt's own was seen."""
        return "text" if None not in self.roles(h).values() else "cache"

    def is_tautological(self, h: Hypothesis) -> bool:
        """Whether the contrast holds whatever the cache does: it compares a text with itself, or swaps that equal the
        pair's own texts stand in it for the natural runs."""
        roles = self.roles(h)
        if None in roles.values() or all(_is_own_run(self.protocol.conditions[name]) for name in roles):
            return False
        return set(roles.values()) <= PAIR or len(set(roles.values())) == 1


def texts_of(protocol: Protocol, rows: pd.DataFrame) -> Texts:
    """What the conditions of a run equal, by its rows.

    rows: prepared rows of every split.
    """
    if "equals_text" not in rows.columns or rows["equals_text"].isna().all():
        return Texts(protocol, {})
    ran = rows.loc[(rows["split"] == "test") & ~rows["failed"], ["phase", "condition", "equals_text"]]
    found: dict[tuple[str, str], str | None] = {}
    for (phase, name), column in ran.groupby(["phase", "condition"], sort=True)["equals_text"]:
        counts = column.dropna().value_counts()
        is_text = len(counts) > 0 and counts.iloc[0] >= NEARLY_ALL * len(column)
        found[str(phase), str(name)] = str(counts.index[0]) if is_text else None
    return Texts(protocol, found)


def _is_own_run(condition: Condition) -> bool:
    return condition.is_natural and condition.text_of is None


def spelled_role(condition: Condition) -> str | None:
    """The role of the prompt whose natural run a condition is by its spelling; None for what is not spelled as one."""
    if condition.is_natural or (condition.patch is not None and condition.patch.is_full_swap):
        return condition.giver
    return None

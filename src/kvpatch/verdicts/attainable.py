"""The smallest p that so many pairs can give, whatever the data say, and which hypotheses can't pass because of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvpatch.protocols.hypotheses import Correction, Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.families import adjusted_in
from kvpatch.verdicts.measure import measured_as
from kvpatch.verdicts.procedures import procedure_of


def planned_pairs(protocol: Protocol, n: int | None = None, phases: Sequence[str] | None = None) -> dict[str, int]:
    """Hypothesis -> the pairs that a run plans for it, for those of the phases that are run. n: in place of each
    phase's own."""
    asked = [h for h in protocol.hypotheses if phases is None or h.phase in phases]
    return {h.id: n or protocol.phases[h.phase].n for h in asked}


def smallest_p(protocol: Protocol, hypothesis: Hypothesis, n: int) -> float:
    """The smallest p that n pairs can give; 0 where no bound is known, NaN without a pair."""
    if n < 1:
        return math.nan
    found = procedure_of(measured_as(protocol, hypothesis).test).smallest_p
    return 0.0 if found is None else found(n)


def smallest_adjusted_p(protocol: Protocol, pairs: Mapping[str, int]) -> dict[str, float]:
    """Hypothesis -> the smallest adjusted p that its pairs can give, with every other hypothesis of the families at its
    own smallest: no data come out lower.

    pairs: hypothesis -> pairs. Those that have none, or are not named, have no p, and count in their family as tests
    that failed.
    """
    least = {h.id: smallest_p(protocol, h, pairs.get(h.id, 0)) for h in protocol.hypotheses}
    return {name: p for name, p in adjusted_in(protocol, least).items() if not math.isnan(p)}


def can_pass(protocol: Protocol, hypothesis: Hypothesis, n: int, smallest: float) -> bool:
    """Whether any data of n pairs pass the test. smallest: as `smallest_adjusted_p` gives it."""
    procedure = procedure_of(measured_as(protocol, hypothesis).test)
    return smallest < hypothesis.alpha and n >= procedure.needs_pairs(hypothesis.alpha)


def correction_of(protocol: Protocol, family: str) -> Correction:
    """How the p-values of a family are corrected."""
    stated = protocol.families.get(family)
    return protocol.corrections.get(family, "holm") if stated is None else stated.correction


def strictest_alpha(protocol: Protocol, hypothesis: Hypothesis) -> float:
    """What p must lie below for a hypothesis that passes alone: Holm asks alpha over the size of the family of it."""
    if correction_of(protocol, hypothesis.family) != "holm":
        return hypothesis.alpha
    return hypothesis.alpha / sum(h.family == hypothesis.family for h in protocol.hypotheses)

"""Adjusted p-values of the hypotheses of a protocol, family by family."""

from __future__ import annotations

from collections.abc import Mapping

from kvpatch.protocols.hypotheses import Correction
from kvpatch.statistics.multiplicity import adjusted


def adjusted_by_family(
    p_values: Mapping[str, float], families: Mapping[str, str], corrections: Mapping[str, Correction]
) -> dict[str, float]:
    """Adjusted within each family. p_values: hypothesis -> p. families: hypothesis -> family. corrections: family ->
    correction, Holm where it names none.

    The protocol, not the data, says how many hypotheses a family has: each counts, tautological and not
    interpretable ones too. What may be claimed is then a subset of what Holm rejects, so the family's error
    rate holds; leaving out hypotheses after seeing that what they wait for failed would not keep it.
    """
    out: dict[str, float] = {}
    for family in dict.fromkeys(families[name] for name in p_values):
        members = [name for name in p_values if families[name] == family]
        found = adjusted([p_values[name] for name in members], corrections.get(family, "holm"))
        out.update(zip(members, found, strict=True))
    return out

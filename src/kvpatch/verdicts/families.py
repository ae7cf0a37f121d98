"""Adjusted p-values of the hypotheses of a protocol, family by family, and over families that pass alpha on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvpatch.protocols.families import Family
from kvpatch.protocols.hypotheses import Correction
from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.multiplicity import adjusted, recycled


def adjusted_in(protocol: Protocol, p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a protocol's hypotheses, to be held against each one's alpha. p_values: hypothesis -> p."""
    of = {h.id: h.family for h in protocol.hypotheses}
    return adjusted_by_family(p_values, of, protocol.corrections, protocol.families)


def adjusted_by_family(
    p_values: Mapping[str, float],
    families: Mapping[str, str],
    corrections: Mapping[str, Correction],
    stated: Mapping[str, Family] | None = None,
) -> dict[str, float]:
    """Adjusted within each family. p_values: hypothesis -> p. families: hypothesis -> family. corrections: family ->
    correction, Holm where it names none. stated: what the protocol's `families` say of some, or all, of them.

    The protocol, not the data, says how many hypotheses a family has: each counts, tautological and not
    interpretable ones too. What may be claimed is then a subset of what Holm rejects, so the family's error
    rate holds; leaving out hypotheses after seeing that what they wait for failed would not keep it.

    A family that is passed alpha has adjusted p-values on the scale of its own alpha: where it is tested at twice as
    much, they are half as large, and may lie below p.
    """
    stated = stated or {}
    members: dict[str, list[str]] = {}
    for name in p_values:
        members.setdefault(families[name], []).append(name)
    linked = [family for family in _linked(stated) if family in members]
    out: dict[str, float] = {}
    for family, names in members.items():
        if family not in linked:
            own = stated[family].correction if family in stated else corrections.get(family, "holm")
            out.update(zip(names, adjusted([p_values[name] for name in names], own), strict=True))
    found = recycled(
        [[p_values[name] for name in members[family]] for family in linked],
        [stated[family].alpha for family in linked],
        [[stated[family].passes_to.get(other, 0.0) for other in linked] for family in linked],
    )
    for family, factors in zip(linked, found, strict=True):
        for name, factor in zip(members[family], factors, strict=True):
            known = not math.isnan(p_values[name])
            out[name] = min(1.0, factor * stated[family].alpha) if known else math.nan
    return {name: out[name] for name in p_values}


def _linked(stated: Mapping[str, Family]) -> list[str]:
    """Families that pass alpha on, or are passed some."""
    heirs = {other for family in stated.values() for other in family.passes_to}
    return [name for name, family in stated.items() if family.passes_to or name in heirs]


def most_alpha(protocol: Protocol) -> dict[str, float]:
    """Family -> the largest alpha that it can come to be tested at: its own, and all that could be passed to it.

    The error of one family is at most that; of families that pass alpha to each other together, at most the sum of
    their own alphas.
    """
    stated = {h.family: h.alpha for h in protocol.hypotheses} | {
        name: family.alpha for name, family in protocol.families.items()
    }
    return {name: alpha + _passed_to(name, protocol.families) for name, alpha in stated.items()}


def _passed_to(name: str, stated: Mapping[str, Family]) -> float:
    """All the alpha that a family gets once every other family is rejected."""
    names = list(stated)
    if name not in names:
        return 0.0
    ps = [[1.0] if other == name else [0.0] for other in names]
    rows = [[stated[a].passes_to.get(b, 0.0) for b in names] for a in names]
    factor = recycled(ps, [stated[other].alpha for other in names], rows)[names.index(name)][0]
    return 1 / factor - stated[name].alpha

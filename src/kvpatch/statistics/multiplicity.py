"""Correction for several hypotheses of one family: Holm, or Benjamini-Hochberg for maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from statsmodels.stats.multitest import multipletests

from kvpatch.protocols.schema import Correction


def adjusted(p_values: Sequence[float], correction: Correction = "holm") -> list[float]:
    """Adjusted p-values, in the order given; NaN stays NaN but counts as a test that failed (p = 1).

    Source: Holm 1979 (Scand J Stat 6:65) for the chance of any false claim; Benjamini & Hochberg 1995 (JRSS B 57:289)
    for the share of false claims; both by `statsmodels.stats.multitest.multipletests`.
    """
    if len(p_values) == 0:
        return []
    filled = np.where(np.isnan(p_values), 1.0, p_values)
    found = np.asarray(multipletests(filled, method={"holm": "holm", "benjamini_hochberg": "fdr_bh"}[correction])[1])
    return [math.nan if math.isnan(p) else float(a) for p, a in zip(p_values, found, strict=True)]


def adjusted_by_family(
    p_values: Mapping[str, float], families: Mapping[str, str], corrections: Mapping[str, Correction]
) -> dict[str, float]:
    """Adjusted within each family. p_values: hypothesis -> p. families: hypothesis -> family. corrections: family ->
    correction, Holm where it names none.

    The protocol, not the data, says how many hypotheses a family has: each counts, tautological and not
    interpretable ones too. What may be claimed is then a subset of what Holm rejects, so the family's error
    rate holds; leaving out hypotheses after seeing that their gate failed would not keep it.
    """
    out: dict[str, float] = {}
    for family in dict.fromkeys(families[name] for name in p_values):
        members = [name for name in p_values if families[name] == family]
        found = adjusted([p_values[name] for name in members], corrections.get(family, "holm"))
        out.update(zip(members, found, strict=True))
    return out

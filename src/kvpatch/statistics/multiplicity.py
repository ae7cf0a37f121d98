"""Holm's correction within a family of hypotheses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from statsmodels.stats.multitest import multipletests


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given; NaN stays NaN but counts as a test that failed (p = 1).

    Source: Holm 1979 (Scand J Stat 6:65), by `statsmodels.stats.multitest.multipletests`.
    """
    if len(p_values) == 0:
        return []
    filled = np.where(np.isnan(p_values), 1.0, p_values)
    adjusted = np.asarray(multipletests(filled, method="holm")[1])
    return [math.nan if math.isnan(p) else float(a) for p, a in zip(p_values, adjusted, strict=True)]


def holm_by_family(p_values: Mapping[str, float], families: Mapping[str, str]) -> dict[str, float]:
    """Holm within each family. p_values: hypothesis -> p. families: hypothesis -> family.

    The protocol, not the data, says how many hypotheses a family has: each counts, tautological and not
    interpretable ones too. What may be claimed is then a subset of what Holm rejects, so the family's error
    rate holds; leaving out hypotheses after seeing that their gate failed would not keep it.
    """
    out: dict[str, float] = {}
    for family in dict.fromkeys(families[name] for name in p_values):
        members = [name for name in p_values if families[name] == family]
        out.update(zip(members, holm([p_values[name] for name in members]), strict=True))
    return out

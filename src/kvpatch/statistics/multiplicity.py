"""Correction for several hypotheses of one family: Holm, or Benjamini-Hochberg for maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvpatch.statistics.grid import Floats


def adjusted(p_values: Sequence[float], correction: Literal["holm", "benjamini_hochberg"] = "holm") -> list[float]:
    """Adjusted p-values, in the order given; NaN stays NaN but counts as a test that failed (p = 1).

    Source: Holm 1979 (Scand J Stat 6:65) for the chance of any false claim; Benjamini & Hochberg 1995 (JRSS B 57:289)
    for the share of false claims. Both are a few lines, and the tests hold them to statsmodels' to the bit: importing
    statsmodels takes a second, and its Holm runs Python's garbage collector at every call, 0.15 s each time.
    """
    if len(p_values) == 0:
        return []
    filled = np.where(np.isnan(p_values), 1.0, p_values)
    found = _holm(filled) if correction == "holm" else _benjamini_hochberg(filled)
    return [math.nan if math.isnan(p) else float(a) for p, a in zip(p_values, found, strict=True)]


def _holm(p_values: Floats) -> Floats:
    """The k-th smallest of m p-values times m - k + 1, no less than those of the smaller ones, and at most 1."""
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    found = np.empty_like(scaled)
    found[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return found


def _benjamini_hochberg(p_values: Floats) -> Floats:
    """The k-th smallest of m p-values over k / m, no more than those of the larger ones, and at most 1."""
    m = len(p_values)
    order = np.argsort(p_values)
    scaled = p_values[order] / (np.arange(1, m + 1) / m)
    found = np.empty_like(scaled)
    found[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return found

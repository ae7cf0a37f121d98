"""Correction for several hypotheses: Holm in a family, Benjamini-Hochberg for maps, a graph that passes alpha on."""

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


def recycled(
    families: Sequence[Sequence[float]], alphas: Sequence[float], transitions: Sequence[Sequence[float]]
) -> list[list[float]]:
    """The sequentially rejective graphical procedure: at what part of the alphas each hypothesis is rejected.

    Holm within a family, at the family's alpha; once all of a family are rejected, its alpha passes to the others by
    the graph. A family of one hypothesis is a node of Bretz et al.'s graphs; a larger one is the limit of their graph
    whose edges out of the family weigh next to nothing. The chance of any false rejection is at most the sum of the
    alphas, whatever the dependence between the tests.

    families: p-values of each; NaN counts as 1. alphas: of each family, 0 or more. transitions: [from][to], share of
    alpha that a rejected family passes on; each row sums to 1 at most, with 0 on the diagonal.
    Returns, in the same order, the factor by which all alphas could be multiplied with the hypothesis still on the edge
    of being rejected: it is rejected where that is below 1 (adjusted p = factor times alpha). Infinite where no factor
    rejects it.
    Source: Bretz, Maurer, Brannath & Posch 2009 (Stat Med 28:586), algorithms 1 and 2; Maurer & Bretz 2013 (Stat
    Biopharm Res 5:311) for graphs of families. statsmodels and scipy have neither.
    """
    left = [[(1.0 if math.isnan(p) else p, place) for place, p in enumerate(ps)] for ps in families]
    out = [[math.inf] * len(ps) for ps in families]
    alpha, graph = list(alphas), [list(row) for row in transitions]
    for members in left:
        members.sort(reverse=True)  # the smallest is taken off the end
    for family in [f for f, members in enumerate(left) if not members]:
        _pass_on(family, alpha, graph)
    factor = 0.0
    while True:
        open_ones = [f for f, members in enumerate(left) if members and alpha[f] > 0]
        if not open_ones:
            return out
        at = {f: len(left[f]) * left[f][-1][0] / alpha[f] for f in open_ones}
        first = min(at, key=lambda f: at[f])
        factor = max(factor, at[first])
        out[first][left[first].pop()[1]] = factor
        if not left[first]:
            _pass_on(first, alpha, graph)


def _pass_on(gone: int, alpha: list[float], graph: list[list[float]]) -> None:
    """Take a family out of the graph: its alpha goes along its edges, and whoever passed to it passes to its heirs."""
    others = [f for f in range(len(alpha)) if f != gone]
    for f in others:
        alpha[f] += alpha[gone] * graph[gone][f]
    old = [list(row) for row in graph]
    for f in others:
        back = old[f][gone] * old[gone][f]
        for g in others:
            graph[f][g] = (old[f][g] + old[f][gone] * old[gone][g]) / (1 - back) if g != f and back < 1 else 0.0
        graph[f][gone] = graph[gone][f] = 0.0
    alpha[gone] = 0.0


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

"""Families with their own alpha, and the graph by which they pass it on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kvpatch.protocols.families import Family
from kvpatch.statistics.multiplicity import adjusted, recycled
from kvpatch.verdicts.families import adjusted_by_family


def by_closure(ps: list[float], alphas: list[float], graph: list[list[float]]) -> list[bool]:
    """Rejections by the closed test behind the graph: every intersection by weighted Bonferroni, its weights as Bretz
    et al. derive them, node by node taken out. Slow, and written from another definition than the procedure."""
    m = len(ps)

    def weights(kept: tuple[int, ...]) -> dict[int, float]:
        a, g = list(alphas), np.array(graph, dtype=float)
        for gone in set(range(m)) - set(kept):
            for k in range(m):
                if k != gone:
                    a[k] += a[gone] * g[gone, k]
            new = np.zeros_like(g)
            for k, n in itertools.permutations([x for x in range(m) if x != gone], 2):
                loop = g[k, gone] * g[gone, k]
                new[k, n] = (g[k, n] + g[k, gone] * g[gone, n]) / (1 - loop) if loop < 1 else 0
            a[gone], g = 0.0, new
        return {k: a[k] for k in kept}

    sets = [kept for size in range(1, m + 1) for kept in itertools.combinations(range(m), size)]
    falls = {kept: any(ps[k] < w for k, w in weights(kept).items()) for kept in sets}
    return [all(falls[kept] for kept in sets if k in kept) for k in range(m)]


def test_a_graph_of_two_primary_and_two_secondary_hypotheses_worked_by_hand():
    """The parallel gatekeeping of Bretz et al. 2009: two primary hypotheses share alpha, each passes half to the other
    and half to its own secondary one, and a secondary one passes to the other branch's primary."""
    graph = [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5], [0, 1, 0, 0], [1, 0, 0, 0]]
    found = recycled([[0.01], [0.005], [0.012], [0.5]], [0.0125, 0.0125, 0, 0], graph)
    # H2 falls at .005 / .0125. H1 then has .0125 + .00625 and H4 .00625. H1 falls at .01 / .01875, and its alpha goes
    # to H3 and H4 by .5 / (1 - .25) and .25 / (1 - .25): each has .0125. H3 falls at .012 / .0125.
    assert [f[0] for f in found] == pytest.approx([0.01 / 0.01875, 0.4, 0.96, 0.5 / 0.025])


def test_the_published_adjusted_p_values_of_a_dose_and_endpoint_graph():
    """The example of the R package graphicalMCP (its vignette on closed testing, by Bretz et al. 2009): six hypotheses,
    two doses and three endpoints, edges of weight epsilon between the doses."""
    e = 1e-5
    graph = [
        [0, 0.5, 0.25, 0, 0.25, 0],
        [0.5, 0, 0, 0.25, 0, 0.25],
        [0, 0, 0, 0, 1, 0],
        [e, 0, 0, 0, 0, 1 - e],
        [0, e, 1 - e, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
    ]
    ps = [0.015, 0.013, 0.01, 0.007, 0.1, 0.0124]
    found = recycled([[p] for p in ps], [0.5, 0.5, 0, 0, 0, 0], graph)
    assert [f[0] for f in found] == pytest.approx([0.026, 0.026, 0.028, 0.028, 0.1, 0.028], abs=1e-6)


def test_the_procedure_rejects_what_its_closed_test_rejects():
    rng = np.random.default_rng(4)
    some = 0
    for _ in range(300):
        m = int(rng.integers(2, 5))
        graph = rng.random((m, m)) * (rng.random((m, m)) < 0.7) * (1 - np.eye(m))
        graph = graph / np.maximum(1, graph.sum(axis=1, keepdims=True)) if rng.random() < 0.5 else graph / m
        alphas = (0.1 * rng.dirichlet(np.ones(m))).tolist()
        ps = (rng.random(m) * 0.08).tolist()
        found = [factors[0] < 1 for factors in recycled([[p] for p in ps], alphas, graph.tolist())]
        assert found == by_closure(ps, alphas, graph.tolist())
        some += sum(found)
    assert some > 100


def test_a_family_alone_is_holm():
    ps = [0.011, 0.2, math.nan, 0.004, 0.012]
    factors = recycled([ps], [0.05], [[0.0]])[0]
    found = [min(1.0, factor * 0.05) for factor in factors]
    assert found[:2] + found[3:] == pytest.approx([a for a in adjusted(ps) if not math.isnan(a)])


def test_alpha_passes_only_once_every_hypothesis_of_a_family_is_rejected():
    graph = {"one": Family(alpha=0.01, passes_to={"two": 1.0}), "two": Family(alpha=0.05)}
    of = {"a": "one", "b": "one", "c": "two"}
    whole = adjusted_by_family({"a": 0.001, "b": 0.002, "c": 0.057}, of, {}, graph)
    part = adjusted_by_family({"a": 0.001, "b": 0.02, "c": 0.057}, of, {}, graph)
    assert whole["c"] == pytest.approx(0.057 * 0.05 / 0.06) and whole["c"] < 0.05 < part["c"] == pytest.approx(0.057)
    assert (part["a"], part["b"]) == pytest.approx((0.002, 0.02))


def test_families_that_pass_nothing_are_corrected_as_before():
    p = {"a": 0.01, "b": math.nan, "c": 0.02, "d": 0.04, "e": 0.03}
    of = {"a": "f", "b": "f", "c": "f", "d": "g", "e": "g"}
    before = adjusted_by_family(p, of, {"g": "benjamini_hochberg"})
    stated = {"f": Family(alpha=0.001), "g": Family(correction="benjamini_hochberg")}
    after = adjusted_by_family(p, of, {}, stated)
    assert list(after) == list(before) and repr(after) == repr(before)


def test_no_dependence_raises_the_error_above_the_sum_of_the_alphas():
    """One true family passes its alpha on: nulls of the other then err at most as often as both alphas allow."""
    rng, draws, wrong = np.random.default_rng(8), 4_000, 0
    for _ in range(draws):
        nulls = rng.random(3)
        factors = recycled([[1e-9], nulls.tolist()], [0.02, 0.03], [[0, 1.0], [1.0, 0]])
        wrong += any(f < 1 for f in factors[1])
    assert wrong / draws <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)
    assert wrong / draws >= 0.05 - 4 * math.sqrt(0.05 * 0.95 / draws)

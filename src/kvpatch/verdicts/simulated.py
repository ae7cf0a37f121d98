"""What a kind of test would have needed: from simulated noise to the effect of each data set, one function per rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.statistics.grid import Floats
from kvpatch.statistics.simulation import critical, critical_correlations, critical_dz, critical_slopes
from kvpatch.verdicts.margins import PAST_MARGIN


@dataclass(frozen=True)
class Noise:
    """Pair differences to simulate from: a pilot's, centred and scaled to standard deviation 1, or normal ones.

    sd: of the pilot's differences, in the readout's unit. fixed: the part of the margin that is fixed, in sd.
    """

    name: str = "normal"
    pilot: tuple[float, ...] | None = None
    sd: float | None = None
    fixed: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One simulation: a test at n pairs and one alpha. `alphas`: all that the protocol needs, simulated together."""

    hypothesis: Hypothesis
    noise: Noise
    n: int
    alpha: float
    alphas: tuple[float, ...]
    sets: int


def directional(q: Question) -> Floats:
    """p < alpha, and the 95% interval wholly beyond the margin (beyond 0 without one), whose parts have 2p < .025."""
    found = critical(q.n, q.sets, q.alphas, q.noise.pilot)
    is_less = q.hypothesis.claimed_side == -1
    by_flips, by_t = (found.below, found.below_t) if is_less else (found.above, found.above_t)
    end = -found.high[0.95] if is_less else found.low[0.95]
    needed = np.maximum(by_flips[q.alpha], -end)
    margin = q.hypothesis.margin if q.hypothesis.kind.beyond_margin else None
    if margin is not None and margin.dz is not None:
        needed = np.maximum(needed, margin.dz * found.sd - end)
        needed = np.maximum(needed, critical_dz(q.n, q.sets, margin.dz, q.noise.pilot)[int(is_less)])
    if margin is not None and q.noise.fixed is not None:
        at_margin = np.maximum(np.maximum(by_flips[PAST_MARGIN / 2], by_t[PAST_MARGIN / 2]), -end)
        needed = np.maximum(needed, q.noise.fixed + at_margin)
    return needed


def equivalent(q: Question) -> Floats:
    """The smallest margin at which both one-sided tests pass and the 90% interval lies within."""
    found = critical(q.n, q.sets, q.alphas, q.noise.pilot)
    by_flips = np.maximum(found.above[q.alpha], found.below[q.alpha])
    by_flips = np.maximum(by_flips, np.maximum(found.above_t[q.alpha], found.below_t[q.alpha]))
    return np.maximum(by_flips, np.maximum(-found.low[0.90], found.high[0.90]))


def ordering(q: Question) -> Floats:
    names, peak = q.hypothesis.order()
    return critical_slopes(q.n, len(names), peak, q.alpha, q.sets)


def in_half(q: Question) -> Floats:
    """`directional` on the half of the pairs that tests what the other half chose."""
    return directional(replace(q, n=q.n - q.n // 2))


def correlation(q: Question) -> Floats:
    return critical_correlations(q.n, len(q.hypothesis.controlling), q.alpha, q.sets)

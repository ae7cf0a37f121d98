"""A mode readout that damage moves little: what damage does is learned on calibration pairs, and taken off.

A broken cache makes every continuation less likely, and the ones in the mode less so than the plain ones, since they
are made of words that a model without a topic falls back on. How much less likely they all become is seen in the same
eight cells, averaged over modes, where no mode can show. The mode readout is therefore regressed on five such numbers,
over caches that hold no mode or are destroyed, and what they predict is subtracted (an analysis of covariance).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpatch.readouts.likelihood import LogLikelihoodRatios, log_likelihood_ratios

Floats = NDArray[np.float64]
COVARIATES = ("level", "register", "level_squared", "level_first", "level_middle")
"""Means over modes and topics, in nats per token: of all continuations; of those in the first person less those in the
third; the square of the first, centred; of the first token alone; of the third to the fifth."""
RIDGE = 0.03
"""Shrinks the coefficients, whose covariates are scaled to a mean square of 1 over the destroyed caches."""
MEANS = 60.0
"""How much more the mean shift of a destroyed cache weighs than the scatter of its pairs: it is what fools a test."""
FOLDS = 5
"""Parts of the calibration pairs; what is told of the rule is measured on a part that it was not fitted on."""


@dataclass(frozen=True)
class SpecificMode:
    """The fitted rule of one model.

    centre: mean level of the natural caches. at_rest: [covariates], their means over the natural targets, where nothing
    is subtracted. coefficients: [covariates], nats of the readout per unit; all 0 where the rule would not help.
    """

    centre: float
    at_rest: tuple[float, ...]
    coefficients: tuple[float, ...]

    def specific(self, cells: ArrayLike, *, first: int) -> float:
        """The readout of one trial's cells, less what damage explains of it; nats per token."""
        return float(self.of(np.asarray(cells, dtype=np.float64)[None], first=first)[0])

    def told(self, cells: ArrayLike, ratios: LogLikelihoodRatios, *, first: int) -> tuple[float, list[float]]:
        """`specific` and `damage` of one trial, whose ratios are known (`log_likelihood_ratios` of the same cells)."""
        values = np.asarray(cells, dtype=np.float64)[None]
        found, at_rest = covariates(values, centre=self.centre, first=first), np.array(self.at_rest)
        specific = np.array([ratios.mode]) - (found - at_rest) @ np.array(self.coefficients)
        found[0, 2] = found[0, 0] ** 2  # as `damage` squares it: of a single number NumPy rounds it differently
        return float(specific[0]), (found[0] - at_rest).tolist()

    def damage(self, cells: ArrayLike, *, first: int) -> list[float]:
        """One trial's covariates, less those of the natural targets."""
        shift = covariates(np.asarray(cells, dtype=np.float64), centre=self.centre, first=first)
        return (shift - np.array(self.at_rest)).tolist()

    def of(self, cells: ArrayLike, *, first: int) -> Floats:
        """The same of many: cells [..., cells, positions] gives [...]."""
        values = np.asarray(cells, dtype=np.float64)
        shift = covariates(values, centre=self.centre, first=first) - np.array(self.at_rest)
        return unweighted(values, first=first) - shift @ np.array(self.coefficients)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A rule and what it gives on the pairs it was fitted on.

    held_out: [pairs, conditions], the readout of each pair by a rule that was fitted on other pairs.
    unweighted: [pairs, conditions], the main effect itself.
    is_weighted: whether the rule subtracts anything.
    """

    rule: SpecificMode
    held_out: Floats
    unweighted: Floats
    is_weighted: bool


def unweighted(cells: ArrayLike, *, first: int) -> Floats:
    """The main effect of the mode, nothing subtracted: cells [..., cells, positions] gives [...]."""
    values = np.asarray(cells, dtype=np.float64)
    flat = values.reshape(-1, *values.shape[-2:])
    return np.array([log_likelihood_ratios(one, first=first).mode for one in flat]).reshape(values.shape[:-2])


def covariates(cells: ArrayLike, *, centre: float, first: int) -> Floats:
    """What damage shows in, free of any mode: cells [..., 4 or 8, positions] gives [..., covariates]."""
    values = np.asarray(cells, dtype=np.float64)[..., :first]
    by_position = values.mean(axis=-2)
    level = by_position.mean(axis=-1) - centre
    register = np.zeros_like(level)
    if values.shape[-2] == 8:
        register = (values[..., :4, :] - values[..., 4:, :]).mean(axis=(-2, -1))
    middle = by_position[..., 2:5].mean(axis=-1) - centre if by_position.shape[-1] > 2 else level
    return np.stack([level, register, level**2, by_position[..., 0] - centre, middle], axis=-1)


def fit(cells: ArrayLike, *, natural: tuple[int, int], neutral: list[int], destroyed: list[int], first: int) -> Fitted:
    """Learn the rule.

    Args:
        cells: [pairs, conditions, cells, positions], mean log-probabilities (`pairing.cells_of`); NaN where a condition
            could not be made for a pair.
        natural: places of the natural target and the natural source among the conditions.
        neutral, destroyed: places of the caches that hold no mode and are whole, and of those that are destroyed.
        first: positions that count.
    Returns:
        The rule, which subtracts nothing where the destroyed caches would move it as far as without it: that is
        decided on pairs that it was not fitted on.
    """
    values = np.asarray(cells, dtype=np.float64)
    plain = unweighted(values, first=first)
    level = values[..., :first].mean(axis=(-2, -1))
    centre = float(np.nanmean(level[:, list(natural)]))
    z = covariates(values, centre=centre, first=first)
    at_rest = np.nanmean(z[:, natural[0]], axis=0)
    places = natural, neutral, destroyed
    folds = np.arange(len(values)) % min(FOLDS, len(values))
    held_out = np.full_like(plain, np.nan)
    for fold in set(folds.tolist()):
        learned = _coefficients(plain[folds != fold], z[folds != fold], *places)
        held_out[folds == fold] = plain[folds == fold] - (z[folds == fold] - at_rest) @ learned
    helps = destroyed and worst_shift(held_out, natural, destroyed) < worst_shift(plain, natural, destroyed)
    coefficients = _coefficients(plain, z, *places) if helps else np.zeros(len(COVARIATES))
    rule = SpecificMode(centre, tuple(at_rest.tolist()), tuple(coefficients.tolist()))
    return Fitted(rule, held_out if helps else plain, plain, bool(helps))


def worst_shift(values: Floats, natural: tuple[int, int], destroyed: list[int]) -> float:
    """How far the worst of the destroyed caches moves a readout from the natural target, in its unit.

    Not as a share of the natural gap: where what looked like a mode was damage, the gap goes with it. values: [pairs,
    conditions].
    """
    shifts = np.nanmean(values - values[:, natural[0], None], axis=0)
    return float(np.abs(shifts[destroyed]).max())


def _coefficients(
    plain: Floats, z: Floats, natural: tuple[int, int], neutral: list[int], destroyed: list[int]
) -> Floats:
    """Ridge regression of shifts from the natural target on the covariates' shifts. The scatter of the natural source
    around its own mean counts too, so that no precision is lost; its mean does not, so that the mode is not fitted."""
    target, source = natural
    y, x = plain - plain[:, [target]], z - z[:, [target]]
    scale = np.sqrt(np.nanmean(x[:, destroyed] ** 2, axis=(0, 1))) + 1e-9
    x = x / scale
    moments, products = RIDGE * np.eye(x.shape[-1]), np.zeros(x.shape[-1])

    def add(some_y: Floats, some_x: Floats, weight: float) -> None:
        nonlocal moments, products
        known = np.isfinite(some_y) & np.isfinite(some_x).all(axis=1)
        if known.any():
            some_y, some_x = some_y[known], some_x[known]
            moments = moments + weight * some_x.T @ some_x / len(some_y)
            products = products + weight * some_x.T @ some_y / len(some_y)

    nulls = [*neutral, *destroyed]
    for place in nulls:
        add(y[:, place], x[:, place], 1 / len(nulls))
    for place in destroyed:
        add(np.nanmean(y[:, [place]], axis=0), np.nanmean(x[:, [place]], axis=0).reshape(1, -1), MEANS)
    add(y[:, source] - np.nanmean(y[:, source]), x[:, source] - np.nanmean(x[:, source], axis=0), 1.0)
    return np.linalg.solve(moments, products) / scale

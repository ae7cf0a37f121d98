"""The fitted mode readout: what damage explains is taken off, the mode is left, and an unhelpful rule is not used."""

from __future__ import annotations

import numpy as np
import pytest

from kvpatch.readouts.likelihood import log_likelihood_ratios
from kvpatch.readouts.specific_mode import SpecificMode, covariates, fit, unweighted

NAMES = ["A", "B", "N2", "E1", "F1"]
PLACES = {"natural": (0, 1), "neutral": [2], "destroyed": [3, 4]}
IS_MODE = np.array([1, 0, 1, 0] * 2)


def cells_of(seed: int, pairs: int = 30, leak: float = 0.1) -> np.ndarray:
    """[pairs, conditions, 8, 8]: destroyed caches lower every continuation, the ones in the mode less (`leak`)."""
    rng = np.random.default_rng(seed)
    out = rng.normal(-6, 0.05, (pairs, 1, 8, 8)) + rng.normal(0, 0.02, (pairs, len(NAMES), 8, 8))
    out[:, 1, IS_MODE == 1] += 0.2
    for place, mean in ((3, 1.5), (4, 4.0)):
        damage = rng.uniform(0.6, 1.4, (pairs, 1, 1)) * mean
        out[:, place] -= damage * (1 - leak * IS_MODE[:, None])
    return out


def shares(values: np.ndarray) -> dict[str, float]:
    shifts = (values - values[:, [0]]).mean(axis=0)
    return dict(zip(NAMES, shifts / shifts[1], strict=True))


def test_on_pairs_it_was_not_fitted_on_destroyed_caches_move_it_little_and_the_mode_stays():
    rule = fit(cells_of(0), first=8, **PLACES).rule
    others = cells_of(1)
    before, after = shares(unweighted(others, first=8)), shares(rule.of(others, first=8))
    assert before["E1"] > 0.5 and before["F1"] > 1.5
    assert abs(after["E1"]) < 0.1 and abs(after["F1"]) < 0.1
    gap = (rule.of(others, first=8)[:, 1] - rule.of(others, first=8)[:, 0]).mean()
    assert gap == pytest.approx(0.2, abs=0.02)


def test_what_is_told_of_the_rule_is_measured_on_pairs_it_was_not_fitted_on():
    cells = cells_of(2, pairs=6)
    found = fit(cells, first=8, **PLACES)
    assert found.is_weighted
    assert not np.allclose(found.held_out, found.rule.of(cells, first=8))


def test_where_damage_does_not_move_the_readout_nothing_is_taken_off():
    cells = cells_of(3, leak=0.0)
    cells[:, 3:] = cells[:, [0]]
    found = fit(cells, first=8, **PLACES)
    assert not found.is_weighted
    assert np.array_equal(found.rule.of(cells, first=8), unweighted(cells, first=8))


def test_the_natural_targets_keep_their_mean():
    cells = cells_of(4)
    rule = fit(cells, first=8, **PLACES).rule
    assert rule.of(cells, first=8)[:, 0].mean() == pytest.approx(unweighted(cells, first=8)[:, 0].mean())


def test_no_mode_shows_in_what_damage_is_seen_in():
    cells = cells_of(5)
    moved = cells + 0.7 * (2 * IS_MODE - 1)[:, None]
    assert np.allclose(covariates(cells, centre=-6, first=8), covariates(moved, centre=-6, first=8))


def test_a_condition_that_could_not_be_made_and_a_bank_without_persons_are_no_obstacle():
    cells = cells_of(6)
    cells[::3, 4] = np.nan
    rule = fit(cells[:, :, :4], first=8, **PLACES).rule
    assert np.isfinite(rule.coefficients).all()
    one = cells[0, 1, :4]
    expected = log_likelihood_ratios(one, first=8).mode - np.dot(rule.damage(one, first=8), rule.coefficients)
    assert rule.specific(one, first=8) == pytest.approx(expected)


def test_a_readout_of_few_positions_can_be_fitted():
    assert isinstance(fit(cells_of(7)[..., :2], first=2, **PLACES).rule, SpecificMode)


@pytest.mark.parametrize("kinds", [4, 8])
def test_a_trial_s_readout_and_its_damage_asked_for_at_once_are_those_asked_for_singly_to_the_bit(kinds):
    cells = cells_of(8, pairs=400)[:, :, :kinds]
    rule = SpecificMode(-3.3, (0.1, 0.02, 0.3, 0.1, 0.07), (0.2, -0.1, 0.03, 0.4, -0.3))
    for one in cells.reshape(-1, *cells.shape[2:]):
        told = rule.told(one, log_likelihood_ratios(one, first=6), first=6)
        assert told == (rule.specific(one, first=6), rule.damage(one, first=6))

"""Likelihood readouts: main effects of the 2x2 and Jensen-Shannon divergence, against slow versions and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from scipy.spatial import distance
from torch import Tensor

from kvpatch.readouts.likelihood import js_divergence, js_pull, log_likelihood_ratios


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the 2x2 ---


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(-9, 0))
@limits(max_examples=30, deadline=None)
def test_planted_main_effects_come_back_and_the_interaction_does_not(
    mode: float, content: float, interaction: float, base: float
):
    """Half of each effect is added to one level and taken from the other; the interaction cancels out."""
    cells = [
        base + m * mode / 2 + c * content / 2 + m * c * interaction
        for m, c in (
            (1, -1),
            (-1, -1),
            (1, 1),
            (-1, 1),
        )  # (recursive, target), (plain, target), (r, source), (p, source)
    ]
    result = log_likelihood_ratios(torch.tensor(cells, dtype=torch.float64)[:, None].expand(4, 6), first=4)
    assert result.mode == pytest.approx(mode, abs=1e-12)
    assert result.content == pytest.approx(content, abs=1e-12)
    assert result.mode_by_position == pytest.approx([mode] * 6, abs=1e-12)
    assert result.content_by_position == pytest.approx([content] * 6, abs=1e-12)


def test_positions_are_kept_apart_and_only_the_first_are_averaged():
    cells = random(4, 5)
    result = log_likelihood_ratios(cells, first=3)
    r_t, p_t, r_s, p_s = cells.tolist()
    mode = [((a - b) + (c - d)) / 2 for a, b, c, d in zip(r_t, p_t, r_s, p_s, strict=True)]
    content = [((c - a) + (d - b)) / 2 for a, b, c, d in zip(r_t, p_t, r_s, p_s, strict=True)]
    assert result.mode_by_position == pytest.approx(mode)
    assert result.content_by_position == pytest.approx(content)
    assert result.mode == pytest.approx(sum(mode[:3]) / 3)
    assert result.content == pytest.approx(sum(content[:3]) / 3)
    assert log_likelihood_ratios(cells, first=50).mode == pytest.approx(sum(mode) / 5)


def test_exchanging_levels_turns_one_sign_only():
    cells = random(4, 5)
    plain = log_likelihood_ratios(cells, first=5)
    modes, topics = (log_likelihood_ratios(cells[order], first=5) for order in ([1, 0, 3, 2], [2, 3, 0, 1]))
    assert (modes.mode, modes.content) == pytest.approx((-plain.mode, plain.content))
    assert (topics.mode, topics.content) == pytest.approx((plain.mode, -plain.content))


def test_short_types_are_worked_on_in_float64():
    cells = random(4, 5).float() + 1000
    result = log_likelihood_ratios(cells, first=5)
    assert result.mode == log_likelihood_ratios(cells.double(), first=5).mode


# --- Jensen-Shannon ---


@given(st.integers(2, 40), st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 5.0, 30.0]))
@limits(max_examples=30, deadline=None)
def test_it_is_scipy_s_distance_squared(vocabulary: int, seed: int, scale: float):
    p, q = random(vocabulary, seed=seed, scale=scale), random(vocabulary, seed=seed + 1, scale=scale)
    expected = distance.jensenshannon(p.softmax(-1).numpy(), q.softmax(-1).numpy()) ** 2
    assert float(js_divergence(p, q)) == pytest.approx(expected, abs=1e-10)


def test_float32_is_near_scipy():
    p, q = random(50, 1000, seed=1, scale=3).float(), random(50, 1000, seed=2, scale=3).float()
    expected = distance.jensenshannon(p.double().softmax(-1).numpy(), q.double().softmax(-1).numpy(), axis=1) ** 2
    assert np.allclose(js_divergence(p, q).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)], ids=str)
def test_leading_dimensions_are_kept(shape: tuple[int, ...]):
    p, q = random(*shape, seed=1), random(*shape, seed=2)
    result = js_divergence(p, q)
    assert result.shape == shape[:-1]
    rows = [float(js_divergence(a, b)) for a, b in zip(p.reshape(-1, 7), q.reshape(-1, 7), strict=True)]
    assert result.flatten().tolist() == pytest.approx(rows)


@given(st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 300.0]))
@limits(max_examples=30, deadline=None)
def test_it_is_symmetric_bounded_and_blind_to_constants(seed: int, scale: float):
    p, q = random(20, seed=seed, scale=scale).float(), random(20, seed=seed + 1, scale=scale).float()
    js = float(js_divergence(p, q))
    assert 0 <= js <= math.log(2) + 1e-6
    assert float(js_divergence(q, p)) == pytest.approx(js, abs=1e-6)
    assert float(js_divergence(p + 5, q - 9)) == pytest.approx(js, abs=1e-4)


def test_the_same_distribution_is_at_0_and_disjoint_ones_at_log_2():
    p = random(100, seed=1).float()
    assert float(js_divergence(p, p)) == pytest.approx(0, abs=1e-7)
    assert float(js_divergence(p, p)) >= 0
    far = torch.eye(2, dtype=torch.float64) * 2000
    assert float(js_divergence(far[0], far[1])) == pytest.approx(math.log(2), abs=1e-12)


# --- the pull ---


def test_the_pull_is_positive_nearer_to_the_source_and_0_halfway():
    target, source = random(6, 30, seed=1), random(6, 30, seed=2)
    whole = float(js_divergence(target, source).mean())
    assert js_pull(source, target, source) == pytest.approx(whole)
    assert js_pull(target, target, source) == pytest.approx(-whole)
    assert js_pull(random(6, 30, seed=3), target, target) == 0
    halfway = torch.logaddexp(target.log_softmax(-1), source.log_softmax(-1))
    assert abs(js_pull(halfway, target, source)) < 0.05 * whole


def test_the_pull_is_the_mean_over_positions():
    this, target, source = (random(5, 12, seed=seed) for seed in (1, 2, 3))
    by_position = [js_pull(*(x[i : i + 1] for x in (this, target, source))) for i in range(5)]
    assert js_pull(this, target, source) == pytest.approx(sum(by_position) / 5)

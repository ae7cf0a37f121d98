"""Random numbers that belong to the trial: Gumbel, independent, the same in any batch; they sample the softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kvpatch.engine.sampling import LARGEST_NOISE, _gumbel_of, choose, gumbel

ALPHA = 1e-4  # of each fixed, seeded test: they never fail by luck, as nothing in them changes


def uniforms(seeds: Tensor, step: int, vocabulary: int) -> np.ndarray:
    """The uniform numbers behind the noise."""
    return np.exp(-np.exp(-gumbel(seeds, step, vocabulary).double().numpy()))


# --- the noise ---


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 1, 2, 1000, 100_000])
def test_one_seed_s_noise_is_gumbel(seed: int, step: int):
    noise = gumbel(torch.tensor([seed]), step, 20_000)[0].double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > ALPHA
    assert abs(noise.mean() - np.euler_gamma) < 5 * np.pi / 6**0.5 / 20_000**0.5
    assert abs(noise.var() - np.pi**2 / 6) < 0.15


def test_one_token_s_noise_over_seeds_and_over_steps_is_uniform():
    over_seeds = uniforms(torch.arange(20_000), 3, 5)[:, 2]
    over_steps = np.array([uniforms(torch.tensor([12]), step, 3)[0, 2] for step in range(3000)])
    over_high_seeds = uniforms(torch.arange(20_000) << 32, 3, 2)[:, 1]
    for u in (over_seeds, over_steps, over_high_seeds):
        assert stats.kstest(u, "uniform").pvalue > ALPHA


def test_uniforms_fill_256_bins_evenly():
    counts = np.bincount((uniforms(torch.arange(64), 5, 8192) * 256).astype(int).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > ALPHA


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_steps_seeds_and_neighbouring_tokens_are_uncorrelated():
    base = uniforms(torch.arange(40), 7, 4000)
    others = {
        "next step": uniforms(torch.arange(40), 8, 4000),
        "next seed": uniforms(torch.arange(1, 41), 7, 4000),
        "high seed": uniforms(torch.arange(40) + (1 << 32), 7, 4000),
        "negative seed": uniforms(-1 - torch.arange(40), 7, 4000),
        "seed and step exchanged": uniforms(torch.full((40,), 7), 0, 4000),
    }
    bound = 5 / base.size**0.5
    for name, other in others.items():
        assert abs(correlation(base, other)) < bound, name
    assert abs(correlation(base[:, 1:], base[:, :-1])) < bound
    assert abs(correlation(base[1:], base[:-1])) < bound


def test_no_two_of_many_seeds_and_steps_share_their_noise():
    seeds = torch.cat([torch.arange(-200, 200), torch.arange(1, 200) << 32, torch.tensor([2**63 - 1, -(2**63)])])
    rows = torch.cat([gumbel(seeds, step, 4) for step in range(20)])
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_the_seed_matters(bit: int):
    flipped = 12345 ^ (1 << bit) if bit < 63 else 12345 - 2**63
    a, b = gumbel(torch.tensor([12345, flipped]), 4, 1000)
    assert abs(correlation(a.numpy(), b.numpy())) < 5 / 1000**0.5


def test_noise_is_finite_at_every_value_of_the_bits_and_within_reach():
    # The bits that are used are the upper ones: this is every uniform number there is.
    bits = (torch.arange(2**23, dtype=torch.int64) * 512 - 2**31).to(torch.int32)
    noise = torch.cat([_gumbel_of(bits), _gumbel_of(bits + 511)])
    assert torch.isfinite(noise).all()
    assert float(noise.max()) < LARGEST_NOISE < float(noise.max()) + 0.01
    assert abs(float(noise.double().mean()) - np.euler_gamma) < 1e-4


def test_noise_does_not_depend_on_batch_mates_vocabulary_or_the_step_s_type():
    seeds = torch.tensor([5, -9, 2**40, 5])
    noise = gumbel(seeds, 6, 300)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[3])
    for row, seed in enumerate(seeds):
        assert torch.equal(gumbel(seed[None], 6, 300)[0], noise[row])
    assert torch.equal(gumbel(seeds, 6, 40), noise[:, :40])
    assert torch.equal(gumbel(seeds, torch.tensor(6, dtype=torch.int32), 300), noise)


# --- the choice ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("vary", ["seeds", "high seeds", "steps"])
def test_tokens_follow_the_softmax(temperature: float, vary: str):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -2.0, 1.5])
    n = 12_000
    if vary == "steps":
        seeds = torch.arange(40)
        tokens = torch.cat([choose(logits.expand(40, -1), seeds, step, temperature, 1.0) for step in range(n // 40)])
    else:
        seeds = torch.arange(n) << (32 if vary == "high seeds" else 0)
        tokens = choose(logits.expand(n, -1), seeds, 3, temperature, 1.0)
    expected = (logits.double() / temperature).softmax(-1).numpy() * n
    assert stats.chisquare(tokens.bincount(minlength=8).numpy(), expected).pvalue > ALPHA


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_choosing_among_candidates_is_the_argmax_over_all_noise(top_p: float):
    generator = torch.Generator().manual_seed(1)
    for scale in (0.5, 4.0, 30.0):
        logits = scale * torch.randn(50, 3000, generator=generator)
        seeds = torch.arange(50) * 7919
        scaled = logits / 0.7
        if top_p < 1:
            kept = [keep_slowly(row, top_p) for row in scaled]
            scaled = torch.stack(
                [row.masked_fill(~keep, float("-inf")) for row, keep in zip(scaled, kept, strict=True)]
            )
        expected = (scaled + gumbel(seeds, 9, 3000)).argmax(-1)
        assert torch.equal(choose(logits, seeds, 9, 0.7, top_p), expected)


def test_a_token_far_below_the_best_wins_by_its_noise_alone():
    seeds = torch.arange(40)
    noise = gumbel(seeds, 2, 50_000)
    for row, lifted in zip(*(noise > 11.5).nonzero(as_tuple=True), strict=True):
        logits = torch.full((1, 50_000), -100.0)
        best = int(noise[row].argmin())  # the best token has the least luck
        logits[0, best] = 0.0
        logits[0, lifted] = noise[row, best] - noise[row, lifted] + 0.05
        assert int(choose(logits, seeds[row][None], 2, 1.0, 1.0)) == lifted
        logits[0, lifted] -= 0.1
        assert int(choose(logits, seeds[row][None], 2, 1.0, 1.0)) == best
    assert (noise > 11.5).any()


def test_rows_without_a_finite_logit_get_token_0_and_infinite_ones_win():
    logits = torch.zeros(4, 30)
    logits[0], logits[1, 3], logits[2, 7] = float("-inf"), float("nan"), float("inf")
    assert choose(logits, torch.arange(4), 0, 1.0, 1.0)[:3].tolist() == [0, 0, 7]


def test_a_choice_does_not_depend_on_the_batch():
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(2))
    seeds = torch.arange(30)
    for top_p in (1.0, 0.9):
        together = choose(logits, seeds, 4, 1.0, top_p)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
        assert torch.equal(choose(logits[order], seeds[order], 4, 1.0, top_p), together[order])
        assert all(int(choose(logits[i : i + 1], seeds[i : i + 1], 4, 1.0, top_p)) == together[i] for i in range(30))


def test_rows_that_share_a_seed_share_their_noise():
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(4)).expand(20, -1)
    assert len(choose(logits, torch.full((20,), 77), 2, 1.0, 1.0).unique()) == 1
    assert len(choose(logits, torch.arange(20), 2, 1.0, 1.0).unique()) > 10


def test_temperature_0_is_argmax_and_needs_no_luck():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(5))
    for seed in (0, 1):
        assert torch.equal(choose(logits, torch.full((20,), seed), seed, 0, 0.5), logits.argmax(-1))


def test_a_low_temperature_is_argmax_and_a_high_one_uniform():
    logits = torch.linspace(-3, 3, 10).expand(5000, -1)
    seeds = torch.arange(5000)
    assert (choose(logits, seeds, 0, 0.01, 1.0) == 9).all()
    assert stats.chisquare(choose(logits, seeds, 0, 1e6, 1.0).bincount(minlength=10).numpy()).pvalue > ALPHA


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_a_constant_added_to_all_logits_changes_no_choice(shift: float):
    logits = torch.randint(-8, 8, (200, 50), generator=torch.Generator().manual_seed(6)).float()
    seeds = torch.arange(200)
    differ = choose(logits + shift, seeds, 1, 1.0, 1.0) != choose(logits, seeds, 1, 1.0, 1.0)
    assert differ.float().mean() < 0.01  # float32 at 1e4 rounds noise to 1e-3, which may turn a near tie


def test_masked_tokens_are_never_chosen():
    logits = torch.zeros(2000, 6)
    logits[:, [1, 4]] = float("-inf")
    tokens = choose(logits, torch.arange(2000), 0, 1.0, 1.0)
    assert set(tokens.tolist()) == {0, 2, 3, 5}


# --- top-p ---


def keep_slowly(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens, added one by one until their probabilities sum to at least top_p."""
    probability = logits.softmax(-1)
    keep, total = torch.zeros(len(logits), dtype=torch.bool), 0.0
    for token in logits.argsort(descending=True, stable=True).tolist():
        if total >= top_p:
            break
        keep[token] = True
        total += float(probability[token])
    return keep


@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.sampled_from([0.6, 1.0, 1.5]))
@limits(max_examples=20, deadline=None)
def test_top_p_draws_from_the_documented_set_and_all_of_it(seed: int, top_p: float, temperature: float):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) / 2
    allowed = set(keep_slowly(logits / temperature, top_p).nonzero()[:, 0].tolist())
    tokens = choose(logits.expand(3000, -1), torch.arange(3000), 0, temperature, top_p)
    assert set(tokens.tolist()) == allowed  # the least likely of the set has a chance of at least 1 in 70


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(0.4, {2}), (0.5, {2}), (0.5001, {2, 0}), (0.75, {2, 0}), (0.8, {2, 0, 1}), (0.99, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_token_that_reaches_it_and_no_other(top_p: float, allowed: set[int]):
    logits = torch.log2(torch.tensor([0.25, 0.125, 0.5, 0.125])) * np.log(2)
    logits[3] -= 1e-3
    tokens = choose(logits.expand(2000, -1), torch.arange(2000), 0, 1.0, top_p)
    assert set(tokens.tolist()) == allowed


def test_within_the_nucleus_tokens_keep_their_odds():
    logits = torch.tensor([1.0, 0.5, 0.0, -3.0, -4.0])
    tokens = choose(logits.expand(8000, -1), torch.arange(8000), 0, 1.0, 0.9)
    expected = logits[:3].double().softmax(-1).numpy() * 8000
    assert stats.chisquare(tokens.bincount(minlength=3).numpy(), expected).pvalue > ALPHA

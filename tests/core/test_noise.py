"""Counter-based random numbers: theirs alone, and normal where they should be."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from kvpatch.caches.noise import normal, uniform

SEEDS = torch.tensor([0, 1, 2**62, -5])


def test_normal_numbers_are_normal():
    numbers = normal(SEEDS, 3, (200, 50))
    for row in numbers:
        assert stats.kstest(row.flatten().numpy(), "norm").pvalue > 1e-3
    assert float(numbers.std()) == pytest.approx(1, abs=0.01)


def test_a_row_s_numbers_depend_on_its_seed_stream_and_place_alone():
    whole = normal(SEEDS, 3, (40, 8))
    assert torch.equal(normal(SEEDS[2:3], 3, (40, 8))[0], whole[2])
    assert torch.equal(normal(SEEDS, 3, (20, 8)), whole[:, :20])
    torch.manual_seed(7)
    assert torch.equal(normal(SEEDS, 3, (40, 8)), whole)


def test_seeds_and_streams_give_unrelated_numbers():
    rows = torch.stack([*normal(SEEDS, 0, (4000,)), *normal(SEEDS, 1, (4000,)), *normal(SEEDS, 7, (4000,))])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(correlation.abs().max()) < 5 / 4000**0.5


def test_uniform_numbers_lie_strictly_between_0_and_1():
    ends = uniform(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert 0 < float(ends.min()) and float(ends.max()) < 1

"""The comparison that decides whether the engine's own step runs: on tokens that can tell, and on nothing else."""

from __future__ import annotations

import pytest
import torch

import kvpatch as kv
from kvpatch.engine import backend
from kvpatch.engine.backend import DRAWS, MOST_NOISE, fast_of
from kvpatch.engine.step import PlainOps

pytestmark = pytest.mark.model


@pytest.fixture
def drawn(monkeypatch):
    """Sets what each draw gives: error and noise. Returns the seeds that were drawn."""
    seeds: list[int] = []

    def of(found: list[tuple[float, float]]) -> list[int]:
        def difference(_backbone, _fast, _positions, seed: int) -> tuple[float, float]:
            seeds.append(seed)
            return found[seed]

        monkeypatch.setattr(backend, "_difference_at", difference)
        return seeds

    return of


@pytest.mark.parametrize("error", [0.0, 0.9])
def test_tokens_on_which_the_model_itself_is_noise_are_passed_over_whatever_the_step_does_there(drawn, error: float):
    seeds = drawn([(0.001, 1.3), (error, MOST_NOISE / 2), (0.5, 0.0)])
    assert backend._telling_difference(None, None, torch.arange(4)) == (error, MOST_NOISE / 2)
    assert seeds == [0, 1]


def test_where_all_tokens_are_noise_the_quietest_are_taken(drawn):
    seeds = drawn([(0.1, 0.9), (0.8, 0.4), (0.2, 0.5), (0.0, 0.7)])
    assert backend._telling_difference(None, None, torch.arange(4)) == (0.8, 0.4)
    assert seeds == list(range(DRAWS))


def test_a_wrong_step_is_refused_in_sixteen_bits_too(tiny_dirs, monkeypatch):
    backbone = kv.load(tiny_dirs("llama"), device="cpu", dtype="bfloat16").backbone
    assert fast_of(backbone).network is not None
    right = PlainOps.norm
    monkeypatch.setattr(PlainOps, "norm", lambda ops, hidden, weight: right(ops, hidden, weight) * 1.5)
    backbone.kept.clear()
    assert fast_of(backbone).network is None

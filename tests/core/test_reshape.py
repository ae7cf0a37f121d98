"""R_V set by hand: the wanted ratio, with directions and norm kept; and its nulls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from core_caches import make_cache
from kvpatch.errors import CacheError
from kvpatch.interventions.reshape import reshape_cache, turned, with_ratio
from kvpatch.readouts.geometry import participation_ratio, r_v
from kvpatch.specs.interventions import Reshape

seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(**changes: Any) -> Reshape:
    return Reshape(layers=[2], window=6, **changes)


# --- one window ---


@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.05, 0.95), seeds)
@limits(max_examples=40, deadline=None)
def test_wanted_ratio_is_reached_with_norm_and_directions_kept(tokens: int, dim: int, share: float, seed: int):
    v = random(2, tokens, dim, seed=seed)
    wanted = 1 + share * (min(tokens, dim) - 1) * torch.ones(2, dtype=torch.float64)
    new = with_ratio(v, wanted)
    assert torch.allclose(participation_ratio(new), wanted, rtol=0, atol=1e-4)
    assert torch.allclose(new.norm(dim=(1, 2)), v.norm(dim=(1, 2)), rtol=1e-10)
    u, s, w = torch.linalg.svd(v, full_matrices=False)
    inner = u.mT @ new @ w.mT  # diagonal, positive and in the same order where the directions are kept
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-9 * float(s.max()))
    assert (inner.diagonal(dim1=1, dim2=2) > 0).all()
    assert (inner.diagonal(dim1=1, dim2=2).diff() <= 1e-9).all()


def test_its_own_ratio_leaves_a_window_as_it_is():
    v = random(3, 16, 24)
    assert (with_ratio(v, participation_ratio(v)) - v).abs().max() < 1e-10


def test_a_direction_that_is_not_there_is_not_made():
    v = random(6, 2) @ random(2, 10, seed=1)
    new = with_ratio(v, torch.tensor(1.9))
    assert torch.linalg.matrix_rank(new) == 2
    with pytest.raises(CacheError, match="ratio of 3 is out of reach for a window of rank 2"):
        with_ratio(v, torch.tensor(3.0))


@given(st.integers(1, 12), st.integers(2, 15), st.floats(0, 1.9), seeds)
@limits(max_examples=40, deadline=None)
def test_rotation_moves_by_the_distance_and_keeps_every_singular_value(tokens: int, dim: int, share: float, seed: int):
    v = random(tokens, dim, seed=seed)
    if dim % 2:
        share = share / 4  # one direction lies in no plane
    distance = share * float(v.norm())
    new = turned(v, distance, seed)
    if dim % 2 == 0:
        assert float((new - v).norm()) == pytest.approx(distance, abs=1e-9)
    assert torch.allclose(torch.linalg.svdvals(new), torch.linalg.svdvals(v), rtol=1e-9, atol=1e-9)
    assert torch.equal(new, turned(v, distance, seed))
    if share > 0.01 and dim > 2:  # a plane has but two rotations by one angle
        assert not torch.allclose(new, turned(v, distance, seed + 1))


# --- a cache ---


def test_target_gets_the_source_s_ratio_and_nothing_else_changes():
    own, giver = make_cache((9, 12), seed=1), make_cache((11, 8), seed=2)
    new = reshape_cache(own, giver, spec(), [0, 1])
    late = [r_v(cache, 0, 2, window=6) for cache in (own, giver, new)]
    early = [participation_ratio(c.values[0][:, :, -6:].transpose(1, 2).flatten(2)) for c in (own, giver, new)]
    assert torch.allclose(late[2] * early[2], late[1] * early[1], atol=1e-4)
    assert not torch.allclose(late[0], late[2], atol=0.01)
    assert all(torch.equal(a, b) for a, b in zip(own.keys, new.keys, strict=True))
    assert all(torch.equal(own.values[layer], new.values[layer]) for layer in (0, 1))
    assert torch.equal(own.values[2][:, :, :-6], new.values[2][:, :, :-6])
    norms = [cache.values[2][:, :, -6:].flatten(1).norm(dim=1) for cache in (own, new)]
    assert torch.allclose(norms[0], norms[1])


def test_own_ratio_is_the_identity_to_1e_5():
    own, giver = make_cache((9, 12), seed=1), make_cache((11, 8), seed=2)
    same = reshape_cache(own, giver, spec(ratio="own"), [0, 1])
    assert max(float((a - b).abs().max()) for a, b in zip(own.values, same.values, strict=True)) < 1e-5


def test_rotation_moves_as_far_as_the_reshaping_and_leaves_r_v():
    own, giver = make_cache((9, 12), seed=1), make_cache((11, 8), seed=2)
    new = reshape_cache(own, giver, spec(), [5, 6])
    turned_cache = reshape_cache(own, giver, spec(by="rotation"), [5, 6])
    far = [(c.values[2] - own.values[2]).flatten(1).norm(dim=1) for c in (new, turned_cache)]
    assert torch.allclose(far[0], far[1], rtol=1e-4)
    assert torch.allclose(r_v(turned_cache, 0, 2, window=6), r_v(own, 0, 2, window=6), rtol=1e-4)
    alone = reshape_cache(own[1], giver[1], spec(by="rotation"), [6])
    assert torch.allclose(turned_cache.values[2][1:, :, -12:], alone.values[2], atol=1e-5)


def test_row_shorter_than_the_window_is_refused():
    with pytest.raises(CacheError, match="a giver of 5 slots is shorter than the window of 6"):
        reshape_cache(make_cache((9,)), make_cache((5,)), spec(), [0])

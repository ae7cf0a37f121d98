"""Participation ratio and R_V: against singular values, on any shape and scale, and row by row of a padded batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor

from core_caches import ABSOLUTE, make_cache, row_of
from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import rotate
from kvpatch.caches.selection import SINKS
from kvpatch.errors import CacheError
from kvpatch.readouts.geometry import (
    cache_ratios,
    corrected_participation_ratio,
    layer_at,
    participation_ratio,
    principal_angles,
    r_v,
    r_v_of,
    r_v_trajectory,
)

sizes = st.integers(1, 24)
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_svd(window: Tensor) -> float:
    s = np.linalg.svd(window.double().numpy(), compute_uv=False)
    return float((s**2).sum() ** 2 / (s**4).sum())


# --- participation ratio ---


@given(sizes, sizes, seeds)
@limits(max_examples=30, deadline=None)
def test_it_is_the_definition_by_singular_values(tokens: int, dim: int, seed: int):
    v = random(tokens, dim, seed=seed)
    assert float(participation_ratio(v)) == pytest.approx(by_svd(v), rel=1e-10)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("window", [(16, 5), (5, 16), (1, 7), (7, 1)], ids=str)
def test_leading_dimensions_are_windows_of_their_own(lead: tuple[int, ...], window: tuple[int, int]):
    v = random(*lead, *window)
    ratio = participation_ratio(v)
    assert ratio.shape == lead
    expected = [by_svd(x) for x in v.reshape(-1, *window)]
    assert torch.allclose(ratio.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


@given(sizes, sizes, seeds)
@limits(max_examples=30, deadline=None)
def test_it_lies_between_1_and_the_smaller_side(tokens: int, dim: int, seed: int):
    ratio = float(participation_ratio(random(tokens, dim, seed=seed)))
    assert 1 - 1e-12 <= ratio <= min(tokens, dim) + 1e-12


def test_orthogonal_vectors_count_as_many_and_copies_of_one_as_1():
    assert float(participation_ratio(torch.eye(6))) == pytest.approx(6)
    assert float(participation_ratio(3 * torch.eye(6, 20))) == pytest.approx(6)
    assert float(participation_ratio(torch.ones(9, 4))) == pytest.approx(1)
    assert float(participation_ratio(torch.diag(torch.tensor([2.0, 1.0])))) == pytest.approx(25 / 17)


def test_it_is_not_centred():
    v = random(20, 6) + 100
    assert float(participation_ratio(v)) == pytest.approx(by_svd(v), rel=1e-10)
    assert float(participation_ratio(v)) < 1.01 < float(participation_ratio(v - v.mean(0)))


@given(sizes, sizes, seeds, st.sampled_from([1e-150, 1e-60, 1e-3, -7.0, 1e60, 1e150, 1e300]))
@limits(max_examples=30, deadline=None)
def test_scale_does_not_matter_in_float64(tokens: int, dim: int, seed: int, scale: float):
    v = random(tokens, dim, seed=seed)
    assert float(participation_ratio(v * scale)) == pytest.approx(by_svd(v), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-10, 1.0, 1e10, 1e37])
def test_scale_does_not_matter_in_float32(scale: float):
    v = random(16, 32)
    ratio = participation_ratio(v.float() * scale)
    assert ratio.dtype == torch.float32
    assert float(ratio) == pytest.approx(by_svd(v), rel=1e-4)


@given(sizes, sizes, seeds)
@limits(max_examples=20, deadline=None)
def test_rotation_order_and_transposition_do_not_matter(tokens: int, dim: int, seed: int):
    v = random(tokens, dim, seed=seed)
    turn = torch.linalg.qr(random(dim, dim, seed=seed + 1)).Q
    expected = pytest.approx(float(participation_ratio(v)), rel=1e-9)
    assert float(participation_ratio(v @ turn)) == expected
    assert float(participation_ratio(v.flip(0))) == expected
    assert float(participation_ratio(v.mT)) == expected


@pytest.mark.parametrize("ratio", [participation_ratio, corrected_participation_ratio])
def test_a_ratio_in_float32_is_that_in_float64_rounded_however_many_windows_there_are(ratio):
    v = random(40, 16, 192).bfloat16()
    exact = ratio(v.double()).float()
    assert torch.equal(ratio(v), exact)
    assert torch.equal(torch.cat([ratio(v[:1]), ratio(v[1:4]), ratio(v[4:])]), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ratios_of_shorter_types_are_given_in_float32(dtype: torch.dtype):
    v = (random(16, 32) * 1000).to(dtype)
    ratio = participation_ratio(v)
    assert ratio.dtype == torch.float32
    assert float(ratio) == pytest.approx(by_svd(v), rel=1e-5)


def test_a_zero_or_empty_window_has_no_ratio_and_spoils_no_other():
    v = random(3, 4, 5)
    v[1] = 0
    ratio = participation_ratio(v)
    assert ratio.isnan().tolist() == [False, True, False]
    assert float(ratio[2]) == pytest.approx(by_svd(v[2]))
    assert participation_ratio(torch.zeros(2, 0, 5)).isnan().tolist() == [True, True]


def test_a_window_that_is_not_finite_has_no_ratio():
    for bad in (float("nan"), float("inf")):
        v = random(4, 5)
        v[1, 2] = bad
        assert participation_ratio(v).isnan()


def test_a_vector_alone_is_refused():
    with pytest.raises(CacheError, match=r"needs \[..., tokens, dim\], got shape \(5,\)"):
        participation_ratio(torch.ones(5))


def test_the_input_is_not_changed():
    v = random(4, 5)
    before = v.clone()
    participation_ratio(v)
    assert torch.equal(v, before)


# --- R_V ---


def slow_r_v(cache: KVCache, row: int, early: int, late: int, window: int) -> float:
    """Heads joined token by token, the last slots of the row, singular values."""
    values = row_of(cache, row)[1]
    joined = [torch.cat(list(v), dim=-1)[-window:] for v in values]
    return by_svd(joined[late]) / by_svd(joined[early])


@pytest.mark.parametrize("window", [2, 5, 8])
def test_r_v_is_late_over_early_of_each_row_s_last_slots(window: int):
    cache = make_cache((8, 12, 9), seed=1)
    ratio = r_v(cache, early=0, late=2, window=window)
    assert ratio.dtype == torch.float32
    expected = [slow_r_v(cache, row, 0, 2, window) for row in range(3)]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-5)
    assert r_v(cache, early=2, late=0, window=window).tolist() == pytest.approx([1 / x for x in expected], rel=1e-5)


def test_r_v_does_not_depend_on_padding_or_batch():
    cache = make_cache((8, 12, 9), seed=1)
    together = r_v(cache, 0, 2, window=6)
    alone = torch.cat([r_v(row, 0, 2, window=6) for row in cache])
    assert torch.allclose(together, alone, rtol=1e-6)


def test_rows_shorter_than_the_window_have_no_r_v():
    cache = make_cache((3, 12, 4), seed=1)
    assert r_v(cache, 0, 2, window=4).isnan().tolist() == [True, False, False]
    assert r_v(cache, 0, 2, window=13).isnan().all()
    assert r_v(make_cache((0, 0)), 0, 2).isnan().tolist() == [True, True]


def test_r_v_of_a_layer_over_itself_is_1_and_keys_do_not_enter():
    cache = make_cache((20,), seed=1)
    assert float(r_v(cache, 1, 1)) == 1
    turned = KVCache(**{**cache.__dict__, "keys": tuple(-k + 3 for k in cache.keys)})
    assert torch.equal(r_v(turned, 0, 2), r_v(cache, 0, 2))


def test_layers_may_be_fractions_of_depth_or_counted_from_the_end():
    cache = make_cache((20,), seed=1)
    assert torch.equal(r_v(cache, early=0.0, late=1.0), r_v(cache, 0, 2))
    assert torch.equal(r_v(cache, early=-3, late=-1), r_v(cache, 0, 2))


def test_r_v_of_takes_heads_joined_to_one_vector_a_token():
    late, early = random(2, 3, 7, 4, seed=1), random(2, 3, 7, 4, seed=2)
    expected = [
        by_svd(late[row].transpose(0, 1).reshape(7, 12)) / by_svd(early[row].transpose(0, 1).reshape(7, 12))
        for row in range(2)
    ]
    assert r_v_of(late, early).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_of_one_is_refused(window: int):
    with pytest.raises(CacheError, match=f"window must be at least 2 slots, got {window}"):
        r_v(make_cache((20,)), 0, 2, window=window)


@pytest.mark.parametrize(
    ("layer", "layers", "expected"),
    [
        (0, 32, 0),
        (-1, 32, 31),
        (0.0, 32, 0),
        (1.0, 32, 31),
        (0.125, 32, 4),
        (0.75, 32, 24),
        (0.75, 30, 23),
        (0.5, 1, 0),
    ],
)
def test_layer_at(layer: int | float, layers: int, expected: int):
    assert layer_at(layer, layers) == expected


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (3, r"layer 3 does not exist: there are 3 \(0 to 2\)"),
        (-4, "layer -4 does not exist"),
        (1.5, "layer 1.5 as a fraction of depth must lie between 0 and 1"),
        (-0.1, "must lie between 0 and 1"),
        (float("nan"), "must lie between 0 and 1"),
    ],
)
def test_layers_that_are_not_there_are_refused(layer: int | float, message: str):
    with pytest.raises(CacheError, match=message):
        r_v(make_cache((20,)), early=layer, late=0)


# --- without the bias of a small window ---


def planted(tokens: int, windows: int, seed: int = 0) -> tuple[Tensor, float]:
    """Windows of Gaussian vectors whose spectrum falls off, and the participation ratio over endless ones."""
    scale = 0.93 ** torch.arange(64, dtype=torch.float64)
    truth = float((scale**2).sum() ** 2 / (scale**4).sum())
    return random(windows, tokens, 64, seed=seed) * scale, truth


def test_a_small_window_reads_low_and_the_corrected_ratio_does_not():
    """The raw ratio climbs with the window; the corrected one does not."""
    for tokens, at_most in ((8, 6.5), (16, 9.5), (32, 11)):
        windows, truth = planted(tokens, 2000)
        assert float(participation_ratio(windows).mean()) < at_most < truth
        assert float(corrected_participation_ratio(windows).median()) == pytest.approx(truth, rel=0.1)


def test_correction_is_the_sum_over_pairs_of_different_vectors():
    v = random(3, 7, 5)
    for window, found in zip(v, corrected_participation_ratio(v), strict=True):
        above = sum(float(a @ a) * float(b @ b) for i, a in enumerate(window) for j, b in enumerate(window) if i != j)
        below = sum(float(a @ b) ** 2 for i, a in enumerate(window) for j, b in enumerate(window) if i != j)
        assert float(found) == pytest.approx(above / below, rel=1e-10)


def test_what_bounds_nothing_is_infinite_and_what_is_nothing_has_no_corrected_ratio():
    assert float(corrected_participation_ratio(torch.eye(6))) == float("inf")
    assert corrected_participation_ratio(torch.zeros(6, 4)).isnan()
    assert corrected_participation_ratio(torch.ones(1, 4)).isnan()
    assert float(corrected_participation_ratio(torch.ones(9, 4))) == pytest.approx(1)


# --- every layer and head of a cache ---


@pytest.mark.parametrize("corrected", [False, True])
def test_ratios_of_a_cache_are_those_of_each_head_s_last_slots(corrected: bool):
    cache = make_cache((12, 20, 15), seed=1)
    ratio = corrected_participation_ratio if corrected else participation_ratio
    for part in ("k", "v"):
        found = cache_ratios(cache, part, window=8, corrected=corrected)
        assert found.shape == (3, 3, 2)
        for row in range(3):
            for layer, rope in enumerate(cache.rope):
                own = cache[row]
                window = (own.values if part == "v" else own.keys)[layer][0, :, -8:]
                if part == "k":
                    window = rotate(window[None], -own.positions[:, -8:], rope)[0]
                assert torch.allclose(found[row, layer], ratio(window), rtol=1e-4)


def test_joined_ratios_are_what_r_v_divides():
    cache = make_cache((20, 12), seed=1)
    found = cache_ratios(cache, window=6, joined=True)
    assert torch.allclose(found[:, 2] / found[:, 0], r_v(cache, 0, 2, window=6))


def test_sinks_stay_out_of_the_window():
    cache = make_cache((10, 10 + SINKS), seed=1)
    assert cache_ratios(cache, window=10).isnan()[:, 0, 0].tolist() == [True, False]
    loud = cache.values[0].clone()
    loud[1, :, :SINKS] *= 1000
    louder = KVCache(**{**cache.__dict__, "values": (loud, *cache.values[1:])})
    assert torch.equal(cache_ratios(louder, window=10)[1], cache_ratios(cache, window=10)[1])


def test_keys_of_a_model_that_does_not_turn_them_are_read_as_they_are():
    cache = make_cache((20,), seed=1, rope=ABSOLUTE)
    assert torch.allclose(cache_ratios(cache, "k")[0, 0], participation_ratio(cache.keys[0][0, :, -16:]))


# --- trajectory ---


def test_trajectory_is_r_v_of_every_window_of_consecutive_tokens():
    late, early = random(2, 3, 9, 4, seed=1), random(2, 3, 9, 4, seed=2)
    found = r_v_trajectory(late, early, 5)
    assert found.shape == (2, 5)
    for start in range(5):
        part = slice(start, start + 5)
        assert torch.allclose(found[:, start], r_v_of(late[:, :, part], early[:, :, part]), rtol=1e-10)
    assert r_v_trajectory(late, early, 10).shape == (2, 0)


# --- angles ---


@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 3), seeds)
@limits(max_examples=20, deadline=None)
def test_angles_are_those_of_scipy_between_leading_directions(tokens: int, dim: int, rank: int, seed: int):
    a, b = random(tokens, dim, seed=seed), random(tokens + 1, dim, seed=seed + 1)
    bases = [np.linalg.svd(x.numpy(), full_matrices=False)[2][:rank].T for x in (a, b)]
    expected = np.sort(subspace_angles(*bases))
    assert principal_angles(a, b, rank).tolist() == pytest.approx(expected.tolist(), abs=1e-7)


def test_angle_of_a_window_with_itself_is_0_whatever_its_order_and_scale():
    v = random(2, 16, 10)
    assert principal_angles(v, 3 * v.flip(1), 4).abs().max() < 1e-10
    assert principal_angles(torch.eye(4)[:2], torch.eye(4)[2:], 2).tolist() == pytest.approx([np.pi / 2] * 2)


def test_a_tiny_angle_is_not_lost():
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert float(principal_angles(a, b, 1)) == pytest.approx(1e-9, rel=1e-6)


def test_windows_without_the_rank_have_no_angles_and_spoil_no_others():
    v = random(3, 6, 5)
    v[1] = 0
    w = random(3, 6, 5, seed=1)
    w[2, 0, 0] = float("nan")
    assert principal_angles(v, w, 2).isnan().all(dim=1).tolist() == [False, True, True]
    with pytest.raises(CacheError, match="no subspaces of rank 6"):
        principal_angles(v, w, 6)

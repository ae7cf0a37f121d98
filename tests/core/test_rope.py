"""Rotation of cached keys: against complex multiplication in float64, for every layout, and as a group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from core_caches import HALF, INTERLEAVED, PARTIAL, slow_rotation
from kvpatch.caches.rope import LayerRope, rotate
from kvpatch.errors import CacheError

PARTIAL_INTERLEAVED = LayerRope("interleaved", (1.0, 0.25))
FULL_INTERLEAVED = LayerRope("interleaved", (1.0, 0.3, 0.02, 1e-3))
ROPES = {
    "half": HALF,
    "half partial": PARTIAL,
    "interleaved": FULL_INTERLEAVED,
    "interleaved partial": PARTIAL_INTERLEAVED,
    "interleaved six of eight": INTERLEAVED,
}
# Relative to the largest entry: half a unit in the last place of the stored type, and what fp32 products add.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

deltas = st.lists(st.integers(-5000, 5000), min_size=3, max_size=3)


def random_keys(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64).to(dtype)


def slowly(keys: Tensor, delta: Tensor, rope: LayerRope) -> Tensor:
    out = torch.empty(keys.shape, dtype=torch.float64)
    for batch in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for slot in range(keys.shape[2]):
                out[batch, head, slot] = slow_rotation(keys[batch, head, slot], int(delta[batch, slot]), rope)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_complex_multiplication_of_each_pair(name: str, dtype: torch.dtype):
    keys, delta = random_keys(dtype), torch.tensor([[1, -7, 400], [0, 3000, -1]])
    turned, expected = rotate(keys, delta, ROPES[name]), slowly(keys, delta, ROPES[name])
    assert turned.dtype == dtype
    assert turned.shape == keys.shape
    assert (turned.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", ROPES)
@given(first=deltas, second=deltas)
@limits(max_examples=20, deadline=None)
def test_rotations_add(name: str, first: list[int], second: list[int]):
    keys, a, b = random_keys(), torch.tensor([first] * 2), torch.tensor([second] * 2)
    together = rotate(keys, a + b, ROPES[name])
    assert torch.allclose(rotate(rotate(keys, a, ROPES[name]), b, ROPES[name]), together, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ROPES)
@given(delta=deltas)
@limits(max_examples=15, deadline=None)
def test_rotation_keeps_norms_and_products_of_keys_that_move_together(name: str, delta: list[int]):
    keys, queries = random_keys(seed=1), random_keys(seed=2)
    shift = torch.tensor([delta] * 2)
    turned, turned_queries = rotate(keys, shift, ROPES[name]), rotate(queries, shift, ROPES[name])
    assert torch.allclose(turned.norm(dim=-1), keys.norm(dim=-1), atol=1e-11)
    assert torch.allclose((turned * turned_queries).sum(-1), (keys * queries).sum(-1), atol=1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_delta_0_returns_the_key_bit_for_bit_beside_slots_that_move(name: str, dtype: torch.dtype):
    keys, delta = random_keys(dtype), torch.tensor([[0, 5, 0], [0, 0, -3]])
    keys[0, 0, 0, 0] = -0.0
    turned = rotate(keys, delta, ROPES[name])
    still = (delta == 0)[:, None, :, None].expand(keys.shape)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[keys.element_size()]
    assert torch.equal(turned[still].view(bits), keys[still].view(bits))
    moved = ~still
    assert not torch.equal(turned[moved], keys[moved])
    assert rotate(keys, torch.zeros_like(delta), ROPES[name]) is keys


def test_dimensions_past_the_rotary_ones_are_never_touched():
    keys = random_keys(torch.bfloat16)
    turned = rotate(keys, torch.full((2, 3), 17), PARTIAL)
    assert torch.equal(turned[..., 4:], keys[..., 4:])
    assert (turned[..., :4] != keys[..., :4]).any()


def test_the_input_is_not_changed():
    keys = random_keys()
    before = keys.clone()
    rotate(keys, torch.full((2, 3), 9), HALF)
    assert torch.equal(keys, before)


def test_bf16_is_rounded_once_however_far_the_key_moves():
    generator = torch.Generator().manual_seed(3)
    rope = LayerRope("half", tuple(500_000.0 ** (-i / 32) for i in range(32)))
    keys = torch.randn(1, 4, 64, 64, generator=generator).bfloat16()
    for distance in (1, 400, 100_000):
        delta = torch.full((1, 64), distance)
        exact = rotate(keys.double(), delta, rope)
        error = (rotate(keys, delta, rope).double() - exact).abs()
        assert (error <= 2.0**-8 * exact.abs() + 1e-6).all()
        assert (error > 2.0**-12 * exact.abs()).any()  # it is bf16 that is stored


def test_angles_hold_in_float32_at_distances_where_float32_angles_would_not():
    keys = random_keys()
    delta = torch.full((2, 3), 10_000_019)
    assert torch.allclose(rotate(keys.float(), delta, HALF).double(), rotate(keys, delta, HALF), atol=1e-5)


def test_absolute_positions_refuse_to_move_and_accept_to_stay():
    keys, rope = random_keys(), LayerRope("absolute")
    assert rotate(keys, torch.zeros(2, 3, dtype=torch.int64), rope) is keys
    with pytest.raises(CacheError, match="can't be moved to another position"):
        rotate(keys, torch.tensor([[0, 0, 0], [0, 0, 1]]), rope)


def test_keys_without_rotation_move_freely():
    keys = random_keys()
    assert rotate(keys, torch.full((2, 3), 12), LayerRope("none")) is keys


def test_rotary_dim_is_twice_the_number_of_frequencies():
    assert [r.rotary_dim for r in (HALF, PARTIAL, INTERLEAVED, LayerRope("none"))] == [8, 4, 6, 0]

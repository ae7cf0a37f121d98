"""Donors: each is what its name says, belongs to its row's seed, and fools attention only where it means to."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from core_caches import ABSOLUTE, HALF, NO_ROPE, copied, is_same, make_cache, row_of, slow_rotation, tensors
from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import LayerRope
from kvpatch.errors import CacheError
from kvpatch.interventions.donors import make_donor

RANDOM = (
    "shuffle_values",
    "shuffle_jointly",
    "shuffle_rerotate",
    "shuffle_heads",
    "gaussian_isotropic",
    "gaussian_fitted",
)
EVERY = ("source", *RANDOM, "mean")
LENGTHS = (12, 7, 9)
SEEDS = (3, 4, 5)


@pytest.fixture
def source() -> KVCache:
    return make_cache(LENGTHS, seed=1, starts=(0, 2, 5))


@pytest.fixture
def reference() -> KVCache:
    return make_cache((15, 20), seed=2)


def attention(cache: KVCache, row: int) -> list[Tensor]:
    """What a random query at the pending position reads, per layer, [kv_heads, head_dim]: softmax by hand."""
    generator, out = torch.Generator().manual_seed(11), []
    for k, v, rope in zip(*row_of(cache, row), cache.rope, strict=True):
        query = slow_rotation(
            torch.randn(8, generator=generator, dtype=torch.float64), float(cache.pending_position[row]), rope
        )
        scores = k.double() @ query / 8**0.5  # [kv_heads, slots]
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        out.append((weights[..., None] * v.double()).sum(dim=1))
    return out


def off(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def order_of(donor: Tensor, source: Tensor) -> list[int]:
    """For each slot of [kv_heads, slots, dim], the slot of the source with the same content."""
    slots = range(source.shape[1])
    return [next(j for j in slots if torch.equal(donor[:, i], source[:, j])) for i in slots]


# --- what holds for all ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_donor_has_the_source_s_shape_dtype_and_labels_and_changes_nothing(name: str, dtype: torch.dtype):
    source, reference = make_cache(LENGTHS, seed=1, dtype=dtype), make_cache((15, 20), seed=2, dtype=dtype)
    before = copied(source), copied(reference)
    donor = make_donor(name, source, SEEDS, reference)
    assert is_same(tensors(source), before[0])
    assert is_same(tensors(reference), before[1])
    for made, own in zip((*donor.keys, *donor.values), (*source.keys, *source.values), strict=True):
        assert (made.shape, made.dtype) == (own.shape, own.dtype)
    for label in ("positions", "token_ids", "segments", "origins", "pending", "pending_position"):
        assert torch.equal(getattr(donor, label), getattr(source, label))
    assert donor.pieces == source.pieces
    assert all(
        torch.isfinite(k).all() and torch.isfinite(v).all()
        for row in range(3)
        for k, v in zip(*row_of(donor, row), strict=True)
    )


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_donor(name: str, source: KVCache, reference: KVCache):
    made = [make_donor(name, source, SEEDS, reference).checksums() for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("other", [(13, 14, 15), (3 + 2**40, 4 + 2**63, -5)], ids=str)
@pytest.mark.parametrize("name", [n for n in RANDOM if n != "shuffle_heads"])
def test_another_seed_gives_another_donor(name: str, other: tuple[int, ...], source: KVCache, reference: KVCache):
    ours, theirs = (make_donor(name, source, seeds, reference).checksums() for seeds in (SEEDS, other))
    assert all(a != b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("explicit", [True, False], ids=["reference", "no reference"])
@pytest.mark.parametrize("name", RANDOM)
def test_a_donor_depends_on_neither_batch_mates_nor_padding(
    name: str, explicit: bool, source: KVCache, reference: KVCache
):
    given = reference if explicit else None
    together = make_donor(name, source, SEEDS, given)
    for row, seed in enumerate(SEEDS):
        alone = make_donor(name, source[row], [seed], given)
        wide = make_donor(name, KVCache.concat([make_cache([25], seed=9), source[row]]), [99, seed], given)
        for parts in (row_of(alone, 0), row_of(wide, 1)):
            for made, want in zip(parts, row_of(together, row), strict=True):
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made, want, strict=True))


def test_rows_of_one_prompt_and_one_seed_get_one_donor(source: KVCache):
    for name in RANDOM:
        twice = make_donor(name, source[[1, 1, 1]], [8, 8, 9]).checksums()
        assert twice[0] == twice[1]
    assert len(set(make_donor("shuffle_values", source[[0] * 6], range(6)).checksums())) == 6


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_is_wanted_for_every_row(name: str, source: KVCache):
    with pytest.raises(CacheError, match="2 seeds for a batch of 3"):
        make_donor(name, source, [1, 2])


def test_the_source_is_the_source(source: KVCache):
    assert make_donor("source", source, SEEDS) is source


# --- shuffles ---


def test_shuffled_values_are_the_same_values_in_one_order_for_all_layers(source: KVCache):
    donor = make_donor("shuffle_values", source, SEEDS)
    assert is_same(list(donor.keys), list(source.keys))
    for row, length in enumerate(LENGTHS):
        made, own = row_of(donor, row)[1], row_of(source, row)[1]
        orders = [order_of(m, o) for m, o in zip(made, own, strict=True)]
        assert orders[0] == orders[1] == orders[2] != list(range(length))
        assert sorted(orders[0]) == list(range(length))


@pytest.mark.parametrize("name", ["shuffle_values", "shuffle_jointly", "shuffle_rerotate"])
def test_no_slot_keeps_its_own_values(name: str, source: KVCache):
    """Else a mode that sits in one slot comes through a shuffle in one row of so many."""
    for seed in range(20):
        donor = make_donor(name, source, [seed] * 3)
        for row, length in enumerate(LENGTHS):
            made, own = row_of(donor, row)[1], row_of(source, row)[1]
            assert all(there != slot for slot, there in enumerate(order_of(made[0], own[0]))), length


def test_a_single_slot_can_only_stay():
    one = make_cache((1,))
    assert make_donor("shuffle_values", one, [0]).checksums() == one.checksums()


def test_joint_shuffle_of_keys_and_values_leaves_attention_as_it_was(source: KVCache):
    donor = make_donor("shuffle_jointly", source, SEEDS)
    assert donor.checksums() != source.checksums()
    for row in range(3):
        assert off(attention(donor, row), attention(source, row)) < 1e-12


@pytest.mark.parametrize("name", ["shuffle_values", "shuffle_rerotate"])
def test_these_shuffles_change_attention(name: str, source: KVCache):
    donor = make_donor(name, source, SEEDS)
    for row in range(3):
        assert off(attention(donor, row), attention(source, row)) > 0.01


def test_without_rotation_the_rerotated_shuffle_is_the_joint_one():
    source = make_cache(LENGTHS, seed=1, rope=NO_ROPE)
    made = [make_donor(name, source, SEEDS).checksums() for name in ("shuffle_rerotate", "shuffle_jointly")]
    assert made[0] == made[1]


def test_the_rerotated_shuffle_turns_each_key_to_where_it_lands():
    source = make_cache((6, 4), seed=1, starts=(0, 7), dtype=torch.float64)
    donor = make_donor("shuffle_rerotate", source, (1, 2))
    for row in range(2):
        (made_k, made_v), (own_k, own_v) = row_of(donor, row), row_of(source, row)
        order = order_of(made_v[0], own_v[0])
        assert sorted(order) == list(range(len(order))) != order
        for layer, rope in enumerate(source.rope):
            assert order_of(made_v[layer], own_v[layer]) == order
            for slot, came_from in enumerate(order):
                for head in range(2):
                    expected = slow_rotation(own_k[layer][head, came_from], slot - came_from, rope)
                    assert torch.allclose(made_k[layer][head, slot], expected, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 3, 8])
def test_no_head_stays_in_its_place_and_keys_go_with_their_values(kv_heads: int):
    source = make_cache(LENGTHS, seed=1, kv_heads=kv_heads)
    seen = set()
    for seed in range(12):
        donor = make_donor("shuffle_heads", source, [seed] * 3)
        for row in range(3):
            for parts in zip(*row_of(donor, row), *row_of(source, row), strict=True):
                made_k, made_v, own_k, own_v = (x.transpose(0, 1) for x in parts)
                order = order_of(made_k, own_k)
                assert order == order_of(made_v, own_v)
                assert sorted(order) == list(range(kv_heads))
                assert all(head != place for place, head in enumerate(order))
                seen.add(tuple(order))
    assert len(seen) == {2: 1, 3: 2}.get(kv_heads, len(seen))
    assert kv_heads < 8 or len(seen) > 5


def test_one_head_cannot_be_shuffled():
    with pytest.raises(CacheError, match="layer 0 has one KV head"):
        make_donor("shuffle_heads", make_cache((4,), kv_heads=1), [0])


def test_keys_at_absolute_positions_can_be_shuffled_only_as_they_are():
    source = make_cache((6,), seed=1, rope=ABSOLUTE)
    for name in ("shuffle_values", "shuffle_jointly", "shuffle_heads", "gaussian_isotropic"):
        make_donor(name, source, [1])
    for name in ("shuffle_rerotate", "gaussian_fitted", "mean"):
        with pytest.raises(CacheError, match="can't be moved"):
            make_donor(name, source, [1])


# --- Gaussians ---


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_isotropic_noise_has_every_vector_s_norm(dtype: torch.dtype, rtol: float):
    source = make_cache(LENGTHS, seed=1, dtype=dtype)
    donor = make_donor("gaussian_isotropic", source, SEEDS)
    for row in range(3):
        for made, own in zip(chain(*row_of(donor, row)), chain(*row_of(source, row)), strict=True):
            assert torch.allclose(made.float().norm(dim=-1), own.float().norm(dim=-1), rtol=rtol)
            cosine = torch.cosine_similarity(made.float(), own.float(), dim=-1)
            assert cosine.abs().mean() < 0.6


def test_isotropic_noise_points_nowhere():
    source = make_cache((2000,), seed=1)
    made, _ = row_of(make_donor("gaussian_isotropic", source, [1]), 0)
    unit = torch.nn.functional.normalize(torch.cat([k.double() for k in made]).flatten(0, 1), dim=-1)
    n = len(unit)
    assert unit.mean(dim=0).abs().max() < 5 / (8 * n) ** 0.5
    second = unit.T @ unit / n - torch.eye(8, dtype=torch.float64) / 8
    assert second.abs().max() < 5 * 0.125 / n**0.5


def test_a_zero_vector_stays_zero():
    source = make_cache((3,), seed=1)
    keys = tuple(k * 0 for k in source.keys)
    donor = make_donor("gaussian_isotropic", KVCache(**{**source.__dict__, "keys": keys}), [1])
    assert all((k == 0).all() for k in donor.keys)


def planted(slots: int, seed: int) -> tuple[KVCache, np.ndarray, np.ndarray]:
    """A cache of one layer and one head whose keys before RoPE, and values, have a planted mean and covariance."""
    rng = np.random.default_rng(seed)
    mean, mix = 3 * rng.standard_normal(8), rng.standard_normal((8, 8)) / 2
    cache = make_cache((slots,), seed=3, rope=(HALF,), kv_heads=1, dtype=torch.float64)
    vectors = torch.from_numpy(mean + rng.standard_normal((2, slots, 8)) @ mix.T)
    vectors[:, 0] = 1e4  # a sink, which the fit must not see
    keys = torch.stack([slow_rotation(x, i, HALF) for i, x in enumerate(vectors[0])])
    whole = {**cache.__dict__, "keys": (keys[None, None],), "values": (vectors[1][None, None],)}
    return KVCache(**whole), mean, mix @ mix.T


def test_the_fitted_gaussian_has_the_planted_mean_and_covariance_before_rope_and_no_sink():
    reference, mean, covariance = planted(600, seed=5)
    source = make_cache((2000,), seed=4, rope=(HALF,), kv_heads=1, starts=(17,))
    donor = make_donor("gaussian_fitted", source, [1], reference)
    keys, values = (x[0][0].double() for x in row_of(donor, 0))
    before_rope = torch.stack([slow_rotation(k, -(17 + i), HALF) for i, k in enumerate(keys)])
    for drawn in (before_rope.numpy(), values.numpy()):
        spread = np.sqrt(np.diag(covariance))
        # Both the reference (599 vectors) and the donor (2000) have errors of sampling: about 5 standard errors.
        assert np.all(np.abs(drawn.mean(0) - mean) < 5 * spread * (1 / 599 + 1 / 2000) ** 0.5)
        bound = 5 * np.outer(spread, spread) * (2 * (1 / 599 + 1 / 2000)) ** 0.5
        assert np.all(np.abs(np.cov(drawn.T) - covariance) < bound)


def test_fitted_draws_are_independent_between_slots_and_parts():
    reference, _, _ = planted(300, seed=6)
    source = make_cache((1500,), seed=4, rope=(HALF,), kv_heads=1)
    keys, values = (x[0][0].double() for x in row_of(make_donor("gaussian_fitted", source, [1], reference), 0))
    keys = torch.stack([slow_rotation(k, -i, HALF) for i, k in enumerate(keys)])
    keys, values = keys - keys.mean(0), values - values.mean(0)
    for a, b in ((keys[:-1], keys[1:]), (values[:-1], values[1:]), (keys, values)):
        r = (a * b).mean(0) / (a.std(0) * b.std(0))
        assert r.abs().max() < 5 / 1500**0.5


def test_the_first_slot_of_every_reference_row_is_left_out_wherever_it_stands():
    source = make_cache((5,), seed=1)
    plain = make_cache((6, 4), seed=2)
    moved = [v.clone() for v in plain.values]
    for value in moved:
        value[0, :, 0], value[1, :, 2] = 1e5, -1e5
    changed = KVCache(**{**plain.__dict__, "values": tuple(moved)})
    assert make_donor("gaussian_fitted", source, [1], changed).checksums() == (
        make_donor("gaussian_fitted", source, [1], plain).checksums()
    )


def test_a_gaussian_wants_two_slots_besides_the_first():
    for lengths, count in (((2,), 1), ((1, 1), 0)):
        with pytest.raises(CacheError, match=f"can't be fitted to {count} slots; give a longer reference"):
            make_donor("gaussian_fitted", make_cache((4,)), [1], make_cache(lengths, seed=2))
    make_donor("gaussian_fitted", make_cache((4,)), [1], make_cache((3,), seed=2))


# --- the mean ---


def test_the_mean_is_taken_slot_by_slot_from_the_end_before_rope():
    source = make_cache((3, 5), seed=1, starts=(2, 0), dtype=torch.float64)
    reference = make_cache((6, 4, 5), seed=2, starts=(0, 3, 1), dtype=torch.float64)
    donor = make_donor("mean", source, (0, 0), reference)
    rows = [row_of(reference, row) for row in range(3)]
    for row, length in enumerate((3, 5)):
        made_k, made_v = row_of(donor, row)
        for layer, rope in enumerate(source.rope):
            for back in range(1, length + 1):
                there = [r for r in range(3) if (6, 4, 5)[r] >= back]
                for head in range(2):
                    v = torch.stack([rows[r][1][layer][head, -back] for r in there]).mean(0)
                    unturned = [
                        slow_rotation(rows[r][0][layer][head, -back], -int(reference.positions[r, -back]), rope)
                        for r in there
                    ]
                    k = slow_rotation(torch.stack(unturned).mean(0), int(source.positions[row, -back]), rope)
                    assert torch.allclose(made_v[layer][head, -back].double(), v, atol=2e-6)
                    assert torch.allclose(made_k[layer][head, -back].double(), k, atol=2e-6)


def test_the_mean_of_one_row_is_that_row():
    source = make_cache((5,), seed=1, rope=(LayerRope("none"),))
    assert make_donor("mean", source, [0]).checksums() == source.checksums()


def test_slots_further_back_than_every_reference_take_the_furthest_mean():
    none = (LayerRope("none"),)
    reference = make_cache((5, 4), seed=2, rope=none)
    short = make_donor("mean", make_cache((5,), seed=1, rope=none), [0], reference)
    long = make_donor("mean", make_cache((7,), seed=1, rope=none), [0], reference)
    for mine, theirs in ((long.keys[0], short.keys[0]), (long.values[0], short.values[0])):
        assert torch.equal(mine[:, :, 2:], theirs)
        assert torch.equal(mine[:, :, :2], theirs[:, :, :1].expand(-1, -1, 2, -1))


def test_a_longer_row_in_the_batch_does_not_change_the_mean_of_a_shorter_one():
    reference = make_cache((5, 4), seed=2)
    alone = make_donor("mean", make_cache((4,), seed=1), [0], reference)
    both = make_donor("mean", make_cache((4, 7), seed=1), [0, 0], reference)
    assert both[0].checksums() == alone.checksums()

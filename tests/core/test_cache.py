"""KVCache: shapes are checked, rows come and go without trace, checksums see every bit and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from core_caches import NO_ROPE, ROPES, copied, is_same, make_cache, row_of, tensors
from kvpatch.caches.kvcache import PAD, KVCache, pad_left
from kvpatch.errors import CacheError
from kvpatch.specs.patch import Patch

LENGTHS = (4, 7, 1, 5)


@pytest.fixture
def cache() -> KVCache:
    return make_cache(LENGTHS, seed=1)


def is_equal(left: KVCache, right: KVCache) -> bool:
    """Whether two caches are the same, what stands in their padding left aside."""
    labels = ("positions", "token_ids", "segments", "origins", "pending", "pending_position")
    return (
        all(torch.equal(getattr(left, name), getattr(right, name)) for name in labels)
        and (left.pieces, left.rope) == (right.pieces, right.rope)
        and all(
            is_same(ours, theirs)
            for row in range(left.batch)
            for ours, theirs in zip(row_of(left, row), row_of(right, row), strict=True)
        )
    )


# --- what a cache says of itself ---


def test_sizes(cache: KVCache):
    assert (len(cache), cache.batch, cache.slots, cache.layers) == (4, 4, 7, 3)
    assert cache.lengths.tolist() == list(LENGTHS)
    assert cache.is_real.sum().item() == sum(LENGTHS)
    assert cache.nbytes == 3 * 2 * (4 * 2 * 7 * 8) * 4
    assert repr(cache) == (
        "KVCache(batch=4, layers=3, kv_heads=2, head_dim=8, slots=[4, 7, 1, 5], dtype=torch.float32)"
    )


def test_token_ids_of_a_row_leave_padding_out(cache: KVCache):
    assert cache.row_token_ids(0) == [10000, 10001, 10002, 10003, 10099]
    assert cache.row_token_ids(2, with_pending=False) == [10200]


@pytest.mark.parametrize("padding", [-1, 0])
def test_positions_alone_say_which_slots_have_tokens(padding):
    cache = make_cache((4, 2), seed=1)
    token_ids = torch.where(cache.is_real, cache.token_ids, padding)
    token_ids[:, -1] = -1  # nobody knows the token, as of a slot that no text made
    cache = replace(cache, token_ids=token_ids)
    assert cache.row_token_ids(0) == [10000, 10001, 10002, -1, 10099]
    assert cache[[1, 0]].row_token_ids(0, with_pending=False) == [10100, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"token_ids": c.token_ids[:, 1:]}, r"token_ids has shape \(4, 6\), positions \(4, 7\)"),
        (lambda c: {"segments": c.segments[:3]}, r"segments has shape \(3, 7\)"),
        (lambda c: {"origins": c.origins.T}, r"origins has shape \(7, 4\)"),
        (lambda c: {"keys": c.keys[:2]}, "2 key layers, 3 value layers, 3 ropes"),
        (lambda c: {"values": c.values[:2]}, "3 key layers, 2 value layers, 3 ropes"),
        (lambda c: {"rope": c.rope[:1]}, "3 key layers, 3 value layers, 1 ropes"),
        (lambda c: {"keys": (c.keys[0], c.keys[1][:, :, 1:], c.keys[2])}, r"layer 1: keys \(4, 2, 6, 8\)"),
        (lambda c: {"values": (*c.values[:2], c.values[2][:, :1])}, r"layer 2: .* values \(4, 1, 7, 8\)"),
        (lambda c: {"values": (c.values[0][0], *c.values[1:])}, "layer 0: "),
        (lambda c: {"keys": (c.keys[0].flatten(2), *c.keys[1:])}, "layer 0: "),
        (lambda c: {"pending": c.pending[1:]}, r"pending has shape \(3,\), the batch is 4"),
        (lambda c: {"pending_position": c.pending_position[1:]}, "the batch is 4"),
        (lambda c: {"pieces": c.pieces[1:]}, "pieces for 3 rows, the batch is 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(cache: KVCache, change, message: str):
    with pytest.raises(CacheError, match=message):
        replace(cache, **change(cache))


def test_values_may_be_wider_than_keys(cache: KVCache):
    wide = replace(cache, values=tuple(torch.cat([v, v], dim=-1) for v in cache.values))
    assert wide[1].values[0].shape == (1, 2, 7, 16)


def test_a_cache_cannot_be_assigned_to(cache: KVCache):
    with pytest.raises(AttributeError):
        cache.pending = cache.pending + 1  # type: ignore[misc]


# --- rows ---


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [1]),
        (-1, [3]),
        ([2, 0], [2, 0]),
        ([3, 3, -4], [3, 3, 0]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [3, 1]),
    ],
)
def test_row_selection(cache: KVCache, rows, expected: list[int]):
    part = cache[rows]
    assert part.lengths.tolist() == [LENGTHS[row] for row in expected]
    assert part.slots == max(LENGTHS[row] for row in expected)  # padding that none of them needs is cut off
    for place, row in enumerate(expected):
        assert part.row_token_ids(place) == cache.row_token_ids(row)
        assert part.pieces[place] == cache.pieces[row]
        assert int(part.pending_position[place]) == LENGTHS[row]
        for ours, theirs in zip(row_of(part, place), row_of(cache, row), strict=True):
            assert is_same(ours, theirs)
        for name in ("positions", "segments", "origins"):
            own = getattr(part, name)[place][part.is_real[place]]
            assert torch.equal(own, getattr(cache, name)[row][cache.is_real[row]])


@pytest.mark.parametrize("rows", [4, -5, [0, 4], [], slice(4, 9)])
def test_rows_that_are_not_there_are_refused(cache: KVCache, rows):
    with pytest.raises(CacheError, match=r"are not in a batch of 4"):
        cache[rows]


def test_iteration_gives_each_row_once(cache: KVCache):
    rows = list(cache)
    assert [row.batch for row in rows] == [1] * 4
    assert [row.slots for row in rows] == list(LENGTHS)
    assert is_equal(KVCache.concat(rows), cache)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
@limits(max_examples=25, deadline=None)
def test_concat_then_select_gives_the_parts_back(lengths: list[int], data: st.DataObject):
    caches = [make_cache([n], seed=n + i) for i, n in enumerate(lengths)]
    joined = KVCache.concat(caches)
    assert joined.slots == max(lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    assert all(is_equal(row, caches[i]) for i, row in zip(order, joined[order], strict=True))


def test_concat_pads_on_the_left_with_labels_that_say_so():
    joined = KVCache.concat([make_cache([2], seed=1), make_cache([4, 3], seed=2)])
    assert joined.positions.tolist() == [[PAD, PAD, 0, 1], [0, 1, 2, 3], [PAD, 0, 1, 2]]
    for labels in (joined.token_ids, joined.segments, joined.origins):
        assert (labels[~joined.is_real] == PAD).all()
        assert (labels[joined.is_real] != PAD).all()
    for tensor in (*joined.keys, *joined.values):
        assert (tensor[0, :, :2] == 0).all()


def test_a_cache_without_slots_is_a_cache_and_joins_others():
    empty = make_cache([0], seed=3)
    assert (empty.slots, empty.lengths.tolist(), empty.checksums()) == (0, [0], ["0" * 16])
    joined = KVCache.concat([empty, make_cache([2], seed=1)])
    assert joined.lengths.tolist() == [0, 2]
    assert joined[0].slots == 0


def test_concat_refuses_nothing_and_other_models(cache: KVCache):
    with pytest.raises(CacheError, match="nothing to concatenate"):
        KVCache.concat([])
    with pytest.raises(CacheError, match="different models"):
        KVCache.concat([cache, make_cache([2], rope=NO_ROPE)])


def test_pad_left_leaves_long_enough_tensors_alone():
    tensor = torch.ones(2, 3)
    assert pad_left(tensor, 3, 0, 1) is tensor
    assert pad_left(tensor, 2, 0, 1) is tensor
    assert pad_left(tensor, 5, 9, 1).tolist() == [[9, 9, 1, 1, 1]] * 2


def test_to_keeps_everything(cache: KVCache):
    assert is_equal(cache.to("cpu"), cache)


def test_no_operation_changes_a_cache_or_shares_its_memory(cache: KVCache):
    before = copied(cache)
    parts = [cache[1], cache[[0, 0]], cache[:], KVCache.concat([cache]), Patch(strength=0).apply(cache, cache)]
    assert is_same(tensors(cache), before)
    for part in parts:
        for tensor in (*part.keys, *part.values, part.token_ids):
            tensor.fill_(-77)
    assert is_same(tensors(cache), before)


# --- checksums ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_checksums_depend_on_neither_padding_nor_batch(dtype: torch.dtype):
    cache = make_cache(LENGTHS, seed=1, dtype=dtype)
    sums = cache.checksums()
    assert len(set(sums)) == 4
    assert all(len(s) == 16 and int(s, 16) >= 0 for s in sums)
    assert [row.checksums()[0] for row in cache] == sums
    wider = KVCache.concat([make_cache([12], seed=2, dtype=dtype), cache])
    assert wider.checksums()[1:] == sums
    assert cache[[2, 0]].checksums() == [sums[2], sums[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_bit_in_any_layer_part_head_and_slot_changes_one_row_s_checksum(dtype: torch.dtype):
    cache = make_cache((3, 2), seed=1, dtype=dtype, kv_heads=2, head_dim=8)
    sums, width = cache.checksums(), 8 * cache.keys[0].element_size()
    whole = {64: torch.int64, 32: torch.int32, 16: torch.int16}[width]
    seen = set()
    for part in ("keys", "values"):
        for layer in range(3):
            for head, slot, dim in ((0, 0, 0), (1, 2, 7), (0, 1, 3)):
                for bit in (0, width // 2, width - 1):
                    tensor = getattr(cache, part)[layer].clone()
                    flipped = tensor.view(whole)
                    mask = torch.tensor(1, dtype=torch.int64) << bit
                    flipped[0, head, slot, dim] ^= mask.to(whole)
                    changed = list(getattr(cache, part))
                    changed[layer] = tensor
                    now = replace(cache, **{part: tuple(changed)}).checksums()
                    assert now[0] != sums[0], (part, layer, head, slot, dim, bit)
                    assert now[1] == sums[1]
                    seen.add(now[0])
    assert len(seen) == 2 * 3 * 3 * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_taking_checksums_changes_nothing(dtype: torch.dtype):
    cache = make_cache((3, 2), seed=1, dtype=dtype)
    before = copied(cache)
    assert cache.checksums() == cache.checksums()
    assert is_same(tensors(cache), before)


def test_padding_does_not_enter_checksums():
    cache = make_cache((5, 2), seed=1)
    values = tuple(v.clone() for v in cache.values)
    for v in values:
        v[1, :, :3] = 5.0
    assert replace(cache, values=values).checksums() == cache.checksums()


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("layer", range(3))
def test_swapping_two_slots_changes_the_checksum(part: str, layer: int):
    cache = make_cache((6,), seed=1)
    for a, b in ((0, 1), (0, 5), (2, 4)):
        order = torch.arange(6)
        order[[a, b]] = order[[b, a]]
        changed = list(getattr(cache, part))
        changed[layer] = changed[layer][:, :, order]
        assert replace(cache, **{part: tuple(changed)}).checksums() != cache.checksums()


def test_swapping_slots_of_the_same_content_in_another_order_changes_the_checksum():
    # Vectors that hold the same numbers, differently ordered: a weighted sum of bits would not see the swap.
    cache = make_cache((4,), seed=1)
    keys = [k.clone() for k in cache.keys]
    for slot in range(1, 4):
        keys[0][0, :, slot] = keys[0][0, :, 0].roll(slot, -1)
    before = replace(cache, keys=tuple(keys)).checksums()
    for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        order = torch.arange(4)
        order[[a, b]] = order[[b, a]]
        assert replace(cache, keys=(keys[0][:, :, order], *keys[1:])).checksums() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_turning_many_signs_at_once_changes_the_checksum(dtype: torch.dtype):
    cache = make_cache((4,), seed=1, dtype=dtype)
    sums = {cache.checksums()[0]}
    for dim in range(8):
        for slot in range(4):
            value = cache.values[1].clone()
            value[0, :, slot, dim] *= -1
            sums.add(replace(cache, values=(cache.values[0], value, cache.values[2])).checksums()[0])
    assert len(sums) == 1 + 8 * 4


def test_swapping_heads_layers_or_keys_with_values_changes_the_checksum():
    cache = make_cache((4,), seed=1)
    others = [
        replace(cache, keys=tuple(k.flip(1) for k in cache.keys)),
        replace(cache, keys=(cache.keys[1], cache.keys[0], cache.keys[2])),
        replace(cache, keys=cache.values, values=cache.keys),
        replace(cache, values=tuple(-v for v in cache.values)),
    ]
    sums = [c.checksums()[0] for c in (cache, *others)]
    assert len(set(sums)) == 5


def test_a_slot_of_zeros_counts():
    zero = make_cache((2,), seed=1, rope=ROPES)
    zero = replace(zero, keys=tuple(k * 0 for k in zero.keys), values=tuple(v * 0 for v in zero.values))
    longer = make_cache((3,), seed=1)
    longer = replace(longer, keys=tuple(k * 0 for k in longer.keys), values=tuple(v * 0 for v in longer.values))
    assert zero.checksums() != longer.checksums()

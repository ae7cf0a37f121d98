"""Patch: what may be asked for, and every splice against a slow implementation, slot by slot."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from core_caches import ABSOLUTE, NO_ROPE, copied, is_same, make_cache, row_of, slow_rotation, tensors
from kvpatch.caches.kvcache import PAD, KVCache, Origin
from kvpatch.errors import CacheError, EmptySelection
from kvpatch.interventions.splice import counted_splice, splice
from kvpatch.specs.patch import Patch

EVERY_ALIGN = ("start", "end", "stretch", "replace", "append")
IN_PLACE = ("start", "end", "stretch")

# --- the patch as data ---


@pytest.mark.parametrize("align", ["replace", "append"])
@pytest.mark.parametrize(
    "subset", [{"layers": [0]}, {"layers": {"band": [0, 0.5]}}, {"kv_heads": [0]}, {"parts": "k"}, {"parts": "v"}]
)
def test_what_changes_the_number_of_slots_needs_everything(align: str, subset: dict[str, Any]):
    with pytest.raises(CacheError, match=f"align='{align}' changes the number of slots.*use align='start'"):
        Patch(align=align, **subset)


@pytest.mark.parametrize("align", ["replace", "append"])
def test_what_changes_the_number_of_slots_has_strength_1(align: str):
    with pytest.raises(CacheError, match="strength must be 1"):
        Patch(align=align, strength=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"align": "middle"},
        {"parts": "vk"},
        {"slots": "everything"},
        {"donor": "random"},
        {"layer": [1]},
        {"layers": {"band": [0.5, 0.5]}},
        {"layers": {"band": [-0.1, 0.5]}},
        {"layers": {"band": [0.5, 1.1]}},
        {"slots": {"fraction": [0.6, 0.3]}},
        {"slots": {"fraction": [0, 1.2]}},
        {"slots": {"of": "nowhere"}},
        {"slots": {"keywords": ["(open"]}},
        {"strength": float("nan")},
        {"strength": float("inf")},
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(wrong: dict[str, Any]):
    with pytest.raises(CacheError, match=r"\APatch: [^\n]+\Z"):
        Patch(**wrong)


def test_a_patch_cannot_be_changed():
    with pytest.raises(ValidationError):
        Patch().strength = 0.5  # type: ignore[misc]


def test_ranges_tuples_and_lists_are_the_same_patch():
    patches = [Patch(layers=kind(range(3, 7)), slots=kind(range(2))) for kind in (range_of, tuple, list)]  # type: ignore[arg-type]
    assert len({p.sha256 for p in patches}) == 1
    assert patches[0].layers == [3, 4, 5, 6]
    assert patches[0] == patches[1] == patches[2]


def range_of(indices: range) -> range:
    return indices


def test_json_is_canonical():
    patch = Patch(strength=1, layers=range(2), align="start")
    assert patch.to_json() == (
        '{"align":"start","donor":"source","kv_heads":null,"layers":[0,1],"parts":"kv","rotate":true,"slots":"all",'
        '"strength":1.0}'
    )


def test_the_hash_is_the_same_tomorrow_and_the_json_s_alone():
    # Stored runs are compared by it: this number may change only with the format's version.
    assert Patch().sha256 == "8d45840b7991e5612f7ad20c64dae6d8dd8720160fcc3d20aefe4437acce451a"
    assert Patch(layers=[0]).sha256 != Patch(layers=[1]).sha256


PATCHES = [
    Patch(),
    Patch(align="replace"),
    Patch(layers=range(16, 30), slots="body", parts="v", align="end", strength=0.5, rotate=False),
    Patch(layers={"band": (0.25, 0.5), "inverse": True}, kv_heads=(0, -1), slots=[0, -1]),
    Patch(
        slots={"of": "body", "without": "sinks", "fraction": (0, 0.25), "keywords": [r"\bI\b"], "matched_to": {}},
        donor="gaussian_fitted",
    ),
]


@pytest.mark.parametrize("patch", PATCHES, ids=range(len(PATCHES)))
def test_patches_survive_yaml_and_json(patch: Patch):
    by_yaml = Patch.model_validate(yaml.safe_load(yaml.safe_dump(patch.model_dump(mode="json"))))
    by_json = Patch.model_validate(json.loads(patch.to_json()))
    assert by_yaml == by_json == patch
    assert by_yaml.sha256 == by_json.sha256 == patch.sha256


def test_only_a_whole_replacement_by_the_source_is_a_full_swap():
    assert Patch(align="replace").is_full_swap
    for other in ({}, {"align": "append"}, {"align": "replace", "slots": "body"}):
        assert not Patch(**other).is_full_swap
    assert not Patch(align="replace", donor="shuffle_values").is_full_swap


# --- an independent, slow splice ---

Pairs = list[tuple[int | None, int | None]]  # (target slot, source slot) of every slot of the result


def slow_pairs(align: str, source: list[int], target: list[int], length: int) -> Pairs:
    """The documented alignment of one row, as pairs of slots of the row (padding not counted)."""
    own = list(range(length))
    if align == "append":
        return [(t, None) for t in own] + [(None, s) for s in source]
    if align == "replace":
        out: Pairs = []
        for t in own:
            if t == min(target):
                out += [(None, s) for s in source]
            if t not in target:
                out.append((t, None))
        return out
    lands: dict[int, int] = {}
    n, m = len(source), len(target)
    for i in range(m):
        if align == "start" and i < n:
            lands[target[i]] = source[i]
        if align == "end" and i < n:
            lands[target[m - 1 - i]] = source[n - 1 - i]
        if align == "stretch" and n:
            lands[target[i]] = source[round(i * (n - 1) / max(1, m - 1))]
    return [(t, lands.get(t)) for t in own]


def slow_slots(slots: Any, cache: KVCache, row: int) -> list[int]:
    length = int(cache.lengths[row])
    segments = cache.segments[row, cache.slots - length :].tolist()
    if slots == "all":
        return list(range(length))
    if slots == "body":
        return [i for i in range(length) if segments[i] == 2]
    if slots == "last":
        return [length - 1]
    return sorted({i % length for i in slots})


def slow_splice(patch: Patch, source: KVCache, target: KVCache) -> list[dict[str, Any]]:
    """Per row: keys and values [layers][kv_heads, slots, head_dim] in float64, and every label."""
    rows = []
    for row in range(target.batch):
        donor = row if source.batch > 1 else 0
        length, first = int(target.lengths[row]), target.slots - int(target.lengths[row])
        donor_first = source.slots - int(source.lengths[donor])
        pairs = slow_pairs(
            patch.align, slow_slots(patch.slots, source, donor), slow_slots(patch.slots, target, row), length
        )
        old = target.positions[row, first:].tolist()
        if patch.align in ("replace", "append"):
            positions = [old[0] + i for i in range(len(pairs))]
            pending = old[0] + len(pairs)
        else:
            positions, pending = old, int(target.pending_position[row])
        own_k, own_v = row_of(target, row)
        put_k, put_v = row_of(source, donor)
        layers = range(target.layers) if patch.layers is None else patch.layers
        heads = range(2) if patch.kv_heads is None else patch.kv_heads
        keys, values = [], []
        for layer, rope in enumerate(target.rope):
            k = torch.zeros(2, len(pairs), 8, dtype=torch.float64)
            v = torch.zeros(2, len(pairs), 8, dtype=torch.float64)
            for head, (at, (t, s)) in product(range(2), enumerate(pairs)):
                if t is not None:
                    k[head, at] = slow_rotation(own_k[layer][head, t], positions[at] - old[t], rope)
                    v[head, at] = own_v[layer][head, t].double()
                if s is not None and layer in layers and head in heads:
                    came_from = int(source.positions[donor, donor_first + s])
                    turn = positions[at] - came_from if patch.rotate else 0
                    new_k = slow_rotation(put_k[layer][head, s], turn, rope)
                    new_v = put_v[layer][head, s].double()
                    x = patch.strength
                    if "k" in patch.parts:
                        k[head, at] = new_k if t is None else (1 - x) * k[head, at] + x * new_k
                    if "v" in patch.parts:
                        v[head, at] = new_v if t is None else (1 - x) * v[head, at] + x * new_v
            keys.append(k)
            values.append(v)
        is_all = patch.parts == "kv" and patch.strength == 1 and set(layers) == {0, 1, 2} and set(heads) == {0, 1}
        has_effect = patch.strength != 0 and len(list(layers)) > 0 and len(list(heads)) > 0
        labels = []
        for t, s in pairs:
            own = None if t is None else (target, row, first + t, target.pieces[row][t])
            put = None if s is None else (source, donor, donor_first + s, source.pieces[donor][s])
            named = put if put and (own is None or is_all) else own
            placed = own or put
            assert named is not None
            assert placed is not None
            labels.append(
                {
                    "token": int(named[0].token_ids[named[1], named[2]]),
                    "piece": named[3],
                    "segment": int(placed[0].segments[placed[1], placed[2]]),
                    "origin": int(Origin.patched if put and has_effect else Origin.own),
                }
            )
        rows.append({"keys": keys, "values": values, "positions": positions, "pending": pending, "labels": labels})
    return rows


def check_against_slow(patch: Patch, source: KVCache, target: KVCache, atol: float = 1e-12) -> KVCache:
    before = copied(source), copied(target)
    result, expected = patch.apply(source, target), slow_splice(patch, source, target)
    assert is_same(tensors(source), before[0])
    assert is_same(tensors(target), before[1])
    assert torch.equal(result.pending, target.pending)
    assert result.rope == target.rope
    assert result.slots == max(len(want["positions"]) for want in expected)
    for row, want in enumerate(expected):
        keys, values = row_of(result, row)
        real = result.is_real[row]
        assert result.positions[row][real].tolist() == want["positions"]
        assert int(result.pending_position[row]) == want["pending"]
        assert result.token_ids[row][real].tolist() == [x["token"] for x in want["labels"]]
        assert result.segments[row][real].tolist() == [x["segment"] for x in want["labels"]]
        assert result.origins[row][real].tolist() == [x["origin"] for x in want["labels"]]
        assert list(result.pieces[row]) == [x["piece"] for x in want["labels"]]
        for labels in (result.token_ids, result.segments, result.origins):
            assert (labels[row][~real] == PAD).all()
        for layer in range(target.layers):
            close(keys[layer], want["keys"][layer], atol)
            close(values[layer], want["values"][layer], atol)
    return result


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=0, atol=atol)


def caches(dtype: torch.dtype = torch.float64) -> tuple[KVCache, KVCache]:
    """Ragged source and target whose sequences start at various positions."""
    source = make_cache((6, 9, 5), seed=1, starts=(0, 3, 1), dtype=dtype)
    return source, make_cache((8, 5, 7), seed=2, starts=(0, 0, 4), dtype=dtype)


@pytest.mark.parametrize("slots", ["all", "body", "last", [0, 2, -1]], ids=str)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_every_align_matches_the_slow_splice(align: str, rotate: bool, slots: Any):
    check_against_slow(Patch(align=align, rotate=rotate, slots=slots), *caches())


@pytest.mark.parametrize("parts", ["k", "v", "kv"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("align", IN_PLACE)
def test_strengths_and_parts_match_the_slow_splice(align: str, strength: float, parts: str):
    check_against_slow(Patch(align=align, strength=strength, parts=parts, slots="body"), *caches())


@pytest.mark.parametrize("layers", [None, [1], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("kv_heads", [None, [1], [0, 1]], ids=str)
def test_subsets_of_layers_and_heads_match_the_slow_splice(layers: list[int] | None, kv_heads: list[int] | None):
    check_against_slow(Patch(layers=layers, kv_heads=kv_heads), *caches())


@given(
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.sampled_from(EVERY_ALIGN),
    st.booleans(),
)
@limits(max_examples=30, deadline=None)
def test_ragged_rows_match_the_slow_splice(
    source: list[int], target: list[int], starts: list[int], align: str, rotate: bool
):
    ours = make_cache(source, seed=3, starts=starts, dtype=torch.float64)
    theirs = make_cache(target, seed=4, starts=starts[::-1], dtype=torch.float64)
    check_against_slow(Patch(align=align, rotate=rotate), ours, theirs)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_stored_types_match_the_slow_splice_to_their_precision(align: str, dtype: torch.dtype, atol: float):
    result = check_against_slow(Patch(align=align), *caches(dtype), atol=atol)
    assert all(t.dtype == dtype for t in (*result.keys, *result.values))


@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_a_source_of_one_row_serves_every_target_row(align: str):
    source, target = caches()
    result = check_against_slow(Patch(align=align), source[1], target)
    repeated = Patch(align=align).apply(source[[1, 1, 1]], target)
    assert is_same(tensors(result), tensors(repeated))


# --- identities ---


@pytest.mark.parametrize("align", [*IN_PLACE, "replace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_swap_changes_no_bit(align: str, dtype: torch.dtype):
    _, target = caches(dtype)
    result = Patch(align=align).apply(target, target)
    assert result.checksums() == target.checksums()
    assert torch.equal(result.positions, target.positions)
    assert torch.equal(result.token_ids, target.token_ids)
    assert result.pieces == target.pieces


def test_a_full_swap_is_the_source_with_the_target_s_pending_token():
    source, target = make_cache((6, 4), seed=1), make_cache((3, 8), seed=2)
    result = Patch(align="replace").apply(source, target)
    assert result.checksums() == source.checksums()
    assert torch.equal(result.token_ids, source.token_ids)
    assert torch.equal(result.pending, target.pending)
    assert result.pending_position.tolist() == [6, 4]


@pytest.mark.parametrize("align", IN_PLACE)
def test_strength_0_changes_no_bit_and_no_label(align: str):
    source, target = caches(torch.float32)
    result = Patch(align=align, strength=0).apply(source, target)
    assert result.checksums() == target.checksums()
    assert torch.equal(result.origins, target.origins)
    assert torch.equal(result.token_ids, target.token_ids)


@pytest.mark.parametrize("align", IN_PLACE)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_keys_then_values_is_both(align: str, strength: float):
    source, target = caches()
    whole = Patch(align=align, strength=strength).apply(source, target)
    keys = Patch(align=align, strength=strength, parts="k").apply(source, target)
    both = Patch(align=align, strength=strength, parts="v").apply(source, keys)
    assert is_same([*both.keys, *both.values], [*whole.keys, *whole.values])
    for row in range(target.batch):
        assert is_same(row_of(keys, row)[1], row_of(target, row)[1])


@pytest.mark.parametrize("align", IN_PLACE)
def test_layer_by_layer_and_head_by_head_is_all_at_once(align: str):
    source, target = caches()
    mixed = target
    for layer, head in product(range(3), range(2)):
        mixed = Patch(layers=[layer], kv_heads=[head], align=align).apply(source, mixed)
    whole = Patch(align=align).apply(source, target)
    assert is_same([*mixed.keys, *mixed.values], [*whole.keys, *whole.values])


@pytest.mark.parametrize("align", EVERY_ALIGN)
@pytest.mark.parametrize("donor", ["source", "shuffle_values", "shuffle_rerotate", "gaussian_isotropic"])
def test_a_row_does_not_depend_on_its_batch(align: str, donor: Any):
    source, target = caches(torch.float32)
    patch = Patch(align=align, donor=donor)
    together = splice(patch, source, target, seed=[5, 6, 7])
    alone = [splice(patch, source[i], target[i], seed=5 + i) for i in range(3)]
    assert together.checksums() == [row.checksums()[0] for row in alone]


@pytest.mark.parametrize("align", IN_PLACE)
def test_a_moved_key_scores_as_it_did_when_the_query_moves_along(align: str):
    """The point of `rotate`: only relative positions count."""
    source, target = (
        make_cache((4,), seed=1, dtype=torch.float64),
        make_cache((4,), seed=2, starts=(9,), dtype=torch.float64),
    )
    result = Patch(align=align).apply(source, target)
    query = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer, rope in enumerate(source.rope):
        at_source = source.keys[layer] @ slow_rotation(query, 4, rope)
        at_target = result.keys[layer] @ slow_rotation(query, 13, rope)
        assert torch.allclose(at_source, at_target, atol=1e-12)
    kept = Patch(align=align, rotate=False).apply(source, target)
    assert is_same(list(kept.keys), list(source.keys))
    assert kept.positions.tolist() == [[9, 10, 11, 12]]


# --- prompts of one token have no cached slot ---


@pytest.mark.parametrize("align", IN_PLACE)
@pytest.mark.parametrize("lengths", [((0,), (3,)), ((3,), (0,)), ((0, 2), (3, 0))], ids=str)
def test_an_empty_row_gives_nothing_and_takes_nothing_in_place(align: str, lengths):
    source, target = make_cache(lengths[0], seed=1), make_cache(lengths[1], seed=2)
    with pytest.raises(EmptySelection, match=r"slots 'all' find no slot in row 0 of the (source|target)"):
        Patch(align=align).apply(source, target)
    result, touched = counted_splice(Patch(align=align), source, target, may_be_empty=True)
    assert result.checksums() == target.checksums()
    assert torch.equal(result.positions, target.positions)
    assert touched.slots == (0,) * target.batch


def test_appending_to_an_empty_row_starts_where_its_pending_token_stood():
    source = make_cache((2, 2), seed=1)
    for lengths in ((0, 3), (0, 0)):
        result = Patch(align="append").apply(source, make_cache(lengths, seed=2))
        assert result[0].positions.tolist() == [[0, 1]]
        assert int(result.pending_position[0]) == 2


@pytest.mark.parametrize("align", ["append", "replace"])
def test_an_empty_row_is_neither_appended_nor_put_in_place_of_another(align: str):
    source, target = make_cache((0,), seed=1), make_cache((3,), seed=2)
    with pytest.raises(EmptySelection, match="in row 0 of the source"):
        Patch(align=align).apply(source, target)
    assert counted_splice(Patch(align=align), source, target, may_be_empty=True)[0].checksums() == target.checksums()


# --- refusals ---


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch(layers=[3]), r"layer 3 does not exist: there are 3 \(0 to 2\)"),
        (Patch(layers=[-4]), "layer -4 does not exist"),
        (Patch(kv_heads=[2]), r"KV head 2 does not exist: there are 2 \(0 to 1\)"),
        (Patch(slots=[5]), r"slot 5 does not exist: there are 5 \(0 to 4\)"),
        (Patch(slots=[-6]), "slot -6 does not exist"),
    ],
)
def test_what_is_out_of_range_is_refused(patch: Patch, message: str):
    with pytest.raises(CacheError, match=message):
        patch.apply(*caches())


def test_replacing_nothing_is_refused():
    source, target = make_cache((6,), seed=1), make_cache((3,), seed=2, segments=[[0, 1, 3]])
    with pytest.raises(CacheError, match="no slot to replace"):
        Patch(align="replace", slots="body").apply(source, target)


def test_caches_that_do_not_fit_are_refused():
    target = make_cache((4, 4, 4))
    with pytest.raises(CacheError, match="source batch of 2 does not fit a target batch of 3"):
        Patch().apply(make_cache((4, 4)), target)
    for other in ({"rope": NO_ROPE}, {"kv_heads": 1}, {"head_dim": 16}):
        with pytest.raises(CacheError, match="models of different shape"):
            Patch().apply(make_cache((4, 4, 4), **other), target)
    with pytest.raises(CacheError, match="2 seeds for a batch of 3"):
        splice(Patch(), target, target, seed=[1, 2])


def test_absolute_positions_allow_only_patches_that_move_nothing():
    source, target = make_cache((4,), seed=1, rope=ABSOLUTE), make_cache((4,), seed=2, rope=ABSOLUTE)
    assert Patch(align="replace").apply(source, target).checksums() == source.checksums()
    with pytest.raises(CacheError, match="can't be moved"):
        Patch(align="append").apply(source, target)
    with pytest.raises(CacheError, match="can't be moved"):
        Patch(align="end").apply(make_cache((6,), seed=1, rope=ABSOLUTE), target)


def test_words_of_the_source_are_put_at_their_places_in_a_target_that_has_none():
    pieces = [("<s>", "[", " watch", " my", "self", " now", "]", ">")]
    source = make_cache([8], seed=1, pieces=pieces)
    target = make_cache([8], seed=2, pieces=[("<s>", "[", " bread", " rises", " by", " yeast", "]", ">")])
    query = {"of": "body", "in_source": True, "keywords": ["myself"]}
    mixed = Patch(slots=query, rotate=False).apply(source, target)
    for layer in range(source.layers):
        changed = (mixed.values[layer] != target.values[layer]).any(dim=(0, 1, 3))
        assert changed.nonzero().flatten().tolist() == [3, 4]
        assert torch.equal(mixed.values[layer][:, :, 3:5], source.values[layer][:, :, 3:5])
    others = Patch(slots={"of": "body", "in_source": True, "matched_to": query}, rotate=False)
    random = others.apply(source, target, seed=3)
    changed = (random.values[0] != target.values[0]).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert len(changed) == 2
    assert not {3, 4} & set(changed)

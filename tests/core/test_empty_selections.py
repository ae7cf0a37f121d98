"""A selection that finds nothing is an error that names it and the row; and every change counts what it touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core_caches import ABSOLUTE, HEAD_DIM, KV_HEADS, LAYERS, is_same, make_cache
from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import Touched, chosen_layers
from kvpatch.errors import CacheError, EmptySelection
from kvpatch.interventions.cache_steering import counted_steering, steer_cache
from kvpatch.interventions.reshape import counted_reshaping
from kvpatch.interventions.splice import counted_splice
from kvpatch.specs.interventions import CacheSteering, Reshape
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import LayerBand, SlotQuery

IN_PLACE = ("start", "end", "stretch")
EVERY_ALIGN = (*IN_PLACE, "replace", "append")
ZEBRA = SlotQuery(keywords=["zebra"])


def of_words(*rows: str, seed: int = 0) -> KVCache:
    """A cache of a row a text, a slot a word, all of them body; words are one space apart."""
    pieces = [[f" {word}" for word in row.split()] for row in rows]
    return make_cache([len(row) for row in pieces], seed=seed, pieces=pieces, segments=[[2] * len(r) for r in pieces])


NOTHING: list[Any] = [
    "bos",
    "template",
    "trailer",
    ZEBRA,
    SlotQuery(keywords=[]),
    SlotQuery(fraction=(0, 0.01)),
    SlotQuery(of="trailer"),
    SlotQuery(without="all"),
    SlotQuery(matched_to=ZEBRA),
    [],
]


@pytest.mark.parametrize("slots", NOTHING, ids=str)
@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_slots_that_neither_side_has_are_an_error(align: str, slots: Any):
    source, target = of_words("one two three four", seed=1), of_words("five six seven", seed=2)
    with pytest.raises(EmptySelection, match=r"\Aslots .* find no slot in row 0 of the (source|target), so [^\n]*\Z"):
        Patch(slots=slots, align=align).apply(source, target)


@pytest.mark.parametrize("align", [*IN_PLACE, "replace"])
def test_slots_that_one_side_has_are_an_error_too(align: str):
    has, has_not = of_words("one two three", seed=1), of_words("five six seven", seed=2)
    patch = Patch(slots=SlotQuery(keywords=["two"]), align=align)
    with pytest.raises(EmptySelection, match=r"\"keywords\": \[\"two\"\].* in row 0 of the target"):
        patch.apply(has, has_not)
    with pytest.raises(EmptySelection, match="in row 0 of the source"):
        patch.apply(has_not, has)


def test_what_is_appended_need_not_be_in_the_target():
    has, has_not = of_words("one two three", seed=1), of_words("five six", seed=2)
    for slots in (SlotQuery(keywords=["two"]), [1, 2], SlotQuery(keywords=["two"], in_source=True)):
        mixed, touched = counted_splice(Patch(slots=slots, align="append"), has, has_not)
        count = 2 if isinstance(slots, list) else 1
        assert (mixed.slots, touched.slots) == (2 + count, (count,))
        assert mixed.token_ids[0, -1] == has.token_ids[0, 1 if count == 1 else 2]
    with pytest.raises(EmptySelection, match="row 0 of the source"):
        Patch(slots=SlotQuery(keywords=["five"]), align="append").apply(has, has_not)


@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_one_row_without_is_named_among_others_that_have(align: str):
    source = of_words("a self b c", "a self b c", "a b", seed=1)
    target = of_words("self d e", "self d", "self d e f", seed=2)
    with pytest.raises(EmptySelection, match="in row 2 of the source"):
        Patch(slots=SlotQuery(keywords=["self"]), align=align).apply(source, target)


def test_a_selection_made_in_the_source_that_finds_nothing_there_is_an_error():
    source, target = of_words("a b c", seed=1), of_words("d e f", seed=2)
    with pytest.raises(EmptySelection, match="in row 0 of the source"):
        Patch(slots=SlotQuery(of="body", in_source=True, keywords=["zebra"])).apply(source, target)


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ({"layers": []}, r"layers \[\] holds no layer of a model with 3 layers"),
        ({"kv_heads": []}, r"kv_heads \[\] holds none of a layer's 2 KV heads"),
        ({"layers": LayerBand(band=(0.4, 0.45))}, r"band \[0.4, 0.45\] holds no layer of a model with 3 layers"),
        ({"layers": LayerBand(band=(0, 1), inverse=True)}, r"the inverse of band \[0.0, 1.0\] holds no layer"),
    ],
)
@pytest.mark.parametrize("strength", [0, 1])
def test_no_layer_and_no_head_are_errors(subset: dict[str, Any], words: str, strength: float):
    source, target = make_cache((4, 5), seed=1), make_cache((5, 3), seed=2)
    patch = Patch(strength=strength, **subset)
    with pytest.raises(EmptySelection, match=words):
        patch.apply(source, target)
    mixed, touched = counted_splice(patch, source, target, may_be_empty=True)
    assert mixed.checksums() == target.checksums()
    assert [touched.of_row(row) for row in range(2)] == [(0, 0, 0)] * 2


def test_strength_0_of_something_is_a_control_and_counts_what_it_reached():
    source, target = make_cache((6, 7), seed=1), make_cache((7, 5), seed=2)
    mixed, touched = counted_splice(Patch(strength=0, slots="body"), source, target)
    assert mixed.checksums() == target.checksums()
    assert touched == Touched((2, 1), LAYERS, KV_HEADS)
    with pytest.raises(EmptySelection):
        Patch(strength=0, slots=ZEBRA).apply(source, target)


def test_a_source_too_short_to_fill_the_target_lands_as_far_as_it_goes():
    source, target = of_words("one two", seed=1), of_words("three four five six", seed=2)
    for align, count in (("start", 2), ("end", 2), ("stretch", 4), ("replace", 2), ("append", 2)):
        _, touched = counted_splice(Patch(align=align), source, target)
        assert touched == Touched((count,), LAYERS, KV_HEADS), align


@pytest.mark.parametrize("align", EVERY_ALIGN)
def test_rows_that_find_nothing_stay_as_they_are_where_that_may_be(align: str):
    source = of_words("a self b c", "a b c", "self x self", seed=1)
    target = of_words("self d e", "self d", "d e f", seed=2)
    patch = Patch(slots=SlotQuery(keywords=["self"]), align=align)
    mixed, touched = counted_splice(patch, source, target, may_be_empty=True)
    assert touched.slots == ((1, 0, 0) if align != "append" else (1, 0, 2))
    for row, count in enumerate(touched.slots):
        assert (mixed[row].checksums() == target[row].checksums()) == (count == 0)
        assert touched.of_row(row) == ((count, LAYERS, KV_HEADS) if count else (0, 0, 0))


# --- counts ---


def changed(mixed: KVCache, target: KVCache) -> list[tuple[int, int, int]]:
    """Slots, layers and heads of each row in which keys or values differ, found by looking."""
    parts = [(mixed.keys, target.keys), (mixed.values, target.values)]
    keys, values = (torch.stack([(x != y).any(dim=3) for x, y in zip(a, b, strict=True)]) for a, b in parts)
    differ = (keys | values) & target.is_real[:, None]  # [layers, batch, heads, slots]
    axes = ((0, 1), (1, 2), (0, 2))  # of [layers, heads, slots]: what is left is slots, layers, heads
    counts = [[int(differ[:, row].any(dim=of).sum()) for of in axes] for row in range(mixed.batch)]
    return [(slots, layers, heads) for slots, layers, heads in counts]


@pytest.mark.parametrize(
    "patch",
    [
        Patch(slots="body", layers=LayerBand(band=(0, 0.5))),
        Patch(slots="body", layers=[0, 2], kv_heads=[1], parts="v"),
        Patch(slots=[0, -1], align="start", strength=0.5, parts="k"),
        Patch(slots=SlotQuery(of="body", fraction=(0, 0.5)), align="stretch"),
        Patch(slots=SlotQuery(of="body", matched_to=SlotQuery(of="last"))),
        Patch(slots="all", align="end"),
    ],
    ids=str,
)
def test_what_is_counted_is_what_changed(patch: Patch):
    source, target = make_cache((9, 6, 7), seed=1), make_cache((6, 8, 7), seed=2)
    mixed, touched = counted_splice(patch, source, target, seed=3)
    assert [touched.of_row(row) for row in range(3)] == changed(mixed, target)


def test_keyword_slots_are_counted_by_row():
    source = of_words("self a self b", "a self b c", seed=1)
    target = of_words("c self self d", "self self e", seed=2)
    _, touched = counted_splice(Patch(slots=SlotQuery(keywords=["self"])), source, target)
    assert touched == Touched((2, 1), LAYERS, KV_HEADS)
    matched = Patch(slots=SlotQuery(in_source=True, matched_to=SlotQuery(keywords=["self"])))
    assert counted_splice(matched, source, target)[1].slots == (2, 1)


def directions() -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    one = {layer: torch.ones(KV_HEADS, HEAD_DIM) for layer in range(LAYERS)}
    return one, one


@pytest.mark.parametrize("strength", [0, 2])
def test_steering_the_cache_counts_its_slots_and_refuses_none(strength: float):
    cache = make_cache((9, 6))
    _, touched = counted_steering(cache, CacheSteering(strength=strength, layers=[1]), directions(), [0, 1])
    assert touched == Touched((5, 2), 1, KV_HEADS)
    short = make_cache((3, 2), segments=[[0, 2, 3], [0, 2]])
    with pytest.raises(EmptySelection, match="'trailer' find no slot in row 1 of the target"):
        steer_cache(short, CacheSteering(strength=strength, slots="trailer"), directions(), [0, 1])
    with pytest.raises(EmptySelection, match="holds no layer"):
        steer_cache(cache, CacheSteering(strength=strength, layers=[]), directions(), [0, 1])


def test_reshaping_counts_its_window_and_refuses_no_layer():
    cache, giver = make_cache((9, 8), seed=1), make_cache((9, 8), seed=2)
    spec = Reshape(window=6, layers=[1])
    assert counted_reshaping(cache, giver, spec, [0, 1])[1] == Touched((6, 6), 1, KV_HEADS)
    with pytest.raises(EmptySelection, match="holds no layer"):
        counted_reshaping(cache, giver, Reshape(window=6, layers=[]), [0, 1])


def test_a_band_narrower_than_a_layer_is_empty_only_where_that_may_be():
    band = LayerBand(band=(0.1, 0.12))
    with pytest.raises(EmptySelection):
        chosen_layers(band, 4)
    assert chosen_layers(band, 4, may_be_empty=True) == []


# --- absolute positions ---


@pytest.mark.parametrize("align", IN_PLACE)
@pytest.mark.parametrize("donor", ["source", "shuffle_values", "shuffle_rerotate", "gaussian_fitted", "mean"])
def test_values_alone_move_to_any_position_where_keys_can_t(align: str, donor: Any):
    source, target = make_cache((9,), seed=1, rope=ABSOLUTE), make_cache((6,), seed=2, rope=ABSOLUTE)
    patch = Patch(parts="v", align=align, donor=donor)
    mixed = patch.apply(source, target, seed=3)
    assert is_same(list(mixed.keys), list(target.keys))
    assert not is_same(list(mixed.values), list(target.values))
    if donor == "source":
        taken = {"start": [0, 1, 2, 3, 4, 5], "end": [3, 4, 5, 6, 7, 8], "stretch": [0, 2, 3, 5, 6, 8]}[align]
        assert is_same(list(mixed.values), [v[:, :, taken] for v in source.values])


def test_values_are_those_of_a_rotary_model_s_patch():
    """A donor's values do not depend on how keys are turned."""
    for donor in ("shuffle_rerotate", "gaussian_fitted", "mean"):
        patch = Patch(parts="v", donor=donor)
        still, turning = (
            patch.apply(make_cache((9,), seed=1, **rope), make_cache((6,), seed=2, **rope), seed=3)
            for rope in ({"rope": ABSOLUTE}, {})
        )
        assert is_same(list(still.values), list(turning.values))


def test_keys_that_stay_or_keep_their_rotation_are_taken_where_positions_are_absolute():
    source, target = make_cache((9,), seed=1, rope=ABSOLUTE), make_cache((6,), seed=2, rope=ABSOLUTE)
    assert is_same(list(Patch(rotate=False).apply(source, target).keys), [k[:, :, 3:] for k in source.keys])
    assert is_same(list(Patch(align="start").apply(source, target).keys), [k[:, :, :6] for k in source.keys])
    assert is_same(list(Patch(strength=0).apply(source, target).keys), list(target.keys))
    for parts in ("k", "kv"):
        with pytest.raises(CacheError, match="can't be moved"):
            Patch(parts=parts).apply(source, target)

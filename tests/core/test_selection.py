"""Selections: which slots, layers and KV heads a name, a query or a list of indices means."""

from __future__ import annotations

import dataclasses
import re
from itertools import accumulate, chain, pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from core_caches import make_cache, usual_segments
from kvpatch.caches.kvcache import KVCache, Segment
from kvpatch.caches.selection import (
    SINKS,
    beside_mask,
    head_indices,
    layer_indices,
    mirrored_slots,
    slot_indices,
    slot_mask,
)
from kvpatch.errors import CacheError
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import LayerBand, SlotQuery

WORDS = ("<s>", "[INST]", " I", " watch", " my", "self", ", and", " your", "self", " in", " it", "[/IN", "ST]")


def prompt(pieces: tuple[str, ...] = WORDS) -> KVCache:
    return make_cache([len(pieces), 3], pieces=[pieces, ("a", "b", "c")])


def body_of(length: int) -> list[int]:
    return [i for i, s in enumerate(usual_segments(length)) if s == Segment.body]


# --- names and indices ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", list(range(9))),
        ("bos", [0]),
        ("template", [1]),
        ("body", [2, 3, 4, 5, 6]),
        ("trailer", [7, 8]),
        ("last", [8]),
        ("sinks", list(range(SINKS))),
    ],
)
def test_named_selections_count_from_the_first_real_slot(name: str, expected: list[int]):
    cache = make_cache([9, 12])
    assert slot_indices(cache, 0, name) == [slot + 3 for slot in expected]
    assert slot_indices(cache[0], 0, name) == expected
    assert slot_indices(cache[0], 0, Patch(slots=name)) == expected  # type: ignore[arg-type]


def test_segments_partition_the_row():
    cache = make_cache([9, 12, 1, 2, 4])
    for row in range(cache.batch):
        parts = [slot_indices(cache, row, segment.name) for segment in Segment]
        assert sorted(chain(*parts)) == slot_indices(cache, row, "all")


def test_short_rows_have_fewer_sinks_and_may_have_no_body():
    cache = make_cache([2, 0, 6])
    assert slot_indices(cache, 0, "sinks") == [4, 5]
    assert slot_indices(cache, 0, "body") == []
    assert slot_indices(cache, 1, "last") == slot_indices(cache, 1, "all") == slot_indices(cache, 1, "sinks") == []


def test_an_unknown_name_is_refused():
    with pytest.raises(CacheError, match="'head' is not a selection; use all, bos, template, body, trailer, last"):
        slot_indices(make_cache([4]), 0, "head")


def test_indices_are_sorted_counted_once_and_from_either_end():
    cache = make_cache([5, 8])
    assert slot_indices(cache, 0, [4, 0, -1, 0, -5]) == [3, 7]
    assert slot_indices(cache, 1, [-1, 2]) == [2, 7]
    assert slot_indices(cache, 0, []) == []


@pytest.mark.parametrize("index", [5, -6])
def test_indices_are_limited_by_the_row_not_by_its_padding(index: int):
    with pytest.raises(CacheError, match=rf"slot {index} does not exist: there are 5 \(0 to 4\)"):
        slot_indices(make_cache([5, 8]), 0, [index])


# --- fractions ---


@given(st.integers(0, 40), st.lists(st.floats(0.01, 0.99), max_size=4))
@limits(max_examples=30, deadline=None)
def test_adjacent_fractions_partition_the_body(length: int, cuts: list[float]):
    edges = [0.0, *sorted(set(cuts)), 1.0]
    cache = make_cache([length])
    parts = [slot_indices(cache, 0, SlotQuery(of="body", fraction=pair)) for pair in pairwise(edges)]
    assert list(chain(*parts)) == slot_indices(cache, 0, "body")


def test_quarters_and_the_middle_half():
    cache = make_cache([20])  # a body of 16 slots from slot 2 on
    share = {pair: slot_indices(cache, 0, SlotQuery(of="body", fraction=pair)) for pair in ((0, 0.25), (0.25, 0.75))}
    assert share[0, 0.25] == [2, 3, 4, 5]
    assert share[0.25, 0.75] == list(range(6, 14))


def test_without_is_taken_out_before_the_fraction():
    cache = make_cache([20])
    assert slot_indices(cache, 0, SlotQuery(of="body", without="sinks")) == list(range(4, 18))
    assert slot_indices(cache, 0, SlotQuery(of="body", without="sinks", fraction=(0, 0.5))) == list(range(4, 11))
    assert slot_indices(cache, 0, SlotQuery(of="all", without="body")) == [0, 1, 18, 19]


# --- keywords ---


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        (["myself"], [4, 5]),  # over a token boundary
        (["yourself"], [7, 8]),
        (["self"], [5, 8]),
        ([r"\bI\b"], [2]),
        ([r"\bi\b"], [2]),  # case does not count
        (["watch my"], [3, 4]),
        (["f, a"], [5, 6]),
        ([r"self", r"\bI\b"], [2, 5, 8]),
        (["nothing"], []),
        (["x*"], []),  # empty matches select nothing
        (["inst"], []),  # found, but in the template and the trailer
    ],
)
def test_keywords_select_the_slots_their_matches_overlap(keywords: list[str], expected: list[int]):
    assert slot_indices(prompt(), 0, SlotQuery(of="body", keywords=keywords)) == expected


def test_keywords_match_wherever_of_looks():
    assert slot_indices(prompt(), 0, SlotQuery(keywords=[r"\[/?INST\]"])) == [1, 11, 12]


def test_empty_pieces_do_not_shift_a_match():
    pieces = ("<s>", "", " a", "", "b", "", " c", "d", "e")
    found = slot_indices(prompt(pieces), 0, SlotQuery(keywords=["ab"]))
    assert {2, 4} <= set(found) <= {2, 3, 4}
    assert slot_indices(prompt(pieces), 0, SlotQuery(keywords=["c"])) == [6]


@given(
    st.lists(st.text("ab ", min_size=1, max_size=3), min_size=5, max_size=12),
    st.sampled_from(["ab", "a+", r"\bb", " "]),
)
@limits(max_examples=30, deadline=None)
def test_keywords_match_a_slow_search(pieces: list[str], pattern: str):
    ends = list(accumulate(map(len, pieces)))
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    hit = {owner[at] for m in re.finditer(pattern, "".join(pieces), re.IGNORECASE) for at in range(*m.span())}
    assert len(owner) == ends[-1]
    assert slot_indices(make_cache([len(pieces)], pieces=[pieces]), 0, SlotQuery(keywords=[pattern])) == sorted(hit)


# --- matched random slots ---

SELF = SlotQuery(of="body", keywords=["self"])


def test_matched_slots_are_as_many_and_none_of_them_selected():
    cache = prompt()
    wanted = slot_indices(cache, 0, SELF)
    chosen = {seed: slot_indices(cache, 0, SlotQuery(of="body", matched_to=SELF), seed) for seed in range(40)}
    for slots in chosen.values():
        assert len(slots) == len(set(slots)) == len(wanted)
        assert not set(slots) & set(wanted)
        assert set(slots) <= set(slot_indices(cache, 0, "body"))
    assert len({tuple(slots) for slots in chosen.values()}) > 1
    again = slot_indices(cache, 0, SlotQuery(of="body", matched_to=SELF), 7)
    assert again == chosen[7]


def test_matched_slots_do_not_depend_on_the_batch():
    cache, query = prompt(), SlotQuery(of="body", matched_to=SELF)
    wide = KVCache.concat([make_cache([20]), cache])
    padding = wide.slots - cache.slots
    assert slot_indices(wide, 1, query, 3) == [slot + padding for slot in slot_indices(cache, 0, query, 3)]


@pytest.mark.parametrize("where", [(0.0, 0.1), (0.5, 0.6), (0.9, 1.0)], ids=str)
def test_matched_slots_come_from_the_same_tenth_of_the_depth(where: tuple[float, float]):
    body = 100
    pieces = ["x"] * (body + 4)
    start = 2 + round(where[0] * body)
    marked = [start, start + 3, start + 8]
    for slot in marked:
        pieces[slot] = "self"
    cache = make_cache([len(pieces)], pieces=[pieces])
    seen = set()
    for seed in range(20):
        chosen = slot_indices(cache, 0, SlotQuery(of="body", matched_to=SELF), seed)
        assert all(start <= slot < start + 10 for slot in chosen)
        seen |= set(chosen)
    assert seen == set(range(start, start + 10)) - set(marked)  # and every free slot of it may come


def test_depth_is_that_of_the_whole_stretch_when_filters_narrow_the_pool():
    pieces = ["x"] * 104
    pieces[2 + 75] = "self"
    cache = make_cache([104], pieces=[pieces])
    for without, fraction in ((None, (0.5, 1.0)), ("sinks", None)):
        query = SlotQuery(of="body", without=without, fraction=fraction, matched_to=SELF)  # type: ignore[arg-type]
        assert all(72 <= slot_indices(cache, 0, query, seed)[0] < 82 for seed in range(20))
    # What is matched may lie outside the pool: the nearest tenth that has a free slot serves.
    late = SlotQuery(of="body", fraction=(0, 0.5), matched_to=SELF)
    assert all(42 <= slot_indices(cache, 0, late, seed)[0] < 52 for seed in range(20))
    trailer = SlotQuery(of="body", matched_to=SlotQuery(of="last"))
    assert all(92 <= slot_indices(cache, 0, trailer, seed)[0] < 102 for seed in range(20))


def test_matching_more_slots_than_are_free_is_refused():
    most = SlotQuery(of="body", fraction=(0, 0.9))
    with pytest.raises(CacheError, match="matched_to wants 8 other slots, and only 1 are free"):
        slot_indices(prompt(), 0, SlotQuery(of="body", matched_to=most))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 1])
def test_any_seed_is_taken(seed: int):
    assert len(slot_indices(prompt(), 0, SlotQuery(of="body", matched_to=SELF), seed)) == 2


def test_matching_nothing_selects_nothing():
    query = SlotQuery(of="body", matched_to=SlotQuery(keywords=["nothing"]))
    assert slot_indices(prompt(), 0, query) == []


# --- layers and heads ---

DEC7 = [(0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]


@pytest.mark.parametrize("count", [8, 12, 18, 30, 32, 80])
def test_the_protocol_s_bands_cover_every_layer_once(count: int):
    layers = chain(*(layer_indices(LayerBand(band=band), count) for band in DEC7))
    assert list(layers) == list(range(count))


def test_bands_of_32_layers_are_the_experiment_s():
    bands = [layer_indices(LayerBand(band=band), 32) for band in DEC7]
    assert bands == [list(range(*edges)) for edges in ((0, 4), (4, 8), (8, 16), (16, 24), (24, 32))]


@given(st.integers(1, 50), st.floats(0, 0.9), st.floats(0.05, 1))
@limits(max_examples=30, deadline=None)
def test_an_inverse_band_is_every_other_layer(count: int, low: float, width: float):
    band = (low, min(1.0, low + width))
    assume(round(band[0] * count) < round(band[1] * count))
    inside = layer_indices(LayerBand(band=band), count)
    outside = layer_indices(LayerBand(band=band, inverse=True), count)
    assert sorted(inside + outside) == list(range(count))


def test_a_band_without_a_layer_is_refused():
    with pytest.raises(CacheError, match=r"band \[0.0, 0.125\] holds no layer of a model with 3 layers"):
        layer_indices(LayerBand(band=(0, 0.125)), 3)


def test_layers_and_heads_by_index():
    assert layer_indices(None, 4) == head_indices(None, 4) == [0, 1, 2, 3]
    assert layer_indices([3, 0, -1], 4) == [0, 3]
    assert head_indices([-1], 3) == [2]
    for bad in (4, -5):
        with pytest.raises(CacheError, match=rf"layer {bad} does not exist: there are 4"):
            layer_indices([0, bad], 4)
        with pytest.raises(CacheError, match=rf"KV head {bad} does not exist: there are 4"):
            head_indices([0, bad], 4)


# --- selections made in the source ---


def test_a_selection_of_the_source_lands_at_the_same_relative_places():
    source, target = make_cache([25]), make_cache([14])  # bodies of 21 and 10
    there, here = slot_indices(source, 0, "body"), slot_indices(target, 0, "body")
    assert mirrored_slots(source, target, 0, "body", there[::20]) == [here[0], here[-1]]
    assert mirrored_slots(source, source, 0, "body", there[3:9]) == there[3:9]


@given(st.integers(6, 30), st.integers(6, 30), st.data())
def test_no_two_slots_of_the_source_land_on_one(long: int, short: int, data: st.DataObject):
    source, target = make_cache([long]), make_cache([short])
    there, here = slot_indices(source, 0, "body"), slot_indices(target, 0, "body")
    chosen = sorted(data.draw(st.sets(st.sampled_from(there), min_size=1, max_size=min(len(there), len(here)))))
    found = mirrored_slots(source, target, 0, "body", chosen)
    assert len(set(found)) == len(chosen)
    assert found == sorted(found)
    assert set(found) <= set(here)


def test_what_can_t_be_mirrored_is_refused():
    source, target = make_cache([25]), make_cache([6])
    with pytest.raises(CacheError, match="finds no slot"):
        mirrored_slots(source, target, 0, "body", [])
    with pytest.raises(CacheError, match="21 slots are chosen in the source, and the target's body has 2"):
        mirrored_slots(source, target, 0, "body", slot_indices(source, 0, "body"))


# --- slots compared with marked ones ---


MARKED = SlotQuery(of="body", keywords=["mark"])


def ranked(pieces: tuple[str, ...], ranks: list[int]) -> KVCache:
    """One row whose body is all of it but the first slot and the last, with tokens of these ranks."""
    segments = [Segment.template, *[Segment.body] * (len(pieces) - 2), Segment.trailer]
    cache = make_cache([len(pieces)], pieces=[pieces], segments=[segments])
    return dataclasses.replace(cache, token_ids=torch.tensor([ranks]))


def test_equally_frequent_slots_are_those_nearest_in_rank_where_places_are_alike():
    pieces = ("<s>", *["a"] * 4, "mark", "b", "c", *["d"] * 4, "</s>")
    cache = ranked(pieces, [1, *[9] * 4, 800, 10, 750, *[9] * 4, 2])
    query = SlotQuery(of="body", matched_to=MARKED, equally_frequent=True)
    assert slot_indices(cache, 0, query) == [7]
    assert all(slot_indices(cache, 0, query, seed) == [7] for seed in range(5))  # no chance has a part in it


def test_equally_frequent_slots_are_near_where_ranks_are_alike():
    pieces = ("<s>", *["a"] * 20, "mark", *["a"] * 2, "</s>")
    found = slot_indices(
        ranked(pieces, [7] * len(pieces)), 0, SlotQuery(of="body", matched_to=MARKED, equally_frequent=True)
    )
    assert found in ([20], [22])


def test_equally_frequent_goes_with_matched_to():
    with pytest.raises(CacheError, match="equally_frequent says how slots are matched; it goes with matched_to"):
        SlotQuery(of="body", equally_frequent=True)


def test_at_most_draws_so_many_by_the_seed_and_leaves_fewer_as_they_are():
    cache = ranked(("<s>", *["mark", "a"] * 6, "</s>"), [7] * 14)
    marks = slot_indices(cache, 0, MARKED)
    one = MARKED.model_copy(update={"at_most": 1})
    drawn = {tuple(slot_indices(cache, 0, one, seed)) for seed in range(40)}
    assert drawn == {(slot,) for slot in marks}
    assert slot_indices(cache, 0, MARKED.model_copy(update={"at_most": 6})) == marks


def test_marked_slots_are_compared_with_as_many_others_beyond_the_sinks_or_with_none():
    few = ("<s>", "a", "b", "c", "mark", "mark", "d", "</s>")
    cache = ranked(few, [7] * 8)
    assert not beside_mask(cache, MARKED).any()  # of the body's three others two are sinks
    more = ranked((*few[:-1], "e", "f", "</s>"), [7] * 10)
    found = beside_mask(more, MARKED)
    assert int(found.sum()) == 2
    assert not (found & slot_mask(more, MARKED)).any() and not (found & slot_mask(more, "sinks")).any()
    assert not beside_mask(ranked(("<s>", *["a"] * 6, "</s>"), [7] * 8), MARKED).any()
    assert not beside_mask(more, "body").any()


def test_what_came_later_is_no_part_of_an_older_selection_s_hash():
    assert set(SlotQuery().model_dump()) == {"of", "without", "fraction", "keywords", "matched_to", "in_source"}

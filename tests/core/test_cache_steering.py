"""M1, T and M2: joined prompts against a slow cut-and-turn, and directions added to a finished cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from core_caches import ABSOLUTE, LAYERS, ROPES, copied, is_same, make_cache, row_of, slow_rotation, tensors
from kvpatch import Patch
from kvpatch.caches.kvcache import PAD, KVCache, Segment
from kvpatch.engine.prefill import prefill
from kvpatch.errors import CacheError
from kvpatch.interventions.cache_steering import steer_cache
from kvpatch.interventions.joined import join_prompts, joined_cache, without_giver
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import CacheSteering, Joined

FOUR = pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "cohere"])
GIVERS = ("Watch how each word arrives.", "Say what it is like to choose the words you are choosing now.", "Look.")
RECEIVERS = ("Explain how bread rises.", "How?", "Which steps of a recipe can a beginner leave out safely?")
SEPARATOR = "\n\n"


# --- M1 and T -------------------------------------------------------------------------------------------------------


class Joining:
    """Givers and receivers of unequal lengths, in one padded batch."""

    def __init__(self, model, chat: bool | None = None):
        self.givers = [model.encode(text, chat=chat) for text in GIVERS]
        self.receivers = [model.encode(text, chat=chat) for text in RECEIVERS]
        self.separator = model.continuation_ids(SEPARATOR)
        pairs = zip(self.givers, self.receivers, strict=True)
        self.prompts = [join_prompts(g, r, self.separator, SEPARATOR) for g, r in pairs]
        self.joined = prefill(model.backbone, self.prompts)
        self.natural = prefill(model.backbone, self.receivers)
        lengths = [[len(p.token_ids) for p in side] for side in (self.givers, self.receivers)]
        assert all(len(set(side)) == 3 for side in lengths), "rows must be padded"


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def words_of(prompt: EncodedPrompt) -> list[int]:
    return [t for t, s in zip(prompt.token_ids, prompt.segments, strict=True) if s == Segment.body]


def slow_m1(model, giver: EncodedPrompt, receiver: EncodedPrompt, separator: list[int]) -> tuple[list, list]:
    """One row: read the joined tokens with transformers' own cache, cut, un-rotate, re-rotate, vector by vector."""
    start = next(i for i, segment in enumerate(receiver.segments) if segment == Segment.body)
    put_in = words_of(giver) + separator
    ids = [*receiver.token_ids[:start], *put_in, *receiver.token_ids[start:]][:-1]
    cache = DynamicCache()
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([ids]), use_cache=True, **{model.backbone._cache_argument: cache})
    kept = [at for at in range(len(ids)) if not start <= at < start + len(put_in)]
    assert [ids[at] for at in kept] == list(receiver.token_ids[:-1])
    keys, values = [], []
    for layer, rope in zip(cache.layers, model.geometry.rope, strict=True):
        rows = torch.empty(layer.keys.shape[1], len(kept), layer.keys.shape[3], dtype=torch.float64)
        for head, (new, old) in itertools.product(range(rows.shape[0]), enumerate(kept)):
            unturned = slow_rotation(layer.keys[0, head, old], -old, rope)
            rows[head, new] = slow_rotation(unturned, new, rope)
        keys.append(rows.float())
        values.append(layer.values[0][:, kept])
    return keys, values


@pytest.mark.model
@pytest.mark.parametrize("chat", [True, False])
@FOUR
def test_m1_equals_a_slow_cut_and_turn(architecture, chat, tiny):
    model = tiny(architecture)
    j = Joining(model, chat)
    cut = without_giver(j.joined, j.natural)
    for row, (giver, receiver) in enumerate(zip(j.givers, j.receivers, strict=True)):
        expected = slow_m1(model, giver, receiver, j.separator)
        for found, slow in zip(row_of(cut, row), expected, strict=True):
            for layer in range(model.geometry.layers):
                assert off(found[layer], slow[layer]) < 2e-5


@pytest.mark.model
@FOUR
def test_m1_holds_no_token_of_the_giver(architecture, tiny):
    j = Joining(tiny(architecture))
    cut = without_giver(j.joined, j.natural)
    for name in ("token_ids", "positions", "segments", "origins", "pending", "pending_position"):
        assert torch.equal(getattr(cut, name), getattr(j.natural, name)), name
    assert torch.equal(cut.lengths, j.natural.lengths)
    assert cut.pieces == j.natural.pieces
    assert [cut.row_token_ids(row) for row in range(3)] == [list(p.token_ids) for p in j.receivers]


@pytest.mark.model
@FOUR
def test_m1_differs_from_the_natural_target_where_the_giver_was_read_and_not_before(architecture, tiny):
    j = Joining(tiny(architecture))
    cut = without_giver(j.joined, j.natural)
    for row in range(3):
        segments = j.natural.segments[row][j.natural.is_real[row]]
        start = int((segments == Segment.body).nonzero()[0])
        assert start > 0
        for found, own in zip(row_of(cut, row), row_of(j.natural, row), strict=True):
            for layer in range(len(found)):
                assert off(found[layer][:, :start], own[layer][:, :start]) < 1e-5
            # The first layer's keys and values are of the token alone; above it every slot has read the giver.
            assert off(found[0][:, start:], own[0][:, start:]) < 1e-4
            differ = (found[-1] - own[-1])[:, start:].abs().amax(dim=(0, 2))
            assert bool((differ > 1e-3).all())


@pytest.mark.model
def test_m1_with_another_giver_is_another_cache(tiny):
    model = tiny("llama")
    j = Joining(model)
    others = [join_prompts(j.givers[0], r, j.separator, SEPARATOR) for r in j.receivers]
    cut, other = (without_giver(joined, j.natural) for joined in (j.joined, prefill(model.backbone, others)))
    assert off(cut.values[-1][1:], other.values[-1][1:]) > 1e-3


@pytest.mark.model
def test_joined_prompt_holds_the_giver_s_words_and_then_the_receiver_s_in_one_template(tiny):
    j = Joining(tiny("llama"))
    for giver, receiver, prompt in zip(j.givers, j.receivers, j.prompts, strict=True):
        start = receiver.segments.index(Segment.body)
        put_in = words_of(giver) + j.separator
        assert list(prompt.token_ids) == [*receiver.token_ids[:start], *put_in, *receiver.token_ids[start:]]
        assert words_of(prompt) == put_in + words_of(receiver)
        assert len(prompt.segments) == len(prompt.pieces) == len(prompt.token_ids)
        both = "".join(p for p, s in zip(prompt.pieces, prompt.segments, strict=True) if s == Segment.body)
        assert both == "".join(
            "".join(p for p, s in zip(x.pieces, x.segments, strict=True) if s == Segment.body) + between
            for x, between in ((giver, SEPARATOR), (receiver, ""))
        )


@pytest.mark.model
def test_keeping_all_gives_the_joined_prompt_s_own_cache(tiny):
    j = Joining(tiny("llama"))
    assert joined_cache(Joined(keep="all"), j.joined, j.natural) is j.joined
    cut = joined_cache(Joined(keep="receiver"), j.joined, j.natural)
    assert is_same(tensors(cut), tensors(without_giver(j.joined, j.natural)))


@pytest.mark.model
def test_m1_leaves_its_inputs_alone(tiny):
    j = Joining(tiny("gemma3"))
    before = copied(j.joined) + copied(j.natural)
    without_giver(j.joined, j.natural)
    assert is_same(before, tensors(j.joined) + tensors(j.natural))


@pytest.mark.model
def test_joined_caches_of_other_prompts_are_refused(tiny):
    j = Joining(tiny("llama"))
    with pytest.raises(CacheError, match="not those of the receiver's own prompt"):
        without_giver(j.joined[[1, 0, 2]], j.natural)


@pytest.mark.model
def test_keys_that_can_t_be_moved_are_refused(tiny):
    j = Joining(tiny("gpt2"))
    with pytest.raises(CacheError, match="can't be moved"):
        without_giver(j.joined, j.natural)


# --- M2 -------------------------------------------------------------------------------------------------------------

ROWS = [9, 6, 12]


def directions(cache: KVCache, seed: int = 3) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        {i: torch.randn(k.shape[1], k.shape[3], generator=generator) for i, k in enumerate(cache.keys)} for _ in "kv"
    )


@pytest.mark.parametrize("random_directions", [None, 20])
def test_strength_0_is_the_target_bit_for_bit(random_directions):
    cache = make_cache(ROWS)
    spec = CacheSteering(strength=0, random_directions=random_directions)
    assert is_same(copied(cache), tensors(steer_cache(cache, spec, directions(cache), [0, 1, 2])))


@pytest.mark.parametrize("strength", [0.5, 1, -4])
def test_strength_times_the_direction_is_added_to_the_body_and_keys_are_turned_to_their_slot(strength):
    cache = make_cache(ROWS, starts=[0, 7, 30])
    before = copied(cache)
    keys, values = directions(cache)
    moved = steer_cache(cache, CacheSteering(strength=strength), (keys, values), [0, 1, 2])
    assert is_same(before, tensors(cache))
    for layer, row, slot, head in itertools.product(range(LAYERS), range(3), range(cache.slots), range(2)):
        key, value = (t[layer][row, head, slot].double() for t in (cache.keys, cache.values))
        if cache.segments[row, slot] == Segment.body:
            turned = slow_rotation(keys[layer][head], int(cache.positions[row, slot]), ROPES[layer])
            key, value = key + strength * turned, value + strength * values[layer][head].double()
            torch.testing.assert_close(moved.keys[layer][row, head, slot].double(), key, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(moved.values[layer][row, head, slot].double(), value, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(moved.keys[layer][row, head, slot].double(), key)
            assert torch.equal(moved.values[layer][row, head, slot].double(), value)
    labels = ("positions", "token_ids", "segments", "origins", "pending", "pending_position")
    assert all(torch.equal(getattr(moved, name), getattr(cache, name)) for name in labels)


def test_only_the_chosen_layers_parts_and_slots_move():
    cache = make_cache(ROWS)
    spec = CacheSteering(strength=2, layers=[1], parts="v", slots="last")
    moved = steer_cache(cache, spec, directions(cache), [0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(moved.keys, cache.keys, strict=True))
    for layer in range(LAYERS):
        differs = (moved.values[layer] != cache.values[layer]).any(dim=3).any(dim=1)
        expected = torch.zeros_like(differs)
        expected[:, -1] = layer == 1
        assert torch.equal(differs, expected)


def test_keys_that_hold_no_rotation_get_the_direction_as_it_is():
    cache = make_cache(ROWS, rope=ABSOLUTE)
    keys, values = directions(cache)
    moved = steer_cache(cache, CacheSteering(strength=1, slots="last"), (keys, values), [0, 1, 2])
    assert torch.equal(moved.keys[1][:, :, -1], cache.keys[1][:, :, -1] + keys[1])


def random_steps(numbers: list[int], count: int = 20, part: str = "v") -> list[list[Tensor]]:
    """What is added at a row's last slot: [layer][row], each [kv_heads, head_dim]; from caches of zeros at position 0,
    where a key is not turned."""
    cache = make_cache([1] * len(numbers))
    nothing = tuple(torch.zeros_like(k) for k in cache.keys)
    cache = replace(cache, keys=nothing, values=nothing)
    spec = CacheSteering(strength=1, slots="last", random_directions=count)
    moved = steer_cache(cache, spec, directions(cache), numbers)
    return [[row[:, -1] for row in layer] for layer in (moved.values if part == "v" else moved.keys)]


@pytest.mark.parametrize("part", ["k", "v"])
def test_random_directions_have_the_norms_of_the_known_one_head_by_head(part):
    known = directions(make_cache([1]))["kv".index(part)]
    for layer, rows in enumerate(random_steps([0, 7, 19], part=part)):
        for step in rows:
            torch.testing.assert_close(step.norm(dim=-1), known[layer].norm(dim=-1), atol=1e-5, rtol=1e-5)
            # Not the known one itself: on 8 dimensions a cosine of 0.98 does not come by chance.
            cosine = torch.nn.functional.cosine_similarity(step, known[layer], dim=-1)
            assert float(cosine.abs().max()) < 0.98


@pytest.mark.parametrize("part", ["k", "v"])
def test_twenty_random_directions_are_twenty_and_the_next_is_the_first_again(part):
    for rows in random_steps(list(range(40)), part=part):
        distinct = {tuple(step.flatten().tolist()) for step in rows}
        assert len(distinct) == 20
        assert all(torch.equal(rows[i], rows[i + 20]) for i in range(20))


def test_layers_and_parts_have_random_directions_of_their_own():
    found = [rows[0] / rows[0].norm(dim=-1, keepdim=True) for part in "kv" for rows in random_steps([4], part=part)]
    cosines = [float((a * b).sum(dim=-1).max()) for a, b in itertools.combinations(found, 2)]
    assert max(cosines) < 0.98


def test_a_random_direction_belongs_to_its_number_whatever_the_batch():
    alone = [rows[0] for rows in random_steps([5])]
    among = [rows[2] for rows in random_steps([1, 9, 5, 5])]
    assert is_same(alone, among)


def test_random_directions_point_every_way():
    """Their mean over many is near none: 2000 unit directions have a mean of norm 1 / sqrt(2000) = 0.022, about."""
    steps = torch.stack(random_steps(list(range(2000)), count=2000)[0])
    units = steps / steps.norm(dim=-1, keepdim=True)
    assert float(units.mean(dim=0).norm(dim=-1).max()) < 0.06


# --- what M3, M4 and S05 stand on -----------------------------------------------------------------------------------


def sides(lengths: list[int] | None = None) -> tuple[KVCache, KVCache]:
    return make_cache(lengths or ROWS, seed=1), make_cache(ROWS, seed=2)


@pytest.mark.parametrize("slots", ["all", "body", "last", [1, -2]])
def test_a_patch_of_strength_0_is_the_target_bit_for_bit(slots):
    source, target = sides([7, 7, 11])
    mixed = Patch(slots=slots, strength=0).apply(source, target)
    assert mixed.checksums() == target.checksums()
    for row in range(3):
        assert is_same([t for part in row_of(mixed, row) for t in part], [t for p in row_of(target, row) for t in p])
    for name in ("positions", "token_ids", "segments", "origins", "pending", "pending_position"):
        assert torch.equal(getattr(mixed, name), getattr(target, name)), name


def test_a_patch_of_strength_1_is_the_source_where_lengths_are_equal():
    source, target = sides()
    mixed = Patch(strength=1).apply(source, target)
    for row in range(3):
        assert is_same([t for part in row_of(mixed, row) for t in part], [t for p in row_of(source, row) for t in p])
    assert torch.equal(mixed.token_ids, source.token_ids)
    assert torch.equal(mixed.pending, target.pending)


def test_strength_goes_evenly_from_the_target_to_the_source():
    source, target = sides()
    for strength in (0.25, 0.5):
        mixed = Patch(strength=strength).apply(source, target)
        for row in range(3):
            own, put, got = (row_of(cache, row)[1] for cache in (target, source, mixed))
            for layer in range(LAYERS):
                torch.testing.assert_close(got[layer], (1 - strength) * own[layer] + strength * put[layer])


@pytest.mark.parametrize("slots", ["all", "body", "trailer", {"of": "all", "without": "sinks"}])
@pytest.mark.parametrize("lengths", [ROWS, [7, 7, 11]])
def test_keys_alone_and_then_values_alone_are_keys_and_values(slots, lengths):
    source, target = sides(lengths)
    whole = Patch.model_validate({"slots": slots}).apply(source, target)
    for first, second in (("k", "v"), ("v", "k")):
        half = Patch.model_validate({"slots": slots, "parts": first}).apply(source, target)
        assert not is_same(list(half.keys + half.values), list(whole.keys + whole.values))
        both = Patch.model_validate({"slots": slots, "parts": second}).apply(source, half)
        assert is_same(list(both.keys + both.values), list(whole.keys + whole.values))
        assert torch.equal(both.positions, whole.positions)
    assert int((whole.origins == PAD).sum()) == int((~target.is_real).sum())

"""`kvpatch check` holds on every architecture, and each identity fails where what it guards is broken on purpose."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import kvpatch as kv
import kvpatch.checks.identities as check_room
import kvpatch.engine.batching as places_room
import kvpatch.engine.decode as decode_room
import kvpatch.engine.step as step_room
import kvpatch.interventions.donors as donors
import kvpatch.interventions.in_prefill
import kvpatch.interventions.splice as splice_room
from broken import attention_to_padding, attention_with_a_window_one_too_long, attention_without_window
from kvpatch.caches.kvcache import PAD
from kvpatch.caches.rope import LayerRope, Turns
from kvpatch.checks.identities import check
from kvpatch.models import backbone, hf
from tiny import ARCHITECTURES

pytestmark = pytest.mark.model

LOGITS = "own forward pass gives the model's logits"
GREEDY = "own decoding gives transformers' greedy text"
SELF = "self-swap changes nothing"
FULL = "full swap equals text"
JOINT = "joint shuffle of keys and values equals the source"
SHIFT = "moving all keys and the query changes nothing"
RESIDUAL = "residual stream at all positions rebuilds the source cache"
HOOKS = "every hook fired as often as planned"
INPUTS = "inputs unchanged afterwards"
BATCHED = "batched rows equal single rows"
EDIT = "a large edit changes the logits"
ALL = [LOGITS, GREEDY, SELF, FULL, JOINT, SHIFT, RESIDUAL, HOOKS, INPUTS, BATCHED, EDIT]

NOT_APPLICABLE = {"mistral": {JOINT}, "gemma2": {JOINT}, "gemma3": {JOINT}, "gpt2": {SHIFT}}


@pytest.fixture(autouse=True, scope="module")
def _a_short_list_for_the_collector() -> Iterator[None]:
    """`check` collects garbage between identities, which is slow with everything that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def failures(model) -> set[str]:
    return {found.identity for found in check(model) if found.holds is False}


# --- it holds ---


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_identity_holds_or_says_why_it_does_not_apply(architecture: str, chat: bool, tiny):
    seen = []
    found = check(tiny(architecture, chat), on_identity=seen.append)
    assert [identity.identity for identity in found] == ALL
    assert seen == found
    for identity in found:
        if identity.identity in NOT_APPLICABLE.get(architecture, set()):
            assert identity.holds is None
            assert identity.note
        else:
            assert identity.holds is True, identity
            assert identity.error <= identity.bound


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_logits_are_compared_past_the_window(architecture: str, tiny):
    assert "past the window of 16" in check(tiny(architecture))[0].note


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_in_bfloat16_the_bound_follows_the_noise(architecture: str, tiny_dirs):
    found = {i.identity: i for i in check(kv.load(tiny_dirs(architecture), device="cpu", dtype="bfloat16"))}
    assert found[GREEDY].holds is None
    assert found[FULL].bound == pytest.approx(10 * max(found[BATCHED].error, 2.0**-8))
    assert not [name for name, identity in found.items() if identity.holds is False]


def test_in_bfloat16_noise_is_not_measured_against_itself(tiny_dirs, monkeypatch: pytest.MonkeyPatch):
    model = kv.load(tiny_dirs("llama"), device="cpu", dtype="bfloat16")
    attention_to_padding(monkeypatch)
    assert BATCHED in failures(model)


# --- it fails where something is broken ---


def broken_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "turn", lambda self, keys, rope: keys)


def rotation_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = check_room.rotate
    monkeypatch.setattr(check_room, "rotate", lambda keys, delta, rope: rotate(keys, -delta, rope))


def decoding_of_the_second_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (decode_room, step_room):
        monkeypatch.setattr(room, "choose", lambda logits, *_: logits.topk(2, dim=-1).indices[:, 1])


def decoding_at_a_position_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    run = backbone.Backbone.forward

    def standing(self, token_ids, positions, slab, *rest, **settings):
        if token_ids.shape[1] == 1 and slab.length > 1:
            positions = positions.clamp(max=20)
        return run(self, token_ids, positions, slab, *rest, **settings)

    begin = step_room.PlainOps.begin

    def standing_in_places(self, places):
        places.position.clamp_(max=20)
        begin(self, places)

    monkeypatch.setattr(backbone.Backbone, "forward", standing)
    monkeypatch.setattr(step_room.PlainOps, "begin", standing_in_places)


def a_splice_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice_room, "splice", lambda patch, source, target, **_: target)


def a_splice_that_moves_every_slot_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    splice = splice_room.splice

    def shifted(*args, **settings):
        out = splice(*args, **settings)
        return replace(out, values=tuple(v.roll(1, dims=2) for v in out.values))

    monkeypatch.setattr(splice_room, "splice", shifted)


def a_joint_shuffle_that_leaves_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(donors._MAKERS, "shuffle_jointly", donors._shuffle_values)


def a_donor_that_changes_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutating(source, rows, reference):
        source.values[0].mul_(1.01)
        return source

    monkeypatch.setitem(donors._MAKERS, "source", mutating)


def a_decode_that_writes_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    slab_of = decode_room.slab_of

    def writing(backbone, cache, room):
        cache.keys[-1][:, :, -1] += 0.5
        return slab_of(backbone, cache, room)

    fill = places_room._Turns._fill

    def writing_too(self, places):
        self.cache.keys[-1][:, :, -1] += 0.5
        fill(self, places)

    monkeypatch.setattr(decode_room, "slab_of", writing)
    monkeypatch.setattr(places_room._Turns, "_fill", writing_too)


def a_residual_patch_that_misses_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = check_room.replaced_residual

    def missing(backbone, replacement, at):
        return replaced(backbone, {layer: stream for layer, stream in replacement.items() if layer > 0}, at)

    monkeypatch.setattr(check_room, "replaced_residual", missing)


def a_residual_patch_at_the_last_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = check_room.replaced_residual

    def last(backbone, replacement, at):
        at = torch.zeros_like(at)
        at[:, -1] = True
        return replaced(backbone, replacement, at)

    monkeypatch.setattr(check_room, "replaced_residual", last)


def a_hook_that_never_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = check_room.replaced_residual

    @contextmanager
    def one_short(backbone, replacement, at):
        with replaced(backbone, {layer: stream for layer, stream in replacement.items() if layer > 0}, at) as firings:
            firings.planned = len(replacement)
            yield firings

    monkeypatch.setattr(check_room, "replaced_residual", one_short)


def keys_that_keep_their_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unturned(Turns):
        def turn(self, keys: torch.Tensor, rope: LayerRope) -> torch.Tensor:
            return keys

    monkeypatch.setattr(splice_room, "Turns", Unturned)


def changes_of_keys_that_never_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = hf.LayerEdit.apply
    monkeypatch.setattr(
        hf.LayerEdit, "apply", lambda self, part, tensor: tensor if part == "key" else apply(self, part, tensor)
    )


def an_edit_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(donors._MAKERS, "gaussian_isotropic", lambda source, rows, reference: source)
    monkeypatch.setattr(splice_room, "splice", lambda patch, source, target, **_: target)


def logits_off_by_a_ten_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = backbone.Backbone.scaled
    monkeypatch.setattr(backbone.Backbone, "scaled", lambda self, logits: scaled(self, logits) * 1.0001)


BREAKS: list[tuple[str, Callable, str]] = [
    ("llama", broken_rotation, SHIFT),
    ("cohere", broken_rotation, SHIFT),
    ("gpt_neox", broken_rotation, SHIFT),
    ("gemma3", rotation_the_wrong_way, SHIFT),
    ("mistral", attention_without_window, LOGITS),
    ("gemma3", attention_without_window, LOGITS),
    ("gemma3", attention_with_a_window_one_too_long, LOGITS),
    ("llama", attention_to_padding, BATCHED),
    ("llama", decoding_of_the_second_likeliest, GREEDY),
    ("gpt_neox", decoding_of_the_second_likeliest, GREEDY),
    ("llama", decoding_at_a_position_that_stands_still, GREEDY),
    ("gpt_neox", decoding_at_a_position_that_stands_still, GREEDY),
    ("llama", a_splice_that_does_nothing, FULL),
    ("gpt2", a_splice_that_does_nothing, FULL),
    ("llama", a_splice_that_moves_every_slot_by_one, SELF),
    ("llama", a_splice_that_moves_every_slot_by_one, FULL),
    ("llama", a_joint_shuffle_that_leaves_the_keys, JOINT),
    ("llama", a_donor_that_changes_its_input, INPUTS),
    ("llama", a_decode_that_writes_into_the_cache, INPUTS),
    ("gpt_neox", a_decode_that_writes_into_the_cache, INPUTS),
    ("llama", a_residual_patch_that_misses_the_first_layer, RESIDUAL),
    ("llama", a_residual_patch_at_the_last_position_only, RESIDUAL),
    ("llama", a_hook_that_never_fires, HOOKS),
    ("llama", keys_that_keep_their_rotation, SHIFT),
    ("gpt_neox", keys_that_keep_their_rotation, SHIFT),
    ("llama", changes_of_keys_that_never_fire, HOOKS),
    ("gpt2", changes_of_keys_that_never_fire, HOOKS),
    ("llama", an_edit_that_does_not_arrive, EDIT),
    ("llama", logits_off_by_a_ten_thousandth, LOGITS),
]


@pytest.mark.parametrize(("architecture", "break_it", "caught_by"), BREAKS)
def test_what_is_broken_on_purpose_is_caught_by_its_identity(
    architecture: str, break_it: Callable, caught_by: str, tiny, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(architecture)
    break_it(monkeypatch)
    assert caught_by in failures(model)


def test_every_identity_is_caught_failing_at_least_once():
    assert {caught_by for _, _, caught_by in BREAKS} == set(ALL)


def test_hooks_are_gone_when_the_pass_inside_them_fails(tiny):
    backbone = tiny("llama").backbone
    with pytest.raises(RuntimeError, match="on purpose"), kvpatch.engine.residual.recorded_residual(backbone, range(4)):
        raise RuntimeError("on purpose")
    at = torch.ones(1, 3, dtype=torch.bool)
    stream = {layer: torch.zeros(1, 3, 48) for layer in range(4)}
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        kvpatch.engine.residual.replaced_residual(backbone, stream, at),
    ):
        raise RuntimeError("on purpose")
    assert not any(block._forward_pre_hooks for block in backbone.blocks)


def test_a_residual_patch_changes_the_positions_it_names_and_no_earlier_ones(tiny):
    backbone = tiny("llama").backbone
    ids, positions = torch.tensor([[10, 11, 12, 13, 14]]), torch.arange(5)[None]
    plain, patched = backbone.slab(1, 5), backbone.slab(1, 5)
    backbone.forward(ids, positions, plain)
    at = torch.tensor([[False, False, True, False, False]])
    with kvpatch.engine.residual.replaced_residual(backbone, {1: torch.ones(1, 5, 48)}, at) as firings:
        backbone.forward(ids, positions, patched)
    assert (firings.planned, firings.fired) == (1, 1)
    moved = [
        [int(slot) for slot in (a.keys != b.keys).any(dim=3).any(dim=1)[0].nonzero()]
        for a, b in zip(plain.layers, patched.layers, strict=True)
    ]
    assert moved == [[], [2], [2, 3, 4], [2, 3, 4]]
    assert PAD not in patched.positions

"""Does every condition of a plan fit the model and the prompts? Asked before a run spends anything.

Each patch is laid out on caches of the right shape that hold nothing, pair by pair, so that whatever would fail while
the run goes on fails now: a layer, KV head or slot that does not exist, a selection that is empty or too small, keys
that would have to move and can't, a spliced cache longer than the context. Interventions are asked for their layers,
slots and joined lengths in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvpatch.activations import landing
from kvpatch.cache import KVCache
from kvpatch.cache_steering import join_prompts
from kvpatch.engine.prefill import labels_of
from kvpatch.errors import CacheError, EmptySelection, ProtocolError
from kvpatch.interventions import CacheSteering, InPrefill, Joined, ValueSteering
from kvpatch.models.hf import Geometry
from kvpatch.models.template import EncodedPrompt
from kvpatch.patch import Patch
from kvpatch.protocols.plan import Batch, Plan, PlannedPair
from kvpatch.protocols.schema import Condition
from kvpatch.selection import chosen_heads, chosen_layers, chosen_mask, slot_mask, told
from kvpatch.splice import counted_splice


@dataclass(frozen=True)
class _Place:
    """Where conditions must fit: a model's shape, its tokenizer, and the tokens that will follow a cache."""

    geometry: Geometry
    encode: Callable[[str], EncodedPrompt]
    continuation_ids: Callable[[str], Sequence[int]]
    room: int


def refuse_misfits(
    plan: Plan,
    geometry: Geometry,
    encode: Callable[[str], EncodedPrompt],
    continuation_ids: Callable[[str], Sequence[int]],
    room: int,
) -> None:
    """Check every condition of a plan.

    Args:
        encode: tokenises the text of a prompt; the neutral scaffold's is empty.
        continuation_ids: tokenises text as it is (the separator of joined prompts).
        room: tokens that will follow the cache.
    Raises:
        ProtocolError: naming the condition that does not fit, its phase, and the pair where it is a pair's.
    """
    place = _Place(geometry, encode, continuation_ids, room)
    for batch in plan.batches:
        laid_out: set[tuple[object, ...]] = set()
        for name, condition in batch.conditions.items():
            where = f"condition {name} of phase {batch.phase}"
            try:
                _check_layers_and_heads(condition, geometry)
            except CacheError as error:
                raise ProtocolError(f"{where}: {error}") from error
            layout = _layout_of(condition)
            seeds = {trial.pair: trial.seed for trial in batch.trials if trial.condition == name}
            if not seeds or (layout is not None and layout in laid_out):
                continue
            laid_out |= set() if layout is None else {layout}
            pairs = [(batch.pairs[pair], seeds[pair]) for pair in sorted(seeds)]
            _refuse_misfit_pairs(where, condition, pairs, batch.readouts.r_v.window, place)
        _refuse_unmarked(batch, place)


def _check_layers_and_heads(condition: Condition, geometry: Geometry) -> None:
    """What does not depend on the prompts."""
    patch, spec = condition.patch, condition.intervention
    if patch is not None:
        chosen_layers(patch.layers, geometry.layers, may_be_empty=condition.may_be_empty)
        chosen_heads(patch.kv_heads, geometry.kv_heads, may_be_empty=condition.may_be_empty)
        if patch.donor == "shuffle_heads" and geometry.kv_heads < 2:
            raise CacheError("the model has one KV head, which can't be shuffled; give min_kv_heads: 2")
    elif spec is not None and not isinstance(spec, Joined):
        chosen_layers(spec.layers, geometry.layers, may_be_empty=condition.may_be_empty)


def _layout_of(condition: Condition) -> tuple[object, ...] | None:
    """What conditions share that lay their slots out alike; None where nothing is spliced."""
    if condition.patch is None:
        return None
    return _without_content(condition.patch).to_json(), condition.from_, condition.into, condition.may_be_empty


def _without_content(patch: Patch) -> Patch:
    """A patch of the same slots. A donor has its source's layout, and a layout is the same in every layer and head."""
    return patch.model_copy(update={"donor": "source", "layers": None, "kv_heads": None})


Seeded = Sequence[tuple[PlannedPair, int]]
"""Pairs, each with the seed of a trial."""


def _refuse_misfit_pairs(where: str, condition: Condition, pairs: Seeded, window: int, place: _Place) -> None:
    """Check a condition on its pairs, all together; where that fails, one by one, to name the pair."""
    try:
        _check_pairs(condition, pairs, window, place)
    except CacheError as together:
        for pair in pairs:
            try:
                _check_pairs(condition, [pair], window, place)
            except CacheError as error:
                message = error.without_row if isinstance(error, EmptySelection) else error
                raise ProtocolError(f"{where}: {message}{_advice(error)} (pair {pair[0].pair_id})") from error
        raise ProtocolError(f"{where}: {together}") from together


def _advice(error: CacheError) -> str:
    return ", or say may_be_empty: true of the condition" if isinstance(error, EmptySelection) else ""


def _check_pairs(condition: Condition, pairs: Seeded, window: int, place: _Place) -> None:
    spec, may_be_empty = condition.intervention, condition.may_be_empty
    if condition.patch is not None:
        _check_patch(condition, condition.patch, pairs, place)
        return
    if spec is None:
        return
    receivers = [place.encode(pair.texts[condition.into]) for pair, _ in pairs]
    if isinstance(spec, ValueSteering | CacheSteering):
        chosen_mask(_empty_caches(receivers, place.geometry), spec.slots, may_be_empty=may_be_empty)
        return
    givers = [place.encode(pair.texts[str(condition.from_)]) for pair, _ in pairs]
    if isinstance(spec, InPrefill):
        lengths = [len(giver.token_ids) - 1 for giver in givers]
        landing(spec.slots, _empty_caches(receivers, place.geometry), lengths, may_be_empty=may_be_empty)
    elif isinstance(spec, Joined):
        separator = place.continuation_ids(spec.separator)
        joined = [join_prompts(g, r, separator, spec.separator) for g, r in zip(givers, receivers, strict=True)]
        longest = max(len(prompt.token_ids) for prompt in joined)
        # Slots that are taken out again have nothing to follow them.
        _refuse_too_long("a joined prompt", longest, place.room if spec.keep == "all" else 0, place.geometry)
    else:
        shortest = min(len(prompt.token_ids) - 1 for prompt in (*receivers, *givers))
        if shortest < (spec.window or window):
            raise CacheError(
                f"a prompt of {shortest} cached slots is shorter than the window of {spec.window or window}"
            )


def _check_patch(condition: Condition, patch: Patch, pairs: Seeded, place: _Place) -> None:
    geometry = place.geometry
    source = _empty_caches([place.encode(pair.texts[str(condition.from_)]) for pair, _ in pairs], geometry)
    target = _empty_caches([place.encode(pair.texts[condition.into]) for pair, _ in pairs], geometry)
    seeds = [seed for _, seed in pairs]
    mixed, _ = counted_splice(_without_content(patch), source, target, seed=seeds, may_be_empty=condition.may_be_empty)
    _refuse_too_long("a spliced cache", int(mixed.pending_position.max()) + 1, place.room, geometry)


def _refuse_unmarked(batch: Batch, place: _Place) -> None:
    """Refuse a pair in none of whose prompts the phase finds a slot to mark: its attention there would be 0."""
    if batch.watched is None or batch.watched.marked is None:
        return
    for index, pair in enumerate(batch.pairs):
        names = {trial.condition for trial in batch.trials if trial.pair == index}
        conditions = [batch.conditions[name] for name in names]
        roles = {role for c in conditions for role in (c.into, c.from_, c.text_of) if role is not None}
        prompts = [place.encode(pair.texts[role]) for role in sorted(roles)]
        if prompts and not slot_mask(_empty_caches(prompts, place.geometry), batch.watched.marked).any():
            raise ProtocolError(
                f"phase {batch.phase}: its marked {told(batch.watched.marked)} find no slot in any prompt of a pair, "
                f"so attention on them would be 0; mark slots that they have (pair {pair.pair_id})"
            )


def _refuse_too_long(what: str, tokens: int, room: int, geometry: Geometry) -> None:
    if tokens + room > geometry.context:
        why = f"; {geometry.limit}" if geometry.ends_because else ""
        raise CacheError(
            f"{what} of {tokens} tokens and the {room} to follow are more than the context, {geometry.context}{why}"
        )


def _empty_caches(prompts: Sequence[EncodedPrompt], geometry: Geometry) -> KVCache:
    """Caches with the labels of these prompts, one head a layer, and one layer for each way that keys are turned."""
    labels = labels_of(prompts, "cpu")
    ropes = tuple(dict.fromkeys(geometry.rope))
    batch, slots = labels["positions"].shape
    nothing = tuple(torch.zeros(batch, 1, slots, geometry.head_dim) for _ in ropes)
    return KVCache(keys=nothing, values=nothing, rope=ropes, **labels)

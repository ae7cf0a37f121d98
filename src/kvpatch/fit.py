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

from kvpatch.cache import KVCache
from kvpatch.engine.prefill import labels_of
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.interventions import CacheSteering, InPrefill, Joined, Reshape, ValueSteering
from kvpatch.models.hf import Geometry
from kvpatch.models.template import EncodedPrompt
from kvpatch.patch import Patch
from kvpatch.protocols.plan import Batch, Plan, PlannedPair
from kvpatch.protocols.schema import Condition
from kvpatch.selection import head_indices, layer_indices, slot_indices
from kvpatch.splice import splice


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
        ProtocolError: naming the condition that does not fit.
    """
    place = _Place(geometry, encode, continuation_ids, room)
    for batch in plan.batches:
        laid_out: set[tuple[str, str, str]] = set()
        for name, condition in batch.conditions.items():
            try:
                if condition.patch is not None:
                    _check_patch(name, condition, condition.patch, batch, place, laid_out)
                elif isinstance(spec := condition.intervention, Reshape):
                    window = spec.window or batch.readouts.r_v.window
                    _check_reshape(spec, window, condition, _pairs_of(name, batch), place)
                elif spec is not None:
                    _check_intervention(spec, condition, _pairs_of(name, batch), place)
            except CacheError as error:
                raise ProtocolError(f"condition {name} of phase {batch.phase}: {error}") from error


def _pairs_of(name: str, batch: Batch) -> list[PlannedPair]:
    """The pairs that have trials of a condition."""
    return [batch.pairs[pair] for pair in sorted({t.pair for t in batch.trials if t.condition == name})]


def _check_patch(
    name: str, condition: Condition, patch: Patch, batch: Batch, place: _Place, laid_out: set[tuple[str, str, str]]
) -> None:
    geometry = place.geometry
    layer_indices(patch.layers, geometry.layers)
    head_indices(patch.kv_heads, geometry.kv_heads)
    if patch.donor == "shuffle_heads" and geometry.kv_heads < 2:
        raise CacheError("the model has one KV head, which can't be shuffled; give min_kv_heads: 2")
    # A donor has its source's layout, and a layout is the same in every layer and head.
    layout = patch.model_copy(update={"donor": "source", "layers": None, "kv_heads": None})
    key = (layout.to_json(), str(condition.from_), condition.into)
    if key in laid_out:
        return
    laid_out.add(key)
    seeds = {trial.pair: trial.seed for trial in batch.trials if trial.condition == name}
    pairs = [batch.pairs[pair] for pair in sorted(seeds)]
    if not pairs:
        return
    source = _empty_caches([place.encode(pair.texts[str(condition.from_)]) for pair in pairs], geometry)
    target = _empty_caches([place.encode(pair.texts[condition.into]) for pair in pairs], geometry)
    mixed = splice(layout, source, target, seed=[seeds[pair] for pair in sorted(seeds)])
    _refuse_too_long("a spliced cache", int(mixed.pending_position.max()) + 1, place.room, geometry)


def _check_intervention(
    spec: InPrefill | Joined | ValueSteering | CacheSteering,
    condition: Condition,
    pairs: Sequence[PlannedPair],
    place: _Place,
) -> None:
    geometry = place.geometry
    if not isinstance(spec, Joined):
        layer_indices(spec.layers, geometry.layers)
    if not pairs:
        return
    receivers = [place.encode(pair.texts[condition.into]) for pair in pairs]
    if isinstance(spec, Joined):
        words = [place.encode(pair.texts[str(condition.from_)]).body_length for pair in pairs]
        longest = max(n + len(r.token_ids) for n, r in zip(words, receivers, strict=True))
        longest += len(place.continuation_ids(spec.separator))
        # Slots that are taken out again have nothing to follow them.
        _refuse_too_long("a joined prompt", longest, place.room if spec.keep == "all" else 0, geometry)
        return
    caches = _empty_caches(receivers, geometry)
    for row in range(caches.batch):
        slot_indices(caches, row, spec.slots)


def _check_reshape(
    spec: Reshape, window: int, condition: Condition, pairs: Sequence[PlannedPair], place: _Place
) -> None:
    layer_indices(spec.layers, place.geometry.layers)
    texts = [pair.texts[role] for pair in pairs for role in (condition.into, str(condition.from_))]
    shortest = min((len(place.encode(text).token_ids) - 1 for text in texts), default=window)
    if shortest < window:
        raise CacheError(f"a prompt of {shortest} cached slots is shorter than the window of {window}")


def _refuse_too_long(what: str, tokens: int, room: int, geometry: Geometry) -> None:
    if tokens + room > geometry.context:
        raise CacheError(f"{what} of {tokens} tokens and the {room} to follow are too many; {geometry.limit}")


def _empty_caches(prompts: Sequence[EncodedPrompt], geometry: Geometry) -> KVCache:
    """Caches with the labels of these prompts, one head a layer, and one layer for each way that keys are turned."""
    labels = labels_of(prompts, "cpu")
    ropes = tuple(dict.fromkeys(geometry.rope))
    batch, slots = labels["positions"].shape
    nothing = tuple(torch.zeros(batch, 1, slots, geometry.head_dim) for _ in ropes)
    return KVCache(keys=nothing, values=nothing, rope=ropes, **labels)

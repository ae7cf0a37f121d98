"""Does every patch of a plan fit the model and the prompts? Asked before a run spends anything.

Each patch is laid out on caches of the right shape that hold nothing, pair by pair, so that whatever would fail while
the run goes on fails now: a layer, KV head or slot that does not exist, a selection that is empty or too small, keys
that would have to move and can't, a spliced cache longer than the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvpatch.cache import PAD, KVCache, Origin
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.hf import Geometry
from kvpatch.models.template import EncodedPrompt
from kvpatch.patch import Patch
from kvpatch.protocols.plan import Batch, Plan
from kvpatch.selection import head_indices, layer_indices
from kvpatch.splice import splice


def refuse_misfits(plan: Plan, geometry: Geometry, encode: Callable[[str], EncodedPrompt], room: int) -> None:
    """Check every patch of a plan.

    Args:
        encode: tokenises the text of a prompt; the neutral scaffold's is empty.
        room: tokens that will follow the cache.
    Raises:
        ProtocolError: naming the condition that does not fit.
    """
    for batch in plan.batches:
        laid_out: set[tuple[str, str, str]] = set()
        for name, condition in batch.conditions.items():
            patch = condition.patch
            if patch is None:
                continue
            try:
                layer_indices(patch.layers, geometry.layers)
                head_indices(patch.kv_heads, geometry.kv_heads)
                if patch.donor == "shuffle_heads" and geometry.kv_heads < 2:
                    raise CacheError("the model has one KV head, which can't be shuffled; give min_kv_heads: 2")
                # A donor has its source's layout, and a layout is the same in every layer and head.
                layout = patch.model_copy(update={"donor": "source", "layers": None, "kv_heads": None})
                key = (layout.to_json(), str(condition.from_), condition.into)
                if key not in laid_out:
                    _lay_out(layout, batch, str(condition.from_), condition.into, geometry, encode, room)
                    laid_out.add(key)
            except CacheError as error:
                raise ProtocolError(f"condition {name} of phase {batch.phase}: {error}") from error


def _lay_out(
    patch: Patch,
    batch: Batch,
    giver: str,
    into: str,
    geometry: Geometry,
    encode: Callable[[str], EncodedPrompt],
    room: int,
) -> None:
    source = _empty_caches([encode(pair.texts[giver]) for pair in batch.pairs], geometry)
    target = _empty_caches([encode(pair.texts[into]) for pair in batch.pairs], geometry)
    seeds = {trial.pair: trial.seed for trial in batch.trials}
    mixed = splice(patch, source, target, seed=[seeds[pair] for pair in range(len(batch.pairs))])
    longest = int(mixed.pending_position.max()) + 1
    if longest + room > geometry.context:
        raise CacheError(
            f"a spliced cache of {longest} tokens and the {room} to follow are more than the context, "
            f"{geometry.context}"
        )


def _empty_caches(prompts: Sequence[EncodedPrompt], geometry: Geometry) -> KVCache:
    """Caches with the labels of these prompts, one head a layer, and one layer for each way that keys are turned."""
    slots = max(len(prompt.token_ids) for prompt in prompts) - 1

    def table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        padded = [[PAD] * (slots - len(row)) + list(row) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(prompts), slots)

    ropes = tuple(dict.fromkeys(geometry.rope))
    nothing = tuple(torch.zeros(len(prompts), 1, slots, geometry.head_dim) for _ in ropes)
    positions = table([range(len(prompt.token_ids) - 1) for prompt in prompts])
    return KVCache(
        keys=nothing,
        values=nothing,
        positions=positions,
        token_ids=table([prompt.token_ids[:-1] for prompt in prompts]),
        segments=table([prompt.segments[:-1] for prompt in prompts]),
        origins=torch.where(positions == PAD, PAD, int(Origin.own)),
        pending=torch.tensor([prompt.token_ids[-1] for prompt in prompts]),
        pending_position=torch.tensor([len(prompt.token_ids) - 1 for prompt in prompts]),
        pieces=tuple(prompt.pieces[:-1] for prompt in prompts),
        rope=ropes,
    )

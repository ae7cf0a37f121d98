"""Carry out a patch: splice a donor's slots into a target's finished cache (KV cache patching).

For every row a plan says, slot by slot of the result, which target slot and which donor slot it is made of. The
tensors then follow by gathering, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import PAD, KVCache, Origin, refuse_unlike
from kvpatch.caches.rope import LayerRope, Turns
from kvpatch.caches.selection import (
    Touched,
    chosen_heads,
    chosen_layers,
    head_indices,
    mirrored_slots,
    refuse_empty,
    slot_indices,
)
from kvpatch.caches.stacks import over_layers
from kvpatch.errors import CacheError
from kvpatch.interventions.donors import make_donor
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials
from kvpatch.models.geometry import Geometry
from kvpatch.specs.arguments import plain, refuse_other, whole
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import SlotQuery


@dataclass(frozen=True)
class Layout:
    """Where every slot of the result comes from.

    Attributes:
        target, source: [batch, slots], slot of the target (of the donor) it is made of; -1 for none.
        on_host: [batch, slots, 2], the same two where no GPU has to be waited for.
        keeps_target: whether the target's slots stay what and where they are, but for what is put in.
        positions: [batch, slots], where it lands; -1 where padded.
        pending_position: [batch].
    """

    target: Tensor
    source: Tensor
    on_host: np.ndarray
    keeps_target: bool
    positions: Tensor
    pending_position: Tensor


def splice(
    patch: Patch,
    source: KVCache,
    target: KVCache,
    *,
    seed: int | Sequence[int] = 0,
    reference: KVCache | None = None,
) -> KVCache:
    """Put the selected part of `source` (or of the donor made from it) into `target`; see `Patch.apply`.

    Args:
        seed: one for all rows, or one a row.
    """
    return counted_splice(patch, source, target, seed=seed, reference=reference)[0]


def counted_splice(
    patch: Patch,
    source: KVCache,
    target: KVCache,
    *,
    seed: int | Sequence[int] = 0,
    reference: KVCache | None = None,
    may_be_empty: bool = False,
) -> tuple[KVCache, Touched]:
    """`splice`, and how much of every row it touched.

    Args:
        may_be_empty: a row in which the selection finds nothing is left as it is; otherwise it is an error.
    """
    for side, cache in (("source", source), ("target", target)):
        refuse_other(side, cache, KVCache)
    if reference is not None:
        refuse_other("reference", reference, KVCache)
    source = broadcast(source, target)
    seeds = _seeds(seed, target.batch)
    layers = set(chosen_layers(patch.layers, target.layers, may_be_empty=may_be_empty))
    heads = [chosen_heads(patch.kv_heads, k.shape[1], may_be_empty=may_be_empty) for k in target.keys]
    if "k" not in patch.parts:
        source, reference = without_keys(source), None if reference is None else without_keys(reference)
    donor = make_donor(patch.donor, source, seeds, reference)
    layout = plan(patch, donor, target, seeds, may_be_empty=may_be_empty)
    keys, values = _spliced(patch, donor, target, layout, {layer: tuple(heads[layer]) for layer in sorted(layers)})
    mixed = _labelled(patch, donor, target, layout, keys, values)
    changed = (layout.on_host[..., 1] != PAD).sum(axis=1).tolist()
    return mixed, Touched(tuple(changed), len(layers), max((len(heads[layer]) for layer in layers), default=0))


def _spliced(
    patch: Patch, donor: KVCache, target: KVCache, layout: Layout, heads: Mapping[int, tuple[int, ...]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of a patch in these KV heads of these layers."""
    put = Taken(layout.source, donor.positions, layout.positions if patch.rotate else None)

    def put_in(of: tuple[tuple[int, ...], LayerRope | None], own: Tensor, donor: Tensor) -> Tensor:
        chosen, rope = of
        new = put.values(donor) if rope is None else put.keys(donor, rope)
        return blend(own, new, _mask(put.is_real, chosen, own.shape[-3]), patch.strength)

    if layout.keeps_target:
        keys, values = (over_layers(torch.clone, tensors) for tensors in (target.keys, target.values))
    else:
        own = Taken(layout.target, target.positions, layout.positions)
        keys = over_layers(lambda rope, tensor: own.keys(tensor, rope), target.keys, of=target.rope)
        values = over_layers(own.values, target.values)
    if not heads or patch.strength == 0:
        return keys, values
    chosen = list(heads)

    def with_put(own: tuple[Tensor, ...], donor: Sequence[Tensor], ropes: Sequence[LayerRope | None]) -> Any:
        of = [(heads[layer], ropes[layer]) for layer in chosen]
        new = over_layers(put_in, *([part[layer] for layer in chosen] for part in (own, donor)), of=of)
        changed = dict(zip(chosen, new, strict=True))
        return tuple(changed.get(layer, tensor) for layer, tensor in enumerate(own))

    if "k" in patch.parts:
        keys = with_put(keys, donor.keys, target.rope)
    if "v" in patch.parts:
        values = with_put(values, donor.values, [None] * target.layers)
    return keys, values


def _seeds(seed: object, batch: int) -> list[int]:
    """One seed a row, from one for all or one a row; of any size."""
    found = plain(seed)
    if not isinstance(found, (list, tuple)):
        return [whole("seed", found)] * batch
    if len(found) != batch:
        raise CacheError(f"{len(found)} seeds for a batch of {batch}")
    return [whole("a seed", one) for one in found]


def without_keys(cache: KVCache) -> KVCache:
    """A cache whose keys are not read: where keys can't be moved, no key of it is then turned. Others stay."""
    if not any(rope.keeps_its_place for rope in cache.rope):
        return cache
    return replace(cache, rope=tuple(LayerRope("none") for _ in cache.rope))


def plan(patch: Patch, source: KVCache, target: KVCache, seeds: Sequence[int], *, may_be_empty: bool = False) -> Layout:
    """Lay out the result of a patch, row by row.

    Raises:
        EmptySelection: where the selection finds nothing in a row of the source or of the target, unless that may be.
    """
    rows = []
    from_sources = [slot_indices(source, row, patch, seeds[row]) for row in range(target.batch)]
    from_targets = [_from_target(patch, source, target, row, slots, seeds) for row, slots in enumerate(from_sources)]
    if not may_be_empty:
        if patch.align == "replace":
            counts = list(map(len, from_targets))
            refuse_empty(patch.slots, counts, "target", "align='replace' found no slot to replace")
        refuse_empty(patch.slots, list(map(len, from_sources)), "source")
        if patch.align != "append":  # which puts its slots behind the target's last, whatever that is
            refuse_empty(patch.slots, list(map(len, from_targets)), "target")
    for row, (from_source, from_target) in enumerate(zip(from_sources, from_targets, strict=True)):
        first = target.slots - target.row_lengths[row]
        rows.append(_row_plan(patch.align, from_source, from_target, first, target.slots))
    slots = max((len(pairs) for pairs in rows), default=0)
    padded = [[(PAD, PAD)] * (slots - len(pairs)) + pairs for pairs in rows]
    table = np.array(padded, dtype=np.int64).reshape(target.batch, slots, 2)
    to, of = (sent(np.ascontiguousarray(table[..., side]), target.positions.device) for side in (0, 1))
    slot = np.arange(target.slots)
    unmoved = np.where(slot >= target.slots - np.array(target.row_lengths)[:, None], slot, PAD)
    if patch.align in ("replace", "append"):
        # The sequence runs on from the target's first position, whatever its new length.
        real = (to != PAD) | (of != PAD)
        # (A row that caches nothing yet would start where its pending token stands.)
        next_one = target.pending_position[:, None]
        own = torch.where(target.is_real, target.positions, next_one)
        start = torch.cat([own, next_one], dim=1).amin(dim=1, keepdim=True)
        positions = torch.where(real, start + real.cumsum(dim=1) - 1, PAD)
        pending = (start + real.sum(dim=1, keepdim=True)).squeeze(1)
    else:
        positions = torch.where(to != PAD, _pick(target.positions, to), PAD)
        pending = target.pending_position
    return Layout(to, of, table, np.array_equal(table[..., 0], unmoved), positions, pending)


def _from_target(
    patch: Patch, source: KVCache, target: KVCache, row: int, chosen: list[int], seeds: Sequence[int]
) -> list[int]:
    """The target's slots that a row's chosen slots of the source are for; none where they are appended."""
    if patch.align == "append":
        return []
    if isinstance(patch.slots, SlotQuery) and patch.slots.in_source:
        return mirrored_slots(source, target, row, patch.slots.of, chosen) if chosen else []
    return slot_indices(target, row, patch, seeds[row])


def _row_plan(align: str, source: list[int], target: list[int], first: int, slots: int) -> list[tuple[int, int]]:
    """(target slot, source slot) for every slot of one row's result; -1 for none."""
    own = range(first, slots)
    if align == "append":
        return [(slot, PAD) for slot in own] + [(PAD, slot) for slot in source]
    if not source or not target:
        return [(slot, PAD) for slot in own]
    if align == "replace":
        gone = set(target)
        before = [(slot, PAD) for slot in own if slot < target[0]]
        after = [(slot, PAD) for slot in own if slot > target[0] and slot not in gone]
        return before + [(PAD, slot) for slot in source] + after
    if align == "stretch":
        last, span = len(source) - 1, max(1, len(target) - 1)
        pairs = {slot: source[round(i * last / span)] for i, slot in enumerate(target)}
    else:
        step = 1 if align == "start" else -1
        pairs = dict(zip(target[::step], source[::step], strict=False))
    return [(slot, pairs.get(slot, PAD)) for slot in own]


class Taken:
    """Slots taken out of every layer of a cache, keys turned to where they land."""

    def __init__(self, slots: Tensor, positions: Tensor, landing: Tensor | None) -> None:
        """Args:
        slots: [batch, new_slots], slots of the cache; -1 for none.
        positions: [batch, slots] of the cache.
        landing: [batch, new_slots], positions that keys are turned to; None leaves keys as they are.
        """
        self._index = slots.clamp(min=0)[:, None, :, None]
        self.is_real = (slots != PAD)[:, None, :, None]
        self._turns = None
        if landing is not None:
            self._turns = Turns(torch.where(slots != PAD, landing - _pick(positions, slots), 0))

    def values(self, tensor: Tensor) -> Tensor:
        """The slots of [..., batch, heads, slots, dim] as they are; zeros for none."""
        *before, slots, dim = tensor.shape
        if slots == 0:
            return tensor.new_zeros(*before, self._index.shape[2], dim)
        taken = tensor.gather(-2, self._index.to(tensor.device).expand(*before, -1, dim))
        return torch.where(self.is_real.to(tensor.device), taken, 0)

    def keys(self, tensor: Tensor, rope: LayerRope) -> Tensor:
        """The same of keys, turned."""
        taken = self.values(tensor)
        return taken if self._turns is None else self._turns.turn(taken, rope)


def _pick(labels: Tensor, slots: Tensor) -> Tensor:
    return labels.gather(1, slots.clamp(min=0)) if labels.shape[1] else torch.full_like(slots, PAD)


def _mask(is_put: Tensor, heads: Sequence[int], count: int) -> Tensor:
    """[batch, heads or 1, slots, 1]: where something is put, of [batch, 1, slots, 1], in these heads of so many."""
    if len(set(heads)) == count:
        return is_put
    chosen = torch.zeros(count, dtype=torch.bool, device=is_put.device)
    chosen[list(heads)] = True
    return is_put & chosen[None, :, None, None]


def blend(own: Tensor, put: Tensor, is_put: Tensor, strength: float) -> Tensor:
    """`put` in place of `own` where `is_put`, or so much of the way there."""
    is_put = is_put.to(own.device)
    if strength == 1:
        return torch.where(is_put, put, own)
    work = torch.promote_types(own.dtype, torch.float32)
    mixed = own.to(work) + strength * (put.to(work) - own.to(work))
    return torch.where(is_put, mixed.to(own.dtype), own)


def _labelled(
    patch: Patch, donor: KVCache, target: KVCache, layout: Layout, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> KVCache:
    """The result with its labels. A slot is the source's token where all of its K and V came from there."""
    of_source = layout.source != PAD
    heads = [k.shape[1] for k in target.keys]
    layers = chosen_layers(patch.layers, target.layers, may_be_empty=True)
    changed = sum(len(head_indices(patch.kv_heads, heads[layer])) for layer in layers)
    is_whole = patch.parts == "kv" and patch.strength == 1 and changed == sum(heads)
    has_effect = patch.strength != 0 and changed > 0
    has_no_target = layout.target == PAD
    to, of = layout.on_host[..., 0], layout.on_host[..., 1]
    is_named_by_source = (of != PAD) & ((to == PAD) | is_whole)
    named_by_source = sent(is_named_by_source, of_source.device)

    def label(name: str, by_source: Tensor) -> Tensor:
        own = torch.where(layout.target != PAD, _pick(getattr(target, name), layout.target), PAD)
        return torch.where(by_source, _pick(getattr(donor, name), layout.source), own)

    origins = torch.where(of_source & has_effect, int(Origin.patched), label("origins", of_source & False))
    rows = enumerate(zip(to.tolist(), of.tolist(), is_named_by_source.tolist(), strict=True))
    pieces = tuple(_row_pieces(donor, target, row, to, of, by) for row, (to, of, by) in rows)
    return replace(
        target,
        keys=keys,
        values=values,
        positions=layout.positions,
        token_ids=label("token_ids", named_by_source),
        segments=label("segments", of_source & has_no_target),
        origins=origins,
        pending_position=layout.pending_position,
        pieces=pieces,
    )


def _row_pieces(donor: KVCache, target: KVCache, row: int, to: list[int], of: list[int], by: list[bool]) -> tuple:
    own, put = target.pieces[row], donor.pieces[row]
    own_pad, put_pad = target.slots - len(own), donor.slots - len(put)
    return tuple(
        put[s - put_pad] if is_put else own[t - own_pad]
        for t, s, is_put in zip(to, of, by, strict=True)
        if is_put or t != PAD
    )


def broadcast(source: KVCache, target: KVCache) -> KVCache:
    """Check that the caches are of one model, and give a source of one row the target's batch size."""
    refuse_unlike(source, target, "source and target")
    if source.batch == target.batch:
        return source
    if source.batch != 1:
        raise CacheError(f"a source batch of {source.batch} does not fit a target batch of {target.batch}")
    return source[[0] * target.batch]


def _build(patch: Patch, trials: Trials) -> Made:
    reference, source = trials.reference(), trials.giver_caches()
    return Made(
        *counted_splice(
            patch, source, trials.own, seed=trials.seeds, reference=reference, may_be_empty=trials.may_be_empty
        )
    )


def _refuse_model(patch: Patch, geometry: Geometry, may_be_empty: bool) -> None:
    chosen_layers(patch.layers, geometry.layers, may_be_empty=may_be_empty)
    chosen_heads(patch.kv_heads, geometry.kv_heads, may_be_empty=may_be_empty)
    if patch.donor == "shuffle_heads" and geometry.kv_heads < 2:
        raise CacheError("the model has one KV head, which can't be shuffled; give min_kv_heads: 2")


def _refuse_prompts(patch: Patch, fitting: Fitting) -> None:
    source, target = fitting.empty_caches(fitting.givers), fitting.empty_caches(fitting.receivers)
    bare = _without_content(patch)
    mixed, _ = counted_splice(bare, source, target, seed=fitting.seeds, may_be_empty=fitting.may_be_empty)
    fitting.refuse_too_long("a spliced cache", int(mixed.pending_position.max()) + 1)


def _without_content(patch: Patch) -> Patch:
    """A patch of the same slots. A donor has its source's layout, and a layout is the same in every layer and head
    and at every strength."""
    return patch.model_copy(update={"donor": "source", "layers": None, "kv_heads": None, "strength": 1.0})


def _layout(patch: Patch) -> str:
    return _without_content(patch).to_json()


def _is_of_shape(patch: Patch) -> bool:
    """Named slots and indices are found by the prompts' segments alone; a query may read their words, or draw."""
    return not isinstance(patch.slots, SlotQuery)


SPLICE = Kind(
    Patch,
    _build,
    refuse_model=_refuse_model,
    refuse_prompts=_refuse_prompts,
    layout=_layout,
    is_of_shape=_is_of_shape,
)

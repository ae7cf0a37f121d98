"""In-prefill interventions: change activations while the target's prompt runs, so that later layers see the change.

Values, keys and queries are changed where they are made, through the slab's own attention interface, so that fused and
separate projections are alike. The residual stream is changed by hooks that live inside one `with` block. Both count
how often they fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpatch.cache import PAD, KVCache, refuse_unlike
from kvpatch.engine.decode import refuse_foreign
from kvpatch.engine.prefill import prefill_pass
from kvpatch.errors import CacheError, ModelError
from kvpatch.interventions import InPrefill, ValueSteering
from kvpatch.models.hf import Backbone, Edits, LayerEdit
from kvpatch.models.template import EncodedPrompt
from kvpatch.patch import SlotQuery
from kvpatch.rope import LayerRope, rotate
from kvpatch.selection import Touched, chosen_layers, chosen_mask, refuse_empty, slot_mask


@dataclass
class Firings:
    """How often changes were planned to fire, and did; `seen` holds what was recorded, by layer."""

    planned: int = 0
    fired: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Intervened:
    """Caches after an in-prefill intervention, how often it fired, and how much of every row it touched."""

    cache: KVCache
    planned: int
    fired: int
    touched: Touched


def run_in_prefill(
    backbone: Backbone,
    spec: InPrefill,
    sources: Sequence[EncodedPrompt],
    targets: Sequence[EncodedPrompt],
    natural: KVCache,
    may_be_empty: bool = False,
) -> Intervened:
    """Prefill targets while activations of their sources replace their own.

    Args:
        sources, targets: one of each a row; slots are matched from the last cached one backwards.
        natural: the targets' natural caches, which slot selections are read from.
        may_be_empty: a row in which nothing is found to change is left as it is; otherwise it is an error.
    """
    refuse_foreign(backbone, natural)
    backbone.catch_up()
    layers = chosen_layers(spec.layers, backbone.geometry.layers, may_be_empty=may_be_empty)
    lengths = [len(p.token_ids) - 1 for p in sources]
    is_put, delta = landing(spec.slots, natural, lengths, may_be_empty=may_be_empty)
    touched = _touched(is_put, layers, backbone)
    if spec.site == "residual":
        with recorded_residual(backbone, layers) as seen:
            prefill_pass(backbone, sources)
        _refuse_unseen(seen.seen, layers)
        source_slots = max(lengths)
        streams = {i: _aligned(seen.seen[i][:, None], natural.slots)[:, 0] for i in layers}
        assert all(stream.shape[1] == source_slots for stream in seen.seen.values())
        with replaced_residual(backbone, streams, is_put) as firings:
            cache = prefill_pass(backbone, targets)
        return Intervened(cache, firings.planned, firings.fired, touched)
    queries: dict[int, Tensor] = {}
    taps = {i: LayerEdit(query=_tap(queries, i)) for i in layers} if spec.site == "queries_keys_values" else None
    source = prefill_pass(backbone, sources, edits=taps)
    if taps:
        _refuse_unseen(queries, layers)
    edits = {i: _replacement(spec, source, queries, i, is_put, delta, natural.slots) for i in layers}
    cache = prefill_pass(backbone, targets, edits=edits)
    planned, fired = (sum(getattr(edit, name) for edit in edits.values()) for name in ("planned", "fired"))
    return Intervened(cache, planned, fired, touched)


def run_value_steering(
    backbone: Backbone,
    spec: ValueSteering,
    directions: dict[int, Tensor],
    targets: Sequence[EncodedPrompt],
    natural: KVCache,
    may_be_empty: bool = False,
) -> Intervened:
    """Prefill targets while alpha times a direction, [kv_heads, head_dim] a layer, is added to their values."""
    refuse_foreign(backbone, natural)
    refuse_foreign_directions(directions, backbone.identity)
    backbone.catch_up()
    layers = chosen_layers(spec.layers, backbone.geometry.layers, may_be_empty=may_be_empty)
    is_put = chosen_mask(natural, spec.slots, may_be_empty=may_be_empty)
    mask = is_put[:, None, :, None]

    def steer(layer: int) -> LayerEdit:
        step = spec.alpha * directions[layer][None, :, None]
        return LayerEdit(value=lambda v: v + torch.where(mask, step, 0).to(v.dtype))

    edits = {i: steer(i) for i in layers}
    cache = prefill_pass(backbone, targets, edits=edits)
    fired = sum(edit.fired for edit in edits.values())
    return Intervened(cache, len(edits), fired, _touched(is_put, layers, backbone))


def _touched(is_put: Tensor, layers: Sequence[int], backbone: Backbone) -> Touched:
    """Of a change at these slots, [batch, slots], in all KV heads of these layers."""
    return Touched(tuple(is_put.sum(dim=1).tolist()), len(layers), backbone.geometry.kv_heads)


@dataclass(frozen=True)
class RowSteering:
    """What is added to the values of every token fed after the prompt: layer -> [batch, kv_heads, head_dim], zero for
    rows that are not steered."""

    steps: dict[int, Tensor]

    def edits(self, rows: slice = slice(None)) -> Edits:
        """The changes for some of the rows."""

        return {layer: LayerEdit(steer=step[rows]) for layer, step in self.steps.items()}


def landing(
    slots: str | SlotQuery | Sequence[int],
    natural: KVCache,
    source_lengths: Sequence[int],
    *,
    may_be_empty: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which target slots are changed, [batch, slots], and how far their source stood from there, [batch, 1].

    Raises:
        EmptySelection: where the selection finds no slot in a row, or its source is too short to reach one of them,
            unless that may be.
    """
    is_put = chosen_mask(natural, slots, may_be_empty=may_be_empty)
    lengths = torch.tensor(list(source_lengths), device=is_put.device)
    from_end = torch.arange(natural.slots, 0, -1, device=is_put.device)
    is_put = is_put & (from_end <= lengths[:, None])
    if not may_be_empty:
        reached = is_put.sum(dim=1).tolist()
        refuse_empty(slots, reached, "target that its source reaches, counted from the end")
    return is_put, (natural.lengths - lengths)[:, None]


def _aligned(tensor: Tensor, slots: int) -> Tensor:
    """[batch, heads, any, dim] brought to `slots`, the last slot staying last."""
    missing = slots - tensor.shape[2]
    return tensor[:, :, -slots:] if missing <= 0 else torch.nn.functional.pad(tensor, (0, 0, missing, 0))


def _refuse_unseen(seen: dict[int, Tensor], layers: Sequence[int]) -> None:
    """Stop where a source's activations passed by unrecorded, so that there is nothing to put in."""
    if missing := [layer for layer in layers if layer not in seen]:
        raise ModelError(f"the source's activations at layer {missing[0]} were not seen")


def _tap(into: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def record(tensor: Tensor) -> Tensor:
        into[layer] = tensor.clone()
        return tensor

    return record


def _replacement(
    spec: InPrefill, source: KVCache, queries: dict[int, Tensor], layer: int, is_put: Tensor, delta: Tensor, slots: int
) -> LayerEdit:
    mask = is_put[:, None, :, None]
    rope: LayerRope = source.rope[layer]

    def put(tensor: Tensor, turns: bool) -> Callable[[Tensor], Tensor]:
        landed = _aligned(tensor, slots)
        if turns:
            landed = rotate(landed, torch.where(is_put, delta, 0), rope)
        return lambda own: torch.where(mask, landed, own)

    if spec.site == "values":
        return LayerEdit(value=put(source.values[layer], False))
    return LayerEdit(
        query=put(queries[layer], True), key=put(source.keys[layer], True), value=put(source.values[layer], False)
    )


@contextmanager
def recorded_residual(backbone: Backbone, layers: Sequence[int]) -> Iterator[Firings]:
    """Record the residual stream that enters each layer, [batch, tokens, width] a layer."""
    firings = Firings(planned=len(layers))

    def change(layer: int, hidden: Tensor) -> Tensor:
        firings.seen[layer] = hidden.detach().clone()
        return hidden

    with _hooked(backbone, layers, change, firings):
        yield firings


@contextmanager
def replaced_residual(backbone: Backbone, replacement: dict[int, Tensor], at: Tensor) -> Iterator[Firings]:
    """Replace the residual stream that enters some layers.

    Args:
        replacement: layer -> [batch, tokens, width], as recorded.
        at: [batch, tokens], True where the stream is replaced.
    """
    firings = Firings(planned=len(replacement))

    def change(layer: int, hidden: Tensor) -> Tensor:
        return torch.where(at[..., None], replacement[layer], hidden)

    with _hooked(backbone, list(replacement), change, firings):
        yield firings


@contextmanager
def _hooked(
    backbone: Backbone, layers: Sequence[int], change: Callable[[int, Tensor], Tensor], firings: Firings
) -> Iterator[None]:
    """Hooks on what enters some layers, gone on any exit."""

    def hook(layer: int):
        def run(module, args, kwargs):
            firings.fired += 1
            if args:
                return (change(layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(layer, kwargs["hidden_states"])}

        return run

    handles = [backbone.blocks[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Directions(dict[int, Tensor]):
    """Directions that were read off caches: layer -> [kv_heads, head_dim], and the identity of their `model`."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


def refuse_foreign_directions(directions: dict[int, Tensor], model: str) -> None:
    """Refuse directions that were read off another model's caches; a plain dict holds the user's own numbers.

    Raises:
        CacheError: where the models differ.
    """
    if isinstance(directions, Directions) and directions.model != model:
        raise CacheError(
            f"these directions were read off another model ({directions.model or 'unknown'}, this one is "
            f"{model or 'unknown'}); take them from caches of this model"
        )


def mean_difference(sources: KVCache, targets: KVCache) -> tuple[Directions, Directions]:
    """Mean over prompts of the body's mean key (before RoPE) and value, sources less targets.

    Returns:
        Two `Directions`, layer -> [kv_heads, head_dim], float32: keys and values.
    Raises:
        CacheError: where the caches are of different models.
    """
    refuse_unlike(sources, targets, "sources and targets")
    keys, values = Directions(sources.model), Directions(sources.model)
    for layer in range(sources.layers):
        key_means, value_means = zip(*(_body_means(cache, layer) for cache in (sources, targets)), strict=True)
        keys[layer] = key_means[0] - key_means[1]
        values[layer] = value_means[0] - value_means[1]
    return keys, values


def _body_means(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    is_body = slot_mask(cache, "body")
    share = (is_body / is_body.sum(dim=1, keepdim=True))[:, None, :, None]
    back = -torch.where(cache.positions != PAD, cache.positions, 0)
    rope = cache.rope[layer]
    unturned = cache.keys[layer] if rope.layout == "absolute" else rotate(cache.keys[layer], back, rope)

    def mean(part: Tensor) -> Tensor:
        return (part.float() * share).sum(dim=2).mean(dim=0)

    return mean(unturned), mean(cache.values[layer])

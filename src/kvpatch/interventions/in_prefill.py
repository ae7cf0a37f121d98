"""In-prefill interventions: change activations while the target's prompt runs, so that later layers see the change.

Values, keys and queries are changed where they are made, through the slab's own attention interface, so that fused and
separate projections are alike. The residual stream is changed by hooks that live inside one `with` block. Both count
how often they fire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import LayerRope, Turns
from kvpatch.caches.selection import Touched, chosen_layers, chosen_mask, indices_within, refuse_empty
from kvpatch.engine.decode import refuse_foreign
from kvpatch.engine.prefill import prefill_pass
from kvpatch.engine.residual import recorded_residual, replaced_residual
from kvpatch.errors import EmptySelection, ModelError
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials, refuse_missing_layers
from kvpatch.models.backbone import Backbone
from kvpatch.models.geometry import Geometry
from kvpatch.models.hf import LayerEdit
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import OF_QUERY_HEADS, InPrefill
from kvpatch.specs.selectors import SlotQuery
from kvpatch.specs.spans import Span


def run_in_prefill(
    backbone: Backbone,
    spec: InPrefill,
    sources: Sequence[EncodedPrompt],
    targets: Sequence[EncodedPrompt],
    natural: KVCache,
    may_be_empty: bool = False,
    source_caches: Callable[[], KVCache] | None = None,
) -> Made:
    """Prefill targets while activations of their sources replace their own.

    Args:
        sources, targets: one of each a row; slots are matched from the last cached one backwards.
        natural: the targets' natural caches, which slot selections are read from.
        may_be_empty: a row in which nothing is found to change is left as it is; otherwise it is an error.
        source_caches: gives the sources' natural caches where they are at hand; they are made here if None.
    """
    refuse_foreign(backbone, natural)
    backbone.catch_up()
    layers = chosen_layers(spec.layers, backbone.geometry.layers, may_be_empty=may_be_empty)
    lengths = [len(p.token_ids) - 1 for p in sources]
    is_put, delta = landing(spec.slots, natural, lengths, may_be_empty=may_be_empty)
    touched = touched_slots(is_put, layers, backbone)
    if spec.site == "residual":
        with recorded_residual(backbone, layers) as seen:
            prefill_pass(backbone, sources)
        _refuse_unseen(seen.seen, layers)
        source_slots = max(lengths)
        streams = {i: _aligned(seen.seen[i][:, None], natural.slots)[:, 0] for i in layers}
        assert all(stream.shape[1] == source_slots for stream in seen.seen.values())
        with replaced_residual(backbone, streams, is_put) as firings:
            cache = prefill_pass(backbone, targets)
        return Made(cache, touched, firings.planned, firings.fired)
    heads = _query_heads(spec, backbone.geometry.query_heads)
    seen_parts: dict[int, Tensor] = {}
    taps = None if spec.site == "values" else {i: _tapping(spec.site, _tap(seen_parts, i)) for i in layers}
    if taps is None and source_caches is not None:
        source = source_caches()
    else:
        source = prefill_pass(backbone, sources, edits=taps)
    if taps:
        _refuse_unseen(seen_parts, layers)
    turns = Turns(torch.where(is_put, delta, 0))
    puts = {i: _Replacement(is_put, turns, source.rope[i], heads) for i in layers}
    edits = {i: put.edit(spec.site, source, seen_parts, i) for i, put in puts.items()}
    cache = prefill_pass(backbone, targets, edits=edits)
    planned, fired = (sum(getattr(edit, name) for edit in edits.values()) for name in ("planned", "fired"))
    if spec.site in OF_QUERY_HEADS:
        groups = backbone.geometry.query_heads // backbone.geometry.kv_heads
        touched = Touched(touched.slots, touched.layers, len({head // groups for head in heads}))
    return Made(cache, touched, planned, fired)


def touched_slots(is_put: Tensor, layers: Sequence[int], backbone: Backbone) -> Touched:
    """Of a change at these slots, [batch, slots], in all KV heads of these layers."""
    return Touched(tuple(is_put.sum(dim=1).tolist()), len(layers), backbone.geometry.kv_heads)


def landing(
    slots: str | SlotQuery | Span | Sequence[int],
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


def _tapping(site: str, tap: Callable[[Tensor], Tensor]) -> LayerEdit:
    """An edit that shows what a site needs of the source, and changes nothing."""
    return LayerEdit(output=tap) if site == "heads" else LayerEdit(query=tap)


@dataclass(frozen=True)
class _Replacement:
    """What is put into one layer: at which target slots [batch, slots], turned how, in which query heads."""

    is_put: Tensor
    turns: Turns
    rope: LayerRope
    heads: Sequence[int]

    def put(self, tensor: Tensor, turns: bool, heads: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
        """A change that puts [batch, heads, any, dim] of the source in place of the target's own."""
        mask = self.is_put[:, None, :, None].to(tensor.device)
        landed = _aligned(tensor, self.is_put.shape[1])
        if turns:
            landed = self.turns.turn(landed, self.rope)
        if heads is not None:
            is_head = torch.zeros(tensor.shape[1], dtype=torch.bool, device=tensor.device)
            is_head[list(heads)] = True
            mask = mask & is_head[None, :, None, None]
        return lambda own: torch.where(mask, landed, own)

    def edit(self, site: str, source: KVCache, seen: dict[int, Tensor], layer: int) -> LayerEdit:
        """seen: layer -> the source's queries, or what its heads read."""
        if site == "heads":
            return LayerEdit(output=self.put(seen[layer], False, self.heads))
        if site == "queries":
            return LayerEdit(query=self.put(seen[layer], True, self.heads))
        value = self.put(source.values[layer], False)
        if site == "values":
            return LayerEdit(value=value)
        return LayerEdit(query=self.put(seen[layer], True), key=self.put(source.keys[layer], True), value=value)


def _query_heads(spec: InPrefill, count: int) -> list[int]:
    """The query heads that are meant, of `count` in a layer.

    Raises:
        CacheError: for one that there is not. EmptySelection: for none.
    """
    chosen = spec.query_heads
    found = indices_within("query head", range(count) if chosen is None else chosen, count)
    if not found:
        raise EmptySelection(f"query_heads hold none of a layer's {count} query heads, so nothing would change")
    return found


def _refuse_model(spec: InPrefill, geometry: Geometry, may_be_empty: bool) -> None:
    refuse_missing_layers(spec, geometry, may_be_empty)
    _query_heads(spec, geometry.query_heads)


def _build(spec: InPrefill, trials: Trials) -> Made:
    backbone, own = trials.model.backbone, trials.own
    return run_in_prefill(
        backbone, spec, trials.givers, trials.receivers, own, trials.may_be_empty, trials.giver_caches
    )


def _refuse_prompts(spec: InPrefill, fitting: Fitting) -> None:
    lengths = [len(giver.token_ids) - 1 for giver in fitting.givers]
    landing(spec.slots, fitting.empty_caches(fitting.receivers), lengths, may_be_empty=fitting.may_be_empty)


IN_PREFILL = Kind(InPrefill, _build, refuse_model=_refuse_model, refuse_prompts=_refuse_prompts, runs_prompts=True)

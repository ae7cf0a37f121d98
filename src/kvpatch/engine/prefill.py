"""Prefill: run prompts through the model once and keep their caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches import on_host
from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import PAD, KVCache, Origin
from kvpatch.caches.stacks import stack_of
from kvpatch.engine.attention import Attention, AttentionCapture, AttentionRequest
from kvpatch.engine.backend import reader_of
from kvpatch.engine.pack import Held, pack_rows
from kvpatch.engine.token_budget import is_narrow, run_in_passes, tokens_at_once
from kvpatch.errors import ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import AttentionObserver, Edits, Slab
from kvpatch.models.template import EncodedPrompt

SHARED_AT_LEAST = 8
"""A beginning of this many tokens that all prompts share (a chat template's, mostly) is run once for all of them."""


@torch.no_grad()
def prefill(backbone: Backbone, prompts: Sequence[EncodedPrompt]) -> KVCache:
    """Caches of prompts, without their last tokens, which stay pending.

    Args:
        prompts: any number, of any lengths up to the model's context.
    Returns:
        A `KVCache` whose rows stand in the order of `prompts`.
    Raises:
        ProtocolError: for a prompt longer than the model's context.
    """
    if not prompts:
        raise ProtocolError("there is no prompt to prefill")
    reader = reader_of(backbone)  # first, since it takes over what was changed in the model
    for prompt in prompts:
        if len(prompt.token_ids) > backbone.geometry.context:
            raise ProtocolError(f"a prompt has {len(prompt.token_ids)} tokens; {backbone.geometry.limit}")
    lengths = [len(prompt.token_ids) for prompt in prompts]
    # A pass of one row costs a narrow model as much as one of many, so a beginning has none where one pass takes all.
    is_one_pass = is_narrow(backbone) and len(prompts) * max(lengths) <= tokens_at_once(backbone)
    shared = 0 if is_one_pass else _shared_beginning(prompts)
    beginning = _beginning(backbone, reader, prompts[0].token_ids[:shared]) if shared else None
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    parts: list[KVCache] = []

    def run(low: int, high: int) -> None:
        parts.append(prefill_pass(backbone, [prompts[i] for i in order[low:high]], shared, beginning))

    run_in_passes(backbone, [lengths[i] - shared for i in order], run)
    joined = parts[0] if len(parts) == 1 else KVCache.concat(parts)
    if order == list(range(len(prompts))):
        return joined
    back = sorted(range(len(order)), key=lambda place: order[place])
    return joined[back]


def _shared_beginning(prompts: Sequence[EncodedPrompt]) -> int:
    """Number of cached tokens that all prompts begin with; 0 where running them once would not pay."""
    if len(prompts) < 2:
        return 0
    first, last = min(p.token_ids[:-1] for p in prompts), max(p.token_ids[:-1] for p in prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return shared if shared >= SHARED_AT_LEAST else 0


def _beginning(backbone: Backbone, reader: Any, token_ids: Sequence[int]) -> Held:
    """The shared beginning, in one row."""
    at = torch.arange(len(token_ids), device=backbone.device)[None]
    if reader is not None:
        return Held(*_read_pass(reader, [token_ids], len(token_ids), None, None), at)
    slab = backbone.slab(1, len(token_ids))
    backbone.forward(torch.tensor([list(token_ids)], device=backbone.device), at, slab)
    layers = slab.slab_layers
    return Held([layer.keys for layer in layers], [layer.values for layer in layers], at)


def prefill_pass(
    backbone: Backbone,
    prompts: Sequence[EncodedPrompt],
    shared: int = 0,
    beginning: Held | None = None,
    edits: Edits | None = None,
    observer: AttentionObserver | None = None,
) -> KVCache:
    """One pass over prompts; `prefill` cuts many prompts into such passes.

    Args:
        shared, beginning: number of tokens that all prompts begin with, and one row that holds them.
        edits: changes to queries, keys and values as they are made; the pass must then share no beginning.
        observer: is shown every layer's attention; with a shared beginning, that of the rest alone.
    """
    labels = labels_of(prompts, backbone.device)
    token_ids, positions = labels["token_ids"], labels["positions"]
    batch, slots = positions.shape
    if observer is None and (reader := reader_of(backbone, edits)) is not None:
        keys, values = _read_pass(reader, [p.token_ids[:-1] for p in prompts], slots, beginning, edits)
        return KVCache(keys, values, **labels, rope=backbone.geometry.rope, model=backbone.identity)
    if beginning is not None:
        slab = Slab.holding(
            tuple(keys.expand(batch, -1, -1, -1) for keys in beginning.keys),
            tuple(values.expand(batch, -1, -1, -1) for values in beginning.values),
            beginning.positions.expand(batch, -1),
            slots - shared,
        )
    else:
        slab = backbone.slab(batch, max(slots, 1))
    rest = slots - shared
    if rest or not slots:
        own = torch.where(positions >= shared, positions, PAD)[:, -rest:] if rest else positions.new_zeros(batch, 1)
        backbone.forward(token_ids[:, -rest:].clamp(min=0) if rest else own, own, slab, edits=edits, observer=observer)
    return KVCache(
        keys=tuple(_right_aligned(x.keys, positions, shared) for x in slab.slab_layers),
        values=tuple(_right_aligned(x.values, positions, shared) for x in slab.slab_layers),
        **labels,
        rope=backbone.geometry.rope,
        model=backbone.identity,
    )


LayerTensors = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Keys and values, a tensor per layer each."""


def _read_pass(
    reader: Any, token_ids: Sequence[Sequence[int]], slots: int, beginning: Held | None, edits: Edits | None
) -> LayerTensors:
    """Keys and values of rows of tokens, right-aligned, by the engine's own kernels: [batch, kv_heads, slots, head_dim]
    per layer."""
    backbone, batch = reader.backbone, len(token_ids)
    geometry, device = backbone.geometry, backbone.device
    shared = 0 if beginning is None else beginning.positions.shape[1]
    rows = [list(zip(row[shared:], range(shared, len(row)), strict=True)) for row in token_ids]
    held = None
    if beginning is not None:
        keys, values = ([one.expand(batch, -1, -1, -1) for one in of] for of in (beginning.keys, beginning.values))
        held = Held(keys, values, beginning.positions.expand(batch, -1))
    pack = pack_rows(rows, None if held is None else [shared] * batch, held)
    row, column = (sent(at, device) for at in (pack.row, pack.column + slots - pack.shape[1]))
    starts = sent(np.array([slots - len(row) for row in token_ids]), device)
    of_row, of_slot = (torch.arange(count, device=device) for count in (batch, shared))

    # Each layer's new keys and values, as packed; brought to their places for all layers together.
    packed = torch.empty(
        2, geometry.layers, len(row), geometry.kv_heads, geometry.head_dim, dtype=backbone.dtype, device=device
    )

    def on_layer(layer: int, *new: Tensor) -> None:
        for part, tensor in zip(packed, new, strict=True):
            part[layer] = tensor

    if len(row):
        reader.read(pack, held, edits=edits, on_layer=on_layer, wants_states=False)
    made = []
    for part, of in zip(packed, ((), ()) if beginning is None else (beginning.keys, beginning.values), strict=True):
        whole = part.new_zeros(geometry.layers, batch, geometry.kv_heads, slots, geometry.head_dim)
        whole[:, row, :, column] = part.transpose(0, 1)
        if of:  # [layers, kv_heads, shared, head_dim], the same for all rows
            first = stack_of(of)[:, 0].permute(2, 0, 1, 3)
            whole[:, of_row[:, None], :, starts[:, None] + of_slot] = first
        made.append(whole.unbind())
    return made[0], made[1]


def prefill_with_attention(
    backbone: Backbone, prompts: Sequence[EncodedPrompt], to_capture: AttentionRequest
) -> tuple[KVCache, Attention]:
    """Caches of prompts in one pass, and statistics of every head over their tokens (the pending ones left out).

    Args:
        to_capture: what to capture; `marked` is [batch, slots], rows right-aligned as in the cache.
    Raises:
        ProtocolError: for no prompt, or one longer than the model's context or of a single token.
    """
    backbone.catch_up()
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if not 1 < longest <= backbone.geometry.context:
        raise ProtocolError(
            f"prompts of 2 to {backbone.geometry.context} tokens can be watched; the longest has {longest}"
        )
    labels = labels_of(prompts, backbone.device)
    none = labels["positions"][:, :0]
    capture = AttentionCapture(labels["segments"], labels["origins"], none, none, to_capture)
    return prefill_pass(backbone, prompts, observer=capture), capture.result()


def labels_of(prompts: Sequence[EncodedPrompt], device: str | torch.device) -> dict[str, Any]:
    """What the slots of the prompts' caches stand for: every field of `KVCache` but keys, values, rope and
    model."""
    slots = max(len(prompt.token_ids) for prompt in prompts) - 1

    def table(rows: Sequence[Sequence[int]], what: str, known: tuple[Any, ...]) -> Tensor:
        """[batch, slots]; `known` is what a cache will ask for."""
        padded = np.array([[PAD] * (slots - len(row)) + list(row) for row in rows], dtype=np.int64)
        return noted(padded.reshape(len(prompts), slots), what, known)

    def noted(numbers: np.ndarray, what: str, known: tuple[Any, ...]) -> Tensor:
        labels = sent(numbers, torch.device(device))
        on_host.told(labels, what, known)
        return labels

    lengths = tuple(len(prompt.token_ids) - 1 for prompt in prompts)
    tokens, segments = (tuple(tuple(getattr(p, of)[:-1]) for p in prompts) for of in ("token_ids", "segments"))
    pending = tuple(prompt.token_ids[-1] for prompt in prompts)
    positions = table([range(length) for length in lengths], on_host.LENGTHS, lengths)  # [batch, slots]
    return {
        "positions": positions,
        "token_ids": table(tokens, on_host.OWN, tokens),
        "segments": table(segments, on_host.OWN, segments),
        "origins": torch.where(positions == PAD, PAD, int(Origin.own)),
        "pending": noted(np.array(pending, dtype=np.int64), on_host.PLAIN, pending),
        "pending_position": noted(np.array(lengths, dtype=np.int64), on_host.PLAIN, lengths),
        "pieces": tuple(prompt.pieces[:-1] for prompt in prompts),
    }


def _right_aligned(tensor: Tensor, positions: Tensor, shared: int) -> Tensor:
    """Bring each row's shared beginning, which stands at the slab's left, up against the row's own tokens.

    tensor [batch, kv_heads, capacity, dim]; positions [batch, slots] of the right-aligned rows.
    """
    slots = positions.shape[1]
    if not shared:
        return tensor[:, :, :slots]
    own = torch.arange(slots, device=positions.device).expand_as(positions)
    index = torch.where((positions >= 0) & (positions < shared), positions, own).to(tensor.device)
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

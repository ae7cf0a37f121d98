"""The one file that knows transformers' cache and attention interfaces.

`Backbone` runs a causal language model over a `Slab`, a preallocated KV cache whose rows are right-aligned, so that
every row writes the same slot. Attention runs through an interface of our own, which sees queries, keys and values
after RoPE and after the cache: the mask comes from explicit positions, and grouped queries are folded into the query
axis, so that keys and values are never repeated. The interface is registered under a name of its own and
switched on only while a forward pass of ours runs; the model is untouched before and after.

At load the model is probed with a few tokens: what it caches, how each layer turns its keys, what each layer attends to
(`masks`), up to which length that holds (`limits`), and whether our forward pass gives the model's own logits. A model
that fails is refused with the reason.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from kvpatch.caches.kvcache import PAD
from kvpatch.errors import CacheError, ModelError

ATTENTION = "kvpatch_slab"


@dataclass
class LayerEdit:
    """Changes to the queries, keys and values that one layer makes in a forward pass, after RoPE and before they are
    cached or used, and to what its query heads read, before they are joined. Each takes and gives [batch, heads, new,
    head_dim]; `steer` is added to all new values, [batch, kv_heads, head_dim]; `fired` counts the changes made."""

    query: Callable[[Tensor], Tensor] | None = None
    key: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    output: Callable[[Tensor], Tensor] | None = None
    steer: Tensor | None = None
    fired: int = 0

    @property
    def planned(self) -> int:
        """Changes one forward pass should make."""
        return sum(change is not None for change in (self.query, self.key, self.value, self.output, self.steer))

    @property
    def only_steers(self) -> bool:
        """Whether adding to the values is all it does."""
        return self.steer is not None and self.planned == 1

    def apply(self, part: str, tensor: Tensor) -> Tensor:
        """Change one part, if this edit has something to change in it."""
        if part == "value" and self.steer is not None:
            self.fired += 1
            tensor = tensor + self.steer[:, :, None].to(tensor)
        change = getattr(self, part)
        if change is None:
            return tensor
        self.fired += 1
        return change(tensor)


Edits = Mapping[int, LayerEdit]
"""Layer -> edit."""


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is made from: its probabilities are softmax(softcap(query key^T scaling) + bias).
    `sinks` are further scores, which take their share of it and belong to no slot.

    Attributes:
        query: [batch, query_heads, queries, dim]; key: [batch, kv_heads, slots, dim], both after RoPE and any edit. The
            queries stand in the last slots.
        bias: [batch, 1, queries, slots], 0 where a query may look, -inf elsewhere.
        scaling: factor of the scores. softcap: where they are capped, or None. sinks: [query_heads], or None.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None = None


class AttentionObserver(Protocol):
    """Is shown the attention of every layer of a forward pass. It changes nothing, and is seen by that pass alone."""

    def begin(self, token_ids: Tensor, positions: Tensor) -> None:
        """A pass starts, over tokens [batch, new] at positions [batch, new], -1 where padded."""

    def observe(self, layer: int, inputs: AttentionInputs) -> None:
        """One layer's turn."""


@dataclass
class _Extent:
    """Slots of a slab: how many there are, and that the newest stand at [start, length). Its layers share it; were they
    to hold the slab itself, its memory would wait for the garbage collector, which counts no bytes."""

    capacity: int
    start: int = 0
    length: int = 0
    rounds: Callable[[Tensor], Tensor] | None = None  # what keys and values are written as


class SlabLayer(CacheLayerMixin):
    """One layer of a slab, in the shape transformers' `Cache` wants its layers."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, extent: _Extent, layer: int) -> None:
        super().__init__()
        self.extent, self.layer = extent, layer
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, key_dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.extent.capacity, key_dim)
        self.values = value_states.new_zeros(batch, heads, self.extent.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.extent.start, self.extent.length
        if edit := _running.step.edits.get(self.layer):
            key_states, value_states = edit.apply("key", key_states), edit.apply("value", value_states)
        if (rounds := self.extent.rounds) is not None:
            key_states, value_states = rounds(key_states), rounds(value_states)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.extent.length, 0

    def get_seq_length(self) -> int:
        return self.extent.start

    def get_max_length(self) -> int:
        return self.extent.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


class Slab(Cache):
    """KV cache of fixed capacity that a forward pass writes into: the only buffers that change in place.

    Per layer, keys and values are [batch, kv_heads, capacity, head_dim]; `positions` is [batch, capacity], -1 where a
    slot is padding or not yet written. Slots [0, length) are live. `branches` is [batch, capacity]: a slot of branch 0
    is seen by all later tokens, any other by its own branch only, so that several continuations share one cache.
    """

    def __init__(self, batch: int, capacity: int, layers: int, device: torch.device) -> None:
        self.extent = _Extent(capacity)
        self.positions = torch.full((batch, capacity), PAD, dtype=torch.int64, device=device)
        self.branches = torch.zeros_like(self.positions)
        self.slab_layers = [SlabLayer(self.extent, layer) for layer in range(layers)]
        super().__init__(layers=list(self.slab_layers))

    @classmethod
    def holding(cls, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], positions: Tensor, room: int) -> Slab:
        """A slab with a copy of these slots, and room for more."""
        batch, slots = positions.shape
        slab = cls(batch, slots + room, len(keys), positions.device)
        for layer, k, v in zip(slab.slab_layers, keys, values, strict=True):
            layer.lazy_initialization(k, v)
            layer.keys[:, :, :slots] = k
            layer.values[:, :, :slots] = v
        slab.positions[:, :slots] = positions
        slab.extent.start = slab.extent.length = slots
        return slab

    @property
    def length(self) -> int:
        """Slots that are live."""
        return self.extent.length

    def extend(self, positions: Tensor, branches: Tensor | None = None) -> None:
        """Open the next slots for tokens at these positions and of these branches, [batch, new]; -1 is padding."""
        own = self.extent
        own.start, own.length = own.length, own.length + positions.shape[1]
        if own.length > own.capacity:
            raise ModelError(f"a slab of {own.capacity} slots can't take {own.length}")
        self.positions[:, own.start : own.length] = positions
        if branches is not None:
            self.branches[:, own.start : own.length] = branches


@dataclass
class Step:
    """What the layers of one forward pass share: positions of slots and queries, and the masks made of them."""

    slot_positions: Tensor  # [batch, slots]
    query_positions: Tensor  # [batch, queries]
    dtype: torch.dtype
    slot_branches: Tensor | None = None  # [batch, slots]
    edits: Edits = field(default_factory=dict)
    observer: AttentionObserver | None = None
    windows: tuple[int | None, ...] = ()  # by layer; all look at all where empty, as while one token is probed
    chunks: tuple[int | None, ...] = ()  # by layer; pieces of so many positions that do not see one another
    attended: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None  # by layer: query, key, value; None: not kept
    _bias: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    _queries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer: as given, and as edited

    def query_of(self, layer: int, query: Tensor) -> tuple[Tensor, bool]:
        """The query with this layer's edit, and whether it is new in this pass. A layer may attend more than once with
        one query, to halves of its values, say (DiffLlama); its edit is made once."""
        known = self._queries.get(layer)
        if known is not None and (known[0] is query or torch.equal(known[0], query)):
            return known[1], False
        edit = self.edits.get(layer)
        self._queries[layer] = (query, edit.apply("query", query) if edit else query)
        return self._queries[layer][1], True

    def bias_of(self, layer: int, groups: int, device: torch.device) -> Tensor:
        """The additive mask of a layer, on the device that the layer runs on; see `bias`."""
        window = self.windows[layer] if self.windows else None
        chunk = self.chunks[layer] if self.chunks else None
        key = (window, chunk, groups, device)
        if key not in self._bias:
            self._bias[key] = self.bias(window, groups, chunk).to(device)
        return self._bias[key]

    def bias(self, window: int | None, groups: int = 1, chunk: int | None = None) -> Tensor:
        """Additive mask [batch, 1, queries, slots]: 0 where a query may look, -inf elsewhere.

        Slots stand in the order they were written, so a query sees the slots up to its own; a window counts positions,
        and a chunk is the positions with one quotient by its size.
        A padding query sees itself, so that its softmax is over something. With `groups`, the queries of as many heads
        stand one behind the other: [batch, 1, groups * queries, slots].
        """
        if (window, chunk, groups) not in self._bias:
            queries, slots = self.query_positions.shape[1], self.slot_positions.shape[1]
            device = self.slot_positions.device
            slot = torch.arange(slots, device=device)
            own = torch.arange(slots - queries, slots, device=device)[:, None]
            may = (slot <= own)[None] & (self.slot_positions != PAD)[:, None, :]
            if window is not None:
                may &= self.query_positions[:, :, None] - self.slot_positions[:, None, :] < window
            if chunk is not None:
                may &= self.query_positions[:, :, None] // chunk == self.slot_positions[:, None, :] // chunk
            if self.slot_branches is not None:
                of_query = self.slot_branches[:, slots - queries :, None]
                may &= (self.slot_branches == 0)[:, None, :] | (self.slot_branches[:, None, :] == of_query)
            may |= (slot == own)[None]
            # Rows of a whole number of 16 bytes, or a GPU's kernel copies the mask in every layer.
            shape = (len(may), groups * queries, -(-slots // 8) * 8)
            bias = torch.zeros(shape, dtype=self.dtype, device=device)[..., :slots]
            bias.masked_fill_(~may.repeat(1, groups, 1), float("-inf"))
            self._bias[window, chunk, groups] = bias[:, None]
        return self._bias[window, chunk, groups]


_running = threading.local()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over the slab. query [batch, query_heads, queries, dim], key and value [batch, kv_heads, slots, dim];
    returns [batch, queries, query_heads, dim]. Some modules pass a window, some don't: it is read off the masks.
    s_aux [query_heads]: scores of attention sinks, which take a share of each head's attention and hold no value."""
    step: Step = _running.step
    layer = int(module.layer_idx)
    if step.attended is not None:
        step.attended[layer] = (query, key, value)
    query, is_new = step.query_of(layer, query)
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(batch, kv_heads, groups * queries, dim)
    bias = step.bias_of(layer, groups, query.device)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if step.observer is not None and is_new:
        step.observer.observe(layer, AttentionInputs(query, key, bias[:, :, :queries], scale, softcap, s_aux))
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scaling)
    else:
        of_head = None if s_aux is None else s_aux.view(kv_heads, groups, 1).expand(-1, -1, queries).flatten(1)
        out = _written_out(folded, key, value, bias, scale, softcap, of_head)
    out = out.reshape(batch, heads, queries, -1)
    if (edit := step.edits.get(layer)) is not None and edit.output is not None:
        if not is_new:
            raise ModelError(f"layer {layer} attends more than once in a pass, so what its heads read can't be changed")
        out = edit.apply("output", out)
    return out.transpose(1, 2).contiguous(), None


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention step by step, for what the fused kernels do not know. sinks: [kv_heads, folded queries]."""
    scores = q @ k.transpose(2, 3) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = (scores + bias).float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, :, None].expand(len(q), -1, -1, 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : k.shape[2]].to(q.dtype) @ v


AttentionInterface.register(ATTENTION, attend)


@contextlib.contextmanager
def slab_attention(configs: list[Any], step: Step) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    _running.step = step
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
        del _running.step


def dynamic_cache(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> DynamicCache:
    """transformers' own cache with a copy of these slots, [batch, kv_heads, slots, head_dim] a layer. It keeps all of
    them, also where a layer looks back on a window only: the model's masks see to that."""
    made = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        made.update(k.clone(), v.clone(), layer)
    return made


def tensors_of_dynamic(dynamic: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A copy of the keys and values that a cache of transformers holds.

    Raises:
        CacheError: for anything else than such a cache, one that is empty, or one that keeps other things.
    """
    if not isinstance(dynamic, Cache) or isinstance(dynamic, Slab):
        raise CacheError(f"a DynamicCache of transformers is wanted, got a {type(dynamic).__name__}")
    layers: list[Any] = list(dynamic.layers)
    held: list[tuple[Any, Any]] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not held or any(not isinstance(tensor, Tensor) or tensor.ndim != 4 for pair in held for tensor in pair):
        raise CacheError("the DynamicCache holds no keys and values in one of its layers; run the model with it first")
    return tuple(k.detach().clone() for k, _ in held), tuple(v.detach().clone() for _, v in held)


RowChange = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Numbers of rows [n], and their keys and values, [n, kv_heads, slots, head_dim]."""


class GrowingLayer(SlabLayer):
    """One layer of a pass whose rows share a cache of one row, [1, kv_heads, slots, head_dim], and grow in number from
    layer to layer. `change` gives the rows whose slots are others here, and their keys and values."""

    def __init__(self, extent: _Extent, layer: int, keys: Tensor, values: Tensor, change: RowChange | None) -> None:
        super().__init__(extent, layer)
        self.keys, self.values, self.change = keys, values, change
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        shape = (key_states.shape[0], -1, -1, -1)
        keys, values = self.keys.expand(shape), self.values.expand(shape)
        if self.change is not None:
            rows, own_keys, own_values = self.change()
            rows = rows.to(keys.device)
            keys, values = keys.index_copy(0, rows, own_keys), values.index_copy(0, rows, own_values)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class GrowingCache(Cache):
    """A cache of one row that a pass with a growing number of rows reads; nothing is written into it."""

    def __init__(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], new: int, changes: Mapping[int, RowChange]
    ) -> None:
        slots = keys[0].shape[2]
        extent = _Extent(slots + new, start=slots, length=slots + new)
        pairs = enumerate(zip(keys, values, strict=True))
        super().__init__(layers=[GrowingLayer(extent, layer, k, v, changes.get(layer)) for layer, (k, v) in pairs])

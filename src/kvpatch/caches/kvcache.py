"""KVCache: the keys and values of a batch of prompts, with what each slot stands for. A value: nothing changes it.

Layout. Rows are right-aligned: the last slot of every row is its last cached token, shorter rows are padded on the
left. Per layer, `keys` and `values` are [batch, kv_heads, slots, head_dim]; keys are stored after RoPE. Beside them
stand, for every slot, its position, token id, segment, piece of text and origin; -1 marks padding. The last prompt
token is not cached: it is `pending`, and generation starts by feeding it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches import on_host
from kvpatch.caches.checksums import checksums_of
from kvpatch.caches.devices import device_of, sent
from kvpatch.caches.display import Layers, cache_as_html, shortened
from kvpatch.caches.rope import LayerRope
from kvpatch.caches.stacks import over_layers
from kvpatch.errors import CacheError
from kvpatch.specs.arguments import chosen_rows, refuse_other, shown, whole

if TYPE_CHECKING:
    from transformers import DynamicCache

    from kvpatch.engine.model import Model

PAD = -1


class Segment(IntEnum):
    """Strata of a prompt: what precedes the user's words, the words, and what follows them."""

    bos = 0
    template = 1
    body = 2
    trailer = 3


class Origin(IntEnum):
    """Whose activations a slot holds."""

    own = 0
    patched = 1


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch, after prefill and before the pending token.

    Attributes:
        keys, values: one tensor a layer, [batch, kv_heads, slots, head_dim]; keys after RoPE. Of a model that is split
            over devices each layer's are where the layer runs; all labels are where the logits come out.
        positions: [batch, slots], the integer RoPE was applied with; -1 where padded.
        token_ids: [batch, slots]; -1 where padded.
        segments: [batch, slots], `Segment` codes; -1 where padded.
        origins: [batch, slots], `Origin` codes; -1 where padded.
        pending: [batch], the token to feed next.
        pending_position: [batch], the position it will be fed at.
        pieces: per row, the text of each of its own slots (padding left out).
        rope: one `LayerRope` a layer.
        model: identity of the model that made it (`Backbone.identity`, a hash of weights and tokenizer). "" is unknown,
            of caches made by hand, and fits other unknown ones alone, never a model's.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    token_ids: Tensor
    segments: Tensor
    origins: Tensor
    pending: Tensor
    pending_position: Tensor
    pieces: tuple[tuple[str, ...], ...]
    rope: tuple[LayerRope, ...]
    model: str = ""

    def __post_init__(self) -> None:
        shape = tuple(self.positions.shape)
        for name in ("token_ids", "segments", "origins"):
            if tuple(getattr(self, name).shape) != shape:
                raise CacheError(f"{name} has shape {tuple(getattr(self, name).shape)}, positions {shape}")
        if not len(self.keys) == len(self.values) == len(self.rope):
            raise CacheError(f"{len(self.keys)} key layers, {len(self.values)} value layers, {len(self.rope)} ropes")
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            if k.ndim != 4 or (k.shape[0], k.shape[2]) != shape or k.shape[:3] != v.shape[:3]:
                raise CacheError(
                    f"layer {layer}: keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit "
                    f"[batch, kv_heads, slots, head_dim] with batch, slots = {shape}"
                )
        if tuple(self.pending.shape) != shape[:1] or tuple(self.pending_position.shape) != shape[:1]:
            raise CacheError(f"pending has shape {tuple(self.pending.shape)}, the batch is {shape[0]}")
        for name in ("keys", "values"):
            object.__setattr__(self, name, Layers(getattr(self, name)))
        if len(self.pieces) != shape[0]:
            raise CacheError(f"there are pieces for {len(self.pieces)} rows, the batch is {shape[0]}")

    def __repr__(self) -> str:
        lengths = list(self.row_lengths)
        slots = self.slots if set(lengths) <= {self.slots} else shortened(lengths)
        shape = f"kv_heads={self.keys[0].shape[1]}, head_dim={self.keys[0].shape[3]}, " if self.keys else ""
        dtype = self.keys[0].dtype if self.keys else None
        return f"KVCache(batch={self.batch}, layers={self.layers}, {shape}slots={slots}, dtype={dtype})"

    def _repr_html_(self) -> str:
        return cache_as_html(repr(self), self.pieces, self.row_segments)

    def __len__(self) -> int:
        return self.batch

    def __getitem__(self, rows: int | slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor) -> KVCache:
        """Some rows, as a cache of their own (padding that none of them needs is cut off).

        Args:
            rows: an index, several, a slice, or a mask of one boolean a row; lists, NumPy arrays and torch tensors.
        Raises:
            CacheError: for a row that there is not, a mask of another length, or anything else.
        """
        index = chosen_rows(rows, self.batch)
        at = sent(np.array(index, dtype=np.int64), self.positions.device)
        lengths = tuple(map(self.row_lengths.__getitem__, index))
        cut = self.slots - max(lengths)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[..., cut:, :].index_select(-4, at.to(tensor.device))

        positions = self.positions[at, cut:]
        labels = {name: getattr(self, name)[at, cut:] for name in ("token_ids", "segments", "origins")}
        labels |= {name: getattr(self, name)[at] for name in ("pending", "pending_position")}
        on_host.told(positions, on_host.LENGTHS, lengths)
        for name, part in labels.items():
            on_host.pass_on(getattr(self, name), part, index)
        return replace(
            self,
            keys=over_layers(chosen, self.keys),
            values=over_layers(chosen, self.values),
            positions=positions,
            pieces=tuple(self.pieces[row] for row in index),
            **labels,
        )

    def __iter__(self) -> Iterator[KVCache]:
        return (self[row] for row in range(self.batch))

    def rows(self, low: int, high: int) -> KVCache:
        """Rows [low, high), which share their memory with these; all slots stay."""
        names = ("positions", "token_ids", "segments", "origins", "pending", "pending_position", "pieces")
        parts = {name: getattr(self, name)[low:high] for name in names}
        for name in names[:-1]:
            on_host.pass_on(getattr(self, name), parts[name], slice(low, high))
        return replace(
            self,
            keys=tuple(k[low:high] for k in self.keys),
            values=tuple(v[low:high] for v in self.values),
            **parts,
        )

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Slots of each row that are not padding, as numbers."""
        return on_host.once(
            self.positions, on_host.LENGTHS, lambda rows: tuple(sum(at != PAD for at in row) for row in rows)
        )

    @property
    def row_pending(self) -> tuple[int, ...]:
        """The pending token of each row, as numbers."""
        return on_host.once(self.pending, on_host.PLAIN, tuple)

    @property
    def row_pending_position(self) -> tuple[int, ...]:
        """The position that each row's pending token is fed at, as numbers."""
        return on_host.once(self.pending_position, on_host.PLAIN, tuple)

    @property
    def row_segments(self) -> tuple[tuple[int, ...], ...]:
        """Segment of each row's own slots (padding left out), as numbers."""
        return self._own(self.segments)

    @property
    def row_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Token of each row's own slots (padding left out), as numbers; whatever stands for a token, -1 too."""
        return self._own(self.token_ids)

    def _own(self, labels: Tensor) -> tuple[tuple[int, ...], ...]:
        def read(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(row[len(row) - n :]) for row, n in zip(rows, self.row_lengths, strict=True))

        return on_host.once(labels, on_host.OWN, read)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.positions.shape[0]

    @property
    def slots(self) -> int:
        """Number of slots of the longest row."""
        return self.positions.shape[1]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def is_real(self) -> Tensor:
        """[batch, slots], False where padded."""
        return self.positions != PAD

    @property
    def lengths(self) -> Tensor:
        """[batch], slots of each row that are not padding."""
        return self.is_real.sum(dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @classmethod
    def concat(cls, caches: Sequence[KVCache]) -> KVCache:
        """Rows of several caches of one model in one batch, padded on the left to the longest.

        Raises:
            CacheError: for no cache, or caches of different models, types or devices.
        """
        if not isinstance(caches, (list, tuple)):
            raise CacheError(f"caches must be a list of KVCaches, got {shown(caches)}")
        if not caches:
            raise CacheError("there is nothing to concatenate")
        for cache in caches:
            refuse_other("each of the caches", cache, KVCache)
        first = caches[0]
        for other in caches[1:]:
            refuse_unlike(first, other, "two caches of a batch")
        slots = max(c.slots for c in caches)

        def joined(*tensors: Tensor) -> Tensor:
            return torch.cat([pad_left(t, slots, 0, -2) for t in tensors], dim=-4)

        def labels(name: str) -> Tensor:
            return torch.cat([pad_left(getattr(c, name), slots, PAD, 1) for c in caches])

        return replace(
            first,
            keys=over_layers(joined, *(c.keys for c in caches)),
            values=over_layers(joined, *(c.values for c in caches)),
            positions=labels("positions"),
            token_ids=labels("token_ids"),
            segments=labels("segments"),
            origins=labels("origins"),
            pending=torch.cat([c.pending for c in caches]),
            pending_position=torch.cat([c.pending_position for c in caches]),
            pieces=tuple(row for c in caches for row in c.pieces),
        )

    def to(self, device: str | torch.device, layers: Sequence[torch.device] | None = None) -> KVCache:
        """The same cache on another device.

        Args:
            device: where labels go, and keys and values too if `layers` is not given.
            layers: the device of each layer's keys and values, as a model that is split over devices has them.
        Raises:
            CacheError: where there is no such device.
        """
        device = device_of(device)
        names = ("positions", "token_ids", "segments", "origins", "pending", "pending_position")
        places = [device] * self.layers if layers is None else layers
        return replace(
            self,
            keys=tuple(k.to(place) for k, place in zip(self.keys, places, strict=True)),
            values=tuple(v.to(place) for v, place in zip(self.values, places, strict=True)),
            **{name: getattr(self, name).to(device) for name in names},
        )

    def row_token_ids(self, row: int, *, with_pending: bool = True) -> list[int]:
        """Token ids of one row, padding left out, the pending token last.

        Raises:
            CacheError: for a row that there is not.
        """
        row = whole("row", row, least=-self.batch, most=self.batch - 1)
        ids = self.row_tokens[row]
        return [*ids, self.row_pending[row]] if with_pending else list(ids)

    def to_dynamic(self) -> DynamicCache:
        """A copy as `transformers.DynamicCache`, given to `model.hf` as `cache` (`past_key_values` before 5.24).

        The pending token is not in it: feed it next, at `pending_position`. Padding of shorter rows stays on the left;
        then give the model an `attention_mask` of `is_real` with a column of ones for each token that is fed.
        """
        from kvpatch.models.exchange import to_dynamic

        return to_dynamic(self)

    @classmethod
    def from_dynamic(
        cls,
        dynamic: DynamicCache,
        *,
        positions: Any,
        token_ids: Any,
        pending: Any,
        segments: Any = None,
        model: Model | None = None,
    ) -> KVCache:
        """A copy of a cache of transformers, with what each slot stands for.

        Args:
            dynamic: a `DynamicCache` that holds all slots of every layer.
            positions, token_ids: [batch, slots]; positions are -1 where padded (on the left).
            pending: the token to feed next, one a row; its position is the one behind the row's last.
            segments: [batch, slots], `Segment` codes; all body if None, or as they were where `to_dynamic` made it.
            model: the model that made it, which must be told where `to_dynamic` did not make it: without, no model goes
                on from the cache.
        Raises:
            CacheError: where shapes do not fit, or a layer keeps fewer slots than another.
        """
        from kvpatch.models.exchange import from_dynamic

        return from_dynamic(dynamic, positions, token_ids, pending, segments, model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, with positions, tokens, segments, pending tokens and the model's identity.

        Raises:
            CacheError: where the file can't be written.
        """
        from kvpatch.caches.cache_files import save_cache

        return save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Model | None = None) -> KVCache:
        """Read a cache that `save` wrote, onto the model's device.

        Args:
            model: the model that is to go on from it; None reads it for a look alone, on the CPU.
        Raises:
            CacheError: where the file is none of kvpatch's caches, is damaged, or holds a cache of another model.
        """
        from kvpatch.caches.cache_files import load_cache

        return load_cache(path, model)

    def checksums(self) -> list[str]:
        """One 16-digit hexadecimal number a row, over the bits of its real slots; padding and batch do not enter.

        A sum modulo 2**64 of hashes of every number's bits with its place (layer, part, KV head, slot, dimension),
        computed where the tensors are. It detects change; it is not a signature.
        """
        return checksums_of(self.keys, self.values, self.is_real)


def refuse_unlike(one: KVCache, other: KVCache, names: str, *, may_differ_in_type: bool = False) -> None:
    """Refuse two caches that can't be put together.

    Args:
        names: what they are, for the message: "source and target".
        may_differ_in_type: where statistics of one are all that the other is given.
    Raises:
        CacheError: where their models, shapes, types or devices differ.
    """
    if one is other:
        return
    heads = [
        [(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(c.keys, c.values, strict=True)] for c in (one, other)
    ]
    if heads[0] != heads[1] or one.rope != other.rope:
        raise CacheError(f"{names} are of different models: models of different shape ({one!r} and {other!r})")
    tensors = [(*c.keys, *c.values) for c in (one, other)]
    for a, b in zip(*tensors, strict=True):
        if a.dtype != b.dtype and not may_differ_in_type:
            raise CacheError(f"{names} are of different types, {a.dtype} and {b.dtype}; load the model in one type")
        if a.device != b.device:
            raise CacheError(f"{names} are on different devices, {a.device} and {b.device}; move one with .to()")
    if one.model != other.model:
        raise CacheError(
            f"{names} are of different models ({one.model or 'unknown'} and {other.model or 'unknown'}); "
            "prefill both with the same model"
        )


def pad_left(tensor: Tensor, slots: int, fill: int, axis: int) -> Tensor:
    """Pad one axis on the left to `slots` with `fill`; returned as it is when long enough."""
    missing = slots - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor.new_full(shape, fill), tensor], dim=axis)

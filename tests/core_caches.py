"""Tiny random caches, built by hand: no model, ragged rows, labels that make every slot recognisable."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache, Origin, Segment
from kvpatch.caches.rope import LayerRope

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8
HALF = LayerRope("half", tuple(10000.0 ** (-i / 4) for i in range(4)))
PARTIAL = LayerRope("half", (1.0, 0.1))
INTERLEAVED = LayerRope("interleaved", (1.0, 0.3, 0.02))
ROPES = (HALF, PARTIAL, INTERLEAVED)
ABSOLUTE = (LayerRope("absolute"),) * LAYERS
NO_ROPE = (LayerRope("none"),) * LAYERS


def make_cache(
    lengths: Sequence[int],
    *,
    seed: int = 0,
    starts: Sequence[int] | None = None,
    rope: Sequence[LayerRope] = ROPES,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
    segments: Sequence[Sequence[int]] | None = None,
    pieces: Sequence[Sequence[str]] | None = None,
) -> KVCache:
    """A cache of rows of these lengths. A row's content depends on (seed, row) alone; padding holds rubbish."""
    slots, starts = max(lengths), starts or [0] * len(lengths)
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(len(lengths))]
    rubbish = torch.Generator().manual_seed(7 + seed + slots)

    def table(rows: Sequence[Sequence[int]]) -> Tensor:
        padded = [[PAD] * (slots - len(row)) + list(row) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(lengths), slots)

    def tensor() -> Tensor:
        out = 100 * torch.randn(len(lengths), kv_heads, slots, head_dim, generator=rubbish, dtype=torch.float64)
        for row, length in enumerate(lengths):
            own = torch.randn(length, kv_heads, head_dim, generator=generators[row], dtype=torch.float64)
            out[row, :, slots - length :] = own.transpose(0, 1)
        return out.to(dtype)

    positions = table([range(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    return KVCache(
        keys=tuple(tensor() for _ in rope),
        values=tuple(tensor() for _ in rope),
        positions=positions,
        token_ids=table([[10_000 * seed + 100 * row + i for i in range(n)] for row, n in enumerate(lengths)]),
        segments=table(segments if segments is not None else [usual_segments(n) for n in lengths]),
        origins=torch.where(positions == PAD, PAD, int(Origin.own)),
        pending=torch.tensor([10_000 * seed + 100 * row + 99 for row in range(len(lengths))]),
        pending_position=torch.tensor([a + n for a, n in zip(starts, lengths, strict=True)]),
        pieces=tuple(
            tuple(row)
            for row in (pieces or [[f" s{seed}r{row}i{i}" for i in range(n)] for row, n in enumerate(lengths)])
        ),
        rope=tuple(rope),
    )


def usual_segments(length: int) -> list[int]:
    """One BOS, one template slot, the body, and a trailer of two, as far as the length allows."""
    head = [int(Segment.bos), int(Segment.template)][:length]
    trailer = [int(Segment.trailer)] * min(2, length - len(head))
    return head + [int(Segment.body)] * (length - len(head) - len(trailer)) + trailer


def tensors(cache: KVCache) -> list[Tensor]:
    """Every tensor a cache holds."""
    values = [getattr(cache, f.name) for f in fields(cache)]
    loose = [v for v in values if isinstance(v, Tensor)]
    return [*loose, *cache.keys, *cache.values]


def copied(cache: KVCache) -> list[Tensor]:
    """Copies of every tensor, to compare with afterwards."""
    return [t.clone() for t in tensors(cache)]


def is_same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit (NaN-free)."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def row_of(cache: KVCache, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of one row without padding: one [kv_heads, length, head_dim] a layer."""
    first = cache.slots - int(cache.lengths[row])
    return [k[row, :, first:] for k in cache.keys], [v[row, :, first:] for v in cache.values]


def slow_rotation(vector: Tensor, delta: float, rope: LayerRope) -> Tensor:
    """One key vector turned by complex multiplication, pair by pair, in float64. Independent of `caches.rope`."""
    out = [float(x) for x in vector]
    n = len(rope.inv_freq)
    for i, frequency in enumerate(rope.inv_freq):
        a, b = (i, i + n) if rope.layout == "half" else (2 * i, 2 * i + 1)
        turned = complex(out[a], out[b]) * cmath.exp(1j * frequency * delta)
        out[a], out[b] = turned.real, turned.imag
    return torch.tensor(out, dtype=torch.float64)

"""Donors: what a patch puts in, made from the source's cache. Each is a control for one way of being fooled.

A donor has the source's shape, positions and labels; only keys and values differ. Every random number comes from a
generator keyed by the row's seed, so a row gets the same donor whatever batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvpatch.cache import KVCache
from kvpatch.errors import CacheError
from kvpatch.rope import rotate

Rows = Sequence[np.random.Generator]


def make_donor(name: str, source: KVCache, seeds: Sequence[int], reference: KVCache | None = None) -> KVCache:
    """Make a donor from a source.

    Args:
        name: a `Donor` of patch.py.
        source: the cache it is made from, any batch.
        seeds: one seed a row.
        reference: caches whose statistics "gaussian_fitted" and "mean" take. If None, the source itself: a Gaussian is
            fitted to each row alone, the mean is over the source's rows.
    Returns:
        A cache of the source's shape and labels.
    Raises:
        CacheError: where the donor can't be made from this source.
    """
    if len(seeds) != source.batch:
        raise CacheError(f"{len(seeds)} seeds for a batch of {source.batch}")
    if name == "gaussian_fitted" and reference is None and source.batch > 1:
        return KVCache.concat([make_donor(name, row, [seed]) for row, seed in zip(source, seeds, strict=True)])
    generators = [np.random.Generator(np.random.Philox(key=seed % 2**64)) for seed in seeds]
    return _MAKERS[name](source, generators, source if reference is None else reference)


def _source(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """The source as it is."""
    return source


def _shuffle_values(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """E1: values permuted over slots, keys left. (Permuting both is a no-op: keys carry their positions with them.)"""
    order = _permutations(source, rows)
    return replace(source, values=tuple(_gather_slots(v, order) for v in source.values))


def _shuffle_jointly(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """Keys and values permuted together, rotation untouched: changes nothing on full attention. An identity."""
    order = _permutations(source, rows)
    return replace(
        source,
        keys=tuple(_gather_slots(k, order) for k in source.keys),
        values=tuple(_gather_slots(v, order) for v in source.values),
    )


def _shuffle_rerotate(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """E2: un-rotate, permute keys and values together, rotate to the slot each landed on."""
    order = _permutations(source, rows)
    came_from = source.positions.gather(1, order)
    delta = torch.where(source.is_real, source.positions - came_from, 0)
    return replace(
        source,
        keys=tuple(
            rotate(_gather_slots(k, order), delta, rope) for k, rope in zip(source.keys, source.rope, strict=True)
        ),
        values=tuple(_gather_slots(v, order) for v in source.values),
    )


def _shuffle_heads(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """E3: KV heads of every layer permuted so that none stays in its place."""
    keys, values = [], []
    for layer, (k, v) in enumerate(zip(source.keys, source.values, strict=True)):
        heads = k.shape[1]
        if heads < 2:
            raise CacheError(f"layer {layer} has one KV head, so its heads can't be shuffled")
        order = torch.tensor(np.stack([_derangement(rng, heads) for rng in rows]), device=k.device)
        at = torch.arange(k.shape[0], device=k.device)[:, None]
        keys.append(k[at, order])
        values.append(v[at, order])
    return replace(source, keys=tuple(keys), values=tuple(values))


def _gaussian_isotropic(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """F1: Gaussian directions, each vector with the norm of the source's vector in that layer, head and slot."""

    def like(tensor: Tensor) -> Tensor:
        noise = _normal(source, rows, tensor.shape[1], tensor.shape[3], tensor)
        norm = tensor.float().norm(dim=-1, keepdim=True)
        return (noise / noise.norm(dim=-1, keepdim=True) * norm).to(tensor.dtype)

    pairs = [(like(k), like(v)) for k, v in zip(source.keys, source.values, strict=True)]
    return replace(source, keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))


def _gaussian_fitted(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """F2: Gaussian with the mean and covariance of each layer and head over the reference's slots (first slot left
    out: a sink's norm would swamp them). Keys are fitted before RoPE and rotated to the slot's position."""
    first = reference.slots - reference.lengths
    used = reference.is_real & (torch.arange(reference.slots, device=first.device) > first[:, None])
    count = int(used.sum())
    if count < 2:
        raise CacheError(f"a Gaussian can't be fitted to {count} slots; give a longer reference")

    def drawn(fitted: Tensor, like: Tensor) -> Tensor:
        vectors = fitted.float().transpose(1, 2)[used]  # [count, kv_heads, head_dim]
        mean = vectors.mean(dim=0)
        centred = (vectors - mean).transpose(0, 1)  # [kv_heads, count, head_dim]
        # z of length `count` times the centred data has exactly their covariance; no factorisation is needed.
        noise = _normal(source, rows, like.shape[1], count, like)  # [batch, kv_heads, slots, count]
        return (mean[None, :, None] + noise @ centred / (count - 1) ** 0.5).to(like.dtype)

    keys, values = [], []
    at = torch.where(source.is_real, source.positions, 0)
    back = -torch.where(reference.is_real, reference.positions, 0)
    for k, v, fit_k, fit_v, rope in zip(
        source.keys, source.values, reference.keys, reference.values, source.rope, strict=True
    ):
        keys.append(rotate(drawn(rotate(fit_k, back, rope), k), at, rope))
        values.append(drawn(fit_v, v))
    return replace(source, keys=tuple(keys), values=tuple(values))


def _mean(source: KVCache, rows: Rows, reference: KVCache) -> KVCache:
    """Mean over the reference's rows, slot by slot counted from the end; keys are averaged before RoPE.

    Slots further from the end than the longest reference reaches take the mean of the furthest that it has.
    """
    order = (torch.arange(source.slots) + reference.slots - source.slots).clamp(min=0).to(reference.positions.device)
    real = reference.is_real[:, order]
    share = (real / real.sum(dim=0))[:, None, :, None]  # [batch, 1, slots, 1]
    at = torch.where(source.is_real, source.positions, 0)
    back = -torch.where(reference.is_real, reference.positions, 0)

    def averaged(tensor: Tensor, like: Tensor) -> Tensor:
        tail = tensor[:, :, order].float()
        return (tail * share).sum(dim=0, keepdim=True).expand(like.shape).to(like.dtype)

    keys, values = [], []
    for k, v, ref_k, ref_v, rope in zip(
        source.keys, source.values, reference.keys, reference.values, source.rope, strict=True
    ):
        keys.append(rotate(averaged(rotate(ref_k, back, rope), k), at, rope))
        values.append(averaged(ref_v, v))
    return replace(source, keys=tuple(keys), values=tuple(values))


def _permutations(source: KVCache, rows: Rows) -> Tensor:
    """[batch, slots]: for each slot, the slot its content comes from; padding stays where it is."""
    order = torch.arange(source.slots).repeat(source.batch, 1)
    for row, rng in enumerate(rows):
        length = int(source.lengths[row])
        padding = source.slots - length
        order[row, padding:] = torch.from_numpy(rng.permutation(length)) + padding
    return order.to(source.positions.device)


def _derangement(rng: np.random.Generator, count: int) -> np.ndarray:
    while True:
        order = rng.permutation(count)
        if not (order == np.arange(count)).any():
            return order


def _gather_slots(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(2, order[:, None, :, None].expand(tensor.shape))


def _normal(source: KVCache, rows: Rows, heads: int, width: int, like: Tensor) -> Tensor:
    """[batch, heads, slots, width] standard normal; a row's numbers depend on its generator and length alone."""
    out = np.ones((source.batch, heads, source.slots, width), dtype=np.float32)
    for row, rng in enumerate(rows):
        length = int(source.lengths[row])
        out[row, :, source.slots - length :] = rng.standard_normal((heads, length, width), dtype=np.float32)
    return torch.from_numpy(out).to(like.device)


_MAKERS: dict[str, Callable[[KVCache, Rows, KVCache], KVCache]] = {
    "source": _source,
    "shuffle_values": _shuffle_values,
    "shuffle_rerotate": _shuffle_rerotate,
    "shuffle_jointly": _shuffle_jointly,
    "shuffle_heads": _shuffle_heads,
    "gaussian_isotropic": _gaussian_isotropic,
    "gaussian_fitted": _gaussian_fitted,
    "mean": _mean,
}

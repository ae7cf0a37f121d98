"""Donors: what a patch puts in, made from the source's cache. Each is a control for one way of being fooled.

A donor has the source's shape, positions and labels; only keys and values differ. Every random number comes from a
generator keyed by the row's seed, so a row gets the same donor whatever batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import KVCache, refuse_unlike
from kvpatch.caches.noise import int64_seeds, normal
from kvpatch.caches.rope import LayerRope, Turns
from kvpatch.caches.stacks import over_layers
from kvpatch.errors import CacheError

Seeds = Sequence[int]
"""One a row."""


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
    if reference is not None:
        refuse_unlike(source, reference, "source and reference", may_differ_in_type=True)
    if name == "gaussian_fitted" and reference is None and source.batch > 1:
        return KVCache.concat([make_donor(name, row, [seed]) for row, seed in zip(source, seeds, strict=True)])
    return _MAKERS[name](source, seeds, source if reference is None else reference)


def _generators(seeds: Seeds) -> list[np.random.Generator]:
    return [np.random.Generator(np.random.Philox(key=seed % 2**64)) for seed in seeds]


def _source(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """The source as it is."""
    return source


def _shuffle_values(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """E1: values permuted over slots so that none stays, keys left. (Permuting both is a no-op: keys carry their
    positions with them.)"""
    return replace(source, values=_gathered(source.values, _permutations(source, seeds)))


def _shuffle_jointly(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """Keys and values permuted together, rotation untouched: changes nothing on full attention. An identity."""
    order = _permutations(source, seeds)
    return replace(source, keys=_gathered(source.keys, order), values=_gathered(source.values, order))


def _shuffle_rerotate(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """E2: un-rotate, permute keys and values together, rotate to the slot each landed on."""
    order = _permutations(source, seeds)
    came_from = source.positions.gather(1, order)
    turns = Turns(torch.where(source.is_real, source.positions - came_from, 0))
    return replace(
        source,
        keys=over_layers(lambda rope, keys: turns.turn(keys, rope), _gathered(source.keys, order), of=source.rope),
        values=_gathered(source.values, order),
    )


def _shuffle_heads(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """E3: KV heads of every layer permuted so that none stays in its place."""
    keys, values = [], []
    rows = _generators(seeds)
    for layer, (k, v) in enumerate(zip(source.keys, source.values, strict=True)):
        heads = k.shape[1]
        if heads < 2:
            raise CacheError(f"layer {layer} has one KV head, so its heads can't be shuffled")
        order = sent(np.stack([_derangement(rng, heads) for rng in rows]), k.device)
        at = torch.arange(k.shape[0], device=k.device)[:, None]
        keys.append(k[at, order])
        values.append(v[at, order])
    return replace(source, keys=tuple(keys), values=tuple(values))


def _gaussian_isotropic(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """F1: Gaussian directions, each vector with the norm of the source's vector in that layer, head and slot."""

    def like(tensor: Tensor, stream: Tensor) -> Tensor:
        noise = _normal(source, seeds, stream, tensor.shape[-3], tensor.shape[-1]).to(tensor.device)
        norm = tensor.float().norm(dim=-1, keepdim=True)
        return (noise / noise.norm(dim=-1, keepdim=True) * norm).to(tensor.dtype)

    key_streams, value_streams = _streams(source)
    return replace(
        source,
        keys=over_layers(like, source.keys, key_streams),
        values=over_layers(like, source.values, value_streams),
    )


def _gaussian_fitted(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """F2: Gaussian with the mean and covariance of each layer and head over the reference's slots (first slot left
    out: a sink's norm would swamp them). Keys are fitted before RoPE and rotated to the slot's position."""
    to_places = Turns(torch.where(source.is_real, source.positions, 0))
    fits = _fits(reference)

    def drawn(like: Tensor, mean: Tensor, root: Tensor, stream: Tensor) -> Tensor:
        noise = _normal(source, seeds, stream, like.shape[-3], root.shape[-2])  # [..., batch, kv_heads, slots, width]
        rows = noise.to(root.device).transpose(-4, -3).flatten(-3, -2)  # [..., kv_heads, batch * slots, width]
        # In float64, so that what is left after rounding does not depend on how a product of so many rows is summed.
        made = rows.double() @ root.double() + mean.double()[..., None, :]
        return made.unflatten(-2, (source.batch, source.slots)).transpose(-4, -3).to(like.dtype)

    def placed(rope: LayerRope, *numbers: Tensor) -> Tensor:
        return to_places.turn(drawn(*numbers), rope)

    key_streams, value_streams = _streams(source)
    of_keys, of_values = ([(fit.mean, fit.root) for fit in kind] for kind in zip(*fits, strict=True))
    return replace(
        source,
        keys=over_layers(placed, source.keys, *zip(*of_keys, strict=True), key_streams, of=source.rope),
        values=over_layers(drawn, source.values, *zip(*of_values, strict=True), value_streams),
    )


@dataclass(frozen=True)
class _Fit:
    """Mean [kv_heads, head_dim] of vectors, and a root [kv_heads, any, head_dim] of their covariance: root.T @ root."""

    mean: Tensor
    root: Tensor


_FITTED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _fits(reference: KVCache) -> list[tuple[_Fit, _Fit]]:
    """Keys' and values' fit for each layer, made once for a reference."""
    if reference not in _FITTED:
        _FITTED[reference] = _fit(reference)
    return _FITTED[reference]


def _fit(reference: KVCache) -> list[tuple[_Fit, _Fit]]:
    first = reference.slots - reference.lengths
    used = reference.is_real & (torch.arange(reference.slots, device=first.device) > first[:, None])
    count = int(used.sum())
    if count < 2:
        raise CacheError(f"a Gaussian can't be fitted to {count} slots; give a longer reference")
    back = Turns(-torch.where(reference.is_real, reference.positions, 0))

    def fit(tensor: Tensor) -> _Fit:
        vectors = tensor.float().transpose(1, 2)[used.to(tensor.device)]  # [count, kv_heads, head_dim]
        mean = vectors.mean(dim=0)
        centred = (vectors - mean).transpose(0, 1) / (count - 1) ** 0.5  # [kv_heads, count, head_dim]
        return _Fit(mean, torch.linalg.qr(centred, mode="r").R)

    layers = zip(reference.keys, reference.values, reference.rope, strict=True)
    return [(fit(back.turn(k, rope)), fit(v)) for k, v, rope in layers]


def _mean(source: KVCache, seeds: Seeds, reference: KVCache) -> KVCache:
    """Mean over the reference's rows, slot by slot counted from the end; keys are averaged before RoPE.

    Slots further from the end than the longest reference reaches take the mean of the furthest that it has.
    """
    order = (torch.arange(source.slots) + reference.slots - source.slots).clamp(min=0).to(reference.positions.device)
    real = reference.is_real[:, order]
    share = (real / real.sum(dim=0))[:, None, :, None]  # [batch, 1, slots, 1]
    to_places = Turns(torch.where(source.is_real, source.positions, 0))
    back = Turns(-torch.where(reference.is_real, reference.positions, 0))

    def averaged(tensor: Tensor, like: Tensor) -> Tensor:
        tail = tensor[:, :, order.to(tensor.device)].float()
        return (tail * share.to(tensor.device)).sum(dim=0, keepdim=True).expand(like.shape).to(like.dtype)

    keys, values = [], []
    for k, v, ref_k, ref_v, rope in zip(
        source.keys, source.values, reference.keys, reference.values, source.rope, strict=True
    ):
        keys.append(to_places.turn(averaged(back.turn(ref_k, rope), k), rope))
        values.append(averaged(ref_v, v))
    return replace(source, keys=tuple(keys), values=tuple(values))


def _permutations(source: KVCache, seeds: Seeds) -> Tensor:
    """[batch, slots]: for each slot, the slot its content comes from, another one; padding stays where it is.

    Were a slot left in its place, a mode that sits in one slot would come through in one row of so many as there are
    slots, and the control would not be null."""
    order = torch.arange(source.slots).repeat(source.batch, 1)
    for row, rng in enumerate(_generators(seeds)):
        length = source.row_lengths[row]
        padding = source.slots - length
        order[row, padding:] = torch.from_numpy(_derangement(rng, length)) + padding
    return order.to(source.positions.device)


def _derangement(rng: np.random.Generator, count: int) -> np.ndarray:
    """A permutation that leaves nothing in its place, each as likely; of fewer than two, the only one there is."""
    while count > 1:
        order = rng.permutation(count)
        if not (order == np.arange(count)).any():
            return order
    return np.arange(count)


def _gathered(tensors: Sequence[Tensor], order: Tensor) -> tuple[Tensor, ...]:
    """Every layer's slots in another order, [batch, slots]."""
    at = order[:, None, :, None]
    return over_layers(lambda tensor: tensor.gather(-2, at.to(tensor.device).expand(tensor.shape)), tensors)


def _streams(source: KVCache) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """For each layer the stream of random numbers that its keys draw from, and that its values do."""
    streams = torch.arange(2 * source.layers, dtype=torch.int32, device=source.positions.device).unbind()
    return streams[0::2], streams[1::2]


def _normal(source: KVCache, seeds: Sequence[int], stream: Tensor | int, heads: int, width: int) -> Tensor:
    """[batch, heads, slots, width], with streams in front where there are several: standard normal. A row's numbers
    depend on its seed and length alone."""
    own = int64_seeds(seeds, source.positions.device)
    # Slots count from the end, so that padding on the left does not move them.
    numbers = normal(own, stream, (source.slots, heads, width)).flip(-3)  # [..., batch, slots, heads, width]
    return torch.where(source.is_real[:, :, None, None], numbers, 1).transpose(-3, -2)


_MAKERS: dict[str, Callable[[KVCache, Seeds, KVCache], KVCache]] = {
    "source": _source,
    "shuffle_values": _shuffle_values,
    "shuffle_rerotate": _shuffle_rerotate,
    "shuffle_jointly": _shuffle_jointly,
    "shuffle_heads": _shuffle_heads,
    "gaussian_isotropic": _gaussian_isotropic,
    "gaussian_fitted": _gaussian_fitted,
    "mean": _mean,
}

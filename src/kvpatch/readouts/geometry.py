"""Geometry of cached vectors: the participation ratio, R_V and its trajectory, and angles between subspaces.

A window is always the last so many slots. What a ratio says depends on it: a small window reads low whatever it holds,
and one attention sink in it reads near 1, so that a comparison keeps one window and leaves the sinks out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.caches.rope import Turns
from kvpatch.caches.selection import SINKS
from kvpatch.errors import CacheError
from kvpatch.specs.arguments import plain, refuse_other, shown, switch, whole


def participation_ratio(v: Tensor) -> Tensor:
    """Effective number of directions that a window of vectors spreads over.

    Args:
        v: [..., tokens, dim], the vectors of a window, uncentred. Any floating dtype.
    Returns:
        [...], between 1 and min(tokens, dim); NaN for an empty or all-zero window. float64 for float64, else float32.

    With s the singular values of the window, (sum s^2)^2 / sum s^4; computed as (tr G)^2 / tr(G^2) for the smaller
    Gram matrix G of the two, which needs no decomposition (Gao et al. 2017, eq. 4, without centring). It is computed in
    float64, so that how many windows are given at a time leaves no trace in a float32.
    """
    v, given = _scaled(v)
    if 0 in v.shape[-2:]:
        return v.new_full(v.shape[:-2], float("nan"), dtype=given)
    gram = v @ v.mT if v.shape[-2] <= v.shape[-1] else v.mT @ v
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (trace**2 / gram.square().sum(dim=(-2, -1))).to(given)


def corrected_participation_ratio(v: Tensor) -> Tensor:
    """Participation ratio without the bias of a small window: what the ratio would be over endless such vectors.

    Args:
        v: [..., tokens, dim], as in `participation_ratio`.
    Returns:
        [...]; may exceed the number of tokens. NaN for a window of fewer than two vectors or of zeros, infinite for one
        whose vectors are all orthogonal, which bounds nothing.

    (tr S)^2 and tr(S^2) of the second moment S are both read off pairs of different vectors alone, since a vector's
    product with itself is what a small window counts too often: (sum_{i!=j} G_ii G_jj) / (sum_{i!=j} G_ij^2) for G = V
    V^T (the unbiased estimators of Chen, Zhang & Zhong 2010, JASA 105:810, uncentred). It takes the vectors to be
    independent draws, which neighbouring tokens are not quite; read it beside the raw ratio.
    """
    v, given = _scaled(v)
    if v.shape[-2] < 2 or v.shape[-1] == 0:
        return v.new_full(v.shape[:-2], float("nan"), dtype=given)
    gram = v @ v.mT
    own = gram.diagonal(dim1=-2, dim2=-1)
    squares = own.square().sum(dim=-1)
    ratio = (own.sum(dim=-1) ** 2 - squares) / (gram.square().sum(dim=(-2, -1)) - squares).clamp(min=0)
    return ratio.to(given)


def _scaled(v: Tensor) -> tuple[Tensor, torch.dtype]:
    """Windows in float64, each divided by its largest entry: no ratio depends on scale, and fourth powers neither over-
    nor underflow. And the type that a ratio is given in: float64 for float64, else float32."""
    if not isinstance(v, Tensor):
        try:
            v = torch.as_tensor(v)
        except (TypeError, ValueError, RuntimeError):
            raise CacheError(f"participation_ratio needs numbers [..., tokens, dim], got {shown(v)}") from None
    if v.dtype == torch.bool or v.is_complex():
        raise CacheError(f"participation_ratio needs real numbers, got {v.dtype}")
    if v.ndim < 2:
        raise CacheError(f"participation_ratio needs [..., tokens, dim], got shape {tuple(v.shape)}")
    given = torch.float64 if v.dtype == torch.float64 else torch.float32
    v = v.double()
    if 0 in v.shape[-2:]:
        return v, given
    largest = v.abs().amax(dim=(-2, -1), keepdim=True)
    return v / torch.where(largest > 0, largest, 1), given


def cache_ratios(
    cache: KVCache,
    part: Literal["k", "v"] = "v",
    *,
    window: int = 16,
    joined: bool = False,
    corrected: bool = False,
) -> Tensor:
    """Participation ratio of the keys or values of every layer and KV head of a cache.

    Args:
        cache: any batch.
        part: "v", or "k" for keys as they were before RoPE: turned by their positions, any keys spread.
        window: the last so many cached slots are read; the attention sinks (`caches.selection.SINKS`) are left out.
        joined: take a token's KV heads as one vector, as R_V does.
        corrected: without the bias of a small window, see `corrected_participation_ratio`.
    Returns:
        [batch, layers, kv_heads], or [batch, layers] where joined; float32 (float64 for a cache of it); NaN for a row
        with fewer slots than the window and the sinks.
    """
    refuse_other("cache", cache, KVCache)
    if whole("window", window, most=2**31 - 1) < 2:
        raise CacheError(f"window must be at least 2 slots, got {shown(window)}")
    if not isinstance(part, str) or part not in ("k", "v"):
        raise CacheError(f"part must be 'k' or 'v', got {shown(part)}")
    joined, corrected = switch("joined", joined), switch("corrected", corrected)
    ratio = corrected_participation_ratio if corrected else participation_ratio
    back = Turns(-torch.where(cache.positions != PAD, cache.positions, 0)[:, -window:])
    found = []
    for layer, rope in enumerate(cache.rope):
        vectors = (cache.values if part == "v" else cache.keys)[layer][:, :, -window:]
        if part == "k" and not rope.keeps_its_place and rope.layout != "none":
            vectors = back.turn(vectors, rope)
        found.append(ratio(_joined(vectors) if joined else vectors))
    out = torch.stack([of_layer.to(cache.positions.device) for of_layer in found], dim=1)
    has_window = cache.lengths >= window + SINKS
    return torch.where(has_window.reshape(-1, *[1] * (out.ndim - 1)), out, float("nan"))


def layer_at(layer: int | float, layers: int) -> int:
    """Index of a layer given as an index (int) or as a fraction of depth (float).

    Raises:
        CacheError: where there is no such layer.
    """
    layer = plain(layer)
    if isinstance(layer, float):
        if not 0 <= layer <= 1:
            raise CacheError(f"layer {shown(layer)} as a fraction of depth must lie between 0 and 1")
        return min(math.floor(layer * layers + 0.5), layers - 1)
    if not -layers <= whole("a layer", layer) < layers:
        raise CacheError(f"layer {shown(layer)} does not exist: there are {layers} (0 to {layers - 1})")
    return layer % layers


def r_v(cache: KVCache, early: int | float = 4, late: int | float = 24, window: int = 16) -> Tensor:
    """R_V of each row: participation ratio of the cached values of a late layer over that of an early one.

    Args:
        cache: any batch.
        early, late: layers, as indices (int) or fractions of depth (float).
        window: the last so many cached slots are read.
    Returns:
        [batch], float32; NaN for a row with fewer cached slots than the window.
    Raises:
        CacheError: for a layer that does not exist or a window below 2.
    """
    refuse_other("cache", cache, KVCache)
    if whole("window", window, most=2**31 - 1) < 2:
        raise CacheError(f"window must be at least 2 slots, got {shown(window)}")
    layers = [layer_at(layer, cache.layers) for layer in (late, early)]
    has_window = cache.lengths >= window
    late_v, early_v = (cache.values[layer][:, :, -window:].to(cache.positions.device) for layer in layers)
    return torch.where(has_window, r_v_of(late_v, early_v), float("nan"))


def r_v_of(late: Tensor, early: Tensor) -> Tensor:
    """R_V [batch] of two layers' values, each [batch, kv_heads, window, head_dim]. A token's vector is its KV heads'
    values joined, which is what the value projection puts out."""
    return participation_ratio(_joined(late)) / participation_ratio(_joined(early))


def r_v_trajectory(late: Tensor, early: Tensor, window: int) -> Tensor:
    """R_V of every window of consecutive tokens.

    Args:
        late, early: values of two layers, [batch, kv_heads, tokens, head_dim].
        window: tokens of a window.
    Returns:
        [batch, tokens - window + 1], the first of the first `window` tokens; empty where there are fewer.
    """
    if late.shape[2] < window:
        return late.new_zeros(late.shape[0], 0)
    return _ratios_of_windows(_joined(late), window) / _ratios_of_windows(_joined(early), window)


def _ratios_of_windows(v: Tensor, window: int) -> Tensor:
    """`participation_ratio` of every window of consecutive vectors [batch, tokens, dim], [batch, windows]: the Gram
    matrices of the windows are blocks of one. In float64, where fourth powers neither over- nor underflow."""
    gram = v.double() @ v.double().mT
    trace = gram.diagonal(dim1=-2, dim2=-1).unfold(-1, window, 1).sum(dim=-1)
    blocks = gram.square().unfold(-2, window, 1).unfold(-2, window, 1).diagonal(dim1=-4, dim2=-3)
    return (trace**2 / blocks.sum(dim=(-3, -2))).to(torch.promote_types(v.dtype, torch.float32))


def principal_angles(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """Angles between the subspaces that two windows of vectors mostly spread over.

    Args:
        a, b: [..., tokens, dim]; tokens may differ.
        rank: dimensions of each subspace: the first right singular vectors.
    Returns:
        [..., rank], radians between 0 and pi / 2, ascending; float64. NaN where a window has fewer dimensions than
        that, or is not finite.
    Raises:
        CacheError: where the windows can't have that rank.

    Small angles are read off their sines, which a cosine near 1 loses (Bjorck & Golub 1973, Math Comp 27:579).
    """
    for name, window in (("a", a), ("b", b)):
        refuse_other(name, window, Tensor)
        if window.ndim < 2:
            raise CacheError(f"principal_angles needs [..., tokens, dim], got shape {tuple(window.shape)}")
    if not 1 <= whole("rank", rank) <= min(a.shape[-2], b.shape[-2], a.shape[-1]):
        raise CacheError(f"windows {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])} have no subspaces of rank {rank}")
    (basis_a, a_has_rank), (basis_b, b_has_rank) = _leading(a, rank), _leading(b, rank)
    cosines = torch.linalg.svdvals(basis_a @ basis_b.mT).clamp(max=1)  # descending
    outside = basis_b - basis_b @ basis_a.mT @ basis_a
    sines = torch.linalg.svdvals(_flat(outside)[0]).flip(-1).clamp(max=1)  # ascending
    angles = torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))
    return torch.where((a_has_rank & b_has_rank)[..., None], angles, float("nan"))


def _leading(v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors, [..., rank, dim], and whether there are that many."""
    v = v.double()
    is_finite = v.isfinite().all(dim=-1).all(dim=-1)
    narrow, basis = _flat(torch.where(is_finite[..., None, None], v, 0.0))
    _, s, within = torch.linalg.svd(narrow, full_matrices=False)
    directions = within[..., :rank, :] if basis is None else within[..., :rank, :] @ basis
    limit = s[..., 0] * max(v.shape[-2:]) * torch.finfo(torch.float32).eps
    return directions, is_finite & (s[..., rank - 1] > limit)


def _flat(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Few long vectors [..., tokens, dim] as [..., tokens, tokens] in an orthonormal basis [..., tokens, dim] of them,
    whose decomposition is the same and takes half the time; as they are, without a basis, where they are no fewer than
    their dimensions."""
    if v.shape[-2] >= v.shape[-1]:
        return v, None
    basis, coefficients = torch.linalg.qr(v.mT)
    return coefficients.mT, basis.mT


def _joined(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)  # [batch, window, kv_heads * head_dim]

"""Geometry of cached vectors: the participation ratio and R_V."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpatch.cache import KVCache
from kvpatch.errors import CacheError


def participation_ratio(v: Tensor) -> Tensor:
    """Effective number of directions that a window of vectors spreads over.

    Args:
        v: [..., tokens, dim], the vectors of a window, uncentred. Any floating dtype.
    Returns:
        [...], between 1 and min(tokens, dim); NaN for an empty or all-zero window. float64 for float64, else float32.

    With s the singular values of the window, (sum s^2)^2 / sum s^4; computed as (tr G)^2 / tr(G^2) for the smaller
    Gram matrix G of the two, which needs no decomposition (Gao et al. 2017, eq. 4, without centring).
    """
    if v.ndim < 2:
        raise CacheError(f"participation_ratio needs [..., tokens, dim], got shape {tuple(v.shape)}")
    v = v if v.dtype == torch.float64 else v.float()
    if 0 in v.shape[-2:]:
        return v.new_full(v.shape[:-2], float("nan"))
    # The ratio does not depend on scale; dividing by the largest entry keeps fourth powers from over- and underflowing.
    largest = v.abs().amax(dim=(-2, -1), keepdim=True)
    v = v / torch.where(largest > 0, largest, 1)
    gram = v @ v.mT if v.shape[-2] <= v.shape[-1] else v.mT @ v
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return trace**2 / gram.square().sum(dim=(-2, -1))


def layer_at(layer: int | float, layers: int) -> int:
    """Index of a layer given as an index (int) or as a fraction of depth (float).

    Raises:
        CacheError: where there is no such layer.
    """
    if isinstance(layer, float):
        if not 0 <= layer <= 1:
            raise CacheError(f"layer {layer} as a fraction of depth must lie between 0 and 1")
        return min(math.floor(layer * layers + 0.5), layers - 1)
    if not -layers <= layer < layers:
        raise CacheError(f"layer {layer} does not exist: there are {layers} (0 to {layers - 1})")
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
    if window < 2:
        raise CacheError(f"window must be at least 2 slots, got {window}")
    layers = [layer_at(layer, cache.layers) for layer in (late, early)]
    has_window = cache.lengths >= window
    late_v, early_v = (cache.values[layer][:, :, -window:] for layer in layers)
    return torch.where(has_window, r_v_of(late_v, early_v), float("nan"))


def r_v_of(late: Tensor, early: Tensor) -> Tensor:
    """R_V [batch] of two layers' values, each [batch, kv_heads, window, head_dim]. A token's vector is its KV heads'
    values joined, which is what the value projection puts out."""
    return participation_ratio(_joined(late)) / participation_ratio(_joined(early))


def _joined(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)  # [batch, window, kv_heads * head_dim]

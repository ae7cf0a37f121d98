"""G1 and G2: set R_V by hand. The spectrum of cached values is reshaped to a wanted participation ratio.

With V = U diag(s) W^T a window of cached values, only s changes: the energies s^2 are raised to a common power and
scaled back to their sum, so that directions, their order and the window's norm stay, and the power that gives the
wanted ratio is unique. The null turns the same values by a rotation that moves them just as far and leaves every ratio
as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache, refuse_unlike
from kvpatch.caches.selection import Touched, chosen_layers
from kvpatch.errors import CacheError
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials, refuse_missing_layers
from kvpatch.models.geometry import Geometry
from kvpatch.readouts.geometry import participation_ratio
from kvpatch.specs.interventions import Reshape
from kvpatch.specs.selectors import LayerAt, LayerBand
from kvpatch.specs.spans import Span

HIGHEST_POWER = 1e4
TOLERANCE = 1e-4
"""How far the ratio may end from the one that is wanted."""


def reshape_cache(cache: KVCache, giver: KVCache, spec: Reshape, seeds: Sequence[int], r_v_window: int = 16) -> KVCache:
    """Give the last cached values of each row the participation ratio of the giver's.

    Args:
        cache, giver: as many rows each.
        seeds: one a row; a random rotation draws from it.
        r_v_window: the window where the spec names none.
    Returns:
        A new cache in which only values of the spec's layers and window differ.
    Raises:
        CacheError: where a row has fewer slots than the window, or can't have the ratio.
        EmptySelection: where the spec finds no layer.
    """
    return counted_reshaping(cache, giver, spec, seeds, r_v_window)[0]


def counted_reshaping(
    cache: KVCache,
    giver: KVCache,
    spec: Reshape,
    seeds: Sequence[int],
    r_v_window: int = 16,
    *,
    may_be_empty: bool = False,
    r_v_late: int | None = None,
) -> tuple[KVCache, Touched]:
    """`reshape_cache`, and how much of every row it touched; `may_be_empty` allows that to be nothing."""
    refuse_unlike(giver, cache, "giver and receiver")
    window = spec.window or r_v_window
    for name, side in (("receiver", cache), ("giver", giver)):
        if int(side.lengths.min()) < window:
            raise CacheError(f"a {name} of {int(side.lengths.min())} slots is shorter than the window of {window}")
    values = list(cache.values)
    layers = chosen_layers(_layers(spec, r_v_late), cache.layers, may_be_empty=may_be_empty)
    for layer in layers:
        own = _window(cache.values[layer], window)
        asked = own if spec.ratio == "own" else _window(giver.values[layer], window)
        new = with_ratio(own, participation_ratio(asked.double()))
        if spec.by == "rotation":
            distance = (new - own).norm(dim=(-2, -1))
            new = torch.stack([turned(v, float(d), seed) for v, d, seed in zip(own, distance, seeds, strict=True)])
        values[layer] = _with_window(cache.values[layer], new)
    touched = Touched((window,) * cache.batch, len(layers), cache.keys[0].shape[1])
    return replace(cache, values=tuple(values)), touched


def _layers(spec: Reshape, r_v_late: int | None) -> Sequence[int] | LayerBand | LayerAt | Span | None:
    """The layers that the spec means, where the late layer of R_V is known."""
    if spec.layers != "r_v_late":
        return spec.layers
    if r_v_late is None:
        raise CacheError("layers 'r_v_late' is known within a protocol alone; name the layer")
    return [r_v_late]


def with_ratio(v: Tensor, wanted: Tensor) -> Tensor:
    """Windows of the same directions and norm with another participation ratio.

    Args:
        v: [..., tokens, dim].
        wanted: [...], between 1 and the rank of the window.
    Returns:
        [..., tokens, dim], float64.
    Raises:
        CacheError: for a ratio that these directions can't have.
    """
    on, v, wanted = v.device, v.double().cpu(), wanted.cpu()  # a GPU decomposes windows one after the other, slowly
    u, s, w = torch.linalg.svd(v, full_matrices=False)
    energy = s.square() / s[..., :1].square()
    is_there = energy > torch.finfo(torch.float32).eps ** 2
    low, high = (
        torch.zeros_like(wanted, dtype=torch.float64),
        torch.full_like(wanted, HIGHEST_POWER, dtype=torch.float64),
    )
    for _ in range(100):  # the ratio falls as the power rises
        middle = (low + high) / 2
        is_too_flat = _ratio(_raised(energy, is_there, middle)) > wanted
        low, high = torch.where(is_too_flat, middle, low), torch.where(is_too_flat, high, middle)
    raised = _raised(energy, is_there, (low + high) / 2)
    off = (_ratio(raised) - wanted).abs()
    if not bool((off < TOLERANCE).all()):
        worst = int(off.nan_to_num(nan=torch.inf).flatten().argmax())
        raise CacheError(
            f"a participation ratio of {float(wanted.flatten()[worst]):.4g} is out of reach for a window of rank "
            f"{int(is_there.sum(dim=-1).flatten()[worst])}"
        )
    share = raised / raised.sum(dim=-1, keepdim=True)
    new = (share * s.square().sum(dim=-1, keepdim=True)).sqrt()
    # Added to the window, so that an unchanged spectrum gives the same numbers.
    return (v + (u * torch.where(is_there, new - s, 0)[..., None, :]) @ w).to(on)


def turned(v: Tensor, distance: float, seed: int) -> Tensor:
    """A window turned by a random rotation that moves it by a given distance; every singular value stays.

    Args:
        v: [tokens, dim].
        distance: Frobenius norm of the move, at most twice that of the window.
    Returns:
        [tokens, dim], float64.

    The rotation turns each of dim / 2 random orthogonal planes by one angle t, so that the window moves by 2 sin(t / 2)
    times the norm of what lies in the planes.
    """
    v = v.double()
    dim = v.shape[1]
    rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
    basis = torch.linalg.qr(torch.from_numpy(rng.standard_normal((dim, dim))).to(v.device)).Q
    inside = v @ basis[:, : dim // 2 * 2]
    x, y = inside[:, ::2], inside[:, 1::2]
    half = torch.asin((distance / 2 / inside.norm()).clamp(max=1))
    cos, sin = torch.cos(2 * half), torch.sin(2 * half)
    moved = torch.stack([x * (cos - 1) - y * sin, x * sin + y * (cos - 1)], dim=2).flatten(1)
    return v + moved @ basis[:, : dim // 2 * 2].T


def _raised(energy: Tensor, is_there: Tensor, power: Tensor) -> Tensor:
    return torch.where(is_there, energy.clamp(min=torch.finfo(torch.float64).tiny) ** power[..., None], 0)


def _ratio(energy: Tensor) -> Tensor:
    return energy.sum(dim=-1) ** 2 / energy.square().sum(dim=-1)


def _window(values: Tensor, window: int) -> Tensor:
    """[batch, window, kv_heads * head_dim]: a token's heads as one vector, as R_V has them."""
    return values[:, :, -window:].transpose(1, 2).flatten(2)


def _with_window(values: Tensor, window: Tensor) -> Tensor:
    batch, heads, _, dim = values.shape
    out = values.clone()
    out[:, :, -window.shape[1] :] = window.reshape(batch, -1, heads, dim).transpose(1, 2).to(values.dtype)
    return out


def _build(spec: Reshape, trials: Trials) -> Made:
    givers, window = trials.giver_caches(), trials.r_v_window
    late, may_be_empty = trials.r_v_late, trials.may_be_empty
    return Made(
        *counted_reshaping(trials.own, givers, spec, trials.seeds, window, may_be_empty=may_be_empty, r_v_late=late)
    )


def _refuse_model(spec: Reshape, geometry: Geometry, may_be_empty: bool) -> None:
    """The late layer of R_V is looked at with the protocol's other layers of R_V."""
    if spec.layers != "r_v_late":
        refuse_missing_layers(spec, geometry, may_be_empty)


def _refuse_prompts(spec: Reshape, fitting: Fitting) -> None:
    shortest = min(len(prompt.token_ids) - 1 for prompt in (*fitting.receivers, *fitting.givers))
    window = spec.window or fitting.r_v_window
    if shortest < window:
        raise CacheError(f"a prompt of {shortest} cached slots is shorter than the window of {window}")


RESHAPE = Kind(Reshape, _build, refuse_model=_refuse_model, refuse_prompts=_refuse_prompts)

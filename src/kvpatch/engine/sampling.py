"""Random numbers that belong to the trial, and sampling with them.

A token's noise depends on (trial seed, step, token id) alone: not on the batch, not on the order of trials. Trials
that share a seed share their noise, so that conditions of one pair differ by their caches only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 2**32 / golden ratio, as int32
REACH = 20.5
"""Noise lies between -2.82 and 16.64 (23-bit uniforms), so a token further than this below the best can't win."""


def gumbel(seeds: Tensor, step: Tensor | int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for one decoding step.

    Args:
        seeds: [batch], int64, any value.
        step: number of the step, from 0.
        vocabulary: number of tokens.
    Returns:
        [batch, vocabulary], float32.

    The generator is counter-based: the finaliser "lowbias32" (C. Wellons, hash-prospector) of a counter, keyed by a
    hash of seed and step; 23 bits become a uniform number strictly between 0 and 1.
    """
    counter = torch.arange(vocabulary, dtype=torch.int32, device=seeds.device)
    return _noise(_keys(seeds, step)[:, None], counter[None])


def _keys(seeds: Tensor, step: Tensor | int) -> Tensor:
    """[batch], int32: one key for each seed and step."""
    low, high = _mix((seeds & 0xFFFFFFFF).to(torch.int32)), (seeds >> 32).to(torch.int32)
    return _mix(_mix(low ^ high) ^ _mix(torch.zeros_like(low) + (step + 1) * _GOLDEN))


def _noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of tokens under keys, both int32 and of shapes that broadcast."""
    return _gumbel_of(_mix_((tokens * _GOLDEN) ^ keys))


def _gumbel_of(bits: Tensor) -> Tensor:
    # 23 bits and a half fit float32's mantissa. With 24 the last value would round to 1, whose noise is infinite.
    uniform = ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int32; torch's shift keeps the sign, so the shifted-in bits are masked off."""
    return _mix_(x.clone())


def _mix_(x: Tensor) -> Tensor:
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    return x


def choose(logits: Tensor, seeds: Tensor, step: Tensor | int, temperature: float, top_p: float) -> Tensor:
    """Choose one token a row.

    Args:
        logits: [batch, vocabulary], float32.
        seeds: [batch].
        step: number of the step.
        temperature: 0 takes the likeliest token; otherwise tokens follow softmax(logits / temperature).
        top_p: below 1, only the likeliest tokens whose probability sums to at least top_p (Holtzman et al. 2020).
    Returns:
        [batch], token ids.

    Sampling is argmax(logits / temperature + Gumbel noise), which draws from the softmax (Maddison et al. 2014).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits / temperature
    if top_p < 1:
        scaled = _nucleus(scaled, top_p)
    if logits.device.type == "cpu":
        return _choose_among_candidates(scaled, _keys(seeds, step))
    return (scaled + gumbel(seeds, step, logits.shape[-1])).argmax(dim=-1)


def _choose_among_candidates(scaled: Tensor, keys: Tensor) -> Tensor:
    """The same choice, with noise made only for tokens that can win: a few in a hundred of a language model's."""
    best = scaled.amax(dim=-1, keepdim=True)
    rows, tokens = (scaled >= best - REACH).nonzero(as_tuple=True)
    score = scaled[rows, tokens] + _noise(keys[rows], tokens.to(torch.int32))
    highest = torch.full_like(best[:, 0], float("-inf")).scatter_reduce(0, rows, score, "amax")
    is_winner = score == highest[rows]
    # A row without a finite logit has no candidate and gets token 0; its log-probability, NaN, says so.
    first = torch.full((len(best),), scaled.shape[1], dtype=torch.int64)
    first = first.scatter_reduce(0, rows[is_winner], tokens[is_winner], "amin", include_self=True)
    return torch.where(first == scaled.shape[1], 0, first)


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    ordered, index = scaled.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    is_out = probability.cumsum(dim=-1) - probability >= top_p
    return scaled.masked_fill(is_out.scatter(-1, index, is_out), float("-inf"))

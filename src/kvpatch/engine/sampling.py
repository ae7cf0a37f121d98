"""Random numbers that belong to the trial, and sampling with them.

A token's noise depends on (trial seed, step, token id) alone: not on the batch, not on the order of trials. Trials
that share a seed share their noise, so that conditions of one pair differ by their caches only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpatch.caches.noise import GOLDEN, keys_of, mix_, uniform

LARGEST_NOISE = 16.64
"""The largest number that `gumbel` gives: -log(-log(1 - 2**-24)), its uniforms having 23 bits and a half."""
NEAR = 4.0
"""Tokens this close to the best are looked at first; one of them wins most of the time."""
ROUNDING = 1.0
"""More than the sum of a score and its noise is rounded by, for scores of up to ten million."""


def gumbel(seeds: Tensor, step: Tensor | int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for one decoding step.

    Args:
        seeds: [batch], int64, any value.
        step: number of the step, from 0.
        vocabulary: number of tokens.
    Returns:
        [batch, vocabulary], float32.

    The numbers are those of `noise.uniform`, keyed by a hash of seed and step.
    """
    counter = torch.arange(vocabulary, dtype=torch.int32, device=seeds.device)
    return _noise(keys_of(seeds, step)[:, None], counter[None])


def _noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of tokens under keys, both int32 and of shapes that broadcast."""
    return _gumbel_of(mix_((tokens * GOLDEN) ^ keys))


def _gumbel_of(bits: Tensor) -> Tensor:
    return uniform(bits).log_().neg_().log_().neg_()


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
        return _choose_among_candidates(scaled, keys_of(seeds, step))
    return (scaled + gumbel(seeds, step, logits.shape[-1])).argmax(dim=-1)


def _choose_among_candidates(scaled: Tensor, keys: Tensor) -> Tensor:
    """The same choice, with noise made only for tokens that can win: one in a hundred or two.

    The tokens near the best have scores that the winner must reach; no token can that is further below them than noise
    can lift it.
    """
    best = scaled.amax(dim=-1)
    reached = torch.full_like(best, float("-inf"))
    rows, _, score = _scores(scaled, best - NEAR, keys)
    reached = reached.scatter_reduce(0, rows, score, "amax")
    least = torch.minimum(reached - LARGEST_NOISE - ROUNDING, best)  # not a number, if the best is none
    rows, tokens, score = _scores(scaled, least, keys)
    highest = torch.full_like(best, float("-inf")).scatter_reduce(0, rows, score, "amax")
    is_winner = score == highest[rows]
    # A row without a finite logit has no candidate and gets token 0; its log-probability, NaN, says so.
    first = torch.full((len(best),), scaled.shape[1], dtype=torch.int64)
    first = first.scatter_reduce(0, rows[is_winner], tokens[is_winner], "amin", include_self=True)
    return torch.where(first == scaled.shape[1], 0, first)


def _scores(scaled: Tensor, least: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, tokens and noisy scores of all that is at least so much in its row; [rows], a number each."""
    rows, tokens = (scaled >= least[:, None]).nonzero(as_tuple=True)
    return rows, tokens, scaled[rows, tokens] + _noise(keys[rows], tokens.to(torch.int32))


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    ordered, index = scaled.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    is_out = probability.cumsum(dim=-1) - probability >= top_p
    return scaled.masked_fill(is_out.scatter(-1, index, is_out), float("-inf"))

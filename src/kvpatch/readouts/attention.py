"""Statistics of attention: from the scores of a block of queries to one number a head and query, nothing kept between.

Probabilities are made once, in float32, and read off in a handful of passes; no logarithm is taken of them: with z the
scores less their largest, p = exp(z) / Z has entropy log Z - sum(p z), and its largest entry is 1 / Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpatch.heads import DISTANCES, STATISTICS

CLASSES = tuple(name for name in STATISTICS if name.startswith("mass_"))
"""Kinds of slots whose mass is read, in the order of `Block.classes`; a slot may be of several."""


@dataclass(frozen=True)
class Block:
    """Some queries and every slot up to the last one of them.

    Attributes:
        scores: [batch, query_heads, queries, slots], scaled and capped, not yet masked; used up.
        bias: [batch, 1, queries, slots], 0 where a query may look, -inf elsewhere.
        classes: [batch, slots, classes], 1 where a slot is of one of `CLASSES`, else 0; float32.
        positions: [batch, slots]. token_ids: [batch, slots].
        own: [queries], the slot each query stands in.
    """

    scores: Tensor
    bias: Tensor
    classes: Tensor
    positions: Tensor
    token_ids: Tensor
    own: Tensor


def block_statistics(block: Block) -> tuple[dict[str, Tensor], Tensor]:
    """Every statistic of `heads.STATISTICS` of every query.

    Returns:
        Statistic -> [batch, query_heads, queries], NaN where the query has no such thing (entropy with one slot to look
        at, a previous slot, an earlier occurrence of its token); and the probabilities, [batch, query_heads, queries,
        slots].
    """
    z = block.scores.add_(block.bias)
    largest, peak = z.max(dim=-1)
    z = z.sub_(largest[..., None]).clamp_(min=-1e4)  # a finite "never", so that 0 * z stays 0
    p = z.exp()
    total = p.sum(dim=-1)
    p = p.div_(total[..., None])
    may = block.bias == 0
    visible = may.sum(dim=-1)  # [batch, 1, queries]
    entropy = total.log() - z.mul_(p).sum(dim=-1)
    at = block.positions[:, None, :].expand(*p.shape[:2], -1).gather(2, peak)
    query_at = block.positions[:, block.own][:, None]
    out = {
        "entropy": torch.where(visible > 1, entropy / visible.clamp(min=2).float().log(), float("nan")),
        "peak_mass": 1 / total,
        "peak_position": at.float(),
        "peak_distance": (query_at - at).float(),
        "induction": _induction(p, block, may),
    }
    masses = p @ block.classes[:, None]  # [batch, query_heads, queries, classes]
    out |= {name: masses[..., i] for i, name in enumerate(CLASSES)}
    out |= _by_distance(p, block.own, may)
    return {name: out[name] for name in STATISTICS}, p


def _induction(p: Tensor, block: Block, may: Tensor) -> Tensor:
    """Mass on slots whose predecessor holds the query's token: where "A B ... A" would look for B."""
    tokens = block.token_ids
    follows = torch.zeros_like(may[:, 0])
    follows[..., 1:] = tokens[:, block.own, None] == tokens[:, None, :-1]  # [batch, queries, slots]
    follows &= may[:, 0]
    mass = torch.einsum("bhqs,bqs->bhq", p, follows.to(p.dtype))
    return torch.where(follows.any(dim=-1)[:, None], mass, float("nan"))


def _by_distance(p: Tensor, own: Tensor, may: Tensor) -> dict[str, Tensor]:
    """Mass by distance in slots: differences of the running sum at the edges of the bins."""
    running = p.cumsum(dim=-1)
    edges = torch.tensor([0, 1, *DISTANCES], device=p.device)
    first_of_bin = own[:, None] - edges  # [queries, bins]: the slot nearest to the query of each bin
    index = first_of_bin.clamp(min=0).expand(*p.shape[:2], -1, -1)
    up_to = torch.where(first_of_bin >= 0, running.gather(3, index), 0)  # [batch, query_heads, queries, bins]
    mass = up_to - torch.nn.functional.pad(up_to[..., 1:], (0, 1))
    before = (own - 1).clamp(min=0)
    has_previous = may[..., torch.arange(len(own), device=own.device), before] & (own > 0)  # [batch, 1, queries]
    named = {f"distance_{low}": mass[..., 2 + i] for i, low in enumerate(DISTANCES)}
    return {
        "own_slot": mass[..., 0],
        "previous_token": torch.where(has_previous, mass[..., 1], float("nan")),
        **named,
    }

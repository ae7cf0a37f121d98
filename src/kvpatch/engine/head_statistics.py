"""Statistics of attention: from the scores of a block of queries to one number a head and query, nothing kept between.

Probabilities are made once, in float32, and read off in a handful of passes; no logarithm is taken of each: with z the
scores less their largest, the entropy of p = exp(z) / Z is log Z - sum(p z), and the largest p is 1 / Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpatch.specs.attention import DISTANCES, STATISTICS

CLASSES = tuple(name for name in STATISTICS if name.startswith("mass_"))
"""Kinds of slots whose mass is read, in the order of `Block.classes`; a slot may be of several. A class that ends in
`_each` has the weight 1 / its number of slots, and not a number in a row that has none."""
NEVER = -1e30
"""A score as good as -inf whose product with a probability of 0 is 0."""


@dataclass(frozen=True)
class Block:
    """Some queries and every slot up to the last one of them.

    Attributes:
        scores: [batch, query_heads, queries, slots], scaled and capped, not yet masked; used up.
        bias: [batch, 1, queries, slots], 0 where a query may look, -inf elsewhere.
        classes: [batch, classes, slots], the weight of a slot in each of `CLASSES`, mostly 1 or 0; float32.
        positions: [batch, slots]. token_ids: [batch, slots].
        sinks: [query_heads], scores that take a share of attention and belong to no slot; None where there are none.

    The queries stand in the last slots.
    """

    scores: Tensor
    bias: Tensor
    classes: Tensor
    positions: Tensor
    token_ids: Tensor
    sinks: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """[queries], the slot each query stands in."""
        queries, slots = self.scores.shape[2:]
        return torch.arange(slots - queries, slots, device=self.scores.device)


def block_statistics(block: Block) -> tuple[dict[str, Tensor], Tensor]:
    """Every statistic of `specs.attention.STATISTICS` of every query.

    Returns:
        Statistic -> [batch, query_heads, queries], NaN where the query has no such thing (entropy with one slot to look
        at, a previous slot, an earlier occurrence of its token); and the probabilities, [batch, query_heads, queries,
        slots]. With sinks of their own (`Block.sinks`) probabilities sum to less than 1, and the entropy is that of
        their distribution over the slots.
    """
    z = block.scores.add_(block.bias.clamp(min=NEVER))
    peak = z.argmax(dim=-1, keepdim=True)
    top = z.gather(-1, peak)
    z = z.sub_(top)
    p = z.softmax(dim=-1)
    largest, peak = p.gather(-1, peak)[..., 0], peak[..., 0]
    may = block.bias == 0
    visible = may.sum(dim=-1)  # [batch, 1, queries]
    entropy = -largest.log() - torch.einsum("bhqs,bhqs->bhq", p, z)
    if block.sinks is not None:  # 1 / largest is the sum of exp(z) over the slots
        beside = (block.sinks.float()[None, :, None] - top[..., 0]).exp()
        share = 1 / (1 + beside * largest)
        p, largest = p * share[..., None], largest * share
    at = block.positions[:, None, :].expand(*p.shape[:2], -1).gather(2, peak)
    query_at = block.positions[:, block.own][:, None]
    out = {
        "entropy": torch.where(visible > 1, entropy / visible.clamp(min=2).float().log(), float("nan")),
        "peak_mass": largest,
        "peak_position": at.float(),
        "peak_distance": (query_at - at).float(),
        "induction": _induction(p, block, may),
    }
    masses = block.classes @ p.flatten(1, 2).mT  # [batch, classes, query_heads * queries]
    out |= {name: masses[:, i].reshape(p.shape[:3]) for i, name in enumerate(CLASSES)}
    out |= _by_distance(p, may)
    return {name: out[name] for name in STATISTICS}, p


def _induction(p: Tensor, block: Block, may: Tensor) -> Tensor:
    """Mass on slots whose predecessor holds the query's token: where "A B ... A" would look for B."""
    tokens = block.token_ids
    follows = torch.zeros_like(may[:, 0])
    follows[..., 1:] = tokens[:, block.own, None] == tokens[:, None, :-1]  # [batch, queries, slots]
    follows &= may[:, 0]
    mass = torch.einsum("bhqs,bqs->bhq", p, follows.to(p.dtype))
    return torch.where(follows.any(dim=-1)[:, None], mass, float("nan"))


def _by_distance(p: Tensor, may: Tensor) -> dict[str, Tensor]:
    """Mass by distance in slots.

    The rows of p are read a slot further on each, as one would slide them to stand under one another by distance: in
    the view the last column is every query's own slot, and a bin is a stretch of columns.
    """
    batch, heads, queries, slots = p.shape
    padded = F.pad(p, (queries, 0))  # room to slide in, on the left
    row = padded.shape[3]
    strides = (heads * queries * row, queries * row, row + 1, 1)
    by_distance = padded.as_strided((batch, heads, queries, slots + 1), strides)  # distance d in column slots - d

    def mass(low: int, end: int) -> Tensor:
        return by_distance[..., max(0, slots - end + 1) : max(0, slots - low + 1)].sum(dim=-1)

    ends = [2 * low for low in DISTANCES[:-1]] + [slots + 1]
    has_previous = F.pad(may, (queries + 1, 0)).diagonal(slots, dim1=2, dim2=3)  # [batch, 1, queries]
    return {
        "own_slot": mass(0, 1),
        "previous_token": torch.where(has_previous, mass(1, 2), float("nan")),
        **{f"distance_{low}": mass(low, end) for low, end in zip(DISTANCES, ends, strict=True)},
    }

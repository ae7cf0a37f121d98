"""Score: log-probabilities of given continuations under a cache (teacher forcing).

All continuations of a row are packed behind its pending token as branches that do not see one another, so that the
row's cache is held once however many continuations it is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpatch.cache import PAD, KVCache
from kvpatch.engine.attention import Attention, AttentionCapture, Look
from kvpatch.engine.decode import slab_of
from kvpatch.engine.prefill import TOKENS_AT_ONCE
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.hf import Backbone, Edits

Branches = Sequence[Sequence[int]]
"""The continuations of one row, as token ids."""


@dataclass(frozen=True)
class Scores:
    """Teacher-forced readings of given continuations.

    Attributes:
        logprobs: [batch, branches, tokens], natural logarithm, float32; NaN where a row has no such branch or token.
        values: one tensor a layer asked for, [batch, kv_heads, tokens, head_dim]: cached values of the first branch.
        logits: [batch, positions, vocabulary] of the first branch's first positions, or None.
        attention: statistics of every head over the pending token and the first branch, where they were asked for.
    """

    logprobs: Tensor
    values: dict[int, Tensor]
    logits: Tensor | None
    attention: Attention | None = None


@torch.no_grad()
def score(
    backbone: Backbone,
    cache: KVCache,
    continuations: Sequence[Branches],
    *,
    keep_values: Sequence[int] = (),
    keep_logits: int = 0,
    edits: Callable[[slice], Edits] | None = None,
    look: Look | None = None,
) -> Scores:
    """Feed each row its pending token and its continuations, and read what the model gave each token.

    Args:
        cache: any batch; not changed.
        continuations: for every row any number of continuations, each of at least one token.
        keep_values: layers whose cached values of the first continuation are returned.
        keep_logits: return the logits of so many first positions of the first continuation (0: none).
        edits: for a slice of the rows, changes to the queries, keys and values of what is fed.
        look: what to capture of attention; `marked` is of the cache's slots.
    Raises:
        CacheError: where the continuations do not fit the batch.
        ProtocolError: for an empty continuation, or one the context has no room for.
    """
    if len(continuations) != cache.batch:
        raise CacheError(f"{len(continuations)} continuations for a batch of {cache.batch}")
    if not all(row and all(row) for row in continuations):
        raise ProtocolError("a continuation is empty; give it at least one token")
    longest = max(len(branch) for row in continuations for branch in row)
    last = int(cache.pending_position.max()) + longest
    if last > backbone.geometry.context:
        raise ProtocolError(f"{last} positions are needed; the model's context is {backbone.geometry.context}")
    packed = max(1 + sum(len(branch) for branch in row) for row in continuations)
    rows = max(1, TOKENS_AT_ONCE.get(backbone.device.type, 4096) // packed)
    parts = []
    for low in range(0, cache.batch, rows):
        some = slice(low, min(low + rows, cache.batch))
        part = cache[some]
        keep = (keep_values, keep_logits, None if look is None else look.of_rows(some, part.slots))
        parts.append(_score_rows(backbone, part, continuations[some], keep, edits(some) if edits else None))
    branches = max(len(row) for row in continuations)
    logprobs = torch.full((cache.batch, branches, longest), float("nan"), device=backbone.device)
    at = 0
    for part in parts:
        n, b, t = part.logprobs.shape
        logprobs[at : at + n, :b, :t] = part.logprobs
        at += n
    return Scores(
        logprobs,
        {layer: _stack([part.values[layer] for part in parts], 2) for layer in keep_values},
        _stack([part.logits for part in parts if part.logits is not None], 1) if keep_logits else None,
        Attention.concat([part.attention for part in parts if part.attention is not None]) if look else None,
    )


def _stack(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenate along the batch, zero-padded on the right of one axis to the longest."""
    longest = max(part.shape[axis] for part in parts)
    out = []
    for part in parts:
        shape = list(part.shape)
        shape[axis] = longest - shape[axis]
        out.append(torch.cat([part, part.new_zeros(shape)], dim=axis))
    return torch.cat(out)


@dataclass(frozen=True)
class _Pack:
    """One row's tokens as they are fed: the pending token, then branch after branch. `offsets` count positions from the
    pending token's; `starts` say where each branch begins."""

    tokens: list[int]
    branches: list[int]
    offsets: list[int]
    starts: list[int]


def _pack(pending: int, row: Branches, with_first_whole: bool) -> _Pack:
    """Pack a row. A branch's last token predicts nothing that is asked for, so it is fed only where its values are."""
    pack = _Pack([pending], [0], [0], [])
    for b, branch in enumerate(row):
        fed = list(branch) if b == 0 and with_first_whole else list(branch[:-1])
        pack.starts.append(len(pack.tokens))
        pack.tokens.extend(fed)
        pack.branches.extend([b + 1] * len(fed))
        pack.offsets.extend(range(1, len(fed) + 1))
    return pack


def _score_rows(
    backbone: Backbone,
    cache: KVCache,
    continuations: Sequence[Branches],
    keep: tuple[Sequence[int], int, Look | None],
    edits: Edits | None,
) -> Scores:
    device = backbone.device
    keep_values, keep_logits, look = keep
    packs = [_pack(int(cache.pending[r]), row, bool(keep_values)) for r, row in enumerate(continuations)]
    width = max(len(pack.tokens) for pack in packs)
    count = max(len(row) for row in continuations)
    longest = max(len(branch) for row in continuations for branch in row)

    def table(name: str, fill: int) -> Tensor:
        return torch.tensor([getattr(p, name) + [fill] * (width - len(p.tokens)) for p in packs], device=device)

    tokens, branches, offsets = table("tokens", 0), table("branches", 0), table("offsets", PAD)
    positions = torch.where(offsets == PAD, PAD, cache.pending_position[:, None] + offsets)
    slab = slab_of(backbone, cache, width)
    capture = None if look is None else AttentionCapture.after(cache, look)
    if capture is not None:
        capture.only(branches <= 1)
    hidden = backbone.forward(tokens, positions, slab, branches, edits, capture)  # [batch, packed, width]
    wanted = torch.full((cache.batch, count, longest), PAD, dtype=torch.int64)
    read_at = torch.zeros_like(wanted)
    for r, (row, pack) in enumerate(zip(continuations, packs, strict=True)):
        for b, branch in enumerate(row):
            wanted[r, b, : len(branch)] = torch.tensor(list(branch))
            read_at[r, b, 1 : len(branch)] = torch.arange(pack.starts[b], pack.starts[b] + len(branch) - 1)
    wanted, read_at = wanted.to(device), read_at.to(device)
    states = hidden[
        torch.arange(cache.batch, device=device)[:, None, None], read_at
    ]  # [batch, branches, tokens, width]
    is_real = wanted != PAD
    logprobs = torch.full(wanted.shape, float("nan"), device=device)
    logprobs[is_real] = backbone.token_logprobs(states[is_real], wanted[is_real])
    start = cache.slots + 1
    first = max(len(row[0]) for row in continuations)
    values = {i: slab.slab_layers[i].values[:, :, start : start + first] for i in keep_values}
    logits = backbone.logits(states[:, 0, :keep_logits]) if keep_logits else None
    return Scores(logprobs, values, logits, None if capture is None else capture.result())

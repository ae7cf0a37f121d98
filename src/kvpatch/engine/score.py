"""Score: log-probabilities of given continuations under a cache (teacher forcing).

All continuations of a row are packed behind its pending token as branches that do not see one another, so that the
row's cache is held once however many continuations it is asked about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.engine.attention import Attention, AttentionCapture, AttentionRequest
from kvpatch.engine.backend import reader_of
from kvpatch.engine.decode import refuse_foreign, slab_of
from kvpatch.engine.pack import Pack, Segments
from kvpatch.engine.token_budget import run_in_passes
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import Edits

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
        entropies: entropy of the distribution that each token was read from, nats, in the shape of `logprobs`, or None.
    """

    logprobs: Tensor
    values: dict[int, Tensor]
    logits: Tensor | None
    attention: Attention | None = None
    entropies: Tensor | None = None


@torch.no_grad()
def score(
    backbone: Backbone,
    cache: KVCache,
    continuations: Sequence[Branches],
    *,
    of: Sequence[int] | None = None,
    keep_values: Sequence[int] = (),
    keep_logits: int = 0,
    keep_entropies: bool = False,
    edits: Callable[[slice], Edits] | None = None,
    to_capture: AttentionRequest | None = None,
) -> Scores:
    """Feed each row its pending token and its continuations, and read what the model gave each token.

    Rows of like length share a pass (`token_budget.run_in_passes`).

    Args:
        cache: any batch; not changed.
        continuations: for every row any number of continuations, each of at least one token.
        of: for every row the cache's row that it goes on from; its own number if None.
        keep_values: layers whose cached values of the first continuation are returned.
        keep_logits: return the logits of so many first positions of the first continuation (0: none).
        keep_entropies: return the entropy of each token's distribution.
        edits: for a slice of the rows, changes to the queries, keys and values of what is fed.
        to_capture: what to capture of attention; `marked` is of the cache's slots.
    Raises:
        CacheError: where the continuations do not fit the batch, or another model made the cache.
        ProtocolError: for an empty continuation, or one the context has no room for.
    """
    if len(continuations) != (cache.batch if of is None else len(of)):
        raise CacheError(f"{len(continuations)} continuations for a batch of {cache.batch}")
    if not all(row and all(row) for row in continuations):
        raise ProtocolError("a continuation is empty; give it at least one token")
    reader = reader_of(backbone)  # first, since it takes over what was changed in the model
    refuse_foreign(backbone, cache)
    longest = max(len(branch) for row in continuations for branch in row)
    starts = cache.row_pending_position
    goes_on_from = range(cache.batch) if of is None else of
    last = max(starts[of_row] + max(map(len, row)) for of_row, row in zip(goes_on_from, continuations, strict=True))
    if last > backbone.geometry.context:
        raise ProtocolError(f"{last} positions are needed; {backbone.geometry.limit}")
    count, device = len(continuations), backbone.device
    branches, first = max(map(len, continuations)), max(len(row[0]) for row in continuations)
    geometry = backbone.geometry
    shape = (count, geometry.kv_heads, first, geometry.head_dim)
    scores = Scores(
        torch.full((count, branches, longest), float("nan"), device=device),
        {i: torch.zeros(shape, dtype=backbone.dtype, device=device) for i in keep_values},
        torch.zeros(count, min(keep_logits, first), geometry.vocabulary, device=device) if keep_logits else None,
        entropies=torch.full((count, branches, longest), float("nan"), device=device) if keep_entropies else None,
    )
    lengths = [1 + sum(map(len, row)) for row in continuations]
    # Edits come for a slice of the rows, and attention goes into one, so those stay in their order.
    order = list(range(count)) if edits or to_capture else sorted(range(count), key=lengths.__getitem__)
    watched: list[Attention] = []

    def run(low: int, high: int) -> None:
        rows = order[low:high]
        own_edits = edits(slice(low, high)) if edits else None
        if reader is not None and to_capture is None and reader.makes(own_edits):
            _read_rows(reader, cache, continuations, rows, [goes_on_from[row] for row in rows], scores, own_edits)
            return
        if of is not None:
            part = cache[[of[row] for row in rows]]
        elif rows == list(range(rows[0], rows[0] + len(rows))):
            part = cache.rows(rows[0], rows[0] + len(rows))
        else:
            part = cache[rows]
        part_to_capture = (
            None
            if to_capture is None
            else to_capture.of_rows(rows if of is None else [of[r] for r in rows], part.slots)
        )
        seen = _score_rows(backbone, part, continuations, rows, scores, part_to_capture, own_edits)
        watched.extend([] if seen is None else [seen])

    run_in_passes(backbone, [lengths[row] for row in order], run)
    return replace(scores, attention=Attention.concat(watched)) if watched else scores


@dataclass
class _Pass:
    """The rows of one pass as they are fed, and what is read where.

    A row's tokens are its pending token, then branch after branch; `offsets` count positions from the pending token's.
    `read_at` counts the pass's tokens, `write_at` the numbers of `Scores.logprobs`; both and `wanted` have a number per
    token that is asked about.
    """

    tokens: np.ndarray  # [rows, width]
    branches: np.ndarray
    offsets: np.ndarray  # -1 where padded
    read_at: np.ndarray
    write_at: np.ndarray
    wanted: np.ndarray


@dataclass(frozen=True)
class _Row:
    """One row of a pass without its pending token: what is fed, and for every token that is asked about (`wanted`) its
    branch, its place in the branch, and the place in the row that it is read at."""

    tokens: np.ndarray  # [fed]
    branches: np.ndarray
    offsets: np.ndarray
    read: np.ndarray  # [asked about]
    branch: np.ndarray
    token: np.ndarray
    wanted: np.ndarray


@functools.lru_cache(maxsize=4096)
def _row(continuations: tuple[tuple[int, ...], ...], is_kept: bool) -> _Row:
    """Lay a row out. A branch's last token predicts nothing that is asked for, so it is fed only where its values are:
    in the first branch, if they are kept."""
    lengths = np.array(list(map(len, continuations)))
    fed = lengths - 1
    fed[0] += is_kept
    wanted = np.array([token for branch in continuations for token in branch], dtype=np.int64)
    branch, token = _numbered(lengths)
    fed_branch, fed_token = _numbered(fed)
    first = 1 + np.cumsum(fed) - fed  # a branch's first place in the row
    read = np.where(token == 0, 0, first[branch] + token - 1)  # the pending token predicts a branch's first
    of_fed = (np.cumsum(lengths) - lengths)[fed_branch] + fed_token
    return _Row(wanted[of_fed], fed_branch + 1, fed_token + 1, read, branch, token, wanted)


def _numbered(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every item of stretches of these lengths its stretch, and its number there."""
    of = np.repeat(np.arange(len(lengths)), lengths)
    return of, np.arange(len(of)) - (np.cumsum(lengths) - lengths)[of]


def _pack(
    pending: Sequence[int], continuations: Sequence[Branches], rows: Sequence[int], shape: Sequence[int], is_kept: bool
) -> _Pass:
    """Lay a pass out; `shape` is that of `Scores.logprobs`."""
    laid = [_row(tuple(map(tuple, continuations[row])), is_kept) for row in rows]
    width = 1 + max(len(row.tokens) for row in laid)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    branches, offsets = np.zeros_like(tokens), np.full_like(tokens, PAD)
    tokens[:, 0], offsets[:, 0] = pending, 0
    for place, row in enumerate(laid):
        fed = slice(1, 1 + len(row.tokens))
        tokens[place, fed], branches[place, fed], offsets[place, fed] = row.tokens, row.branches, row.offsets
    sizes = [len(row.wanted) for row in laid]
    place, number = np.repeat(np.arange(len(rows)), sizes), np.repeat(np.asarray(rows), sizes)
    read, branch, token, wanted = (
        np.concatenate([getattr(row, name) for row in laid]) for name in ("read", "branch", "token", "wanted")
    )
    write_at = (number * shape[1] + branch) * shape[2] + token
    return _Pass(tokens, branches, offsets, place * width + read, write_at, wanted)


def _score_rows(
    backbone: Backbone,
    cache: KVCache,
    continuations: Sequence[Branches],
    rows: Sequence[int],
    scores: Scores,
    to_capture: AttentionRequest | None,
    edits: Edits | None,
) -> Attention | None:
    """Run one pass, its rows going on from the rows of `cache`, and write what it gives into `scores`, but for the
    attention that `to_capture` asks for, which is returned."""
    device = backbone.device
    made = _pack(cache.row_pending, continuations, rows, scores.logprobs.shape, bool(scores.values))
    tokens, branches, offsets = (torch.from_numpy(t).to(device) for t in (made.tokens, made.branches, made.offsets))
    positions = torch.where(offsets == PAD, PAD, cache.pending_position[:, None] + offsets)
    width = tokens.shape[1]
    slab = slab_of(backbone, cache, width)
    one_each = all(len(continuations[row]) == 1 for row in rows)
    capture = None if to_capture is None else AttentionCapture.after(cache, to_capture)
    if capture is not None:
        capture.only(branches <= 1)
    hidden = backbone.forward(tokens, positions, slab, None if one_each else branches, edits, capture).flatten(0, 1)
    # The pending token predicts the first token of every branch, so its logits are made once.
    states_at, of = np.unique(made.read_at, return_inverse=True)
    states_at, of, write_at = (torch.from_numpy(at).to(device) for at in (states_at, of, made.write_at))
    wanted = torch.from_numpy(made.wanted).to(device)
    if scores.entropies is None:
        scores.logprobs.view(-1)[write_at] = backbone.token_logprobs(hidden[states_at], wanted, of)
    else:
        found, entropies = backbone.token_logprobs_and_entropies(hidden[states_at], wanted, of)
        scores.logprobs.view(-1)[write_at], scores.entropies.view(-1)[write_at] = found, entropies
    at = torch.tensor(rows, device=device)
    first = max(len(continuations[row][0]) for row in rows)
    for layer, values in scores.values.items():
        new = slab.slab_layers[layer].values[:, :, cache.slots + 1 : cache.slots + 1 + first]
        values[at, :, :first] = new.to(device)
    if scores.logits is not None:
        ends = torch.tensor([len(continuations[row][0]) for row in rows], device=device)[:, None]
        step = torch.arange(scores.logits.shape[1], device=device)
        # Token t of the first branch stands t places behind the pending one; past its end there is nothing to read.
        states = hidden.view(len(rows), width, -1).gather(
            1, torch.where(step < ends, step, 0)[..., None].expand(-1, -1, hidden.shape[-1])
        )
        scores.logits[at] = backbone.logits(states)
    return None if capture is None else capture.result()


def _read_rows(
    reader: Any,
    cache: KVCache,
    continuations: Sequence[Branches],
    rows: Sequence[int],
    of: Sequence[int],
    scores: Scores,
    edits: Edits | None,
) -> None:
    """The same by the engine's own kernels: rows go on from the rows `of` of the cache, which is read where it lies."""
    device = reader.backbone.device
    pending, starts, lengths = cache.row_pending, cache.row_pending_position, cache.row_lengths
    made = _pack([pending[row] for row in of], continuations, rows, scores.logprobs.shape, bool(scores.values))
    pack, packed_at = _packed(made, [starts[row] for row in of], of, [lengths[row] for row in of], cache.slots)
    place, column = pack.row, pack.column
    is_first = made.branches[place, column] == 1
    first_at, first_row, first_token = (
        sent(at, device) for at in (np.flatnonzero(is_first), np.asarray(rows)[place[is_first]], column[is_first] - 1)
    )

    def on_layer(layer: int, keys: Tensor, values: Tensor) -> None:
        if layer in scores.values:
            scores.values[layer][first_row, :, first_token] = values[first_at]

    hidden = reader.read(pack, cache, edits=edits, on_layer=on_layer)
    states_at, state_of = np.unique(packed_at[made.read_at], return_inverse=True)
    states_at, write_at, wanted = (sent(at, device) for at in (states_at, made.write_at, made.wanted))
    found, entropies = reader.token_logprobs(hidden[states_at], wanted, state_of)
    scores.logprobs.view(-1)[write_at] = found
    if scores.entropies is not None:
        scores.entropies.view(-1)[write_at] = entropies
    if scores.logits is not None:
        ends = np.array([len(continuations[row][0]) for row in rows])[:, None]
        step = np.arange(scores.logits.shape[1])
        # The first branch's token t - 1, which predicts token t, stands t places behind the pending one.
        states = packed_at[np.arange(len(rows)) * made.tokens.shape[1]][:, None] + np.where(step < ends, step, 0)
        found = reader.logits(hidden[sent(states.ravel(), device)])
        scores.logits[sent(np.asarray(rows), device)] = found.view(*states.shape, -1)


def _packed(
    made: _Pass, starts: Sequence[int], of: Sequence[int], lengths: Sequence[int], slots: int
) -> tuple[Pack, np.ndarray]:
    """A pass without its padding: the pending token of a row is a stretch of its own, and so is every branch.

    Returns:
        The pack, and for every number of the padded pass its place in the pack.
    """
    is_real = made.offsets != PAD
    packed_at = is_real.ravel().cumsum() - 1
    row, column = np.nonzero(is_real)
    branch = made.branches[row, column]
    is_start = np.ones(len(row), dtype=bool)
    is_start[1:] = (row[1:] != row[:-1]) | (branch[1:] != branch[:-1])
    start = np.flatnonzero(is_start)
    of_stretch, held = row[start], np.asarray(lengths)[row[start]]
    pending = np.where(branch[start] == 0, -1, packed_at[of_stretch * made.tokens.shape[1]])
    segments = Segments(
        np.asarray(of)[of_stretch], slots - held, held, pending, start, np.diff(np.append(start, len(row)))
    )
    positions = np.asarray(starts)[row] + made.offsets[row, column]
    return Pack(made.tokens[row, column], positions, segments, row, column, made.tokens.shape), packed_at
